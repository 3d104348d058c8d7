"""The service on a socket: uvicorn, with limits on how long a connection may keep it waiting, and on how many do."""

import asyncio
import functools
import heapq
import socket
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

try:
    import resource
except ImportError:  # on Windows, which does not count open files as Unix does
    resource = None

CONNECTIONS = 1024
HEADER_SECONDS = 10.0  # from a connection's beginning, or the first byte of a further request, to the end of its header
HEADER_BYTES = 16 * 2**10
ANSWER_SECONDS = 30.0  # in which a client takes what waits to be sent
KEPT_SECONDS = 60  # for which a connection is kept after an answer
STOP_SECONDS = 30  # in which requests that have arrived are answered
LAST_SECONDS = 2.0  # of these, for bodies that are still arriving
OTHER_FILES = 256  # that are open beside connections


class Connection(H11Protocol):
    """One connection, which is closed when its client is too slow, or when there are too many that wait for clients.

    Args:
        most: connections at a time. One more closes a sixteenth of them: first those that never had an answer, of these
            first those that have waited longest for a request of their client's, header and body. It is closed itself
            where all others wait for their answers.
        arguments: uvicorn's.
    """

    def __init__(self, most: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._most = most
        self._deadline: asyncio.TimerHandle | None = None
        self._since = 0.0  # when it was opened, answered, or had the header of its request
        self._answered = False  # once at least

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the clock, and make room."""
        super().connection_made(transport)
        # asyncio leaves it out for sockets of the default protocol; a body would wait 40 ms behind its header.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self._since = self.loop.time()
        self._allow(HEADER_SECONDS)
        here = [each for each in self.connections if not each.transport.is_closing()]
        if len(here) > self._most:
            waiting = (each for each in here if each.waits_for_client)
            for each in heapq.nsmallest(self._most // 16 + 1, waiting, lambda each: (each._answered, each._since)):
                each.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    @property
    def waits_for_client(self) -> bool:
        """No request has arrived whole that is not answered."""
        return not self._answering or self.cycle.more_body

    def data_received(self, data: bytes) -> None:
        """Give a header that has begun its time, and what is sent after an early answer."""
        super().data_received(data)
        if not self._answering and self._deadline is None:
            self._allow(HEADER_SECONDS)

    def handle_events(self) -> None:
        """Stop the clock when a header is whole; how long the body may take is up to the application."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._since = self.loop.time()
            self._stop_clock()

    def on_response_complete(self) -> None:
        """Note that it was, and when."""
        self._since, self._answered = self.loop.time(), True
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Give a client that does not read a while."""
        super().pause_writing()
        self._stop_clock()
        self._allow(ANSWER_SECONDS)

    def resume_writing(self) -> None:
        """It reads."""
        super().resume_writing()
        self._stop_clock()
        if not self._answering:
            self._allow(HEADER_SECONDS)

    def shutdown(self) -> None:
        """Answer what has arrived."""
        super().shutdown()
        self.loop.call_later(LAST_SECONDS, self._abort_if_it_waits)

    def timeout_keep_alive_handler(self) -> None:
        """Close, whether or not all was sent."""
        self.transport.abort()

    def _abort_if_it_waits(self) -> None:
        if self.waits_for_client:
            self.transport.abort()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _allow(self, seconds: float) -> None:
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """Says where it listens once it does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().startup(sockets)
        for each in sockets or []:
            host, port = each.getsockname()[:2]
            print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)


def serve(app: FastAPI, listener: socket.socket) -> int:
    """Serve an application until SIGINT or SIGTERM, answer what has arrived by then, and return the exit code.

    Args:
        app: an ASGI application.
        listener: of `listening`; where it listens is said on stderr.
    """
    with listener:
        server(app, connections()).run([listener])
    return 0


def server(app: FastAPI, most: int) -> Server:
    """What serves an application on at most so many connections, to be given sockets that listen."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=functools.partial(Connection, most),
        ws="none",
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEPT_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    return Server(config)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens on a name or an address, on a free port where that is 0.

    Raises:
        OSError: it cannot.
    """
    family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=CONNECTIONS)


def connections() -> int:
    """How many connections there may be, once as many files as may be are allowed to be open."""
    if resource is None:
        return CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + OTHER_FILES
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(min(CONNECTIONS, allowed - OTHER_FILES), 1)

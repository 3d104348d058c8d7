"""The service on a socket: uvicorn, with limits on slow connections and on their number."""

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
HEADER_SECONDS = 10.0  # from the connection's start, or a later request's first byte, to the end of the header
HEADER_BYTES = 16 * 2**10
ANSWER_SECONDS = 30.0  # time in which a client has to read its answer
KEPT_SECONDS = 60  # time that a connection is kept open after an answer
STOP_SECONDS = 30  # time to answer requests that have arrived
LAST_SECONDS = 2.0  # of these, for bodies still arriving
OTHER_FILES = 256  # files that are open besides connections


class Connection(H11Protocol):
    """One connection, closed if its client is too slow or if too many connections wait for their clients.

    Args:
        most: maximum number of connections. One more closes a sixteenth of them: first those that never got an answer,
            then, among equals, those that have waited longest for their client's request, header and body. If all
            others are waiting for the server, the new one is closed itself.
        arguments: uvicorn's.
    """

    def __init__(self, most: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._most = most
        self._deadline: asyncio.TimerHandle | None = None
        self._since = 0.0  # when it was opened, answered, or got a complete header
        self._answered = False  # at least once

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
        """Whether no complete request is waiting for its answer."""
        return not self._answering or self.cycle.more_body

    def data_received(self, data: bytes) -> None:
        """Start the clock for a new header, or for data after an early answer."""
        super().data_received(data)
        if not self._answering and self._deadline is None:
            self._allow(HEADER_SECONDS)

    def handle_events(self) -> None:
        """Stop the clock when the header is complete; the application limits the time of the body."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._since = self.loop.time()
            self._stop_clock()

    def on_response_complete(self) -> None:
        """Record when the answer was sent."""
        self._since, self._answered = self.loop.time(), True
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Give a client that does not read some time."""
        super().pause_writing()
        self._stop_clock()
        self._allow(ANSWER_SECONDS)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._stop_clock()
        if not self._answering:
            self._allow(HEADER_SECONDS)

    def shutdown(self) -> None:
        """Answer complete requests; abort the others after LAST_SECONDS."""
        super().shutdown()
        self.loop.call_later(LAST_SECONDS, self._abort_if_it_waits)

    def timeout_keep_alive_handler(self) -> None:
        """Close, even if not everything was sent."""
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
    """A uvicorn server that prints its address once it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().startup(sockets)
        for each in sockets or []:
            host, port = each.getsockname()[:2]
            print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)


def serve(app: FastAPI, listener: socket.socket) -> int:
    """Serve an application until SIGINT or SIGTERM, and answer what has arrived by then.

    Args:
        app: an ASGI application.
        listener: a socket from `listening`; its address is printed to stderr.

    Returns:
        the exit code.

    Example:
        >>> from neuroflow.serve.server import listening, serve
        >>> serve(app, listening("127.0.0.1", 8000))  # doctest: +SKIP
    """
    with listener:
        server(app, connections()).run([listener])
    return 0


def server(app: FastAPI, most: int) -> Server:
    """A server for an application, with a maximum number of connections; give it listening sockets."""
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
    """Open a socket that listens on a host name or address.

    Args:
        host: name or address.
        port: TCP port; 0 picks a free one.

    Returns:
        the socket.

    Raises:
        OSError: the address cannot be used.

    Example:
        >>> from neuroflow.serve.server import listening
        >>> with listening("127.0.0.1", 0) as listener:
        ...     port = listener.getsockname()[1]
    """
    family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=CONNECTIONS)


def connections() -> int:
    """The maximum number of connections, after raising the limit on open files as far as allowed."""
    if resource is None:
        return CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + OTHER_FILES
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(min(CONNECTIONS, allowed - OTHER_FILES), 1)

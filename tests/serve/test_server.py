"""Connections that keep a server waiting, and too many of them."""

import asyncio
import contextlib
import resource
import socket
import threading
import time

import pytest
from neuroflow.serve import server as limits
from neuroflow.serve.server import connections, listening, server

GET = b"GET /quick HTTP/1.1\r\nHost: localhost\r\n\r\n"
LARGE = 32 * 2**20


class App:
    """Answers /quick, /large, and /slow once it is released; /early before it has read the body."""

    def __init__(self):
        self.arrived, self.released = threading.Semaphore(0), threading.Event()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        if scope["path"] == "/body":
            self.arrived.release()
            while (await receive()).get("more_body"):
                pass
        if scope["path"] == "/slow":
            self.arrived.release()
            await asyncio.to_thread(self.released.wait)
        body = bytes(LARGE) if scope["path"] == "/large" else b"done"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def running(app, most=100):
    with listening("127.0.0.1", 0) as listener:
        address, running = listener.getsockname(), server(app, most)
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        try:
            yield address, running
        finally:
            app.released.set()
            running.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def connected(address, content=b""):
    client = socket.create_connection(address, timeout=60)
    client.sendall(content)
    return client


def answer(client):
    content = b""
    while not content.endswith(b"done"):
        piece = client.recv(2**16)
        assert piece, "closed without an answer"
        content += piece
    assert content.startswith(b"HTTP/1.1 200")


def is_closed(client):
    with contextlib.suppress(ConnectionError):
        while client.recv(2**20):
            pass
    return True


def test_bodies_do_not_wait_for_their_headers():
    with running(App()) as (address, service):
        client = connected(address, GET)
        answer(client)
        (connection,) = service.server_state.connections
        peer = connection.transport.get_extra_info("socket")
        assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        client.close()


def test_headers_that_do_not_end(monkeypatch):
    monkeypatch.setattr(limits, "HEADER_SECONDS", 0.3)
    with running(App()) as (address, _):
        kept = connected(address, GET)
        answer(kept)
        late = [connected(address, begin) for begin in (b"", b"G", GET[:-2])]
        assert all(is_closed(client) for client in late)
        # The clock for a further request begins with its first byte.
        kept.sendall(GET)
        answer(kept)
        kept.sendall(b"G")
        assert is_closed(kept)


def test_a_body_that_does_not_end_once_it_is_answered(monkeypatch):
    monkeypatch.setattr(limits, "HEADER_SECONDS", 0.3)
    with running(App()) as (address, _):
        client = connected(address, b"POST /early HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer(client)
        with pytest.raises(ConnectionError):
            while True:
                client.sendall(b"1\r\na\r\n")


def test_a_client_that_does_not_read(monkeypatch):
    monkeypatch.setattr(limits, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(limits, "KEPT_SECONDS", 1000)
    with running(App()) as (address, served):
        client = connected(address, GET.replace(b"quick", b"large"))
        assert client.recv(1)
        while served.server_state.connections:
            time.sleep(0.01)
        assert is_closed(client)


def test_idle_clients_do_not_lock_others_out():
    app = App()
    with running(app, most=8) as (address, _):
        busy = [connected(address, GET.replace(b"quick", b"slow")) for _ in range(2)]
        half = connected(address, b"POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
        for _ in range(3):
            assert app.arrived.acquire(timeout=60)
        kept = connected(address, GET)
        answer(kept)
        idle = [connected(address) for _ in range(40)]
        for _ in range(3):
            camera = connected(address, GET)
            answer(camera)
        camera.sendall(GET)
        answer(camera)
        assert all(is_closed(client) for client in (half, *idle[:30]))
        kept.sendall(GET)
        answer(kept)
        app.released.set()
        for client in busy:
            answer(client)
        # They have waited for the server, not it for them.
        for _ in range(3):
            answer(connected(address, GET))
        for client in busy:
            client.sendall(GET)
            answer(client)


def test_one_more_than_can_be_answered_is_closed():
    app = App()
    with running(app, most=2) as (address, _):
        busy = [connected(address, GET.replace(b"quick", b"slow")) for _ in range(2)]
        for _ in busy:
            assert app.arrived.acquire(timeout=60)
        assert is_closed(connected(address, GET))
        app.released.set()
        for client in busy:
            answer(client)


def test_what_has_arrived_is_answered_before_the_end(monkeypatch):
    monkeypatch.setattr(limits, "LAST_SECONDS", 0.3)
    app = App()
    with running(app) as (address, served):
        idle, busy = connected(address), connected(address, GET.replace(b"quick", b"slow"))
        half = connected(address, b"POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
        for _ in range(2):
            assert app.arrived.acquire(timeout=60)
        served.should_exit = True
        assert is_closed(idle) and is_closed(half)
        app.released.set()
        answer(busy)
        assert is_closed(busy)


def test_headers_that_are_too_large_or_none():
    for content in (b"GET / HTTP/1.1\r\nA: " + bytes(2**20), b"\x16\x03\x01" + bytes(500), b"GET / HTTP/9\r\n\r\n"):
        with running(App()) as (address, _):
            client = connected(address)
            with contextlib.suppress(ConnectionError):
                client.sendall(content)
            assert is_closed(client)
            answer(connected(address, GET))


def test_an_address_that_is_taken(neuroflow):
    with listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        code, _, message = neuroflow("serve", "--model", "never/loaded", "--port", port)
    assert code == 2 and f"--port {port}: cannot be listened on" in message and message.count("\n") == 1


def test_connections_fit_the_files_that_may_be_open(monkeypatch):
    raised = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: raised.append(limits))
    for limit, most, now in (
        ((256, 4096), 1024, [(1280, 4096)]),
        ((256, 1000), 744, [(1000, 1000)]),
        ((500, 500), 244, []),
        ((100, 100), 1, []),
        ((2**20, resource.RLIM_INFINITY), 1024, []),
    ):
        raised.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limit=limit: limit)
        assert (connections(), raised) == (most, now)

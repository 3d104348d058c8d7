"""Clients of `neuroflow serve` in a process of its own: cameras, and those that mean harm."""

import contextlib
import io
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

REFUSED = {400, 404, 405, 408, 413, 415, 422, 503}
HEADERS = {"Content-Type": "image/jpeg", "Accept": "application/x-npy"}


@contextlib.contextmanager
def serving(*options, threads=None):
    """`neuroflow serve` with these options on a free port: its process and its address."""
    command = [sys.executable, "-m", "neuroflow_cli", "serve", "--port", "0", *map(str, options)]
    environment = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            said = ""
            while not (where := re.search(r"listening on http://(.*):(\d+)", said)):
                said = process.stderr.readline()
                if not said:
                    raise RuntimeError("the server ended before it listened")
            yield process, (where[1], int(where[2]))
        finally:
            process.kill()


def memory(process):
    """Resident bytes."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(process):
    """CPU time that it has taken so far, by all of its threads."""
    user, system = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Answer(NamedTuple):
    """To one frame: what the server says of it, and the seconds from when it was due until it was answered."""

    embedding: np.ndarray
    skipped: float
    ms: float
    waited_ms: float
    together: int
    seconds: float


class Camera(threading.Thread):
    """Sends the frames of one stream, in order, each until it is taken.

    Args:
        address: of the server.
        stream: its name.
        bodies: JPEGs.
        rate: frames a second, None for one as soon as the last is answered.
        phase: when its first frame is due, in periods.

    Attributes:
        answers: so far.
        retries: how often the server had no room.
        stopped: to be set for it to end before its frames do.
        failure: what ended it, None where nothing did.
    """

    def __init__(self, address, stream, bodies, rate=None, phase=0.0):
        super().__init__(daemon=True)
        self.address, self.stream, self.bodies, self.rate, self.phase = address, stream, bodies, rate, phase
        self.answers, self.retries, self.stopped, self.failure = [], 0, threading.Event(), None

    def run(self):
        try:
            connection, begun = HTTPConnection(*self.address, timeout=120), time.perf_counter()
            for number, body in enumerate(self.bodies):
                due = begun + (number + self.phase) / self.rate if self.rate else time.perf_counter()
                if self.stopped.wait(max(due - time.perf_counter(), 0)):
                    break
                self.answers.append(self.send(connection, number, body, due))
        except BaseException as error:
            self.failure = error

    def send(self, connection, number, body, due):
        while True:
            connection.request("POST", f"/v1/streams/{self.stream}/frames?frame={number}", body, HEADERS)
            answer = connection.getresponse()
            content, said = answer.read(), answer.headers
            if answer.status != 503:
                break
            self.retries += 1
            time.sleep(float(said["Retry-After"]))
        if answer.status != 200 or said["x-neuroflow-frame"] != str(number):
            raise RuntimeError(f"{self.stream}, frame {number}: {answer.status}, {content[:200]}")
        skipped, ms, waited = (float(said[f"x-neuroflow-{name}"]) for name in ("skipped", "ms", "waited-ms"))
        together = int(said["x-neuroflow-together"])
        seconds = time.perf_counter() - due
        return Answer(np.load(io.BytesIO(content)), skipped, ms, waited, together, seconds)

    def end(self):
        """Wait for it, and raise what ended it."""
        self.join()
        if self.failure is not None:
            raise self.failure


def encoded(kind):
    """A small picture of noise."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def post(path, body, kind="image/jpeg", length=None, headers=""):
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{headers}"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def get(path, host="localhost", method="GET"):
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()


def array(header):
    header = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def hostile():
    """What is sent, by name; all of it is to be refused."""
    frames, clips = "/v1/streams/hostile/frames", "/v1/streams/hostile/clips"
    jpeg, png, webp, npy = *map(encoded, ("JPEG", "PNG", "WEBP")), "application/x-npy"
    huge = struct.pack(">II5B", 30_000, 30_000, 8, 2, 0, 0, 0)
    tiny = struct.pack(">II5B", 8, 8, 8, 2, 0, 0, 0)
    zeros = zlib.compress(bytes(2**28), 9)
    deep = "(" * 900
    form = "multipart/form-data; boundary=x"
    part = b'--x\r\nContent-Disposition: form-data; name="a"; filename="../../a.jpg"\r\n\r\n'
    table = struct.pack(">I4sIII", 20, b"stsz", 0, 1, 2**31)
    yield "no picture", post(frames, b"GIF89a")
    yield "an empty body", post(frames, b"")
    yield "noise", post(frames, b"\xff\xd8\xff" + np.random.default_rng(1).bytes(9999))
    yield "a JPEG cut off", post(frames, jpeg[: len(jpeg) // 2])
    yield "a JPEG without a picture", post(frames, jpeg[:2] + jpeg[-2:])
    yield "a PNG cut off", post(frames, png[: len(png) // 2], "image/png")
    yield "a WebP cut off", post(frames, webp[: len(webp) // 2], "image/webp")
    yield "a PNG of 900 million pixels", post(frames, png[:8] + chunk(b"IHDR", huge) + png[33:], "image/png")
    yield (
        "a PNG of a few pixels",
        post(frames, png[:8] + chunk(b"IHDR", tiny) + chunk(b"IDAT", zeros) + png[-12:], "image/png"),
    )
    yield (
        "an array of a petabyte",
        post(frames, array("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 10000000, 10000000)}"), npy),
    )
    yield (
        "an array of objects",
        post(frames, array("{'descr': '|O', 'fortran_order': False, 'shape': (3, 32, 32)}") + b"cos\nsystem\n", npy),
    )
    yield "an array that is a program", post(frames, array("__import__('os').abort()"), npy)
    yield "an array of brackets", post(frames, array(deep), npy)
    yield (
        "a video of samples that are not there",
        post(clips, struct.pack(">I4s8x", 16, b"ftyp") + struct.pack(">I4s", 28, b"moov") + table, "video/mp4"),
    )
    yield "a video that is a playlist", post(clips, b"#EXTM3U\nfile:///etc/passwd", "video/mp4")
    yield "a form without an end", post(clips, part + jpeg, form)
    yield "a form of no pictures", post(clips, part + b"none\r\n--x--", form)
    yield "a form with a long header", post(clips, b"--x\r\n" + b"A" * 2**19, form)
    yield (
        "a form of many fields",
        post(clips, b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 9999, form),
    )
    yield "another type", post(frames, jpeg, "text/html")
    yield "a length that is a lie", post(frames, jpeg[:9], length=2**60)
    yield "a negative length", post(frames, b"", length=-1)
    yield "two lengths", post(frames, jpeg, headers="Content-Length: 7\r\n")
    yield "a length and chunks", post(frames, b"zz\r\n", headers="Transfer-Encoding: chunked\r\n")
    for name in ("..%2f..%2fetc%2fpasswd", "%2e%2e", ".hidden", "a" * 200, "a%00b", "a%0d%0ab", "%ff", "a/b"):
        yield f"stream {name[:20]}", post(f"/v1/streams/{name}/frames", jpeg)
    for path in ("/../../etc/passwd", "/docs/..%2f..%2fetc%2fpasswd", "//etc/passwd", "/v1/streams/none", "/%ff%fe"):
        yield f"path {path}", get(path)
    yield "another method", get(frames, method="PATCH")
    yield "another host", get("/v1/streams", host="attacker.example")
    yield "a number of another kind", post(frames + "?frame=1e9", jpeg)
    yield "a number without an end", post(frames + "?frame=" + "9" * 5000, jpeg)
    yield "a header that is too large", get("/" + "a" * 2**17)
    yield "no HTTP", b"\x16\x03\x01\x02\x00" + bytes(600)
    yield "HTTP of another time", b"GET / HTTP/9.9\r\n\r\n"
    yield "a header that is none", b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n"


def sent(address, content):
    """The status of the answer, None where the connection was closed without one."""
    with socket.create_connection(address, timeout=60) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(content)
        try:
            answer = HTTPResponse(client)
            answer.begin()
            detail = answer.read()
        except ConnectionError:
            return None
        assert b"Traceback" not in detail and b"root:" not in detail
        return answer.status


def endless(address, most):
    """A body in chunks that does not end, until somebody has had enough."""
    with socket.create_connection(address, timeout=60) as client:
        client.sendall(
            b"POST /v1/streams/endless/frames HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(2 * most // 2**16):
            client.sendall(b"10000\r\n" + bytes(2**16) + b"\r\n")
        answer = HTTPResponse(client)
        answer.begin()
        return answer.status

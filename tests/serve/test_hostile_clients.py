"""A whole server in a process of its own under hostile clients: it lives, its memory stays, and cameras are served."""

import contextlib
import io
import itertools
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import neuroflow
import numpy as np
import pytest
import torch
from models import exact
from neuroflow.serve.bodies import picture
from neuroflow.video.preprocess import Preprocessor
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

SIDE, MAX_BODY, MAX_PIXELS = 32, 2**20, 10_000
ROUNDS, CAMERAS, GROWTH = 12, 3, 1.1
CONFIG = exact(threshold=0.01).reproducible()
REFUSED = {400, 404, 405, 408, 413, 415, 422, 503}


def image(number=0):
    """A square that moves over a texture."""
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    picture[16:32, 4 * (number % 12) : 4 * (number % 12) + 16] = 255
    return picture


def encoded(kind, number=0):
    file = io.BytesIO()
    Image.fromarray(image(number)).save(file, kind)
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
    jpeg, png, webp, npy = encoded("JPEG"), encoded("PNG"), encoded("WEBP"), "application/x-npy"
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


def endless(address):
    """A body in chunks that does not end, until somebody has had enough."""
    with socket.create_connection(address, timeout=60) as client:
        client.sendall(
            b"POST /v1/streams/endless/frames HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(2 * MAX_BODY // 2**16):
            client.sendall(b"10000\r\n" + bytes(2**16) + b"\r\n")
        answer = HTTPResponse(client)
        answer.begin()
        return answer.status


class Camera(threading.Thread):
    """Sends frames of one stream, in order, until it is told to stop."""

    def __init__(self, address, number):
        super().__init__()
        self.address, self.number, self.stopped = address, number, threading.Event()
        self.answers, self.failure = [], None

    def run(self):
        try:
            connection = HTTPConnection(*self.address, timeout=120)
            for frame in itertools.count():
                if self.stopped.is_set():
                    break
                body = encoded("JPEG", frame * (self.number + 1))
                headers = {"Content-Type": "image/jpeg", "Accept": "application/x-npy"}
                connection.request("POST", f"/v1/streams/camera-{self.number}/frames?frame={frame}", body, headers)
                answer = connection.getresponse()
                content = answer.read()
                assert answer.status == 200, content
                assert answer.headers["x-neuroflow-frame"] == str(frame)
                self.answers.append(np.load(io.BytesIO(content)))
        except BaseException as error:
            self.failure = error


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    directory = tmp_path_factory.mktemp("model")
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=SIDE, patch_size=8)).save_pretrained(directory)
    CONFIG.save(directory / "gate.json")
    return directory


@pytest.fixture(scope="module")
def served(model):
    """The process and its address."""
    options = ["--config", str(model / "gate.json"), "--max-streams", "8", "--port", "0"]
    limits = ["--max-body", str(MAX_BODY), "--max-pixels", str(MAX_PIXELS)]
    command = [sys.executable, "-m", "neuroflow_cli", "serve", "--model", str(model), *options, *limits]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            said = ""
            while not (where := re.search(r"listening on http://(.*):(\d+)", said)):
                said = process.stderr.readline()
                assert said, "it ended"
            yield process, (where[1], int(where[2]))
        finally:
            process.kill()


def memory(process):
    """Resident bytes."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def expected(model, number, frames):
    """The embeddings of a camera, alone and in order."""
    tower = neuroflow.enable_cache(SiglipVisionModel.from_pretrained(model).eval(), CONFIG)
    preprocess = Preprocessor(SIDE, SIDE)
    for frame in range(frames):
        pixels = picture(encoded("JPEG", frame * (number + 1)), preprocess, MAX_PIXELS)
        yield neuroflow.encode(tower, pixels, ["camera"]).pooler_output[0].numpy()


@torch.inference_mode()
def test_hostile_clients(served, model, one_thread):
    process, address = served
    attacks = list(hostile())
    assert sent(address, get("/readyz")) == 200
    cameras = [Camera(address, number) for number in range(CAMERAS)]
    for camera in cameras:
        camera.start()
    # They keep the server waiting all along: connections without a request, half a header, half a body.
    beginnings = [b"", b"G", post("/v1/streams/stalled/frames", b"\xff\xd8", length=5000)]
    stalled = [socket.create_connection(address) for _ in range(60)]
    for client, begin in zip(stalled, itertools.cycle(beginnings), strict=False):
        client.sendall(begin)
    with ThreadPoolExecutor(4) as clients:

        def attack():
            found = [clients.submit(sent, address, content) for _, content in attacks]
            return [one.result() for one in found], clients.submit(endless, address).result()

        attack()
        held = memory(process)
        for _ in range(ROUNDS):
            statuses, of_endless = attack()
            for (name, _), status in zip(attacks, statuses, strict=True):
                assert status is None or status in REFUSED, (name, status)
            assert of_endless == 413
    grown = memory(process) / held
    for camera in cameras:
        camera.stopped.set()
    for camera in cameras:
        camera.join(120)
        if camera.failure:
            raise camera.failure
        right = expected(model, camera.number, len(camera.answers))
        assert len(camera.answers) > ROUNDS
        np.testing.assert_allclose(np.stack(camera.answers), np.stack(list(right)), atol=1e-5)
    assert grown < GROWTH, f"{grown:.2f} times the memory"
    assert sent(address, get("/readyz")) == 200
    for client in stalled:
        client.close()
    process.send_signal(signal.SIGTERM)
    said = process.stderr.read()
    assert process.wait(60) == -signal.SIGTERM and "Traceback" not in said, said

"""A whole server in a process of its own under hostile clients: it lives, its memory stays, and cameras are served."""

import io
import itertools
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import neuroflow
import numpy as np
import pytest
import torch
from models import exact
from neuroflow.serve.bodies import picture
from neuroflow.video.preprocess import Preprocessor
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

from bench.clients import REFUSED, Camera, endless, get, hostile, memory, post, sent, serving

SIDE, MAX_BODY, MAX_PIXELS = 32, 2**20, 10_000
ROUNDS, CAMERAS, GROWTH = 12, 3, 1.1
CONFIG = exact(threshold=0.01).reproducible()


def frames(camera):
    """JPEGs without end of a square that moves over a texture."""
    background = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    for number in itertools.count():
        image, column, file = background.copy(), 4 * ((camera + 1) * number % 12), io.BytesIO()
        image[16:32, column : column + 16] = 255
        Image.fromarray(image).save(file, "JPEG")
        yield file.getvalue()


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=SIDE, patch_size=8)).save_pretrained(tmp_path)
    CONFIG.save(tmp_path / "gate.json")
    return tmp_path


@pytest.fixture
def served(model):
    limits = ["--max-streams", 8, "--max-body", MAX_BODY, "--max-pixels", MAX_PIXELS]
    with serving("--model", model, "--config", model / "gate.json", *limits, threads=1) as served:
        yield served


def expected(model, camera, count):
    """The embeddings of a camera, alone and in order."""
    tower = neuroflow.enable_cache(SiglipVisionModel.from_pretrained(model).eval(), CONFIG)
    for body in itertools.islice(frames(camera), count):
        pixels = picture(body, Preprocessor(SIDE, SIDE), MAX_PIXELS)
        yield neuroflow.encode(tower, pixels, ["camera"]).pooler_output[0].numpy()


@torch.inference_mode()
def test_hostile_clients(served, model, one_thread):
    process, address = served
    attacks = list(hostile())
    assert sent(address, get("/readyz")) == 200
    cameras = [Camera(address, f"camera-{number}", frames(number)) for number in range(CAMERAS)]
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
            return [one.result() for one in found], clients.submit(endless, address, MAX_BODY).result()

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
    for number, camera in enumerate(cameras):
        camera.end()
        found = np.stack([answer.embedding for answer in camera.answers])
        assert len(found) > 1
        np.testing.assert_allclose(found, np.stack(list(expected(model, number, len(found)))), atol=1e-5)
    assert grown < GROWTH, f"{grown:.2f} times the memory"
    assert sent(address, get("/readyz")) == 200
    for client in stalled:
        client.close()
    process.send_signal(signal.SIGTERM)
    said = process.stderr.read()
    assert process.wait(60) == -signal.SIGTERM and "Traceback" not in said, said

"""The service over HTTP, in process: routes, what they answer, and what they refuse."""

import io
from fractions import Fraction

import neuroflow
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from models import exact
from neuroflow.serve.app import create_app
from neuroflow.serve.service import Service
from neuroflow.video.encode import VideoWriter
from neuroflow.video.preprocess import Preprocessor
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
FRAMES = "/v1/streams/door/frames"
CLIPS = "/v1/streams/door/clips"
JPEG = {"content-type": "image/jpeg"}
NPY = {"content-type": "application/x-npy"}


@pytest.fixture
def service():
    torch.manual_seed(0)
    tower = SiglipVisionModel(SiglipVisionConfig(**TINY, image_size=32, patch_size=8)).eval()
    streams = neuroflow.StreamCache(max_streams=4, idle_seconds=60)
    return Service(neuroflow.enable_cache(tower, exact(threshold=0.01), streams=streams), Preprocessor(32, 32), streams)


@pytest.fixture
def client(service):
    with TestClient(create_app(service), base_url="http://127.0.0.1:8000") as client:
        yield client


@pytest.fixture
def guarded(service):
    with TestClient(create_app(service, token="secret"), base_url="http://cameras.example") as client:
        yield client


def images(frames=4):
    """A square that moves over a texture, [48, 64, 3] uint8."""
    background = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    for number in range(frames):
        image = background.copy()
        image[16:32, 16 * number : 16 * number + 16] = 255
        yield image


def packed(image, kind="JPEG", **settings):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **settings)
    return file.getvalue()


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def loaded(response):
    return np.load(io.BytesIO(response.content), allow_pickle=False)


def refused(response, status, words):
    assert response.status_code == status, response.text
    detail = response.json()["detail"]
    assert words in detail and "\n" not in detail, detail
    return response


def test_a_camera_sends_pictures_and_is_answered_embeddings(client):
    answers = [client.post(FRAMES, content=packed(image), headers=JPEG) for image in images()]
    first, *others = [answer.json() for answer in answers]
    assert first["stream"] == "door" and first["key_frame"] == "first" and first["skipped"] == 0
    assert len(first["embedding"]) == 64 and first["patches"] == 16
    assert [other["frame"] for other in others] == [1, 2, 3]
    assert all(0 < other["skipped"] < 1 and other["active"] < 16 for other in others)
    png = client.post(FRAMES, content=packed(next(images()), "PNG"), headers={"content-type": "image/png; x=y"})
    webp = client.post(FRAMES, content=packed(next(images()), "WEBP"), headers={"content-type": "image/webp"})
    assert png.json()["frame"] == 4 and webp.json()["frame"] == 5


@pytest.mark.parametrize("kind", ["npy", "form", "video"])
def test_a_clip_equals_its_frames(client, kind, tmp_path):
    accept = {"accept": "application/x-npy"}
    if kind == "npy":
        pixels = np.stack([np.moveaxis(image[:32, :32], 2, 0) / 127.5 - 1 for image in images()]).astype(np.float32)
        clip = client.post(CLIPS, content=saved(pixels), headers=NPY | accept)
        bodies, headers = [saved(frame) for frame in pixels], NPY
    elif kind == "form":
        bodies, headers = [packed(image, "PNG") for image in images()], {"content-type": "image/png"}
        files = [("frame", (f"{number}.png", body, "image/png")) for number, body in enumerate(bodies)]
        clip = client.post(CLIPS, files=files, headers=accept)
    else:
        with VideoWriter(tmp_path / "clip.mp4", Fraction(10)) as writer:
            for image in images():
                writer.write(image)
        clip = client.post(
            CLIPS, content=(tmp_path / "clip.mp4").read_bytes(), headers={"content-type": "video/mp4"} | accept
        )
    embeddings = loaded(clip)
    assert embeddings.shape == (4, 64)
    assert clip.headers["x-neuroflow-frame"] == "0, 1, 2, 3"
    assert clip.headers["x-neuroflow-key-frame"] == "first, , , "
    if kind != "video":
        alone = [client.post("/v1/streams/yard/frames", content=body, headers=headers | accept) for body in bodies]
        np.testing.assert_allclose(embeddings, np.stack([loaded(each) for each in alone]), atol=1e-5)
        assert alone[0].headers["x-neuroflow-stream"] == "yard"


def test_json_has_null_for_what_is_not_finite(client):
    pixels = np.zeros((3, 32, 32), np.float32)
    client.post(FRAMES, content=saved(pixels), headers=NPY)
    pixels[0, 0, 0] = np.nan
    answer = client.post(FRAMES, content=saved(pixels), headers=NPY)
    assert answer.status_code == 200 and None in answer.json()["embedding"]
    assert any(None in row for row in client.get("/v1/streams/door").json()["surprise"])


def test_streams_are_listed_looked_at_and_deleted(client):
    bodies = [packed(image) for image in images()]
    client.post(FRAMES, content=bodies[0], headers=JPEG)
    assert client.get("/v1/streams/door/picture").status_code == 204
    colour = np.full((48, 64, 3), (200, 100, 50), np.uint8)
    for body in (*bodies[1:3], packed(colour)):
        client.post(FRAMES, content=body, headers=JPEG)
    (summary,) = client.get("/v1/streams").json()["streams"]
    assert summary["stream"] == "door" and summary["frames"] == 4 and summary["key_frames"] == 1
    detail = client.get("/v1/streams/door").json()
    assert detail["grid"] == [4, 4] and sum(map(sum, detail["active"])) > 0
    assert [past["frame"] for past in detail["history"]] == [0, 1, 2, 3]
    assert [past["key_frame"] for past in detail["history"]] == ["first", None, None, None]
    picture = client.get("/v1/streams/door/picture")
    shown = np.array(Image.open(io.BytesIO(picture.content)))
    assert shown.shape == (32, 32, 3) and np.abs(shown.astype(int) - colour[0, 0]).max() < 5
    assert client.delete("/v1/streams/door").status_code == 204
    refused(client.delete("/v1/streams/door"), 404, "not open")
    refused(client.get("/v1/streams/door"), 404, "not open")
    refused(client.get("/v1/streams/door/picture"), 404, "not open")
    assert client.post(FRAMES, content=bodies[1], headers=JPEG).json()["key_frame"] == "first"


def test_what_prometheus_reads(client):
    for image in images():
        client.post(FRAMES, content=packed(image), headers=JPEG)
    client.post(FRAMES, content=b"none", headers=JPEG)
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert lines["neuroflow_frames_total"] == "4.0"
    assert lines["neuroflow_patches_total"] == "64.0"
    assert 16 < float(lines["neuroflow_patches_encoded_total"]) < 64
    assert lines['neuroflow_key_frames_total{reason="first"}'] == "1.0"
    assert lines["neuroflow_latency_seconds_count"] == "4.0"
    assert lines["neuroflow_queue_requests"] == "0.0"
    assert lines['neuroflow_refused_total{status="415"}'] == "1.0"
    assert float(lines["neuroflow_state_bytes"]) > 0
    assert "door" not in str(lines)
    assert 'neuroflow_stream_frames_total{stream="door"} 4.0' in client.get("/metrics?by=stream").text


def test_the_state_of_the_process(service):
    with TestClient(create_app(service), base_url="http://localhost") as client:
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        paths = client.get("/openapi.json").json()["paths"]
        assert {"/v1/streams/{stream}/frames", "/metrics", "/readyz"} <= paths.keys()
        service._stopping = True
        refused(client.get("/readyz"), 503, "stopping")
        full = client.post(FRAMES, content=packed(next(images())), headers=JPEG)
        assert refused(full, 503, "stopping").headers["retry-after"] == "1"
        service._stopping = False


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "words"),
    [
        (FRAMES, b"", "image/jpeg", 415, "JPEG, PNG or WebP"),
        (FRAMES, b"x" * 2**20, "image/jpeg", 413, "1,000,000 bytes"),
        (FRAMES, packed(np.zeros((40, 60, 3), np.uint8)), "image/jpeg", 413, "2,000 pixels"),
        (FRAMES, packed(next(images())), "text/plain", 415, "image/jpeg"),
        (FRAMES, packed(next(images())), "multipart/form-data", 415, "image/jpeg"),
        (FRAMES, saved(np.zeros((2, 3, 32, 32), np.float32)), "application/x-npy", 422, "[3, 32, 32]"),
        (FRAMES + "?frame=-1", b"", "image/jpeg", 422, "frame: "),
        (FRAMES + "?frame=two", b"", "image/jpeg", 422, "frame: "),
        ("/v1/streams/.hidden/frames", b"", "image/jpeg", 422, "stream: "),
        (f"/v1/streams/{'x' * 129}/frames", b"", "image/jpeg", 422, "stream: "),
        ("/v1/streams/a%2Fb/frames", b"", "image/jpeg", 404, "Not Found"),
        ("/v1/streams/a%00b/frames", b"", "image/jpeg", 422, "stream: "),
        (CLIPS, b"x", "image/jpeg", 415, "video/mp4"),
        (CLIPS, b"x", "video/mp4", 415, "MP4"),
        (CLIPS, b"x", "multipart/form-data", 400, "boundary"),
        (CLIPS, b"--x--", "multipart/form-data; boundary=x", 400, "no file"),
        (CLIPS, saved(np.zeros((4, 3, 32, 32), np.float32)), "application/x-npy", 413, "3 at most"),
    ],
)
def test_what_is_refused(service, path, body, kind, status, words):
    limits = {"max_body": 10**6, "max_pixels": 2000, "max_frames": 3}
    with TestClient(create_app(service, **limits), base_url="http://127.0.0.1") as client:
        refused(client.post(path, content=body, headers={"content-type": kind}), status, words)
        assert client.get("/v1/streams").json() == {"streams": []}


def test_too_many_pictures_in_a_form(service):
    with TestClient(create_app(service, max_frames=3), base_url="http://127.0.0.1") as client:
        files = [("frame", ("0.png", packed(image, "PNG"), "image/png")) for image in images(4)]
        refused(client.post(CLIPS, files=files), 400, "Too many files")
        assert client.post(CLIPS, files=files[:3]).status_code == 200


def test_a_token_is_asked_for(guarded):
    body = packed(next(images()))
    for headers in (
        {},
        {"authorization": "secret"},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic secret"},
    ):
        for call in (
            lambda headers=headers: guarded.post(FRAMES, content=body, headers=JPEG | headers),
            lambda headers=headers: guarded.get("/v1/streams", headers=headers),
            lambda headers=headers: guarded.get("/v1/streams/door/picture", headers=headers),
            lambda headers=headers: guarded.delete("/v1/streams/door", headers=headers),
            lambda headers=headers: guarded.get("/metrics", headers=headers),
        ):
            assert refused(call(), 401, "Authorization: Bearer").headers["www-authenticate"] == "Bearer"
    assert guarded.get("/healthz").status_code == guarded.get("/readyz").status_code == 200
    right = {"authorization": "Bearer secret"}
    assert guarded.post(FRAMES, content=body, headers=JPEG | right).status_code == 200
    assert guarded.get("/v1/streams", headers=right).json()["streams"]


def test_without_a_token_only_this_machines_own_names_are_answered(client):
    for host in ("attacker.example", "127.0.0.1.attacker.example"):
        assert client.get("/v1/streams", headers={"host": host}).status_code == 400
    assert client.get("/v1/streams", headers={"host": "localhost:8000"}).status_code == 200

"""Damaged media: whatever a file holds, it gives frames, or one line that says what is wrong with it."""

import contextlib
import functools
import io
import itertools
import os
import time
import warnings

import av
import numpy as np
import pytest
import torch
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Source, SourceError
from neuroflow_cli import main
from PIL import Image
from transformers import ViTConfig, ViTModel

pytestmark = pytest.mark.usefixtures("one_thread")
CLIPS = (
    ("mp4", "libx264"),
    ("mov", "mpeg4"),
    ("mkv", "libx264"),
    ("webm", "libvpx-vp9"),
    ("avi", "mpeg4"),
    ("ts", "mpeg2video"),
    ("flv", "libx264"),
    ("gif", "gif"),
    ("mjpeg", "mjpeg"),
)
IMAGES = ("png", "jpeg", "webp", "bmp", "tiff")
SUFFIXES = (".mp4", ".mkv", ".avi", ".ts", ".png", ".jpg", ".m3u8", ".txt", "")
MAX_PIXELS = 1 << 20


@functools.cache
def media(kind):
    """The bytes of a clip or an image, of some texture."""
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (6, 12, 16, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    file = io.BytesIO()
    if kind in IMAGES:
        exif = Image.Exif()
        exif[0x0112] = 5
        Image.fromarray(frames[0]).save(file, kind, exif=exif)
        return file.getvalue()
    with av.open(file, "w", format={"mkv": "matroska", "ts": "mpegts"}.get(kind, kind)) as output:
        codec = dict(CLIPS)[kind]
        stream = output.add_stream(codec, rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def damaged(seed, directory):
    """A file of some kind under some name, damaged in one or more ways."""
    random = np.random.default_rng(seed)
    content = np.frombuffer(media(str(random.choice([kind for kind, _ in CLIPS] + list(IMAGES)))), np.uint8).copy()
    for _ in range(random.integers(1, 4)):
        if not len(content):
            break
        where = random.integers(len(content), size=random.choice([1, 8, 64]))
        begin, length = random.integers(len(content)), random.choice([4, 64, 1024])
        match random.choice(["cut", "flip", "header", "zero", "noise", "twice", "lost"]):
            case "cut":
                content = content[:begin]
            case "flip":
                content[where] ^= (1 << random.integers(8, size=len(where))).astype(np.uint8)
            case "header":  # where sizes, counts and rates stand
                content[where % 256 % len(content)] = random.choice(np.array([0, 1, 127, 128, 255], np.uint8))
            case "zero":
                content[begin : begin + length] = 0
            case "noise":
                content[begin : begin + length] = random.integers(0, 256, len(content[begin : begin + length]))
            case "twice":
                content = np.concatenate([content, content[begin:]])
            case "lost":
                content = np.delete(content, np.s_[begin : begin + length])
    path = directory / f"{seed}{random.choice(SUFFIXES)}"
    path.write_bytes(content.tobytes())
    return path


def read(path):
    """As every command reads: each frame is as it says, and what is said is one line."""
    preprocess = Preprocessor(32, 32, crop=True, resize=40)
    try:
        with contextlib.closing(Source(str(path), max_pixels=MAX_PIXELS)) as source:
            before = None
            for number, frame in enumerate(itertools.islice(source, 40)):
                assert frame.index == number and (before is None or frame.time > before)
                assert frame.rgb(8, 8).shape == (8, 8, 3) and 0 < np.prod(frame.size) <= MAX_PIXELS
                assert preprocess(frame).isfinite().all()
                before = frame.time
        said = source.stopped
    except SourceError as error:
        said = str(error)
    assert said is None or ("\n" not in said and len(said) < 500)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "vit"
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**tiny, image_size=32), add_pooling_layer=False).save_pretrained(path)
    return str(path)


def run(path, model, capsys):
    """`neuroflow run` has a result and an overlay, or neither and one line."""
    out, overlay = path.parent / "result.jsonl", path.parent / "overlay.mp4"
    options = ("--max-frames", "8", "--max-pixels", str(MAX_PIXELS), "--out", str(out), "--overlay", str(overlay))
    code = main(["run", str(path), "--model", model, *options])
    _, message = capsys.readouterr()
    lines = [line for line in message.splitlines() if line.startswith("neuroflow: error: ")]
    assert (code, len(lines), out.exists(), overlay.exists()) in ((0, 0, True, True), (2, 1, False, False)), message
    assert "Traceback" not in message
    for left in path.parent.iterdir():
        left.unlink()


@pytest.mark.parametrize("seed", range(60))
def test_damaged_media_give_frames_or_one_line(tmp_path, seed):
    read(damaged(seed, tmp_path))


def test_damaged_media_through_the_command(tmp_path, model, capsys):
    for seed in range(1000, 1012):
        run(damaged(seed, tmp_path), model, capsys)


@pytest.mark.fuzz
def test_damaged_media_for_as_long_as_is_asked(tmp_path, model, capsys):
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "60"))
    warnings.simplefilter("ignore")
    for seed in itertools.count(time.time_ns() // 1_000_000):
        path = damaged(seed, tmp_path)
        try:
            read(path)
            run(path, model, capsys)
        except BaseException as error:
            error.add_note(f"damaged media of seed {seed}")
            raise
        if time.monotonic() > end:
            break

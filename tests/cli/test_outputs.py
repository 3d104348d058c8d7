"""What is written: never over what is read, by one run at a time, whole or not at all, and errors in one line."""

import contextlib
import json
import os
import resource
import shutil
import signal
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from models import tiny
from neuroflow.cli import encoding
from neuroflow.files import OutputError, lock, replacing
from neuroflow.journal import Findings
from neuroflow.video.encode import VideoWriter
from neuroflow.video.results import Results
from neuroflow.video.source import Source
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES, SIDE = 6, 48
needs_rerun = pytest.mark.skipif(find_spec("rerun") is None, reason="rerun-sdk is not installed: make test-viz")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "siglip"
    tiny("siglip", SIDE).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    random = np.random.default_rng(0)
    with VideoWriter(path, Fraction(10)) as writer:
        for _ in range(FRAMES):
            writer.write(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    return path


@pytest.fixture
def refused(neuroflow):
    """refused(words, command, *arguments): it stops with exit code 2 and one line that has the words."""

    def call(words, *arguments):
        code, table, message = neuroflow(*arguments)
        message = message.rpartition("\r")[2].rpartition("frame/s]\n")[2]  # behind a progress bar
        lines = [line for line in message.splitlines() if "error: " in line]
        assert code == 2 and table == "" and len(lines) == 1 and words in lines[0], (table, message)
        assert "Traceback" not in message

    return call


def listing(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


COMMANDS = {  # with the suffix that its output has
    "run --overlay": (["run", "{read}", "--overlay", "{written}"], ".mp4"),
    "run --rerun": (["run", "{read}", "--rerun", "{written}"], ".rrd"),
    "run --out": (["run", "{read}", "--out", "{written}"], ".npz"),
    "run, its weights": (["run", "x.mp4", "--weights", "{read}", "--out", "{written}"], ".npz"),
    "track --overlay": (["track", "{read}", "--overlay", "{written}"], ".mp4"),
    "track --out": (["track", "x.mp4", "--labels", "{read}", "--out", "{written}"], ".json"),
    "calibrate": (["calibrate", "{read}", "--target-skip", "0.5", "--out", "{written}"], ".mp4"),
    "calibrate, its config": (
        ["calibrate", "x.mp4", "--config", "{read}", "--target-skip", "0.5", "--out", "{written}"],
        ".json",
    ),
    "eval laws": (["eval", "laws", "{read}", "--out", "{written}"], ".json"),
    "eval video": (["eval", "video", "x", "--testlist", "{read}", "--out", "{written}"], ".json"),
    "eval llm": (["eval", "llm", "--model", "x", "--text", "x.txt", "{read}", "--out", "{written}"], ".json"),
    "run --report": (["run", "{read}", "--report", "{written}"], ".html"),
    "calibrate --report": (
        ["calibrate", "x.mp4", "--config", "{read}", "--target-skip", "0.5", "--out", "x", "--report", "{written}"],
        ".html",
    ),
    "eval laws --report": (["eval", "laws", "{read}", "--report", "{written}"], ".html"),
    "eval video --report": (["eval", "video", "x", "--classes", "{read}", "--report", "{written}"], ".html"),
    "distill": (["distill", "x", "--model", "{read}", "--out", "{written}"], ".safetensors"),
}


@pytest.mark.parametrize("kind", ["the same", "relative", "link", "hard link", "link to it", "file:"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_output_is_an_input(command, kind, refused, tmp_path, monkeypatch):
    template, suffix = COMMANDS[command]
    monkeypatch.chdir(tmp_path)
    read = tmp_path / "inputs" / f"it{suffix}"
    read.parent.mkdir()
    read.write_bytes(b"dear to its owner")
    written, name = read, str(read)
    if kind == "relative":
        written = Path(f"inputs/../inputs/it{suffix}")
    elif kind == "link":
        written = tmp_path / f"other{suffix}"
        written.symlink_to(read)
    elif kind == "hard link":
        written = tmp_path / f"other{suffix}"
        written.hardlink_to(read)
    elif kind == "link to it":
        (tmp_path / "other").symlink_to(read.parent)
        name = f"other/it{suffix}"
    elif kind == "file:":
        name = f"file:{read}"
    before = listing(tmp_path)
    arguments = [part.format(read=name, written=written) for part in template]
    refused("would overwrite", *arguments)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "option", "inside", "name"),
    [
        ("run {}", "--overlay", "1.png", "overlay.mp4"),
        ("track {}", "--out", "1.JPG", "tracks.json"),
        ("calibrate --target-skip 0.5 {}", "--out", "1.png", "1.png"),
        ("eval laws {}", "--out", "1.png", "laws.json"),
        ("eval video {}", "--out", "Walking/1.avi", "result.json"),
        ("eval video {}", "--out", "Walking/1/1.png", "result.json"),
        ("distill {}", "--out", "more/1.mp4", "weights.safetensors"),
        ("distill videos --outside {}", "--out", "more/1.mp4", "weights.safetensors"),
        ("distill videos --model {}", "--out", "model.safetensors", "model.safetensors"),
        ("run x.mp4 --model {}", "--out", "model.safetensors", "result.npz"),
    ],
)
def test_nor_is_it_in_a_directory_that_is_read(command, option, inside, name, refused, tmp_path):
    read, written = tmp_path / "read" / inside, tmp_path / "read" / name
    read.parent.mkdir(parents=True)
    read.write_bytes(b"dear to its owner")
    if written != read:
        written.hardlink_to(read)
    before = listing(tmp_path)
    refused("would overwrite", *command.format(tmp_path / "read").split(), option, written)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("suffix", [".partial", ".journal"])
def test_nor_is_what_is_written_beside_it(suffix, refused, tmp_path):
    read = tmp_path / f"result.npz{suffix}"
    read.write_bytes(b"saved from a crash")
    refused("would overwrite", "run", read, "--out", tmp_path / "result.npz")
    assert read.read_bytes() == b"saved from a crash"


def test_nor_is_another_output_or_a_directory_that_is_read(refused, tmp_path):
    (tmp_path / "a.npz").write_bytes(b"")
    for name in ("b.mp4", "b.html"):
        (tmp_path / name).symlink_to(tmp_path / "a.npz")
    for option, other in (("--overlay", "b.mp4"), ("--report", "b.html")):
        refused("is also what --out writes", "run", "x", "--out", tmp_path / "a.npz", option, tmp_path / other)
    refused("which is read", "eval", "laws", tmp_path, "--plots", tmp_path / "plots")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.html", "b.mp4"]


def test_beside_what_is_read_is_not_over_it(neuroflow, clip, model, tmp_path):
    for frame in Source(str(clip)):
        Image.fromarray(frame.rgb(*frame.size)).save(tmp_path / f"{frame.index:03}.png")
    for _ in range(2):
        code, _, message = neuroflow("run", tmp_path, "--model", model, "--overlay", tmp_path / "overlay.mp4")
        assert code == 0, message


def held(path, command):
    """What another run of the command has open while it writes `path`."""
    if command == "run":
        return contextlib.closing(Results(path, {}))
    if command.startswith("eval"):
        return contextlib.closing(Findings(path, {}))
    return lock(path.with_name(f"{path.name}.lock")) if command == "distill" else replacing(path)


@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        ("run", "--out", "result.jsonl"),
        ("run --resume", "--out", "result.jsonl"),
        ("run", "--overlay", "overlay.mp4"),
        ("run", "--report", "report.html"),
        pytest.param("run", "--rerun", "run.rrd", marks=needs_rerun),
        ("track", "--out", "tracks.json"),
        ("track", "--overlay", "overlay.mp4"),
        ("eval laws", "--out", "laws.json"),
        ("eval laws", "--report", "report.html"),
        ("distill", "--out", "weights.safetensors"),
        ("calibrate --target-skip 0.5", "--out", "config.json"),
    ],
)
def test_a_second_run_stops_and_leaves_the_first_alone(command, option, name, refused, clip, model, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"of an earlier run")
    first = option if option in ("--overlay", "--rerun", "--report") else command.partition(" --")[0]
    with held(path, first):
        before = listing(tmp_path)
        assert len(before) == 2
        source = clip.parent if command == "distill" else clip
        words = command.split()
        if command == "distill":
            (tmp_path / "videos").mkdir()
            for number in range(2):
                shutil.copy(clip, tmp_path / "videos" / f"{number}.mp4")
            source, before = tmp_path / "videos", listing(tmp_path)
        if command.startswith("calibrate"):
            with pytest.raises(OutputError, match="another run is writing it"), replacing(path):
                pass
        else:
            arguments = (*words, source, "--model", model, option, path)
            refused(f"{name}: cannot be written (another run is writing it)", *arguments)
        assert listing(tmp_path) == before
    assert path.read_bytes() == b"of an earlier run"


@contextlib.contextmanager
def room(most):
    """No file can grow beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("command", "option", "name", "most"),
    [
        ("run", "--out", "result.jsonl", 100),
        ("run", "--out", "result.npz", 0),
        ("run", "--overlay", "overlay.mp4", 0),
        ("run", "--overlay", "overlay.mp4", 3000),
        ("run", "--report", "report.html", 3000),
        pytest.param("run", "--rerun", "run.rrd", 3000, marks=needs_rerun),
        ("track", "--overlay", "overlay.mp4", 3000),
        ("track", "--out", "tracks.json", 100),
        ("eval laws --arch=E", "--out", "laws.json", 100),
    ],
)
def test_a_full_disk_is_one_line(command, option, name, most, refused, clip, model, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"of an earlier run")
    with room(most):
        refused("cannot be written (File too large)", *command.split(), clip, "--model", model, option, path)
    assert path.read_bytes() == b"of an earlier run"
    assert {file.name for file in tmp_path.iterdir()} <= {name, f"{name}.journal"}


def test_a_run_out_of_room_is_continued(neuroflow, refused, clip, model, tmp_path):
    arguments = ("run", clip, "--model", model, "--clip", 1, "--threshold", 0, "--out", tmp_path / "result.jsonl")
    with room(4000):
        refused("cannot be written (File too large)", *arguments)
    assert 4000 >= (tmp_path / "result.jsonl.journal").stat().st_size > 2000
    code, _, message = neuroflow(*arguments, "--resume")
    assert code == 0 and "resuming at frame" in message
    rows = [json.loads(line) for line in (tmp_path / "result.jsonl").read_text().splitlines()]
    assert [row["frame"] for row in rows] == list(range(FRAMES))


def test_a_failed_overlay_is_said_by_what_continues_the_run(refused, neuroflow, clip, model, tmp_path, monkeypatch):
    out, overlay = tmp_path / "result.jsonl", tmp_path / "overlay.mp4"
    arguments = ("run", clip, "--model", model, "--out", out, "--overlay", overlay)
    end = encoding.OverlayWriter.__exit__

    def in_no_room(self, *raised):
        with room(100):
            end(self, *raised)

    monkeypatch.setattr(encoding.OverlayWriter, "__exit__", in_no_room)
    refused("overlay.mp4: cannot be written (File too large)", *arguments)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["result.jsonl.journal"]
    refused("overlay.mp4: is not written: the run that is continued left no frame for it", *arguments, "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["result.jsonl"] and len(out.read_text().splitlines()) == 6


@pytest.mark.parametrize("moment", ["first", "last"])
@pytest.mark.parametrize("name", ["result.jsonl", "result.npz"])
def test_a_directory_that_vanishes_is_one_line(name, moment, refused, clip, model, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    append = Results.append

    def vanishing(self, record, embedding):
        append(self, record, embedding)
        if record.frame == (0 if moment == "first" else FRAMES - 1):
            shutil.rmtree(tmp_path / "out")

    monkeypatch.setattr(Results, "append", vanishing)
    refused(
        "cannot be written (No such file or directory)", "run", clip, "--model", model, "--out", tmp_path / "out" / name
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "option", "suffix"),
    [
        ("run", "--out", ".jsonl"),
        ("run", "--overlay", ".mp4"),
        ("run", "--report", ".html"),
        pytest.param("run", "--rerun", ".rrd", marks=needs_rerun),
        ("track", "--out", ".json"),
        ("track", "--overlay", ".mp4"),
        ("eval laws", "--out", ".json"),
        ("calibrate --target-skip 0.5", "--out", ".json"),
        ("distill", "--out", ".safetensors"),
    ],
)
@pytest.mark.parametrize("kind", ["long", "no room for .journal", "NUL", "newline", "read-only", "under a file"])
def test_a_name_that_cannot_be_is_one_line(kind, command, option, suffix, refused, clip, model, tmp_path):
    (tmp_path / "videos").mkdir()
    for number in range(2):
        (tmp_path / "videos" / f"{number}.mp4").symlink_to(clip)
    path = {
        "long": tmp_path / ("x" * 300 + suffix),
        "no room for .journal": tmp_path / ("x" * (254 - len(suffix)) + suffix),
        "NUL": f"{tmp_path}/a\0b{suffix}",
        "newline": tmp_path / f"no\nwhere/a{suffix}",
        "read-only": f"/proc/self/result{suffix}",
        "under a file": clip / f"result{suffix}",
    }[kind]
    if kind == "no room for .journal" and command.startswith("calibrate"):
        pytest.skip("it writes when all is done: test_calibrate has that")
    before = listing(tmp_path)
    source = tmp_path / "videos" if command == "distill" else clip
    refused("", *command.split(), source, "--model", model, option, path)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize(
    ("command", "option", "name", "suffix"),
    [
        ("run", "--out", "result.jsonl", ".journal"),
        ("run --resume", "--out", "result.jsonl", ".journal"),
        ("run", "--out", "result.jsonl", ".partial"),
        ("run", "--overlay", "overlay.mp4", ".partial"),
        ("run", "--report", "report.html", ".partial"),
        pytest.param("run", "--rerun", "run.rrd", ".partial", marks=needs_rerun),
        ("track", "--out", "tracks.json", ".partial"),
        ("eval laws --arch=E", "--out", "laws.json", ".journal"),
    ],
)
def test_planted_links_are_not_followed(command, option, name, suffix, link, refused, clip, model, tmp_path):
    (tmp_path / "victim").write_bytes(b"nobody's but its owner's")
    link(tmp_path / "victim", tmp_path / f"{name}{suffix}")
    refused(f"{name}{suffix} is a link", *command.split(), clip, "--model", model, option, tmp_path / name)
    assert (tmp_path / "victim").read_bytes() == b"nobody's but its owner's"


def test_a_dead_run_has_no_lock(tmp_path):
    path, (reading, writing) = tmp_path / "result.json", os.pipe()
    child = os.fork()
    if not child:
        with lock(path):
            os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    with pytest.raises(OSError, match="another run"):
        lock(path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock(path).close()


@pytest.mark.parametrize(("height", "width"), [(450, 9000), (2, 3000), (3000, 2), (1, 1)])
def test_pictures_of_any_shape_have_an_overlay(height, width, neuroflow, model, tmp_path):
    for number in range(2):
        image = np.zeros((height, width, 3), np.uint8)
        image[:, number * width // 2 :] = 255
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    for command in ("run", "track"):
        overlay = tmp_path / f"{command}.mp4"
        assert neuroflow(command, tmp_path, "--model", model, "--overlay", overlay)[0] == 0
        assert len(list(Source(str(overlay)))) == 2

"""Recordings for Rerun's viewer, read back; and what is said where there is no Rerun, or no display."""

import errno
import io
import sys
import types
from fractions import Fraction

import numpy as np
import pytest
import torch
from neuroflow.files import OutputError
from neuroflow.video import overlay
from neuroflow.video.ahead import Prepared
from neuroflow.video.encode import VideoWriter
from neuroflow.video.results import Record
from neuroflow.video.source import Source
from neuroflow.video.stream import Encoded
from PIL import Image

FRAMES, HEIGHT, WIDTH = 24, 48, 64
ROWS, COLUMNS = 2, 4
REGION = (8.0, 0.0, 56.0, 48.0)  # the middle of frames of HEIGHT and WIDTH
WITHOUT_RERUN = "rerun-sdk is not installed: `make test-viz` installs it and runs this"


@pytest.fixture
def recorder(monkeypatch):
    """Recorder, and a clock that stands still unless it is told to go on."""
    pytest.importorskip("rerun", reason=WITHOUT_RERUN)
    from neuroflow.video import recording

    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(recording.time, "monotonic", lambda: clock.now)
    return recording.Recorder, clock


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """What came of FRAMES frames: the first is a key frame, and of the others patch k % 8 is active."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    with VideoWriter(path, Fraction(10)) as writer:
        for number in range(FRAMES):
            writer.write(np.full((HEIGHT, WIDTH, 3), 10 * number, np.uint8))
    found = []
    for frame in Source(str(path)):
        key = frame.index == 0
        active = torch.ones(ROWS, COLUMNS) > 0 if key else torch.arange(8).view(ROWS, COLUMNS) == frame.index % 8
        surprise = torch.full((ROWS, COLUMNS), torch.nan) if key else active.float()
        skipped, dense = 1 - active.float().mean().item(), None if frame.index == 5 else 20.0 + frame.index
        cosine = None if frame.index == 5 else 1 - frame.index / 100
        record = Record(frame.index, frame.time, skipped, int(active.sum()), key, 2.0 + frame.index, dense, cosine, key)
        prepared = Prepared(frame, torch.zeros(0), REGION, 0.0, 0.0)
        found.append(Encoded(prepared, record, np.zeros(2), active, surprise, "first" if key else None, 0.0, 1))
    return found


def read(path):
    """{"entity:Archetype:field": {frame: its value}}, of what has a frame."""
    tables = []
    try:
        from rerun.chunk import RrdReader
    except ImportError:
        load = pytest.importorskip("rerun.dataframe", reason="this release of Rerun has neither reader").load_recording
        tables.append(("", load(path).view(index="frame", contents="/**").select().read_all()))
    else:
        chunks = RrdReader(path).stream().to_chunks()
        tables += [(f"{chunk.entity_path}:", chunk.to_record_batch()) for chunk in chunks if not chunk.is_static]
    found = {}
    for entity, table in tables:
        columns = {name: table.column(name).to_pylist() for name in table.schema.names}
        frames = columns.pop("frame")
        for name, values in columns.items():
            pairs = zip(frames, values, strict=True)
            found.setdefault(entity + name, {}).update({frame: value for frame, value in pairs if value is not None})
    return found


def picture(blob):
    return Image.open(io.BytesIO(bytes(blob)))


def test_a_recording_has_every_number_and_some_pictures(recorder, encoded, tmp_path):
    kind, clock = recorder
    with kind(tmp_path / "run.rrd") as recording:
        clock.now += 100
        for each in encoded:
            recording.log(each)
            clock.now += 1 / 64
    assert [file.name for file in tmp_path.iterdir()] == ["run.rrd"]
    found = read(tmp_path / "run.rrd")

    def scalars(entity):
        return {frame: value for frame, (value,) in found[f"/{entity}:Scalars:scalars"].items()}

    assert scalars("skipped") == {each.record.frame: each.record.skipped for each in encoded}
    assert scalars("latency/neuroflow") == {number: 2.0 + number for number in range(FRAMES)}
    compared = [number for number in range(FRAMES) if number != 5]
    assert scalars("latency/dense") == {number: 20.0 + number for number in compared}
    assert scalars("cosine") == {number: 1 - number / 100 for number in compared}
    assert found["/key_frames:TextLog:text"] == {0: ["frame 0: first"]}
    # Ten at once, and then ten a second.
    pictured = [*range(11), 13, 20]
    blobs = {name: found[f"/{name}:EncodedImage:blob"] for name in ("frame", "frame/surprise")}
    centers = found["/frame/active:Boxes2D:centers"]
    assert list(centers) == [*blobs["frame"]] == [*blobs["frame/surprise"]] == pictured
    for number in pictured:
        shown, heat = (picture(each[number][0]) for each in blobs.values())
        assert shown.format == "JPEG" and shown.size == (WIDTH, HEIGHT)
        assert np.abs(np.asarray(shown).astype(float) - 10 * number).max() < 12
        assert heat.format == "PNG" and heat.size == (WIDTH, HEIGHT) and heat.mode == "RGBA"
        row, column = divmod(number % 8, COLUMNS)
        middle = np.array([8 + 12 * column + 6, 24 * row + 12])
        if number:
            np.testing.assert_allclose(centers[number], [middle])
            expected = np.zeros((HEIGHT, WIDTH), np.uint8)
            expected[24 * row : 24 * row + 24, 8 + 12 * column : 20 + 12 * column] = 255
            np.testing.assert_array_equal(np.asarray(heat)[..., 3], expected)
            assert tuple(np.asarray(heat)[middle[1], middle[0], :3]) == overlay.INFERNO[-1]
        else:
            assert len(centers[0]) == 8 and not np.asarray(heat)[..., 3].any()
    times = found.get("/skipped:time", found.get("time"))
    assert times is not None and len(times) == FRAMES


def test_a_recording_is_written_whole_or_not_at_all(recorder, encoded, tmp_path):
    kind, _ = recorder
    (tmp_path / "run.rrd").write_bytes(b"of an earlier run")
    with pytest.raises(ZeroDivisionError), kind(tmp_path / "run.rrd") as recording:
        recording.log(encoded[0])
        raise ZeroDivisionError
    with kind(tmp_path / "run.rrd"):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["run.rrd"]
    assert (tmp_path / "run.rrd").read_bytes() == b"of an earlier run"


def test_a_write_that_fails_once_is_no_recording(recorder, encoded, monkeypatch, tmp_path):
    kind, _ = recorder

    def copy(pipe, file):
        while pipe.read(2**16):
            pass
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("neuroflow.video.recording.shutil.copyfileobj", copy)
    with pytest.raises(OutputError, match=r"run\.rrd: cannot be written"), kind(tmp_path / "run.rrd") as recording:
        recording.log(encoded[0])
    assert list(tmp_path.iterdir()) == []


def test_a_viewer_gets_what_a_file_does(recorder, encoded, monkeypatch, tmp_path):
    kind, _ = recorder
    monkeypatch.setattr("rerun.RecordingStream.spawn", lambda self: self.save(tmp_path / "seen.rrd"))
    with kind(None) as recording:
        recording.log(encoded[0])
    assert read(tmp_path / "seen.rrd")["/key_frames:TextLog:text"] == {0: ["frame 0: first"]}


@pytest.mark.parametrize("value", ["run.rrd", "live"])
def test_without_rerun_it_is_said_before_the_run(neuroflow, monkeypatch, value):
    monkeypatch.setitem(sys.modules, "rerun", None)
    code, table, message = neuroflow("run", "/no/such/clip.mp4", "--rerun", value)
    assert code == 2 and table == ""
    assert message == "neuroflow: error: rerun is missing; install the viz extra: neuroflow[viz]\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems always have a display")
def test_without_a_display_the_viewer_is_refused_in_one_line(neuroflow, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rerun", types.ModuleType("rerun"))
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "live").write_bytes(b"read, and never written")
    monkeypatch.chdir(tmp_path)
    code, table, message = neuroflow("run", "live", "--rerun", "live")
    assert code == 2 and table == "" and message.count("\n") == 1
    assert "--rerun live: there is no display here" in message and "rerun run.rrd" in message
    monkeypatch.setenv("DISPLAY", ":0")
    assert "no display" not in neuroflow("run", "/no/such/clip.mp4", "--rerun", "live")[2]
    assert "give a .rrd file" in neuroflow("run", "/no/such/clip.mp4", "--rerun", "out.mp4")[2]

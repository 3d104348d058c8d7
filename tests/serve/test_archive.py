"""Recordings into an archive in this process: what is written, what is said of those that fail, and going on."""

import json
import os
import shutil

import numpy as np
import pyarrow.parquet
import pytest
from models import tiny
from neuroflow import NeuroFlowConfig
from neuroflow.serve import archive as serve
from neuroflow.serve.archive import Encoder, Encoding, Part, Video, find_videos
from neuroflow.video.preprocess import Preprocessor
from PIL import Image
from recordings import held, write_recording

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("siglip", SIDE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Two of one name, one of images, one that ends early, a damaged one, and what is passed over."""
    root = tmp_path_factory.mktemp("recordings")
    write_recording(root / "a" / "clip.mp4", 20)
    write_recording(root / "b" / "clip.mp4", 24, seed=1, cuts=(9,))
    for name in ("images", "cut"):
        (root / name).mkdir()
        for number in range(3):
            Image.new("RGB", (64, 48), (80 * number, 0, 0)).save(root / name / f"{number}.png")
    (root / "cut" / "2.png").write_bytes(b"no image")
    (root / "damaged.mp4").write_bytes(b"no video")
    (root / "a" / ".hidden.mp4").write_bytes(b"")
    (root / "a" / "poster.jpg").write_bytes(b"")
    return root


@pytest.fixture
def archive(neuroflow, model):
    """archive(*sources_and_options) -> exit code, stdout, stderr."""
    return lambda *arguments: neuroflow("archive", *arguments, "--model", model, "--threshold", 0.02)


def summary(out):
    rows = pyarrow.parquet.read_table(out / "summary.parquet").to_pylist()
    return {os.sep.join(row.pop("path").rsplit(os.sep, 2)[1:]): row for row in rows}


def test_an_archive(tmp_path, archive, neuroflow, model, recordings):
    out = tmp_path / "out"
    code, table, message = archive(recordings, recordings / "a", "--out", out)
    assert code == 1
    rows = summary(out)
    names = [os.path.basename(recordings) + "/" + name for name in ("cut", "damaged.mp4", "images")]
    assert list(rows) == ["a/clip.mp4", "b/clip.mp4", *names]
    cut, damaged, images = (rows[name] for name in names)
    failures = [line for line in message.splitlines() if line.startswith("failed: ")]
    assert failures == [f"failed: {cut['error']}", f"failed: {damaged['error']}"]
    assert damaged["output"] is None and "damaged.mp4: it cannot be opened" in damaged["error"]
    assert cut["output"] and cut["frames"] == 2 and "cut: image 2.png cannot be read" in cut["error"]
    assert images["frames"] == 3 and images["bytes"] == sum(
        os.path.getsize(file) for file in recordings.glob("images/*")
    )
    assert "recordings        5: 1 cannot be read, 1 not to the end" in table
    assert len({row["output"] for row in rows.values()}) == 5
    written = [row["output"] for row in rows.values() if row["output"]]
    assert {file.name for file in out.iterdir()} == {*written, "archive.json", "summary.parquet"}
    result = tmp_path / "run.parquet"
    options = ("--model", model, "--threshold", 0.02, "--kernels", "rows")
    assert neuroflow("run", recordings / "a" / "clip.mp4", *options, "--out", result)[0] == 0
    found, run = (pyarrow.parquet.read_table(path) for path in (out / rows["a/clip.mp4"]["output"], result))
    for name in ("frame", "time_s", "skipped", "active", "key_frame"):
        assert found[name].to_pylist() == run[name].to_pylist()
    vectors = [np.stack(table["embedding"].to_numpy()) for table in (found, run)]
    np.testing.assert_allclose(*vectors, rtol=0, atol=1e-5)
    reasons = found["key_frame_reason"].to_pylist()
    assert reasons[0] == "first" and [reason is not None for reason in reasons] == found["key_frame"].to_pylist()
    shown = pyarrow.parquet.read_table(out / rows["b/clip.mp4"]["output"])
    assert [shown["key_frame_reason"][number].as_py() for number in (0, 9)] == ["first", "cut"]
    assert rows["b/clip.mp4"]["key_frames"] == sum(shown["key_frame"].to_pylist())
    assert rows["b/clip.mp4"]["skipped"] == np.mean(shown["skipped"].to_pylist())
    about = json.loads(shown.schema.metadata[b"neuroflow"])
    assert about["source"].endswith("b/clip.mp4") and about["threshold"] == 0.02


def test_going_on(tmp_path, archive, monkeypatch, recordings):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert archive(recordings, "--out", whole)[0] == 1
    encode, calls = Encoder.encode, []

    def interrupted(self, part):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(part)
        return encode(self, part)

    monkeypatch.setattr(Encoder, "encode", interrupted)
    code, table, message = archive(recordings, "--out", out)
    assert code == 130 and table == "" and "--resume" in message and len(held(out)) == 3
    code, _, message = archive(recordings, "--out", out)
    assert code == 2 and "there is an archive already; --resume continues it" in message
    code, _, message = archive(recordings, "--out", out, "--resume", "--size", "64")
    assert code == 2 and "archive.json: was made with size None, not [64, 64]; use that, or give another" in message
    monkeypatch.setattr(Encoder, "encode", lambda self, part: calls.append(part) or encode(self, part))
    assert archive(recordings, "--out", out, "--resume")[0] == 1
    assert held(out) == held(whole) and len(set(calls)) == len(calls) == 5
    # What is damaged, gone or of another size is encoded again, and so is what failed; nothing else.
    rows = summary(out)
    (out / rows["a/clip.mp4"]["output"]).write_bytes(b"")
    images = [row["output"] for name, row in rows.items() if name.endswith("images")]
    (out / images[0]).unlink()
    calls.clear()
    assert archive(recordings, "--out", out, "--resume")[0] == 1
    assert sorted(part.video.path.name for part in calls) == ["clip.mp4", "damaged.mp4", "images"]
    assert held(out) == held(whole)
    more = tmp_path / "more.mp4"
    shutil.copy(recordings / "a" / "clip.mp4", more)
    assert archive(more, "--out", out, "--resume")[0] == 0
    assert len(summary(out)) == 6
    write_recording(more, 30)
    assert archive(more, "--out", out, "--resume")[0] == 0
    assert [row["frames"] for name, row in summary(out).items() if "more" in name] == [30]


def test_parts_are_joined_to_the_same_file(tmp_path, model, monkeypatch):
    monkeypatch.setattr(serve, "LEAST", 30)
    monkeypatch.setattr(serve, "ROWS", 32)
    path = write_recording(tmp_path / "long.mp4", 120, cuts=(50,))
    config = NeuroFlowConfig(threshold=0.02, max_age=24, cut_share=None, cut_surprise=None).reproducible()

    def load():
        return tiny("siglip", SIDE), Preprocessor(SIDE, SIDE)

    (tmp_path / "out").mkdir()
    encoding = Encoding(tmp_path / "out", load, config, None, 1, 16, 10**6, {})
    video = Video.at(path)
    parts = serve._split(encoding, load()[1], video, 3)
    # Shots begin at 0, 24, 48, 50, 74 and 98.
    assert [(part.begin, part.end, part.why) for part in parts] == [
        (0, 48, "first"),
        (48, 74, "age"),
        (74, None, "age"),
    ]
    encoder = Encoder(encoding)
    assert encoder.encode(Part(video)) is None
    whole = held(encoding.out)
    table = pyarrow.parquet.read_table(encoding.out / Part(video).output)
    reasons = {row["frame"]: row["key_frame_reason"] for row in table.to_pylist() if row["key_frame"]}
    assert reasons == {0: "first", 24: "age", 48: "age", 50: "cut", 74: "age", 98: "age"}
    (encoding.out / Part(video).output).unlink()
    assert [encoder.encode(part) for part in reversed(parts)] == [None] * 3
    serve._join(encoding, video, parts)
    assert held(encoding.out)[Part(video).output] == whole[Part(video).output]


def test_bad_input_is_one_line(tmp_path, archive, recordings):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    cases = {
        (tmp_path / "absent",): "no such file or directory",
        (tmp_path / "*.mp4",): "a pattern that something matches",
        (tmp_path / "empty",): "holds no video",
        (recordings, "--workers", 2): "--workers: needs Ray; also give --ray local",
        (recordings, "--by-shot"): "--by-shot: needs Ray",
        (recordings, "--arch", "F"): "arch is 'F'",
        (recordings, "--mid"): "unrecognized arguments",
    }
    for arguments, words in cases.items():
        code, table, message = archive(*arguments, "--out", out)
        assert code == 2 and table == "" and words in message and message.count("\n") == 1, message
    code, _, message = archive(recordings, "--out", recordings / "damaged.mp4")
    assert code == 2 and "damaged.mp4: cannot be written" in message
    assert not out.exists()


def test_names_that_are_no_text(tmp_path, archive):
    path = os.fsencode(tmp_path / "recordings") + b"/\xff,\n.mp4"
    write_recording(tmp_path / "recordings" / "clip.mp4", 2).rename(os.fsdecode(path))
    os.symlink("nowhere", tmp_path / "recordings" / "dangling.mp4")
    code, _, message = archive(tmp_path / "recordings", "--out", tmp_path / "out")
    assert code == 1 and "nowhere: no such file" in message
    first, second = summary(tmp_path / "out").values()
    assert {first["frames"], second["frames"]} == {0, 2}
    assert archive(tmp_path / "recordings", "--out", tmp_path / "out", "--resume")[0] == 1


def test_patterns_and_links_name_a_recording_once(tmp_path):
    path = write_recording(tmp_path / "day10" / "clip.mp4", 1)
    other = write_recording(tmp_path / "day2" / "clip.mp4", 1)
    (tmp_path / "link.mp4").symlink_to(path)
    found = find_videos([tmp_path / "**" / "*.mp4", tmp_path / "day10", tmp_path / "link.mp4"])
    assert [video.path for video in found] == [other.resolve(), path.resolve()]

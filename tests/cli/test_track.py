"""`neuroflow track` as a user meets it."""

import json
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from models import tiny
from neuroflow.cli import track
from neuroflow.street import STREET, load_classes
from neuroflow.video.encode import VideoWriter
from neuroflow.video.source import Source
from neuroflow_cli import main
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("one_thread")
HEIGHT, WIDTH, FRAMES = 160, 240, 24
SIDE = 48


def place(number, t):
    """Left and top of square `number` in frame t: one drives right, the other left, below it."""
    return ((4 * t, 8), (WIDTH - SIDE - 6 * t, 96))[number]


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Frames of a still texture, then two squares that drive over it from the sides."""
    random = np.random.default_rng(0)
    still = random.integers(60, 196, (HEIGHT // 8, WIDTH // 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    looks = [random.integers(0, 256, (SIDE // 8, SIDE // 8, 3)).repeat(8, 0).repeat(8, 1) for _ in range(2)]
    path = tmp_path_factory.mktemp("clips") / "squares.mp4"
    with VideoWriter(path, Fraction(10)) as writer:
        for t in range(-2, FRAMES - 2):
            image = still.copy()
            for number, look in enumerate(looks):
                left, top = place(number, t)
                if t >= 0:
                    image[top : top + SIDE, left : left + SIDE] = look
            writer.write(image)
    return path


@pytest.fixture
def neuroflow_track(capsys):
    """neuroflow_track(source, *options) -> exit code, stdout, stderr."""

    def call(source, *options):
        try:
            code = main(["track", str(source), *map(str, options)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def overlap(box, other):
    left, top, right, bottom = *np.maximum(box[:2], other[:2]), *np.minimum(box[2:], other[2:])
    common = max(right - left, 0) * max(bottom - top, 0)
    areas = [(one[2] - one[0]) * (one[3] - one[1]) for one in (box, other)]
    return common / (sum(areas) - common)


def test_squares_are_followed(neuroflow_track, clip, tmp_path):
    out, overlay = tmp_path / "tracks.json", tmp_path / "overlay.mp4"
    code, report, progress = neuroflow_track(clip, "--out", out, "--overlay", overlay, "--ema-decay", 0.02)
    assert code == 0, progress
    assert f"{FRAMES}/{FRAMES}" in progress and "2 objects" in progress
    written = json.loads(out.read_text())
    assert written["size"] == [WIDTH, HEIGHT] and written["ema_decay"] == 0.02
    frames = written["frames"]
    assert [frame["frame"] for frame in frames] == list(range(FRAMES))
    assert frames[5]["time_s"] == pytest.approx(0.5)
    assert frames[0]["objects"] == frames[1]["objects"] == []
    # The wake of what moved on fades, so that boxes reach as far as patches and wake do.
    for t, frame in enumerate(frames[4:14], 2):
        boxes = {one["id"]: one["box"] for one in frame["objects"]}
        assert set(boxes) == {1, 2}
        for number in range(2):
            left, top = place(number, t)
            assert overlap(boxes[number + 1], (left, top, left + SIDE, top + SIDE)) > 0.4
    names = load_classes().names
    assert all(one["label"] in names and -1 <= one["cosine"] <= 1 for frame in frames for one in frame["objects"])
    long = [one for one in written["tracks"] if one["seen"] >= 15]
    assert [one["id"] for one in long] == [1, 2]
    for one in long:
        seen = [frame["frame"] for frame in frames for other in frame["objects"] if other["id"] == one["id"]]
        assert (one["first"], one["last"], one["seen"]) == (seen[0], seen[-1], len(seen))
    assert f"tracks            {len(written['tracks'])}, 2 of them seen in 15 frames or more" in report
    pictures = [frame.rgb(HEIGHT, WIDTH) for frame in Source(str(overlay))]
    originals = [frame.rgb(HEIGHT, WIDTH) for frame in Source(str(clip))]
    assert len(pictures) == FRAMES
    changed = [np.abs(a.astype(int) - b).max(2) > 60 for a, b in zip(pictures, originals, strict=True)]
    left, top, _, bottom = (round(edge) for edge in frames[10]["objects"][0]["box"])
    assert changed[10][top + 4 : bottom - 4, left : left + 2].mean() > 0.5 and changed[0].mean() < 0.01
    assert sorted(file.name for file in tmp_path.iterdir()) == ["overlay.mp4", "tracks.json"]


def test_boxes_are_where_the_middle_lies_that_a_model_asks_for(neuroflow_track, clip, tmp_path):
    out, model = tmp_path / "tracks.json", tmp_path / "model"
    shutil.copytree(STREET, model)
    settings = {"size": {"shortest_edge": HEIGHT}, "do_center_crop": True, "crop_size": HEIGHT}
    (model / "preprocessor_config.json").write_text(json.dumps(settings))
    assert neuroflow_track(clip, "--model", model, "--out", out, "--max-frames", 16)[0] == 0
    frame = json.loads(out.read_text())["frames"][14]
    for number in range(2):
        left, top = place(number, 12)
        square = left, top, left + SIDE, top + SIDE
        assert max(overlap(one["box"], square) for one in frame["objects"]) > 0.4


def test_labels_name_the_objects_of_another_model(neuroflow_track, clip, tmp_path):
    out, model, labels = tmp_path / "tracks.json", tmp_path / "vit", tmp_path / "texts.safetensors"
    tiny("vit", 96).save_pretrained(model)
    options = ("--model", model, "--size", "240x160", "--max-frames", 6, "--stride", 2, "--out", out)
    assert neuroflow_track(clip, *options)[0] == 0
    written = json.loads(out.read_text())
    assert [frame["frame"] for frame in written["frames"]] == [0, 2, 4, 6, 8, 10]
    assert written["tracks"] and all("label" not in one for one in written["tracks"])
    # Two texts may stand for one name.
    save_file({"embeddings": torch.eye(3, 64)}, labels, {"names": json.dumps(["box", "van", "van"])})
    assert neuroflow_track(clip, *options, "--labels", labels)[0] == 0
    assert {one["label"] for one in json.loads(out.read_text())["tracks"]} <= {"box", "van"}


def error_of(neuroflow_track, *arguments):
    code, table, message = neuroflow_track(*arguments)
    assert code == 2 and table == ""
    lines = [line for line in message.splitlines() if line.startswith("neuroflow")]
    assert len(lines) == 1 and "Traceback" not in message
    return lines[0]


def test_what_is_wrong_is_said_in_one_line(neuroflow_track, clip, tmp_path):
    assert "none.mp4: no such file or directory" in error_of(neuroflow_track, tmp_path / "none.mp4")
    assert "no such directory; give a saved model" in error_of(neuroflow_track, clip, "--model", "./none")
    out = "--out tracks.txt: cannot be written; give a .json file in a directory that exists"
    assert out in error_of(neuroflow_track, clip, "--out", "tracks.txt")
    assert "give a .mp4 file" in error_of(neuroflow_track, clip, "--overlay", tmp_path / "none" / "overlay.mp4")
    assert "'-1' is not a number above 0" in error_of(neuroflow_track, clip, "--threshold=-1")
    assert "'2' is not a number between 0 and 1" in error_of(neuroflow_track, clip, "--ema-decay", "2")


def test_a_model_without_a_token_for_each_patch_is_refused(neuroflow_track, clip, tmp_path):
    tiny("sam", 96).save_pretrained(tmp_path / "sam")
    out = tmp_path / "tracks.json"
    message = error_of(neuroflow_track, clip, "--model", tmp_path / "sam", "--out", out)
    assert "tokens have shape" in message and "accepted is [144, D], one for each patch" in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        (None, None, "labels.safetensors: cannot be read (No such file"),
        ({"embeddings": torch.ones(2, 192)}, None, "labels.safetensors: holds no names; accepted are embeddings"),
        ({"vectors": torch.ones(2, 192)}, {"names": '["a", "b"]'}, "labels.safetensors: holds no embeddings; accepted"),
        ({"embeddings": torch.ones(2, 192)}, {"names": '["a"]'}, "holds embeddings [2, 192] and 1 names; accepted are"),
        ({"embeddings": torch.ones(1, 64)}, {"names": '["a"]'}, "classes have shape [1, 64]; accepted is [1, 192]"),
    ],
    ids=["no file", "no names", "no embeddings", "too few names", "of another model"],
)
def test_labels_that_do_not_fit_are_refused(neuroflow_track, clip, tmp_path, tensors, metadata, said):
    path = tmp_path / "labels.safetensors"
    if tensors is not None:
        save_file(tensors, path, metadata)
    assert said in error_of(neuroflow_track, clip, "--labels", path)


def test_an_interrupted_run_leaves_nothing_and_says_that_it_starts_over(monkeypatch, neuroflow_track, clip, tmp_path):
    tracked = track.track_frames

    def stopped(*arguments):
        for number, one in enumerate(tracked(*arguments)):
            if number == 3:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(track, "track_frames", stopped)
    out, overlay = tmp_path / "tracks.json", tmp_path / "overlay.mp4"
    code, table, message = neuroflow_track(clip, "--out", out, "--overlay", overlay)
    assert code == 130 and table == ""
    assert "interrupted after 3 frames: nothing is written; run it again from the start" in message
    assert list(tmp_path.iterdir()) == []


def test_help_reads_well(neuroflow_track):
    code, text, _ = neuroflow_track("--help")
    assert code == 0
    for words in ("Follow what moves", "to start over", "--labels FILE", "--overlay FILE", "default: 1.6", "examples:"):
        assert words in text
    assert max(len(line) for line in text.splitlines()) <= 120

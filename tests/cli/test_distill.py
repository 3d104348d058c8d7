"""`neuroflow distill`, and `neuroflow run --weights` with what it wrote."""

import argparse
import contextlib
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from models import tiny
from neuroflow.cli.distill import _outside
from neuroflow.distillation import Distillation, Outside
from neuroflow.street import STREET
from neuroflow.video.encode import VideoWriter
from neuroflow.weights import distilled_config
from safetensors import safe_open

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 32
OPTIONS = (
    "--epochs",
    3,
    "--batch",
    8,
    "--clips",
    2,
    "--strides",
    1,
    "--rate",
    1e-3,
    "--thresholds",
    0.01,
    0.2,
    "--forgetting",
    1,
)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "siglip"
    tiny("siglip", SIDE).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def footage(tmp_path_factory):
    """A directory of videos, one of them in a directory of its own, one of others, and one of class folders."""
    root = tmp_path_factory.mktemp("footage")
    for directory in ("videos/more", "others", "street/car", "street/tree"):
        (root / directory).mkdir(parents=True)
    random = np.random.default_rng(0)
    names = [f"videos/{name}" for name in ("a", "b", "more/c")] + [
        "others/0",
        "others/1",
        "street/car/0",
        "street/tree/0",
    ]
    for name in names:
        still = random.integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        with VideoWriter(root / f"{name}.mp4", Fraction(10)) as writer:
            for number in range(6):
                image = still.copy()
                image[16:40, 4 * number : 4 * number + 24] = 255
                writer.write(image)
    return root


@pytest.fixture
def distil(neuroflow, footage, model):
    """distil(out, *options) -> the same of `distill` on the footage."""
    outside = ("--outside", footage / "others")
    return lambda out, *options: neuroflow(
        "distill", footage / "videos", "--model", model, *outside, "--out", out, *OPTIONS, *options
    )


@pytest.mark.parametrize(
    ("arch", "gate"),
    [
        ("B", "active, budget 0.1, floor 4, signal patch, reference ema 0.01"),
        ("dual", "dual, budget 0.1, floor 4, signal patch, reference refreshed"),
    ],
)
def test_the_main_job(neuroflow, distil, footage, model, tmp_path, arch, gate):
    out = tmp_path / "b.safetensors"
    code, table, progress = distil(out, "--arch", arch, "--train", "last-2")
    assert code == 0, progress
    assert "2 for training, 1 held out" in table and f"written           {out}, epoch" in table
    assert "epoch 3" in progress and "evaluation 3" in progress
    rows = [line.split() for line in table.splitlines() if line.split()[0][0].isdecimal()]
    with safe_open(out, "pt") as file:
        history = json.loads(file.metadata()["history"])
        assert {name.split(".")[2] for name in file.keys() if "layers" in name} == {"2", "3"}  # noqa: SIM118
    assert [row[0] for row in rows] == list("0123") and [len(row) for row in rows] == [5, 6, 6, 6]
    for row, epoch in zip(rows, history, strict=True):
        assert f"{epoch['fidelity']:.4f}" in row and row[-1] == f"{epoch['outside']:.1%}"
    assert [file.name for file in tmp_path.iterdir()] == [out.name]

    clip = footage / "videos" / "a.mp4"  # the one that is held out
    result = tmp_path / "result.npz"
    code, table, message = neuroflow("run", clip, "--model", model, "--weights", out, "--compare", "--out", result)
    assert code == 0, message
    assert f"NeuroFlow         {gate}" in table
    best = max(history, key=lambda epoch: epoch["fidelity"])
    assert np.load(result)["cosine"][1:].mean() == pytest.approx(best["fidelity"], abs=1e-5)
    other = neuroflow("run", clip, "--model", model, "--weights", out, "--arch", "E", "--threshold", 0.5)[1]
    assert "NeuroFlow         context, threshold 0.5" in other


def test_resumed_after_a_kill_is_as_uninterrupted(distil, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "b.safetensors"
    assert distil(whole)[0] == 0
    train = Distillation.train

    def killed(self, videos):
        if len(self.history) == 2:
            raise KeyboardInterrupt
        return train(self, videos)

    monkeypatch.setattr(Distillation, "train", killed)
    code, _, message = distil(out)
    assert code == 130 and "the same command with --resume continues" in message and not out.exists()
    monkeypatch.undo()
    code, _, message = distil(out, "--resume", "--epochs", 4)
    assert code == 2 and "other settings" in message and message.count("\n") == 1
    code, table, _ = distil(out, "--resume")
    assert code == 0 and [line.split()[0] for line in table.splitlines()[3:-1]] == list("0123")
    with safe_open(out, "pt") as ours, safe_open(whole, "pt") as other:
        assert ours.metadata() == other.metadata() and set(ours.keys()) == set(other.keys())
        assert all(torch.equal(ours.get_tensor(name), other.get_tensor(name)) for name in ours.keys())  # noqa: SIM118
    code, _, message = distil(out, "--resume")
    assert code == 2 and "--resume: there is no unfinished" in message


def test_it_ends_when_it_forgets(distil, tmp_path):
    out = tmp_path / "b.safetensors"
    code, table, _ = distil(out, "--forgetting", 0.1, "--patience", 1, "--rate", 0.5, "--skip", 0.25)
    assert code == 0 and "ended early       more than 10.0% of the outside videos were forgotten" in table
    assert distilled_config(out).arch == "active"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "b.pt"], "--out b.pt: cannot be written; give a .safetensors file"),
        (["--out", "no/b.safetensors"], "--out no/b.safetensors: cannot be written"),
        (["--resume"], "--resume: there is no unfinished b.safetensors"),
        (["--arch", "F"], "arch is 'F'; accepted is one of A to E or their names"),
        (["--train", "tail"], "train is 'tail'; accepted is 'head', 'last-K' or 'all'"),
        (["--train", "last-9"], "accepted is last-4 at most"),
        (["--thresholds", 0.2, 0.1], "thresholds is (0.2, 0.1); accepted is"),
        (["--skip", 1], "'1' is not a number between 0 and 1"),
        (["--outside", "nowhere"], "--outside nowhere: no such directory"),
        (["--outside", "empty"], "--outside empty: holds no video; accepted are files in .avi"),
        (["--max-frames", 1], "no video has a frame after its first"),
    ],
)
def test_what_cannot_be_done_is_one_line(distil, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("neuroflow.cli.distill._progress", lambda *_: contextlib.nullcontext())
    (tmp_path / "empty").mkdir()
    code, _, message = distil("b.safetensors", *options)
    assert code == 2 and message.count("\n") == 1 and "error: " in message and words in message
    assert not any(file.suffix == ".safetensors" for file in tmp_path.iterdir())


@pytest.mark.parametrize(("content", "words"), [(None, "no such directory"), (0, "holds no video"), (1, "give 2 or")])
def test_a_folder_without_videos_is_one_line(neuroflow, model, tmp_path, content, words):
    videos = tmp_path / "videos"
    if content is not None:
        videos.mkdir()
        (videos / "notes.txt").write_text("no video")
        for number in range(content):
            (videos / f"{number}.mp4").write_bytes(b"")
    code, table, message = neuroflow("distill", videos, "--model", model, "--out", tmp_path / "b.safetensors")
    assert code == 2 and table == "" and message.count("\n") == 1 and words in message


def test_a_model_without_pooled_output_is_one_line(neuroflow, footage, tmp_path):
    tiny("ijepa", SIDE).save_pretrained(tmp_path / "ijepa")
    command = ("distill", footage / "videos", "--model", tmp_path / "ijepa", "--out", tmp_path / "b.safetensors")
    code, _, message = neuroflow(*command)
    assert code == 2 and message.count("\n") == 1
    assert "has no pooled output; accepted is a model with a pooling head or a CLS token" in message


def test_class_folders_of_the_packages_tower(neuroflow, footage, tmp_path):
    command = ("distill", footage / "videos", "--outside", footage / "street", "--out", tmp_path / "b.safetensors")
    code, _, message = neuroflow(*command)
    assert code == 2 and "has a folder 'tree'; the model's classes are car, van" in message


def test_classes_count_where_every_video_is_in_a_folder(tmp_path):
    arguments = argparse.Namespace(outside=tmp_path, model=None)
    paths = [tmp_path / "van" / "0.mp4", tmp_path / "car" / "1.mp4"]
    assert _outside(arguments, paths, ["0", "1"]).labels == [1, 0]
    assert _outside(arguments, [*paths, tmp_path / "2.mp4"], ["0", "1", "2"]) == Outside(["0", "1", "2"])


def test_weights_that_do_not_fit_are_one_line(neuroflow, footage, model, tmp_path):
    clip = footage / "videos" / "a.mp4"
    for weights, words in ((tmp_path / "none", "cannot be read"), (STREET / "model.safetensors", "no distilled")):
        code, _, message = neuroflow("run", clip, "--model", model, "--weights", weights)
        assert code == 2 and words in message and message.strip().count("\n") == 0


def test_help_reads_well(neuroflow):
    code, text, _ = neuroflow("distill", "--help")
    assert code == 0 and all(len(line) <= 120 for line in text.splitlines())
    assert "usage: neuroflow distill [-h]" in text and "neuroflow run clip.mp4 --weights" in text

"""A real ImageNet ViT-Ti on real photographs and footage, by the command that a user types."""

import neuroflow
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import photograph, vit_tiny
from neuroflow_cli import main


@pytest.fixture(scope="module")
def classifier(data, tmp_path_factory):
    """The model, and the Hugging Face directory that it was saved to."""
    directory = tmp_path_factory.mktemp("vit-tiny")
    return vit_tiny(data("weights/vit_tiny_patch16_224.safetensors"), directory), directory


def test_the_converted_classifier_recognises_photographs(classifier, data):
    model, _ = classifier
    paths = sorted(data("imagenet256").glob("*.jpg"))[::5]
    assert len(paths) == 100
    with torch.inference_mode():
        predicted = model(torch.stack([photograph(path) for path in paths])).logits.argmax(-1)
    correct = sum(int(path.name[:4]) == label for path, label in zip(paths, predicted.tolist(), strict=True))
    assert 0.80 <= correct / 100 <= 0.86


def test_the_idle_clip_keeps_its_features(classifier, data, tmp_path, capsys):
    """Context, its defaults, the measuring protocol's 120 frames: 97 % skipped at a cosine of 0.99."""
    video, out = data("videos/intel_bottle-detection.mp4"), tmp_path / "result.npz"
    command = ["run", str(video), "--model", str(classifier[1]), "--arch", "context", "--compare"]
    assert main([*command, "--max-frames", "120", "--out", str(out)]) == 0
    print(capsys.readouterr().out)
    result = np.load(out)
    assert result["skipped"][1:].mean() >= 0.97
    assert result["cosine"][1:].mean() >= 0.99


def test_a_classifier_is_patched_inside(classifier, data):
    """The vision tower lies inside the classification model, whose own output class comes back."""
    model, _ = classifier
    photo = photograph(sorted(data("imagenet256").glob("*.jpg"))[0])[None]
    with torch.inference_mode():
        dense = model(photo)
        neuroflow.enable_cache(model)
        sparse = [model(photo) for _ in range(2)]
        skipped = neuroflow.summary(model).streams["default"].skipped
        neuroflow.disable_cache(model)
    assert type(sparse[1]) is type(dense)
    assert skipped == pytest.approx((1 - 4 / 196) / 2)
    assert F.cosine_similarity(sparse[1].logits, dense.logits).item() > 0.9999


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("intel_one-by-one-person-detection", 0.8),
        ("sam2_05_default_juggle", 0.75),
        ("degirum_Traffic", 0.7),
        ("degirum_aerial_crossing_pedestrians_bikes_cropped", 0),
    ],
)
def test_the_default_stays_close_on_footage(classifier, data, tmp_path, name, skipped):
    """A still camera saves most patches; a drone's saves none, and costs no fidelity."""
    out = tmp_path / "result.npz"
    video = data(f"videos/{name}.mp4")
    command = ["run", str(video), "--model", str(classifier[1]), "--compare", "--max-frames", "30"]
    assert main([*command, "--out", str(out)]) == 0
    result = np.load(out)
    assert result["cosine"][1:].mean() >= 0.99
    assert result["skipped"][1:].mean() >= skipped


def test_every_cut_of_a_slideshow_is_a_key_frame(classifier, data, tmp_path):
    """A slide stands for 31 frames: its first is encoded whole, its duplicates cost the floor."""
    out = tmp_path / "result.npz"
    video = data("videos/degirum_example_video.mp4")
    command = ["run", str(video), "--model", str(classifier[1]), "--compare", "--max-frames", "100"]
    assert main([*command, "--out", str(out)]) == 0
    result = np.load(out)
    assert result["key_frame"].nonzero()[0].tolist() == [0, 31, 62, 93]
    assert result["cosine"][[31, 62, 93]].min() >= 0.999 and result["cosine"][[32, 63, 94]].min() >= 0.999
    assert (result["active"][~result["key_frame"]] == 4).all()

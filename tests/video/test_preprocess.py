"""Pixels as the measuring protocol has them, and as a model's own settings ask for them."""

import json

import av
import numpy as np
import pytest
import torch
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Frame


@pytest.fixture
def frame():
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    return Frame(0, 0.0, av.VideoFrame.from_ndarray(image, format="rgb24"))


def test_default_is_the_measuring_protocol(frame):
    rgb = frame.picture.reformat(width=32, height=16, format="rgb24", interpolation="AREA").to_ndarray()
    expected = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 127.5 - 1
    pixels = Preprocessor(16, 32)(frame)
    assert pixels.shape == (1, 3, 16, 32) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_area_resize_averages(frame):
    image = frame.picture.to_ndarray().astype(float)
    blocks = image.reshape(3, 16, 5, 16, 3).mean((1, 3))
    # swscale works in fixed point.
    assert np.abs(frame.rgb(3, 5) - blocks).max() <= 2


def test_frames_of_other_sizes_and_formats_do_not_disturb_each_other():
    random, preprocess = np.random.default_rng(0), Preprocessor(16, 32)
    for height, width, pixel_format in ((48, 80, "rgb24"), (48, 80, "yuv420p"), (96, 64, "yuv420p"), (48, 80, "rgb24")):
        image = av.VideoFrame.from_ndarray(random.integers(0, 256, (height, width, 3), np.uint8), format="rgb24")
        frame = Frame(0, 0.0, image.reformat(format=pixel_format))
        assert torch.equal(preprocess(frame), Preprocessor(16, 32)(frame))


SETTINGS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 1 / 255}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, lambda x: (x / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.3, 0.4])),
        ({"do_normalize": False}, lambda x: x / 255),
        ({"do_rescale": False, "do_normalize": False}, lambda x: x),
    ],
)
def test_the_models_own_settings_are_read(tmp_path, frame, change, expected):
    settings = {**SETTINGS, "image_processor_type": "SiglipImageProcessor", **change}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    pixels = Preprocessor.from_pretrained(str(tmp_path), Preprocessor(16, 32))(frame)[0].permute(1, 2, 0)
    torch.testing.assert_close(pixels, expected(torch.from_numpy(frame.rgb(16, 32).copy()).float()))


def test_arithmetic_is_float32_step_by_step(frame):
    """Tables that were measured before stay what they are: the same bits, however the memory is gone through."""
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    expected = (frame.rgb(16, 32) * np.float32(1 / 255) - np.float32(mean)) / np.float32(std)
    pixels = Preprocessor(16, 32, mean=mean, std=std)(frame)
    assert pixels.is_contiguous() and np.array_equal(pixels[0].permute(1, 2, 0).numpy(), expected)


def test_without_settings_the_usual_is_said(tmp_path):
    usual = Preprocessor(16, 32, mean=(0.4815, 0.5, 0.5), std=(0.25, 0.5, 0.5))
    with pytest.warns(UserWarning, match="no preprocessor_config.json: .* by mean 0.481 0.5 0.5, std 0.25 0.5 0.5"):
        assert Preprocessor.from_pretrained(str(tmp_path), usual) == usual


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, (16, 32)),
        ({"size": 24}, (24, 24)),
        ({"size": [24, 40]}, (24, 40)),
        ({"size": {"height": 24, "width": 40}, "crop_size": None}, (24, 40)),
        ({"size": {"shortest_edge": 24}, "do_center_crop": False, "crop_size": 20}, (24, 24)),
        ({"size": {"shortest_edge": 24}, "do_center_crop": True, "crop_size": {"height": 20, "width": 22}}, (20, 22)),
        ({"size": {"shortest_edge": 24}, "crop_size": 20}, (20, 20)),
        ({"size": {"longest_edge": 24}}, (16, 32)),
    ],
)
def test_size_is_what_the_settings_end_with(tmp_path, settings, size):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    usual = Preprocessor(16, 32, mean=(0.1, 0.2, 0.3))
    assert Preprocessor.from_pretrained(str(tmp_path), usual) == Preprocessor(*size, mean=usual.mean)

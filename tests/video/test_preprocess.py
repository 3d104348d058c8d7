"""Pixels as the measuring protocol has them, and as a model's own settings ask for them."""

import json

import av
import numpy as np
import pytest
import torch
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Frame, SourceError
from PIL import Image
from transformers import CLIPImageProcessorPil


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


CROP = {"do_center_crop": True, "crop_size": {"height": 20, "width": 22}}


@pytest.mark.parametrize(
    ("settings", "size", "how"),
    [
        ({}, (16, 32), {}),
        ({"size": 24}, (24, 24), {}),
        ({"size": [24, 40]}, (24, 40), {}),
        ({"size": {"height": 24, "width": 40, "shortest_edge": None}, "crop_size": None}, (24, 40), {}),
        ({"size": 24, "do_center_crop": False, "crop_size": 20}, (24, 24), {}),
        ({"size": {"shortest_edge": 24}, **CROP}, (20, 22), {"crop": True, "resize": 24}),
        ({"size": {"height": 24, "width": 40}, **CROP}, (20, 22), {"crop": True, "resize": (24, 40)}),
        ({"size": 24, "crop_size": 20}, (20, 20), {"crop": True, "resize": 24}),
        ({"do_resize": False, **CROP}, (20, 22), {"crop": True}),
        (CROP, (20, 22), {"crop": True, "resize": 20}),
        ({"size": 24, "do_center_crop": True}, (16, 32), {"crop": True, "resize": 24}),
    ],
)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_size_and_crop_are_what_the_settings_say(tmp_path, recwarn, file, settings, size, how):
    (tmp_path / file).write_text(json.dumps({"image_processor": settings} if file[2] == "o" else settings))
    usual = Preprocessor(16, 32, mean=(0.1, 0.2, 0.3))
    assert Preprocessor.from_pretrained(str(tmp_path), usual) == Preprocessor(*size, mean=usual.mean, **how)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("settings", "size", "name"),
    [
        ({"size": {"shortest_edge": 24}}, (24, 24), "size"),
        ({"size": {"longest_edge": 24}, "do_pad": True}, (16, 32), "size, do_pad"),
        ({"size": 24, "do_resize": False}, (24, 24), "do_resize"),
    ],
)
def test_what_the_settings_say_and_is_not_done_is_said(tmp_path, settings, size, name):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match=f"json: {name} is not supported: frames are resized to {size[1]}x{size[0]}"):
        assert Preprocessor.from_pretrained(str(tmp_path), Preprocessor(16, 32)) == Preprocessor(*size)


@pytest.mark.parametrize(
    ("resize", "crop", "size"),
    [(24, (24, 24), (48, 80)), (24, (20, 23), (80, 48)), ((30, 30), (20, 20), (48, 80)), (None, (40, 90), (48, 80))],
)
def test_the_middle_is_what_transformers_cuts(resize, crop, size):
    """At a scale of a whole number, which neither filter can get wrong, on rows and columns of one level each."""
    image = np.zeros((*size, 3), np.uint8)
    image[..., 0], image[..., 1] = 3 * np.arange(size[0])[:, None], 3 * np.arange(size[1])
    processor = CLIPImageProcessorPil(
        do_resize=resize is not None,
        size={"shortest_edge": resize} if isinstance(resize, int) else {"height": 30, "width": 30},
        resample=Image.Resampling.BOX,
        crop_size=dict(zip(("height", "width"), crop, strict=True)),
    )
    expected = processor(Image.fromarray(image), return_tensors="pt").pixel_values
    mean, std = processor.image_mean, processor.image_std
    preprocess = Preprocessor(*crop, mean=tuple(mean), std=tuple(std), crop=True, resize=resize)
    frame = Frame(0, 0.0, av.VideoFrame.from_ndarray(image, format="rgb24"))
    pixels = preprocess(frame)
    assert pixels.shape == expected.shape and (pixels - expected).abs().max() < 0.05
    left, top, right, bottom = preprocess.region(frame.size)
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((size[1] / 2, size[0] / 2), abs=2)


def test_a_frame_too_long_for_the_crop_is_an_error():
    frame = Frame(7, 0.0, av.VideoFrame(9000, 1, "rgb24"))
    with pytest.raises(SourceError, match="frame 7 is 9000x1: 2016000x224 before the crop is too large; give --size"):
        Preprocessor(224, 224, crop=True, resize=224)(frame)
    assert Preprocessor(224, 224, crop=True, resize=224).resized(16, 32)(frame).shape == (1, 3, 16, 32)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("\xff\xfe{}", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("null", "holds None; accepted is a JSON object"),
        ("[1]", "holds \\[1\\]; accepted is a JSON object"),
        ('{"size": "224"}', "size is '224'; accepted is an integer"),
        ('{"size": 0}', "size is 0"),
        ('{"size": -1}', "size is -1"),
        ('{"size": 2.5}', "size is 2.5"),
        ('{"size": true}', "size is True"),
        ('{"size": NaN}', "size is nan"),
        ('{"size": []}', "size is "),
        ('{"size": [1, 2, 3]}', "size is "),
        ('{"size": {}}', "size is {}"),
        ('{"size": {"height": 24}}', "size is {'height': 24}"),
        ('{"size": {"height": 24, "width": "x"}}', "size is "),
        ('{"size": 1000000000}', "178,956,970 pixels at most"),
        ('{"crop_size": [[24]]}', "crop_size is "),
        ('{"do_resize": "no"}', "do_resize is 'no'; accepted is true or false"),
        ('{"do_normalize": 0}', "do_normalize is 0"),
        ('{"do_center_crop": "yes"}', "do_center_crop is 'yes'"),
        ('{"rescale_factor": 0}', "rescale_factor is 0; accepted is a number above 0"),
        ('{"rescale_factor": Infinity}', "rescale_factor is inf"),
        ('{"rescale_factor": "1/255"}', "rescale_factor is '1/255'"),
        ('{"image_mean": [0.5]}', "image_mean is .*; accepted is 3 numbers, of red"),
        ('{"image_mean": "grey"}', "image_mean is 'grey'"),
        ('{"image_mean": {"r": 1}}', "image_mean is "),
        ('{"image_mean": [0.5, NaN, 0.5]}', "image_mean is "),
        ('{"image_mean": [0.5, null, 0.5]}', "image_mean is "),
        ('{"image_mean": [1' + "0" * 400 + ", 0, 0]}", "image_mean is "),
        ('{"image_std": [0.5, 0, 0.5]}', "image_std is .*; accepted is 3 numbers above 0"),
        ('{"image_std": [0.5, 1e-300, 0.5]}', "image_std is "),
        ('{"image_std": [0.5, -1, 0.5]}', "image_std is "),
    ],
)
def test_settings_that_cannot_be_followed_are_one_line(tmp_path, content, words):
    (tmp_path / "preprocessor_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=words) as error:
        Preprocessor.from_pretrained(str(tmp_path), Preprocessor(16, 32))
    message = str(error.value)
    assert (
        message.startswith(str(tmp_path)) and "; accepted is" in message and len(message) < 400 and "\n" not in message
    )

"""The still of the overlay in the README."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from neuroflow.street.scene import Scene, write_scene
from neuroflow.video.overlay import CAPTION_HEIGHT, PANEL_HEIGHT
from neuroflow.video.source import Source
from PIL import Image

from bench.still import BEFORE, still

GUIDE = Path(__file__).parents[2] / "python" / "guide"
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_still_is_of_the_frame_that_is_asked_for(tmp_path):
    clip, number = tmp_path / "clip.mp4", BEFORE + 2
    write_scene(clip, Scene("bus", "local", "static", 1), number + 3, 64)
    with contextlib.closing(Source(str(clip))) as source:
        image = still(source, number, 64, 64)
    assert image.shape == (PANEL_HEIGHT + CAPTION_HEIGHT, 3 * PANEL_HEIGHT, 3)
    frame = list(Source(str(clip)))[number].rgb(PANEL_HEIGHT, PANEL_HEIGHT)
    np.testing.assert_array_equal(image[30:PANEL_HEIGHT, :PANEL_HEIGHT], frame[30:])
    for missing in (0, number + 3):
        with contextlib.closing(Source(str(clip))) as source, pytest.raises(ValueError, match=f"frame {missing} of"):
            still(source, missing, 64, 64)


def test_the_still_in_the_guide_is_small_and_says_whose_it_is():
    with Image.open(GUIDE / "overlay.jpg") as image:
        assert image.height == PANEL_HEIGHT + CAPTION_HEIGHT and image.width % 3 == 0
    assert (GUIDE / "overlay.jpg").stat().st_size < 250_000
    text = (GUIDE / "overlay.txt").read_text()
    assert "Intel Corporation" in text and "CC BY 4.0" in text and "bench.still" in text

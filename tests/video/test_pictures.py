"""The writer of MP4s, and the overlay."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from neuroflow.video.encode import VideoWriter
from neuroflow.video.overlay import (
    BRIGHTNESS,
    CAPTION_HEIGHT,
    COLDEST,
    HOTTEST,
    INFERNO,
    PANEL_HEIGHT,
    BoxWriter,
    OverlayWriter,
    panels,
)
from neuroflow.video.source import Frame, Source


def test_video_appears_whole_or_not_at_all(tmp_path):
    image = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", Fraction(10)) as writer:
        writer.write(image)
        raise RuntimeError
    with VideoWriter(tmp_path / "b.mp4", Fraction(10)):
        pass
    assert list(tmp_path.iterdir()) == []
    with VideoWriter(tmp_path / "c.mp4", Fraction(10)) as writer:
        for _ in range(100):  # more than the encoder holds back
            writer.write(image)
        assert not (tmp_path / "c.mp4").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["c.mp4"]


@pytest.mark.parametrize(("built_in", "codec"), [({"libx264"}, "h264"), (set(), "mpeg4")])
def test_codec_is_what_this_build_has(tmp_path, monkeypatch, recwarn, built_in, codec):
    monkeypatch.setattr(av, "codecs_available", built_in)
    with VideoWriter(tmp_path / "a.mp4", Fraction(30000, 1001)) as writer:
        writer.write(np.zeros((16, 16, 3), np.uint8))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == codec
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)
    assert ["no libx264" in str(warning.message) for warning in recwarn] == [True] * (codec == "mpeg4")


def grey_frame(height, width, level=200):
    return Frame(0, 0.0, av.VideoFrame.from_ndarray(np.full((height, width, 3), level, np.uint8), format="rgb24"))


def test_overlay_shows_frame_surprise_and_encoded_patches_side_by_side(tmp_path):
    active = torch.zeros(6, 8, dtype=torch.bool)
    active[0, 7] = active[5, 7] = True
    surprise = torch.full((6, 8), COLDEST / 2)
    surprise[5, 7], surprise[2, 3], surprise[3, 3] = torch.inf, HOTTEST**0.5 * COLDEST**0.5, torch.nan
    with OverlayWriter(tmp_path / "overlay.mp4", Fraction(10)) as writer:
        writer.draw(grey_frame(96, 128), active, surprise, "frame 0    95.8% skipped")
    (frame,) = Source(str(tmp_path / "overlay.mp4"))
    width = round(PANEL_HEIGHT * 128 / 96)
    assert frame.size == (PANEL_HEIGHT + CAPTION_HEIGHT, 3 * width)
    image = frame.rgb(*frame.size).astype(float)
    plain, heat, patches = (
        image[:PANEL_HEIGHT, panel * width : (panel + 1) * width][PANEL_HEIGHT // 12 :: PANEL_HEIGHT // 6][
            :6, width // 16 :: width // 8
        ][:, :8]
        for panel in range(3)
    )
    titled = np.zeros((6, 8), bool)
    titled[0, :6] = True
    assert np.abs(plain - 200)[~titled].max() < 10
    assert np.abs(patches - np.where(active, 200, 200 * BRIGHTNESS)[..., None])[~titled].max() < 10
    warm = np.zeros((6, 8), bool)
    warm[5, 7] = warm[2, 3] = True
    assert np.abs(heat - 100)[~titled & ~warm].max() < 10
    assert np.abs(heat[5, 7] - (0.25 * 200 + 0.75 * np.array(INFERNO[-1]))).max() < 20
    assert heat[2, 3, 0] > heat[2, 3, 1] + 20 and heat[5, 7].mean() > heat[2, 3].mean() + 20
    caption, legend = np.split(image[PANEL_HEIGHT:].max((0, 2)), [width])
    assert (caption > 200).any() and (legend > 200).any()


def test_what_the_patches_do_not_cover_is_dark_and_cold():
    image = np.full((192, 256, 3), 200, np.uint8)
    everything = torch.ones(2, 2)
    picture = panels(image, everything > 0, everything, "", (64, 48, 192, 160))
    heat, patches = picture[:192, 256:512], picture[:192, 512:]
    for row, column, inside in ((96, 65, True), (96, 62, False), (49, 128, True), (46, 128, False), (96, 193, False)):
        assert (patches[row, column] == (200 if inside else 50)).all(), (row, column)
        assert (heat[row, column, 0] > 200) == inside, (row, column)


def test_a_key_frame_has_no_surprise():
    image = np.full((96, 256, 3), 200, np.uint8)
    key_frame = torch.full((2, 2), torch.nan)
    picture, other = (panels(image, torch.ones(2, 2) > 0, values, "") for values in (key_frame, torch.zeros(2, 2)))
    assert (picture[40:96, 256:512] == 100).all()
    titles = [each[:30, 256:512] for each in (picture, other)]
    assert (titles[0] != titles[1]).any() and (picture[:, :256] == other[:, :256]).all()


def test_a_legend_is_left_out_where_the_caption_needs_its_room():
    image, values = np.zeros((32, 150, 3), np.uint8), torch.zeros(2, 2)
    short, long = (panels(image, values > 0, values, "w" * count)[32:] for count in (2, 30))
    for picture, drawn in ((short, True), (long, False)):
        saturated = picture.max(2).astype(int) - picture.min(2)
        assert (saturated > 100).any() == drawn


def test_overlay_keeps_its_size_when_the_video_does_not(tmp_path, monkeypatch):
    shapes = []
    monkeypatch.setattr(OverlayWriter, "write", lambda self, image, time: shapes.append(image.shape))
    with OverlayWriter(tmp_path / "overlay.mp4", Fraction(10)) as writer:
        for height, width in ((96, 128), (128, 96)):
            writer.draw(grey_frame(height, width), torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2), "")
    assert shapes == [(PANEL_HEIGHT + CAPTION_HEIGHT, 3 * round(PANEL_HEIGHT * 128 / 96), 3)] * 2


def draw(writer, frame):
    if isinstance(writer, OverlayWriter):
        writer.draw(frame, torch.ones(4, 4, dtype=torch.bool), torch.rand(4, 4), "frame")
    else:
        height, width = frame.size
        writer.draw(frame, [(1, (0.0, 0.0, width / 4, height / 4), "1 car"), (2, (0.0, 0.0, width, height), "2")])


@pytest.mark.parametrize("kind", [OverlayWriter, BoxWriter])
@pytest.mark.parametrize("times", [[0, 33, 66, 500, 533, 2000, 2033, 4000], [90_000_000, 90_000_100, 90_000_100]])
def test_overlays_keep_the_times_of_frames(tmp_path, kind, times):
    """From the first on, and one after the other where two have the same."""
    with kind(tmp_path / "overlay.mp4", Fraction(10)) as writer:
        for number, milliseconds in enumerate(times):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8), format="rgb24")
            draw(writer, Frame(number, milliseconds / 1000, picture))
    found = [frame.time for frame in Source(str(tmp_path / "overlay.mp4"))]
    assert found == pytest.approx([(each - times[0]) / 1000 for each in times], abs=1e-3)
    with av.open(str(tmp_path / "overlay.mp4")) as container:
        assert container.duration / 1e6 == pytest.approx(found[-1] + 0.1, abs=2e-3)


@pytest.mark.parametrize("kind", [OverlayWriter, BoxWriter])
@pytest.mark.parametrize("size", [(450, 9000), (2, 3000), (3000, 2), (1, 1), (16000, 1), (700, 30000)])
def test_overlays_of_any_shape(tmp_path, kind, size):
    picture = av.VideoFrame.from_ndarray(np.full((*size, 3), 120, np.uint8), format="rgb24")
    with kind(tmp_path / "overlay.mp4", Fraction(10)) as writer:
        draw(writer, Frame(0, 0.0, picture))
    (frame,) = Source(str(tmp_path / "overlay.mp4"))
    assert max(frame.size) <= 3840 and min(frame.size) >= 2


@pytest.mark.parametrize("rate", [Fraction(1, 10**9), Fraction(10**9), Fraction(1, 3)])
def test_a_rate_may_be_what_a_damaged_file_announces(tmp_path, rate):
    with VideoWriter(tmp_path / "a.mp4", rate) as writer:
        for _ in range(3):
            writer.write(np.zeros((16, 16, 3), np.uint8))
    times = [frame.time for frame in Source(str(tmp_path / "a.mp4"))]
    step = float(1 / min(max(rate, Fraction(1, 1000)), Fraction(1000)))
    assert times == pytest.approx([0, step, 2 * step], rel=1e-3)

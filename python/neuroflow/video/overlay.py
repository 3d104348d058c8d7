"""Pictures to look at: a frame beside its surprise as heat and the patches that were encoded, or under boxes."""

import functools
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw, ImageFont

from .encode import VideoWriter
from .source import Frame

PANEL_HEIGHT, PANEL_WIDTH = 360, 1280  # of each of the three, at most
CAPTION_HEIGHT = 32
BRIGHTNESS = 0.25  # of patches that were not encoded
INK, PAPER = (236, 238, 240), (16, 18, 22)
INFERNO = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
COLDEST, HOTTEST = 5e-3, 0.5  # surprise at either end of the colours, which are its logarithm's
BOX_HEIGHT, BOX_WIDTH = 720, 3840  # of pictures under boxes, at most
COLOURS = ("#ffb000", "#fe6100", "#dc267f", "#785ef0", "#648fff", "#00b894", "#f1f1f1", "#ffe066")

load_font = functools.cache(ImageFont.load_default)
Region = tuple[float, float, float, float]  # left, top, right and bottom edge, in pixels


class OverlayWriter(VideoWriter):
    """An MP4 of frames beside their surprise and their active patches, at their times.

    The first frame's shape is every frame's.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        super().__init__(path, rate)
        self._panel = (0, 0)  # height and width
        self._reformatter = VideoReformatter()

    def draw(
        self,
        frame: Frame,
        active: torch.Tensor,
        surprise: torch.Tensor,
        caption: str,
        region: Region | None = None,
    ) -> None:
        """Append one frame.

        Args:
            frame: the frame, of any size.
            active: [rows, columns] bool, the patches that were encoded.
            surprise: [rows, columns] float32, as `FrameReport` has it.
            caption: a line of text to write below.
            region: the part of the frame that the patches cover, in its pixels; None: all of it. The rest is darkened.
        """
        if not any(self._panel):
            self._panel = fitted(frame.size, PANEL_HEIGHT, PANEL_WIDTH)
        image = frame.rgb(*self._panel, self._reformatter)
        self.write(panels(image, active, surprise, caption, scaled(region, frame.size, self._panel)), frame.time)


def panels(
    image: np.ndarray, active: torch.Tensor, surprise: torch.Tensor, caption: str, region: Region | None = None
) -> np.ndarray:
    """A frame, the same in grey under its surprise, and the same with only the encoded patches lit, side by side.

    Args:
        image: [height, width, 3] uint8.
        active: [rows, columns] bool, the patches that were encoded.
        surprise: [rows, columns] float32, as `FrameReport` has it.
        caption: a line of text to write below.
        region: the part of the image that the patches cover, in its pixels; None: all of it.

    Returns:
        [height + CAPTION_HEIGHT, 3 * width, 3] uint8.
    """
    height, width, _ = image.shape
    lit = spread(np.where(active.cpu().numpy(), 1, BRIGHTNESS), (height, width), region, BRIGHTNESS)
    heat = spread(warmth(surprise), (height, width), region, 0.0)[..., None]
    grey = image.mean(2, keepdims=True)
    warm = (1 - heat) * 0.5 * grey + heat * (0.25 * grey + 0.75 * colours(heat[..., 0]))
    text = Image.new("RGB", (3 * width, CAPTION_HEIGHT), PAPER)
    rows = [np.concatenate([image, warm.astype(np.uint8), (image * lit[..., None]).astype(np.uint8)], 1)]
    picture = Image.fromarray(np.concatenate([*rows, np.asarray(text)]))
    draw, font = ImageDraw.Draw(picture), load_font(15)
    compared = not surprise.isnan().all()
    titles = (
        "frame",
        "surprise" if compared else "surprise: none in a key frame",
        f"encoded: {int(active.sum())} of {active.numel()} patches",
    )
    for number, title in enumerate(titles):
        if draw.textlength(title, font) + 20 <= width and height >= 48:
            corner = number * width + 8, 6
            left, top, right, bottom = draw.textbbox(corner, title, font)
            draw.rectangle((left - 6, top - 4, right + 6, bottom + 4), PAPER)
            draw.text(corner, title, INK, font)
    middle = height + CAPTION_HEIGHT // 2
    draw.text((12, middle), caption, INK, font, anchor="lm")
    _draw_legend(picture, middle, 12 + draw.textlength(caption, font), font)
    return np.asarray(picture)


def _draw_legend(picture: Image.Image, middle: int, taken: float, font: ImageFont.FreeTypeFont) -> None:
    """What the colours stand for, at the right end of the caption, if there is room behind what is taken."""
    draw, bar = ImageDraw.Draw(picture), 120
    low, high = f"surprise  {COLDEST:g}", f"{HOTTEST:g}"
    right = picture.width - 12 - draw.textlength(high, font) - 8
    begin = right - bar - 8 - draw.textlength(low, font)
    if begin < taken + 24:
        return
    draw.text((begin, middle), low, INK, font, anchor="lm")
    draw.text((right + 8, middle), high, INK, font, anchor="lm")
    ramp = colours(np.linspace(0, 1, bar)).astype(np.uint8)
    picture.paste(Image.fromarray(np.broadcast_to(ramp, (12, bar, 3)).copy()), (int(right - bar), middle - 6))


def warmth(surprise: torch.Tensor) -> np.ndarray:
    """Surprise as a number from 0 to 1, by its logarithm; 0 where there was nothing to compare with."""
    values = np.nan_to_num(surprise.float().cpu().numpy(), nan=0.0, posinf=HOTTEST)
    return np.log(values.clip(COLDEST, HOTTEST) / COLDEST) / np.log(HOTTEST / COLDEST)


def colours(warm: np.ndarray) -> np.ndarray:
    """The colour of each warmth: [..., 3] from 0 to 255."""
    stops = np.linspace(0, 1, len(INFERNO))
    return np.stack([np.interp(warm, stops, channel) for channel in zip(*INFERNO, strict=True)], -1)


def spread(values: np.ndarray, size: tuple[int, int], region: Region | None, outside: float) -> np.ndarray:
    """Patches' values at the pixels that they cover.

    Args:
        values: [rows, columns].
        size: height and width of the picture.
        region: the part of the picture that the patches cover, in its pixels; None: all of it.
        outside: what the other pixels have.

    Returns:
        [height, width].
    """
    left, top, right, bottom = region or (0, 0, *size[::-1])
    row, column = (
        np.floor((np.arange(side) + 0.5 - begin) / (end - begin) * count).astype(int).clip(-1, count) + 1
        for side, begin, end, count in zip(size, (top, left), (bottom, right), values.shape, strict=True)
    )
    return np.pad(values, 1, constant_values=outside)[row][:, column]


def fitted(size: tuple[int, int], most_height: int, most_width: int) -> tuple[int, int]:
    """Height and width, both even, of a picture of such a shape that is as large as it may be."""
    scale = min(most_height / size[0], most_width / size[1])
    return max(round(size[0] * scale / 2), 1) * 2, max(round(size[1] * scale / 2), 1) * 2


def scaled(region: Region | None, size: tuple[int, int], to: tuple[int, int]) -> Region | None:
    """A region of a frame in the pixels of a picture of it, each of a height and a width."""
    if region is None:
        return None
    down, across = to[0] / size[0], to[1] / size[1]
    left, top, right, bottom = region
    return left * across, top * down, right * across, bottom * down


class BoxWriter(VideoWriter):
    """An MP4 of frames under boxes, at their times. The first frame's shape is every frame's."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        super().__init__(path, rate)
        self._shape = (0, 0)
        self._reformatter = VideoReformatter()

    def draw(self, frame: Frame, boxes: Iterable[tuple[int, Region, str]]) -> None:
        """Append one frame.

        Args:
            frame: the frame, of any size.
            boxes: number, edges and text of each: left, top, right and bottom in pixels of the frame. A number has
                the same colour throughout.
        """
        height, width = frame.size
        if not any(self._shape):
            self._shape = fitted(frame.size, min(BOX_HEIGHT, height), min(BOX_WIDTH, width))
        picture = Image.fromarray(np.ascontiguousarray(frame.rgb(*self._shape, self._reformatter)))
        draw, font = ImageDraw.Draw(picture), load_font(13)
        scale = np.array([self._shape[1] / width, self._shape[0] / height] * 2)
        for number, edges, text in boxes:
            colour = COLOURS[number % len(COLOURS)]
            left, top, right, bottom = (np.array(edges) * scale).tolist()
            draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=colour, width=2)
            corner = left, max(top - 16, 0)
            draw.rectangle(draw.textbbox(corner, text, font), fill=PAPER)
            draw.text(corner, text, colour, font)
        self.write(np.asarray(picture), frame.time)

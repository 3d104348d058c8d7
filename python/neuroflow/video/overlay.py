"""Pictures to look at: a frame beside the same frame with its inactive patches darkened, or under boxes."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw, ImageFont

from .encode import VideoWriter
from .source import Frame

PANEL_HEIGHT, PANEL_WIDTH = 448, 1920  # of either half, at most
CAPTION_HEIGHT = 32
BRIGHTNESS = 0.25
BOX_HEIGHT, BOX_WIDTH = 720, 3840  # of pictures under boxes, at most
COLOURS = ("#ffb000", "#fe6100", "#dc267f", "#785ef0", "#648fff", "#00b894", "#f1f1f1", "#ffe066")


class OverlayWriter(VideoWriter):
    """An MP4 of frames beside their active patches, at their times. The first frame's shape is every frame's."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        super().__init__(path, rate)
        self._panel = (0, 0)  # height and width
        self._reformatter = VideoReformatter()

    def draw(
        self,
        frame: Frame,
        active: torch.Tensor,
        caption: str,
        region: tuple[float, float, float, float] | None = None,
    ) -> None:
        """Append one frame.

        Args:
            frame: the frame, of any size.
            active: [rows, columns] bool, the patches that were encoded.
            caption: a line of text to burn in below.
            region: left, top, right and bottom edge, in pixels of the frame, of what `active` is of; None for all of
                it. The rest is darkened.
        """
        if not any(self._panel):
            self._panel = _panel_size(*frame.size)
        height, width = self._panel
        panel = frame.rgb(height, width, self._reformatter)
        left, top, right, bottom = region or (0, 0, *frame.size[::-1])
        row, column = (
            np.floor(((np.arange(side) + 0.5) * (whole / side) - begin) / (end - begin) * count).astype(int)
            for side, whole, begin, end, count in zip(
                self._panel, frame.size, (top, left), (bottom, right), active.shape, strict=True
            )
        )
        seen = np.pad(active.cpu().numpy(), 1)  # what lies outside of the region is in the margin
        row, column = (each.clip(-1, count) + 1 for each, count in zip((row, column), active.shape, strict=True))
        brightness = np.where(seen, 256, round(256 * BRIGHTNESS)).astype(np.uint16)
        darkened = (panel * brightness[row][:, column, None] >> 8).astype(np.uint8)
        text = Image.new("RGB", (2 * width, CAPTION_HEIGHT), (16, 18, 22))
        font = ImageFont.load_default(size=15)
        ImageDraw.Draw(text).text((12, CAPTION_HEIGHT / 2), caption, (236, 238, 240), font, anchor="lm")
        self.write(np.concatenate([np.concatenate([panel, darkened], 1), np.asarray(text)]), frame.time)


class BoxWriter(VideoWriter):
    """An MP4 of frames under boxes, at their times. The first frame's shape is every frame's."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        super().__init__(path, rate)
        self._shape = (0, 0)
        self._reformatter = VideoReformatter()

    def draw(self, frame: Frame, boxes: Iterable[tuple[int, tuple[float, float, float, float], str]]) -> None:
        """Append one frame.

        Args:
            frame: the frame, of any size.
            boxes: number, edges and text of each: left, top, right and bottom in pixels of the frame. A number has
                the same colour throughout.
        """
        height, width = frame.size
        if not any(self._shape):
            shrink = min(BOX_HEIGHT / height, BOX_WIDTH / width, 1)
            self._shape = (max(round(height * shrink / 2), 1) * 2, max(round(width * shrink / 2), 1) * 2)
        picture = Image.fromarray(np.ascontiguousarray(frame.rgb(*self._shape, self._reformatter)))
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
        scale = np.array([self._shape[1] / width, self._shape[0] / height] * 2)
        for number, edges, text in boxes:
            colour = COLOURS[number % len(COLOURS)]
            left, top, right, bottom = (np.array(edges) * scale).tolist()
            draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=colour, width=2)
            corner = left, max(top - 16, 0)
            draw.rectangle(draw.textbbox(corner, text, font), fill=(16, 18, 22))
            draw.text(corner, text, colour, font)
        self.write(np.asarray(picture), frame.time)


def _panel_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of a panel for frames of such a size, the height even."""
    scale = min(PANEL_HEIGHT / height, PANEL_WIDTH / width)
    return max(round(height * scale / 2), 1) * 2, max(round(width * scale), 1)

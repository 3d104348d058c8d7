"""The picture that shows what was encoded: a frame beside the same frame with its inactive patches darkened."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw, ImageFont

from .encode import VideoWriter
from .source import Frame

PANEL_HEIGHT = 448
CAPTION_HEIGHT = 32
BRIGHTNESS = 0.25


class OverlayWriter(VideoWriter):
    """An MP4 of frames beside their active patches. The first frame's shape is every frame's."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        super().__init__(path, rate)
        self._panel_width = 0
        self._reformatter = VideoReformatter()

    def draw(self, frame: Frame, active: torch.Tensor, caption: str) -> None:
        """Append one frame.

        Args:
            frame: the frame, of any size.
            active: [rows, columns] bool, the patches that were encoded.
            caption: a line of text to burn in below.
        """
        height, width = frame.size
        self._panel_width = self._panel_width or max(round(PANEL_HEIGHT * width / height), 1)
        panel = frame.rgb(PANEL_HEIGHT, self._panel_width, self._reformatter)
        rows, columns = active.shape
        row = np.arange(PANEL_HEIGHT) * rows // PANEL_HEIGHT
        column = np.arange(self._panel_width) * columns // self._panel_width
        brightness = np.where(active.cpu().numpy(), 256, round(256 * BRIGHTNESS)).astype(np.uint16)
        darkened = (panel * brightness[row][:, column, None] >> 8).astype(np.uint8)
        text = Image.new("RGB", (2 * self._panel_width, CAPTION_HEIGHT), (16, 18, 22))
        font = ImageFont.load_default(size=15)
        ImageDraw.Draw(text).text((12, CAPTION_HEIGHT / 2), caption, (236, 238, 240), font, anchor="lm")
        self.write(np.concatenate([np.concatenate([panel, darkened], 1), np.asarray(text)]))

"""Writing MP4 through PyAV."""

import contextlib
import warnings
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np

from ..files import replacing


class VideoWriter:
    """An MP4 of RGB frames, H.264 where PyAV's FFmpeg has libx264, else MPEG-4 with a warning.

    Written beside `path` under a temporary name, which becomes `path` when the `with` block ends without an error and
    at least one frame was written; otherwise nothing is left.

    Args:
        path: the file to write.
        rate: frames per second.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        if codec == "mpeg4":
            warnings.warn("this PyAV has no libx264: video is written as MPEG-4 instead of H.264", stacklevel=2)
        self._frames = 0
        self._file = contextlib.ExitStack()
        self._partial = self._file.enter_context(replacing(path))
        self._container = av.open(str(self._partial), "w", format="mp4")
        self._stream = self._container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "20", "preset": "veryfast"} if codec == "libx264" else {"qscale": "4"}

    def write(self, image: np.ndarray) -> None:
        """Append one frame, [height, width, 3] uint8, of the first one's size, both sides even."""
        if not self._frames:
            self._stream.height, self._stream.width = image.shape[:2]
        self._frames += 1
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        complete = kind is None and self._frames > 0
        with self._file:
            with self._container:
                if complete:
                    self._container.mux(self._stream.encode())
            if not complete:
                self._partial.unlink(missing_ok=True)

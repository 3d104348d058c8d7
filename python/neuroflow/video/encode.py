"""Write MP4 files with PyAV."""

import contextlib
import warnings
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np

from ..files import OutputError, replacing, writing

TICKS = 60_000  # per second: whole at the usual rates, including NTSC's, and no more than MPEG-4 allows


class VideoWriter:
    """An MP4 of RGB frames: H.264 if PyAV's FFmpeg has libx264, else MPEG-4 with a warning.

    The file is written under a temporary name and becomes `path` when the `with` block ends without an error and at
    least one frame was written; otherwise nothing is left.

    Args:
        path: the file to write.
        rate: frames per second, for frames written without a time.

    Raises:
        OutputError: it cannot be written, or another process is writing it. `write` and the end of the block raise it
            too.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        if codec == "mpeg4":
            warnings.warn("this PyAV has no libx264: video is written as MPEG-4 instead of H.264", stacklevel=2)
        # A damaged file may announce any rate.
        self._rate = min(max(Fraction(rate), Fraction(1, 1000)), Fraction(1000)).limit_denominator(1001)
        self._frames = 0
        self._begin = 0.0  # time of the first frame
        self._tick = -1  # of the last one
        self._path = path
        with contextlib.ExitStack() as stack:
            self._partial = stack.enter_context(replacing(path))
            with writing(path, av.FFmpegError):
                self._container = av.open(f"file:{self._partial}", "w", format="mp4")
            self._file = stack.pop_all()
        self._stream = self._container.add_stream(codec, rate=self._rate)
        self._stream.codec_context.time_base = Fraction(1, TICKS)
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "20", "preset": "veryfast"} if codec == "libx264" else {"qscale": "4"}

    def write(self, image: np.ndarray, time: float | None = None) -> None:
        """Append one frame.

        Args:
            image: [height, width, 3] uint8, the same size for all frames, both sides even.
            time: when it is shown, in seconds, with the first frame at the start of the video; None follows the rate.
        """
        if not self._frames:
            self._stream.height, self._stream.width = image.shape[:2]
            self._begin = time or 0.0
            # MP4 adds up durations in decoding order, and would end before the last frames with B-frames.
            if time is not None and self._stream.codec_context.name == "libx264":
                self._stream.options |= {"bf": "0"}
        if time is None:
            time = float(self._frames / self._rate)
        self._frames += 1
        self._tick = max(round((time - self._begin) * TICKS), self._tick + 1)
        picture = av.VideoFrame.from_ndarray(image, format="rgb24")
        picture.pts, picture.time_base = self._tick, Fraction(1, TICKS)
        picture.duration = round(TICKS / self._rate)
        with writing(self._path, av.FFmpegError):
            self._container.mux(self._stream.encode(picture))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        complete = kind is None and self._frames > 0
        with self._file:
            try:
                with writing(self._path, av.FFmpegError), self._container:
                    if complete:
                        self._container.mux(self._stream.encode())
            except OutputError:
                # Report a failed write, but not in place of the error that ended the block.
                if complete:
                    raise
            if not complete:
                self._partial.unlink(missing_ok=True)

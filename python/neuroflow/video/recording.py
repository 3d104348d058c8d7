"""A run as it goes, in Rerun's viewer or in a recording for it. Needs the `viz` extra."""

import contextlib
import io
import os
import shutil
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import rerun as rr
import rerun.blueprint as rrb
from av.video.reformatter import VideoReformatter
from PIL import Image

from ..files import replacing, writing
from .overlay import colours, fitted, scaled, spread, warmth
from .stream import Encoded

PICTURE_HEIGHT, PICTURE_WIDTH = 480, 1280  # at most
RATE = 10.0  # pictures a second, and at once: frames that go through the model together come together
AMBER = (255, 176, 0)
SERIES = {
    "skipped": "patches skipped",
    "latency/neuroflow": "NeuroFlow, ms/frame",
    "latency/dense": "dense, ms/frame",
    "cosine": "cosine to dense",
}


class Recorder:
    """Logs what comes of each frame, on the timelines `frame` and `time`.

    Each frame has its share of skipped patches, its latencies, its cosine to dense where that is known, and a line of
    text if it is a key frame. At most RATE times a second there are also the frame, its active patches as boxes and its
    surprise as heat.

    Args:
        path: the .rrd file to write, which appears when the `with` block ends without an error; None starts the viewer.

    Raises:
        OutputError: the file cannot be written, or another process is writing it. So do `log` and the end of the block.
        RuntimeError: the viewer cannot be started.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._recording = rr.RecordingStream("neuroflow")
        self._reformatter = VideoReformatter()
        self._logged = False
        self._pictures = RATE  # that may be logged now
        self._counted = time.monotonic()
        self._failed: OSError | None = None
        self._stack = contextlib.ExitStack()
        if path is None:
            self._recording.spawn()
        else:
            self._open(path)
        self._recording.send_blueprint(_layout())
        for series, name in SERIES.items():
            self._recording.log(series, rr.SeriesLines(names=name), static=True)

    def log(self, encoded: Encoded) -> None:
        """Log one frame."""
        frame, record = encoded.prepared.frame, encoded.record
        self._recording.set_time("frame", sequence=frame.index)
        self._recording.set_time("time", duration=frame.time)
        values = (record.skipped, record.neuroflow_ms, record.dense_ms, record.cosine)
        for series, value in zip(SERIES, values, strict=True):
            if value is not None:
                self._recording.log(series, rr.Scalars(value))
        if encoded.key_frame is not None:
            self._recording.log("key_frames", rr.TextLog(f"frame {frame.index}: {encoded.key_frame}"))
        now = time.monotonic()
        self._pictures = min(self._pictures + (now - self._counted) * RATE, RATE)
        self._counted = now
        if self._pictures >= 1:
            self._pictures -= 1
            self._log_pictures(encoded)
        self._logged = True
        self._require_written()

    def _log_pictures(self, encoded: Encoded) -> None:
        frame = encoded.prepared.frame
        size = fitted(frame.size, min(PICTURE_HEIGHT, frame.size[0]), min(PICTURE_WIDTH, frame.size[1]))
        region = scaled(encoded.prepared.region, frame.size, size)
        image = np.ascontiguousarray(frame.rgb(*size, self._reformatter))
        heat = spread(warmth(encoded.surprise), size, region, 0.0)[..., None]
        layer = np.concatenate([colours(heat[..., 0]), 255 * heat], 2).astype(np.uint8)
        rows, columns = encoded.active.shape
        left, top, right, bottom = region
        patch = np.array([(right - left) / columns, (bottom - top) / rows])
        corners = (left, top) + encoded.active.cpu().nonzero().flip(1).numpy() * patch
        boxes = rr.Boxes2D(mins=corners, sizes=np.broadcast_to(patch, corners.shape), colors=[AMBER])
        self._recording.log("frame", _picture(image, "JPEG", draw_order=0))
        self._recording.log("frame/surprise", _picture(layer, "PNG", draw_order=1))
        self._recording.log("frame/active", boxes)

    def _open(self, path: Path) -> None:
        """Have the recording written, through a pipe: of its own errors in writing Rerun only tells stderr."""
        with contextlib.ExitStack() as stack:
            self._partial = stack.enter_context(replacing(path))
            file = stack.enter_context(self._partial.open("wb"))
            reading, into = os.pipe()
            self._copying = threading.Thread(target=self._copy, args=(reading, file), name="recording", daemon=True)
            self._copying.start()
            try:
                self._recording.save(f"/dev/fd/{into}")
            finally:
                os.close(into)
            self._stack = stack.pop_all()

    def _copy(self, reading: int, file: BinaryIO) -> None:
        with open(reading, "rb", buffering=0) as pipe:
            try:
                shutil.copyfileobj(pipe, file)
                file.flush()
            except OSError as error:
                self._failed = error
                while pipe.read(2**16):
                    pass

    def _require_written(self) -> None:
        if self._failed is not None:
            with writing(self._path):
                raise self._failed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            self._recording.disconnect()
            if self._path is None:
                return
            self._copying.join()
            if kind is None and self._logged:
                self._require_written()
            else:
                self._partial.unlink(missing_ok=True)


def _picture(image: np.ndarray, kind: str, draw_order: float) -> rr.EncodedImage:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return rr.EncodedImage(contents=file.getvalue(), media_type=f"image/{kind.lower()}", draw_order=draw_order)


def _layout() -> rrb.Blueprint:
    """Pictures above, curves and key frames below."""
    return rrb.Blueprint(
        rrb.Vertical(
            rrb.Horizontal(
                rrb.Spatial2DView(origin="frame", contents=["frame", "frame/active"], name="encoded patches"),
                rrb.Spatial2DView(origin="frame", contents=["frame", "frame/surprise"], name="surprise"),
            ),
            rrb.Horizontal(
                rrb.TimeSeriesView(origin="skipped", name="share of patches skipped"),
                rrb.TimeSeriesView(origin="latency", name="latency"),
                rrb.TimeSeriesView(origin="cosine", name="cosine to dense"),
                rrb.TextLogView(origin="key_frames", name="key frames"),
                column_shares=[2, 2, 2, 3],
            ),
            row_shares=[2, 1],
        ),
        collapse_panels=True,
    )

"""What the report keeps of a run's frames as they pass: stills, ages of patches, and why key frames are key frames."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from ..video.results import Record
from ..video.stream import Encoded

STILL_HEIGHT, STILL_WIDTH = 720, 640  # of a still, at most
SPACED = 32  # stills kept for the median, evenly spaced over the run


@dataclass(frozen=True)
class Still:
    """A frame to show.

    Attributes:
        record: what came of it.
        reason: why it is a key frame, None of one that is none.
        active: [rows, columns] bool, the patches that were encoded.
        picture: [height, width, 3] uint8.
        region: left, top, right and bottom edge of what `active` is of, as shares of the picture.
    """

    record: Record
    reason: str | None
    active: np.ndarray
    picture: np.ndarray
    region: tuple[float, float, float, float]

    def jpeg(self) -> str:
        """The picture as a data: address."""
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(self.picture)).save(file, "JPEG", quality=82)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

    def inactive_path(self) -> str:
        """An SVG path over the patches that were not encoded, in units of patches."""
        parts = []
        for number, row in enumerate(~self.active):
            edges = np.diff(np.pad(row.astype(np.int8), 1)).nonzero()[0].reshape(-1, 2)
            parts += [f"M{start} {number}h{end - start}v1h{start - end}z" for start, end in edges.tolist()]
        return "".join(parts)

    def outline_path(self) -> str:
        """An SVG path along the edges between patches that were encoded and others, in units of patches."""
        seen = np.pad(self.active, 1)
        above, beside = seen[1:, 1:-1] != seen[:-1, 1:-1], seen[1:-1, 1:] != seen[1:-1, :-1]
        across = (f"M{column} {row}h1" for row, column in np.argwhere(above).tolist())
        down = (f"M{column} {row}v1" for row, column in np.argwhere(beside).tolist())
        return "".join((*across, *down))


class Moments:
    """What is worth showing of a run, found as its frames pass: memory is bounded, however many there are.

    Attributes:
        reasons: why each key frame is one, by the frame's number.
        ages: [33] how many patches of all scored frames were reused at an age of 0 (encoded in that frame), 1, 2 to 3,
            4 to 7 and so on frames.
    """

    def __init__(self) -> None:
        self.reasons: dict[int, str] = {}
        self.ages = np.zeros(33, np.int64)
        self._age: np.ndarray | None = None
        self._reformatter = VideoReformatter()
        self._key_frames: dict[str, Still] = {}  # the first of each reason
        self._lowest: Still | None = None
        self._busiest: Still | None = None
        self._spaced: list[Still] = []
        self._partial, self._step = 0, 1  # partial frames so far; one in so many is kept in `_spaced`

    def note(self, encoded: Encoded) -> None:
        """Look at the run's next frame."""
        record, reason = encoded.record, encoded.key_frame
        active = encoded.active.cpu().numpy()
        self._age = np.where(active, 0, 0 if self._age is None else self._age + 1)
        if not record.first:
            # log2 of 1 is 0, and its place is 1; float64 has every exponent below 2^53 exact.
            self.ages += np.bincount(np.frexp(self._age.ravel().astype(float))[1], minlength=33)
        still: Still | None = None

        def shown() -> Still:
            nonlocal still
            still = still or self._still(encoded, active)
            return still

        if reason is not None:
            self.reasons[record.frame] = reason
            if reason not in self._key_frames:
                self._key_frames[reason] = shown()
        if record.first:
            return
        if record.cosine is not None and (self._lowest is None or record.cosine < self._lowest.record.cosine):
            self._lowest = shown()
        if reason is not None:
            return
        if self._busiest is None or record.active > self._busiest.record.active:
            self._busiest = shown()
        if self._partial % self._step == 0:
            self._spaced.append(shown())
            if len(self._spaced) == SPACED:
                self._spaced, self._step = self._spaced[::2], 2 * self._step
        self._partial += 1

    def chosen(self) -> list[tuple[str, Still]]:
        """The stills to show with what they show, in order of time."""
        found = [(f"key frame: {reason}", still) for reason, still in self._key_frames.items()]
        if self._spaced:
            median = np.median([still.record.active for still in self._spaced])
            typical = min(self._spaced, key=lambda still: abs(still.record.active - median))
            found += [("typical: median share encoded", typical), ("most patches encoded", self._busiest)]
        if self._lowest is not None:
            found.append(("lowest cosine", self._lowest))
        labels: dict[int, list[str]] = {}
        for label, still in found:
            labels.setdefault(still.record.frame, []).append(label)
        stills = {still.record.frame: still for _, still in found}
        return [(", ".join(labels[frame]), stills[frame]) for frame in sorted(stills)]

    def _still(self, encoded: Encoded, active: np.ndarray) -> Still:
        frame = encoded.prepared.frame
        height, width = frame.size
        scale = min(STILL_HEIGHT / height, STILL_WIDTH / width, 1)
        size = max(round(height * scale), 1), max(round(width * scale), 1)
        left, top, right, bottom = encoded.prepared.region
        region = left / width, top / height, right / width, bottom / height
        return Still(encoded.record, encoded.key_frame, active, frame.rgb(*size, self._reformatter), region)

"""The numbers of a run, which the table in the terminal and the report's page share."""

from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import NamedTuple

import numpy as np

from ..video.results import Record


@dataclass(frozen=True)
class Stages:
    """Where a frame's time went, in milliseconds; frames encoded in one call share its time equally.

    Attributes:
        decode: time until the source gave the frame, including the wait for a live one.
        preprocess: from the frame to the model's input.
        wait: time the loop waited for that input; equals the two above if they were not done ahead.
        encode: in the patched model.
        dense: in the unpatched model; None without a comparison.
        write: results, overlay and stills.
        total: of the loop, from the end of the last frame to the end of this one.
    """

    decode: float
    preprocess: float
    wait: float
    encode: float
    dense: float | None
    write: float
    total: float


class Times(NamedTuple):
    """Quantiles of milliseconds a frame."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Times":
        return cls(*np.quantile(milliseconds, [0.5, 0.2, 0.8]).tolist())


class Fidelity(NamedTuple):
    """The frames' cosines to the unpatched model."""

    mean: float
    p5: float
    min: float


@dataclass(frozen=True)
class Figures:
    """The numbers of a run. A run's first frame is dense, and no statistic counts it.

    Args:
        records: of every frame, at least one.
        stages: of the frames that this run encoded.
        state_bytes: what the stream holds.
        model: the model and its input, one line.
        gate: NeuroFlow's settings, one line.
        machine: what the times depend on, one line.
    """

    records: list[Record]
    stages: list[Stages]
    state_bytes: int
    model: str
    gate: str
    machine: str

    @cached_property
    def scored(self) -> list[Record]:
        return [record for record in self.records if not record.first]

    @property
    def compared(self) -> bool:
        """There are frames to score, and the unpatched model ran beside them."""
        return bool(self.scored) and self.scored[0].dense_ms is not None

    @cached_property
    def sparse(self) -> Times | None:
        return Times.of([record.neuroflow_ms for record in self.scored]) if self.scored else None

    @cached_property
    def dense(self) -> Times | None:
        return Times.of([record.dense_ms for record in self.scored]) if self.compared else None

    @property
    def speed_up(self) -> float | None:
        return self.dense.median / self.sparse.median if self.compared else None

    @cached_property
    def skipped(self) -> float | None:
        """The mean share of patches that were not encoded."""
        return float(np.mean([record.skipped for record in self.scored])) if self.scored else None

    @cached_property
    def fidelity(self) -> Fidelity | None:
        if not self.compared:
            return None
        cosine = np.array([record.cosine for record in self.scored])
        return Fidelity(cosine.mean().item(), np.quantile(cosine, 0.05).item(), cosine.min().item())

    @cached_property
    def agreement(self) -> float | None:
        """The share of frames that both models name alike, None without classes."""
        if not self.compared or self.scored[0].dense_predicted is None:
            return None
        return float(np.mean([record.predicted == record.dense_predicted for record in self.scored]))

    @cached_property
    def key_frames(self) -> list[Record]:
        return [record for record in self.records if record.key_frame]

    @cached_property
    def mean_stages(self) -> Stages | None:
        """The mean of each stage, which add up as medians do not; None of a single frame, which no statistic counts."""
        if len(self.stages) < 2:
            return None
        counted = self.stages[1:]
        means = {name: fmean(vars(each)[name] for each in counted) for name in vars(counted[0]) if name != "dense"}
        dense = None if counted[0].dense is None else fmean(each.dense for each in counted)
        return Stages(**means, dense=dense)

    @property
    def other_ms(self) -> float:
        """What of a frame's mean time in the loop no stage accounts for."""
        mean = self.mean_stages
        return mean.total - sum((mean.encode, mean.dense or 0.0, mean.wait, mean.write))

import dataclasses
from typing import Literal

ARCHITECTURES = {"A": "mlp", "B": "active", "C": "dual", "D": "midlayer", "E": "context"}
DEFAULT_THRESHOLD = 0.02


def _require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; accepted is {accepted}")


@dataclasses.dataclass(frozen=True)
class NeuroFlowConfig:
    """What is measured per patch, which patches are encoded, and what the others contribute.

    The default is the training-free architecture E on the patch projection, against the content at each patch's last
    encoding. The published system's gate is `signal="embedding", reference="ema"`.

    Args:
        arch: what inactive patches contribute. "context" (E): their keys and values of every block and their last
            output. "dual" (C): their last output. "active" (B): nothing. "midlayer" (D): the first blocks run on all
            patches, then as C. "mlp" (A): attention runs on all patches, inactive ones repeat their last MLP increment.
        threshold: a patch is active where its surprise, 1 - cosine, lies above it; 0 makes every patch active. 0.02
            when neither threshold nor budget is given.
        budget: instead of a threshold, how many patches are active: a count, or a share of the patches below 1.
        ema_decay: weight of the new frame in the reference, 0 to 1; read when `reference="ema"`.
        floor: the least number of active patches.
        signal: "patch", the patch projection before the positional embedding, or "embedding", after it.
        reference: "refreshed", the signal at the patch's last encoding, or "ema", its moving average.
        max_age: a patch that was not encoded in this many frames is encoded whatever its surprise; None sets no limit.
        mid_layer: for "midlayer", the number of the last block that runs on all patches; None is half of them.

    Raises:
        ValueError: a value outside of what is said above.

    Source: Schmitt 2026, architectures A-D; E, "refreshed" and `max_age` are ours.
    """

    arch: str = "context"
    threshold: float | None = None
    budget: float | None = None
    ema_decay: float = 0.01
    floor: int = 4
    signal: Literal["patch", "embedding"] = "patch"
    reference: Literal["refreshed", "ema"] = "refreshed"
    max_age: int | None = None
    mid_layer: int | None = None

    def __post_init__(self) -> None:
        names = [*ARCHITECTURES, *ARCHITECTURES.values()]
        _require(self.arch in names, "arch", self.arch, "one of " + ", ".join(names))
        object.__setattr__(self, "arch", ARCHITECTURES.get(self.arch, self.arch))
        if self.budget is None and self.threshold is None:
            object.__setattr__(self, "threshold", DEFAULT_THRESHOLD)
        _require(self.budget is None or self.threshold is None, "budget", self.budget, "None beside a threshold")
        _require(
            self.threshold is None or 0 <= self.threshold <= 2, "threshold", self.threshold, "a number from 0 to 2"
        )
        whole = isinstance(self.budget, int) or (self.budget is not None and float(self.budget).is_integer())
        fits = self.budget is None or 0 < self.budget < 1 or (whole and self.budget >= 1)
        _require(fits, "budget", self.budget, "a count of 1 or more, or a share between 0 and 1")
        _require(0 <= self.ema_decay <= 1, "ema_decay", self.ema_decay, "a number from 0 to 1")
        _require(isinstance(self.floor, int) and self.floor >= 0, "floor", self.floor, "an integer, 0 or more")
        _require(self.signal in ("patch", "embedding"), "signal", self.signal, "'patch' or 'embedding'")
        _require(self.reference in ("refreshed", "ema"), "reference", self.reference, "'refreshed' or 'ema'")
        aged = self.max_age is None or (isinstance(self.max_age, int) and self.max_age >= 1)
        _require(aged, "max_age", self.max_age, "None or a number of frames, 1 or more")
        placed = self.mid_layer is None or (isinstance(self.mid_layer, int) and self.mid_layer >= 0)
        _require(placed, "mid_layer", self.mid_layer, "None or the number of a block, counted from 0")

    def tokens_per_frame(self, patches: int) -> int | None:
        """The budget as a count for a frame of `patches` patches, or None under a threshold."""
        if self.budget is None or self.budget >= 1:
            return None if self.budget is None else int(self.budget)
        return max(int(patches * self.budget), 1)

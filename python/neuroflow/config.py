import dataclasses
import itertools
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

from .files import from_json, replacing, to_json

ARCHITECTURES = {"A": "mlp", "B": "active", "C": "dual", "D": "midlayer", "E": "context"}
DEFAULT_THRESHOLD = {"staleness": 0.1, "surprise": 0.02}
RENAMED = {"engine": "launch"}  # fields of files that were written before
LARGEST = (2 - 2**-23) * 2.0**127  # float32
MOST = 2**31 - 1  # int32

Signal = Literal["patch", "embedding", "pixel"]
Reference = Literal["refreshed", "ema", "previous", "dual"]
Score = Literal["staleness", "surprise"]
Refresh = Literal["key", "rolling"]
Batch = Literal["clip", "streams", "dense"]
Reuse = Literal["nearest", "last"]
Launch = Literal["graph", "eager"]
Precision = Literal["model", "bfloat16"]
Kernels = Literal["measured", "rows", "torch"]


def _listed(kind: object) -> str:
    return ", ".join(repr(value) for value in get_args(kind))


def _require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r:.200}; accepted is {accepted}")


def is_number(value: object, low: float, high: float = LARGEST) -> TypeGuard[float]:
    """A real number from `low` to `high`; True and False are none, nor is NaN."""
    return isinstance(value, Real) and not isinstance(value, bool) and value <= high and not value < low


def is_integer(value: object, low: int) -> TypeGuard[int]:
    """An integer from `low` to the largest of int32, as kernels count."""
    return isinstance(value, int) and is_number(value, low, MOST)


@dataclasses.dataclass(frozen=True)
class NeuroFlowConfig:
    """What is measured per patch, which patches are encoded, and what the others contribute.

    The default is the training-free architecture E on the patch projection, against the content at each patch's last
    encoding, scored by staleness. `NeuroFlowConfig.published()` is the published system's.

    Args:
        arch: what inactive patches contribute. "context" (E): their keys and values of every block and their last
            output. "dual" (C): their last output. "active" (B): nothing. "midlayer" (D): the first blocks run on all
            patches, then as C. "mlp" (A): attention runs on all patches, inactive ones repeat their last MLP increment.
        threshold: a patch is active where its score lies above it; 0 makes every patch active. When neither threshold
            nor budget is given, 0.1 on staleness and 0.02 on surprise; `neuroflow.calibrate` finds it for a clip.
        budget: instead of a threshold, how many patches are active: a count, or a share of the patches below 1.
        share_budget: the streams of one pass share the sum of their budgets: the highest scores of all are active.
        floor: the least number of active patches.
        signal: "patch", the patch projection before the positional embedding; "embedding", after it; or "pixel".
        reference: what the signal is compared with. "refreshed", the signal at the patch's last encoding; "previous",
            at the last frame; "ema", its moving average; "dual", the larger surprise of a fast and a slow average, so
            that what stops stays covered until the slow one has taken it in.
        ema_decay: weight of the new frame in the average of "ema" and the slow one of "dual", 0 to 1.
        fast_decay: the same for the fast average of "dual".
        score: what the rule reads. "surprise" is 1 - cosine to the reference; "staleness" estimates from it how far
            the caches have drifted, and weighs that by the attention that the pooled output pays the patch.
        normalise_motion: subtract the frame's mean surprise first, for cameras that move.
        dilation: patches up to this many away from an active one are active too.
        ladder: the active patches of a pass, over all its streams of one size, are one of these numbers, ascending, or
            all: the most surprising of the others fill up to the next. For what is compiled or captured by shape.
        max_age: a patch that was not encoded in this many frames is encoded whatever its score; None sets no limit.
        refresh: how `max_age` is kept. "key", by a key frame that many frames after the last one, which clears every
            error that the caches hold; "rolling", by the oldest few patches of every frame, which never costs much at
            once, but encodes them beside what is stale itself, so that errors fade and do not end.
        cut_share: a frame with more than this share of its patches active becomes a key frame; None: never.
        cut_surprise: so does one whose mean surprise lies above this; None: never.
        cut_light: so does one in another light: since they were encoded, the contrast or the saturation of the patches
            that it would not encode changed by more than this, as the natural logarithm of a ratio, be it at once, as
            when a camera turns to infrared, or little by little, as when fog lifts. A patch by itself shows too little
            of that. Of towers that map whole RGB frames to patches by a convolution; None: never.
        dense_above: a pass with more than this share of the patches of all its streams active runs dense, each stream
            with a key frame, as partial frames would take longer; 1: none does. None: the share is measured on the
            machine, in about half the time of a dense pass after the first one of a size and dtype. Hooks on parts of
            the first block see it run for that.
        blend: weight of a patch's new output in its cache, above 0 to 1. 1 replaces; less damps flicker.
        mid_layer: for "midlayer", the number of the last block that runs on all patches; None is half of them.
        precision: "model", the model's own; or "bfloat16": in a pass that encodes a part of its frames, a float32
            model's linear layers and attention multiply in bfloat16, and the caches hold keys and values in it. Sums,
            the residual stream and passes of whole frames stay float32. Takes half the weights' memory more and half
            the keys' and values' less. Models of other dtypes stay as they are.
        kernels: what multiplies the rows of partial frames on a CPU. "measured": for each shape, dtype and power of two
            of rows the fastest of our own kernels, torch's, and oneDNN's with weights that it has packed, which takes
            their memory again; they take turns in the first frames that have so many, and `summary` says which it is.
            "rows": our own alone, where a row's last bits depend neither on the rows that come with it nor on what was
            faster. "torch": torch's own functions.
        batch: what several frames in one call are, where no context names their streams. "clip": one clip, in order of
            time, which begins with a key frame and leaves nothing behind, so that the same call gives the same twice;
            frames that have nothing in common are key frames, and cost what they cost dense. "streams": a frame of each
            of as many streams, 0 to S - 1. "dense": they run unpatched.
        reuse: what serves a patch that is not encoded. "last", its last version; "nearest", in a clip without a name,
            its last or its next, whichever is nearer in content (bench/results/studies/reuse.md). A stream that goes
            on knows no next version, and is served by the last; so is any reference but "refreshed".
        pass_patches: how many patches a pass holds at most; a call of more frames than that is encoded in several, one
            after the other, which bounds the memory that it takes beside its output.
        launch: "graph": on a GPU, sparse frames of streams that keep coming together are recorded as CUDA graphs, whose
            numbers of patches are those of the ladder (64, 96, 128, 192, ... where none is given). Hooks on the tower's
            modules run when a graph is recorded, and not with every frame. "eager": every frame is launched op by op,
            as everything is on a CPU.

    Raises:
        ValueError: a value outside of what is said above.

    Source: Schmitt 2026, architectures A-D, the gate, and as proposals "dual", `normalise_motion` and `blend`; E,
    "refreshed", "staleness", ages and cuts are ours.
    """

    arch: str = "context"
    threshold: float | None = None
    budget: float | None = None
    share_budget: bool = False
    floor: int = 4
    signal: Signal = "patch"
    reference: Reference = "refreshed"
    ema_decay: float = 0.01
    fast_decay: float = 0.2
    score: Score = "staleness"
    normalise_motion: bool = False
    dilation: int = 0
    ladder: tuple[int, ...] | None = None
    max_age: int | None = 128
    refresh: Refresh = "key"
    cut_share: float | None = 0.5
    cut_surprise: float | None = 0.25
    cut_light: float | None = 0.12
    dense_above: float | None = None
    blend: float = 1.0
    mid_layer: int | None = None
    precision: Precision = "model"
    kernels: Kernels = "measured"
    batch: Batch = "clip"
    reuse: Reuse = "nearest"
    pass_patches: int = 2**16
    launch: Launch = "graph"

    def __post_init__(self) -> None:
        names = [*ARCHITECTURES, *ARCHITECTURES.values()]
        _require(self.arch in names, "arch", self.arch, "one of " + ", ".join(names))
        object.__setattr__(self, "arch", ARCHITECTURES.get(self.arch, self.arch))
        kinds = {
            "signal": Signal,
            "reference": Reference,
            "score": Score,
            "refresh": Refresh,
            "precision": Precision,
            "kernels": Kernels,
            "batch": Batch,
            "reuse": Reuse,
            "launch": Launch,
        }
        for name, kind in kinds.items():
            _require(getattr(self, name) in get_args(kind), name, getattr(self, name), "one of " + _listed(kind))
        for name in ("share_budget", "normalise_motion"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        if self.budget is None and self.threshold is None:
            object.__setattr__(self, "threshold", DEFAULT_THRESHOLD[self.score])
        _require(self.budget is None or self.threshold is None, "budget", self.budget, "None beside a threshold")
        ruled = self.threshold is None or is_number(self.threshold, 0)
        _require(ruled, "threshold", self.threshold, "a finite number of float32, 0 or more")
        counted = is_number(self.budget, 0, MOST) and (0 < self.budget < 1 or self.budget == int(self.budget) > 0)
        limits = f"a count from 1 to {MOST}, or a share between 0 and 1"
        _require(self.budget is None or counted, "budget", self.budget, limits)
        shared = self.budget is not None or not self.share_budget
        _require(shared, "share_budget", self.share_budget, "False without a budget")
        for name in ("ema_decay", "fast_decay"):
            _require(is_number(getattr(self, name), 0, 1), name, getattr(self, name), "a number from 0 to 1")
        for name, least in {"floor": 0, "dilation": 0, "pass_patches": 1}.items():
            value = getattr(self, name)
            _require(is_integer(value, least), name, value, f"an integer from {least} to {MOST}")
        if self.ladder is not None:
            listed = isinstance(self.ladder, list | tuple) and all(is_integer(rung, 1) for rung in self.ladder)
            ascends = listed and bool(self.ladder) and all(low < high for low, high in itertools.pairwise(self.ladder))
            _require(ascends, "ladder", self.ladder, f"None or ascending integers from 1 to {MOST}")
            object.__setattr__(self, "ladder", tuple(self.ladder))
            _require(not self.dilation, "ladder", self.ladder, "None beside a dilation, which adds patches to it")
        aged = self.max_age is None or is_integer(self.max_age, 1)
        _require(aged, "max_age", self.max_age, f"None or a number of frames from 1 to {MOST}")
        cut = self.cut_share is None or (is_number(self.cut_share, 0, 1) and self.cut_share > 0)
        _require(cut, "cut_share", self.cut_share, "None or a share above 0, at most 1")
        cut = self.cut_surprise is None or (is_number(self.cut_surprise, 0, 2) and self.cut_surprise > 0)
        _require(cut, "cut_surprise", self.cut_surprise, "None or a number above 0, at most 2")
        cut = self.cut_light is None or (is_number(self.cut_light, 0, 10) and self.cut_light > 0)
        _require(cut, "cut_light", self.cut_light, "None or a number above 0, at most 10")
        bounded = self.dense_above is None or is_number(self.dense_above, 0, 1)
        _require(bounded, "dense_above", self.dense_above, "None or a share from 0 to 1")
        packs = self.precision == "model" or self.arch != "mlp"
        _require(packs, "precision", self.precision, "'model' for arch 'mlp', whose attention runs on all patches")
        blends = is_number(self.blend, 0, 1) and self.blend > 0
        _require(blends, "blend", self.blend, "a number above 0, at most 1")
        placed = self.mid_layer is None or is_integer(self.mid_layer, 0)
        _require(placed, "mid_layer", self.mid_layer, "None or the number of a block, counted from 0")

    @classmethod
    def published(cls, arch: str = "dual", **settings: Any) -> "NeuroFlowConfig":
        """The gate of the published system: the tokens in front of the first block, against a moving average of them.

        Args:
            arch: "mlp", "active", "dual" or "midlayer" (A to D) as published; "context" (E) under the same gate.
            settings: fields that are to differ, such as `threshold`.

        Raises:
            ValueError: as of `NeuroFlowConfig`.

        Example:
            neuroflow.enable_cache(model, NeuroFlowConfig.published(threshold=0.05))

        Source: Schmitt 2026.
        """
        gate = {
            "signal": "embedding",
            "reference": "ema",
            "score": "surprise",
            "max_age": None,
            "cut_share": None,
            "cut_surprise": None,
            "cut_light": None,
            "dense_above": 1.0,
        }
        return cls(arch=arch, **gate | settings)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "NeuroFlowConfig":
        """A configuration from its fields by name, as files hold them; those left out have their defaults.

        Raises:
            ValueError: no dict, an unknown field, or a value out of range.
        """
        if not isinstance(fields, dict):
            raise ValueError(f"holds a {type(fields).__name__}; accepted is a JSON object")
        fields = {RENAMED.get(name, name): value for name, value in fields.items()}
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"has no field {unknown[0]!r}; accepted are those of NeuroFlowConfig")
        return cls(**fields)

    def reproducible(self) -> "NeuroFlowConfig":
        """The same, but that what is encoded, and every bit of it, does not depend on how fast the machine is."""
        dense_above = 1.0 if self.dense_above is None else self.dense_above
        kernels = "rows" if self.kernels == "measured" else self.kernels
        return dataclasses.replace(self, dense_above=dense_above, kernels=kernels)

    def tokens_per_frame(self, patches: int) -> int | None:
        """The budget as a count for a frame of `patches` patches, or None under a threshold."""
        if self.budget is None or self.budget >= 1:
            return None if self.budget is None else min(int(self.budget), patches)
        return max(int(patches * self.budget), 1)

    def save(self, path: str | Path) -> None:
        """Write the configuration as JSON, for `load`, `enable_cache` and `neuroflow run --config`.

        Raises:
            OSError: the file cannot be written.
        """
        with replacing(Path(path)) as partial:
            partial.write_text(to_json(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "NeuroFlowConfig":
        """Read what `save` wrote; fields that the file leaves out have their defaults.

        Raises:
            ValueError: the file cannot be read, is no JSON object, or holds an unknown field or a value out of range.
        """
        try:
            fields = from_json(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"config {path}: cannot be read ({error}); give a file that save wrote") from None
        try:
            return cls.from_fields(fields)
        except ValueError as error:
            raise ValueError(f"config {path}: {error}") from None

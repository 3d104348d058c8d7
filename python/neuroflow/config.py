import dataclasses
import itertools
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

from .files import from_json, replacing, to_json

ARCHITECTURES = {"A": "mlp", "B": "active", "C": "dual", "D": "midlayer", "E": "context"}
DEFAULT_THRESHOLD = {"staleness": 0.1, "surprise": 0.02}
RENAMED = {"engine": "launch"}  # old names of fields, in files of earlier releases
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
    """A real number from `low` to `high`, other than True, False and NaN."""
    return isinstance(value, Real) and not isinstance(value, bool) and value <= high and not value < low


def is_integer(value: object, low: int) -> TypeGuard[int]:
    """An integer from `low` to the largest int32, which kernels count in."""
    return isinstance(value, int) and is_number(value, low, MOST)


@dataclasses.dataclass(frozen=True)
class NeuroFlowConfig:
    """Settings of a patched model: which patches of a frame are encoded, and what stands in for the others.

    The default is architecture E, which needs no training: each patch projection is compared with the one at the
    patch's last encoding and scored by staleness. `NeuroFlowConfig.published()` gives the published gate.

    Args:
        arch: what a patch contributes when it is not encoded. "context" (E): its keys and values in every block, and
            its last output. "dual" (C): its last output only. "active" (B): nothing. "midlayer" (D): the first blocks
            run on all patches, the others as in C. "mlp" (A): attention runs on all patches, and an inactive patch adds
            the MLP increment of its last active frame.
        threshold: score above which a patch is active, 0 or more; 0 makes every patch active. The default is 0.1 for
            staleness and 0.02 for surprise, or None if a budget is set. `neuroflow.calibrate` fits it to a clip.
        budget: active patches a frame, in place of a threshold: a count, or a share of all patches between 0 and 1.
        share_budget: pool the budgets of all streams in a pass; the highest scores across the streams are active.
        floor: minimum number of active patches a frame, 0 or more. 4 as published.
        dilation: also encode patches within this distance of an active one, in patches, diagonals included. 0 turns it
            off.
        ladder: allowed counts of active patches, ascending, for code that is compiled or captured by shape. A pass
            fills up to the next rung with the next highest scores, or runs on all patches above the last rung.
            Counted over all streams of a pass with the same grid. None allows any count.
        score: what the threshold or budget is applied to. "surprise": 1 - cosine between a patch and its reference, 0
            to 2. "staleness": an estimate of how far the patch's caches have drifted, from the surprise in and around
            it and from its age, weighted by the attention that the pooled output pays to the patch.
        signal: what is compared. "patch": the patch projection before the positional embedding, which would hide
            change. "embedding": the token after it. "pixel": the pixels.
        reference: what the signal is compared with. "refreshed": the signal at the patch's last encoding. "previous":
            the last frame. "ema": a moving average. "dual": a fast and a slow average, whichever gives more surprise,
            so that an object that stops stays active until the slow average has absorbed it.
        ema_decay: weight of the new frame in the "ema" average, and in the slow one of "dual", 0 to 1. 0.01 as
            published.
        fast_decay: weight of the new frame in the fast average of "dual", 0 to 1.
        normalise_motion: subtract the frame's mean surprise from each patch's before scoring, for moving cameras.
        max_age: frames within which every patch is encoded again, whatever its score, 1 or more. None sets no limit.
        refresh: how `max_age` is enforced. "key": a key frame, `max_age` frames after the last one, which removes all
            accumulated error. "rolling": a few of the oldest patches in every frame, which avoids the latency peak; but
            they are encoded against caches that are stale themselves, so errors fade without ever reaching zero.
        cut_share: share of active patches above which a frame becomes a key frame, above 0 to 1. None turns it off.
        cut_surprise: mean surprise above which a frame becomes a key frame, above 0 to 2, which also works under a
            budget. None turns it off.
        cut_light: change of light above which a frame becomes a key frame, as |ln(ratio)| of contrast or saturation,
            above 0 to 10. Measured on the patches that would not be encoded, since each was last encoded, so that it
            catches both a switch to infrared and slowly lifting fog, which a single patch hardly shows. Only for towers
            that project RGB frames by a convolution. None turns it off.
        dense_above: share of active patches, over all streams of a pass, above which the pass runs dense and each of
            its frames becomes a key frame, 0 to 1; 1 never does. None measures the break-even point on this machine,
            once for each size and dtype, in about half the time of a dense pass. Hooks inside the first block also fire
            during this measurement.
        blend: weight of a patch's new output when its cached one is updated, above 0 to 1. 1 replaces it; less damps
            flicker.
        mid_layer: index of the last block that "midlayer" runs on all patches, counted from 0. None: half of the
            blocks.
        batch: how a call with several frames and no named streams is read. "clip": consecutive frames of one clip,
            which starts with a key frame and leaves no state behind, so that the same call gives the same result twice;
            unrelated frames all become key frames, at dense cost. "streams": one frame each of streams 0 to S - 1.
            "dense": run unpatched.
        reuse: which cached version serves a patch that is not encoded. "last": the previous one. "nearest": the
            previous or the next one, whichever is closer in content, inside a clip without a name
            (bench/results/studies/reuse.md). Named streams do not know the next version, and references other than
            "refreshed" do not use it; both fall back to "last".
        precision: "model": the model's dtype. "bfloat16": in partial passes of a float32 model, linear layers and
            attention multiply in bfloat16, and keys and values are cached in it, while sums, the residual stream and
            dense passes stay float32. Adds half the memory of the weights and saves half that of keys and values. No
            effect on models of other dtypes.
        kernels: what multiplies the rows of partial frames on a CPU. "measured": the fastest, for each shape, dtype and
            power of two of rows, of our kernels, torch's, and oneDNN's with packed weights (a second copy of them).
            They take turns during the first frames; `summary` shows the result. "rows": our kernels only, whose
            rounding does not depend on timing or on the other rows in the batch. "torch": torch's only.
        launch: "graph": on a GPU, partial frames of streams that keep arriving together replay a recorded CUDA graph,
            with counts of active patches from the ladder (64, 96, 128, 192, ... if None is given). Hooks on the tower's
            modules then fire during recording only. "eager": launch every op of every frame, as is always done on a
            CPU.
        pass_patches: maximum number of patches in a pass, 1 or more, which bounds the memory a call needs beside its
            output. Calls with more frames are split.

    Raises:
        ValueError: a field has another type, or is out of its range.

    Example:
        >>> config = neuroflow.NeuroFlowConfig(threshold=0.2, max_age=64)
        >>> config.arch
        'context'
        >>> model = neuroflow.enable_cache(model, config)

    Source: Schmitt 2026 for A to D and the gate, and as proposals for "dual", `normalise_motion` and `blend`. E,
    "refreshed", "staleness", ages and cuts are ours.
    """

    arch: str = "context"
    threshold: float | None = None
    budget: float | None = None
    share_budget: bool = False
    floor: int = 4
    dilation: int = 0
    ladder: tuple[int, ...] | None = None
    score: Score = "staleness"
    signal: Signal = "patch"
    reference: Reference = "refreshed"
    ema_decay: float = 0.01
    fast_decay: float = 0.2
    normalise_motion: bool = False
    max_age: int | None = 128
    refresh: Refresh = "key"
    cut_share: float | None = 0.5
    cut_surprise: float | None = 0.25
    cut_light: float | None = 0.12
    dense_above: float | None = None
    blend: float = 1.0
    mid_layer: int | None = None
    batch: Batch = "clip"
    reuse: Reuse = "nearest"
    precision: Precision = "model"
    kernels: Kernels = "measured"
    launch: Launch = "graph"
    pass_patches: int = 2**16

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
        """The published gate: tokens in front of the first block, compared with their moving average.

        Args:
            arch: "mlp", "active", "dual" or "midlayer" (A to D) as published, or "context" (E) under the same gate.
            settings: fields to override, such as `threshold`.

        Returns:
            the configuration, without ages, cuts or a dense fallback, which were not published.

        Raises:
            ValueError: a field that is out of range; see `NeuroFlowConfig`.
            TypeError: a name that is not a field.

        Example:
            >>> config = neuroflow.NeuroFlowConfig.published(threshold=0.05)
            >>> config.arch, config.reference, config.max_age
            ('dual', 'ema', None)

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
        """Build a configuration from a dict of fields, as read from a file; missing fields take their defaults.

        Args:
            fields: field name -> value.

        Returns:
            the configuration.

        Raises:
            ValueError: not a dict, an unknown field, or a value out of range.

        Example:
            >>> neuroflow.NeuroFlowConfig.from_fields({"arch": "dual"}).arch
            'dual'
        """
        if not isinstance(fields, dict):
            raise ValueError(f"holds a {type(fields).__name__}; accepted is a JSON object")
        fields = {RENAMED.get(name, name): value for name, value in fields.items()}
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"has no field {unknown[0]!r}; accepted are those of NeuroFlowConfig")
        return cls(**fields)

    def reproducible(self) -> "NeuroFlowConfig":
        """A copy whose results do not depend on how fast the machine is.

        Returns:
            the same settings, with nothing measured: `dense_above` is 1 if it was None, `kernels` is "rows" if it was
            "measured".

        Example:
            >>> neuroflow.NeuroFlowConfig().reproducible().kernels
            'rows'
        """
        dense_above = 1.0 if self.dense_above is None else self.dense_above
        kernels = "rows" if self.kernels == "measured" else self.kernels
        return dataclasses.replace(self, dense_above=dense_above, kernels=kernels)

    def tokens_per_frame(self, patches: int) -> int | None:
        """The budget as a count of patches.

        Args:
            patches: patches in a frame.

        Returns:
            active patches a frame, at least 1 and at most `patches`; None if the configuration has a threshold.

        Example:
            >>> neuroflow.NeuroFlowConfig(budget=0.25).tokens_per_frame(196)
            49
        """
        if self.budget is None or self.budget >= 1:
            return None if self.budget is None else min(int(self.budget), patches)
        return max(int(patches * self.budget), 1)

    def save(self, path: str | Path) -> None:
        """Write the configuration as JSON, to be read by `load`, `enable_cache` and `neuroflow run --config`.

        Args:
            path: the file; an existing one is replaced.

        Raises:
            OSError: the file cannot be written.

        Example:
            >>> neuroflow.NeuroFlowConfig(threshold=0.2).save("gate.json")
            >>> neuroflow.NeuroFlowConfig.load("gate.json").threshold
            0.2
        """
        with replacing(Path(path)) as partial:
            partial.write_text(to_json(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "NeuroFlowConfig":
        """Read a configuration that `save` wrote; missing fields take their defaults.

        Args:
            path: a JSON file.

        Returns:
            the configuration.

        Raises:
            ValueError: the file cannot be read, is not a JSON object, or holds an unknown field or a value out of
                range.

        Example:
            >>> neuroflow.NeuroFlowConfig(budget=64).save("gate.json")
            >>> neuroflow.NeuroFlowConfig.load("gate.json").budget
            64
        """
        try:
            fields = from_json(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"config {path}: cannot be read ({error}); give a file that save wrote") from None
        try:
            return cls.from_fields(fields)
        except ValueError as error:
            raise ValueError(f"config {path}: {error}") from None

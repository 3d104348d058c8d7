"""Fit settings to the user's own footage: the threshold for a target fidelity or skip rate, and a logit shift."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .config import NeuroFlowConfig
from .embedding import frame_embeddings, in_clips, patch_tokens
from .patch import cache_context, disable_cache, enable_cache, is_patched, summary
from .weights import write

# By score, from float32 rounding or a hundredth of what one frame of age adds, up to more than any patch reaches.
THRESHOLDS = {"surprise": (1e-6, 2.0), "staleness": (1e-5, 1000.0)}
RESOLUTION = 1.005
STREAM = "clip"
SKIP_TOLERANCE = 0.005
UNCHANGED = 1e-6  # 1 - cosine of embeddings that differ only by rounding
Of = Literal["embedding", "tokens"]


class CalibrationError(ValueError):
    """No threshold reaches the target on these frames. The message says what came closest.

    Example:
        >>> try:
        ...     neuroflow.calibrate(model, frames[:1].repeat(4, 1, 1, 1), skip=0.9)
        ... except neuroflow.CalibrationError as error:
        ...     print(error)
        nothing changes in the frames: every embedding is that of the first
    """


class Trial(NamedTuple):
    """What one threshold gave, over all frames but the first.

    Args:
        threshold: the threshold tried.
        skipped: mean share of patches that were not encoded, 0 to 1.
        fidelity: mean over frames of the cosine to the unpatched model's.
        fidelity_p5: 5th percentile of that cosine.
    """

    threshold: float
    skipped: float
    fidelity: float
    fidelity_p5: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The chosen setting, and what it gave.

    Args:
        config: the configuration passed in, with the threshold that was found.
        skipped: mean share of patches that were not encoded, 0 to 1.
        fidelity: mean over frames of the cosine to the unpatched model's.
        fidelity_p5: 5th percentile of that cosine.
        trials: all `Trial`s, in the order they were made.

    Example:
        >>> found = neuroflow.calibrate(model, frames, fidelity=0.99)
        >>> found.fidelity >= 0.99
        True
        >>> found.config.save("gate.json")
    """

    config: NeuroFlowConfig
    skipped: float
    fidelity: float
    fidelity_p5: float
    trials: tuple[Trial, ...]


def calibrate(
    model: nn.Module,
    frames: torch.Tensor | Iterable[torch.Tensor],
    config: NeuroFlowConfig | None = None,
    *,
    fidelity: float | None = None,
    skip: float | None = None,
    of: Of = "embedding",
) -> Calibration:
    """Find the threshold that gives a target fidelity, or a target skip rate, on one clip.

    The threshold is bisected on a log scale, in at most 13 passes over the frames. The first frame is a key frame and
    is not scored. Above some threshold only `floor` patches are active; among thresholds that skip equally much, the
    lowest is chosen, since it lets more through when later footage changes more than this clip.

    The unpatched model runs once, and its results [T, D] or [T, N, D] are kept. Beyond these and the state of one
    stream, 16 frames are held at a time, which go through the model in one call.

    The result does not depend on the speed of the machine: while searching, `dense_above` of None counts as 1 and
    "measured" `kernels` as "rows"; the returned configuration keeps the originals. On footage that changes so much that
    dense is faster, fewer patches are then skipped than reported, and fidelity is higher.

    Args:
        model: an unpatched model in evaluation mode, from `neuroflow.supported_models`, that takes frames as
            `pixel_values` (not patches, as NaFlex does). It is unpatched again when this returns or raises.
        frames: consecutive frames of one clip, as the model takes `pixel_values`: [T, 3, H, W], T of at least 2, or an
            iterable of [1, 3, H, W] that can be read more than once. Moved to the model's device and dtype.
        config: all settings but the threshold; `NeuroFlowConfig()` by default.
        fidelity: target for the mean cosine to the unpatched model, between 0 and 1. The largest threshold that reaches
            it is chosen.
        skip: target for the mean share of skipped patches, between 0 and 1, met within 0.005. Give this or `fidelity`.
        of: what is compared. "embedding": the model's embedding of the frame. "tokens": each patch after the last block
            and its norm, as language models and dense heads read it; a frame's cosine is the mean over its patches.

    Returns:
        the setting and its figures.

    Raises:
        CalibrationError: no threshold reaches the target, or the frames do not tell thresholds apart.
        ValueError: not exactly one target, or one out of range; a budget in `config`; tokens of architecture B; fewer
            than two frames; frames of another shape, with NaN or Inf, or that can be read only once.
        RuntimeError: the model is patched.
        TypeError: no adapter knows the model.

    Example:
        >>> found = neuroflow.calibrate(model, frames, fidelity=0.99)
        >>> print(f"threshold {found.config.threshold:g}: {found.skipped:.0%} skipped")  # doctest: +ELLIPSIS
        threshold ...% skipped
        >>> model = neuroflow.enable_cache(model, found.config)
    """
    config = NeuroFlowConfig() if config is None else config
    if (fidelity is None) == (skip is None):
        raise ValueError(f"fidelity is {fidelity!r} and skip is {skip!r}; accepted is one of them, the other None")
    for name, target in (("fidelity", fidelity), ("skip", skip)):
        if target is not None and not 0 < target < 1:
            raise ValueError(f"{name} is {target!r}; accepted is a number between 0 and 1")
    if of not in get_args(Of):
        raise ValueError(f"of is {of!r}; accepted is 'embedding' or 'tokens'")
    if of == "tokens" and config.arch == "active":
        raise ValueError("of is 'tokens', which arch 'active' has for active patches only; accepted is 'embedding'")
    if config.budget is not None:
        raise ValueError(
            f"config has a budget of {config.budget!r}; accepted is None, as calibrate looks for a threshold"
        )
    if isinstance(frames, Iterator):
        raise ValueError(
            f"frames is a {type(frames).__name__}, which can be read only once; accepted is a tensor [T, 3, H, W], or "
            "an iterable that starts over, such as a list"
        )
    if is_patched(model):
        raise RuntimeError(f"{type(model).__name__} is patched; call neuroflow.disable_cache first")
    if isinstance(frames, torch.Tensor):
        frames = frames.split(1)
    dense = _encoded(model, frames, of)
    if len(dense) < 2:
        raise ValueError(f"frames holds {len(dense)} frame(s); accepted is two or more, as the first is not scored")
    if not dense.isfinite().all():
        number = int((~dense.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"frames: the {of} of frame {number} holds NaN or Inf; accepted is finite pixels")
    if F.cosine_similarity(dense, dense[:1], -1).min() > 1 - UNCHANGED:
        raise CalibrationError(f"nothing changes in the frames: every {of} is that of the first")

    tried = config.reproducible()

    def attempt(threshold: float) -> Trial:
        trials.append(_try(model, frames, of, dense, dataclasses.replace(tried, threshold=threshold)))
        return trials[-1]

    low, high = THRESHOLDS[config.score]
    trials: list[Trial] = []
    most = attempt(high).skipped
    possible = skip is None or most >= skip - SKIP_TOLERANCE
    while possible and high / low > RESOLUTION:
        trial = attempt(float(f"{math.sqrt(low * high):.4g}"))
        if skip is not None and abs(trial.skipped - skip) <= SKIP_TOLERANCE:
            break
        if trial.skipped > skip if fidelity is None else trial.fidelity < fidelity or trial.skipped >= most:
            high = trial.threshold
        else:
            low = trial.threshold
    best = _best(trials, fidelity, skip)
    return Calibration(dataclasses.replace(config, threshold=best.threshold), *best[1:], tuple(trials))


def _best(trials: list[Trial], fidelity: float | None, skip: float | None) -> Trial:
    if fidelity is not None:
        nearest = max(trials, key=lambda trial: trial.fidelity)
        reached = [trial for trial in trials if trial.fidelity >= fidelity]
    else:
        nearest = min(trials, key=lambda trial: abs(trial.skipped - skip))
        reached = [trial for trial in trials if abs(trial.skipped - skip) <= SKIP_TOLERANCE]
    outcome = f"{nearest.skipped:.1%} of the patches skipped at a mean cosine of {nearest.fidelity:.4f}"
    if len(trials) > 1 and len({trial.skipped for trial in trials}) == 1:
        tried = sorted(trial.threshold for trial in trials)
        raise CalibrationError(
            f"the frames do not tell thresholds apart: each from {tried[0]:g} to {tried[-1]:g} gives {outcome}"
        )
    if not reached:
        asked = f"a skip rate of {skip:.1%}" if fidelity is None else f"a mean cosine of {fidelity:g}"
        raise CalibrationError(f"{asked} is not reached: the nearest is threshold {nearest.threshold:g}, {outcome}")
    if fidelity is None:
        return min(reached)
    largest = max(reached)
    return min(trial for trial in reached if trial.skipped >= largest.skipped)


def _try(
    model: nn.Module, frames: Iterable[torch.Tensor], of: Of, dense: torch.Tensor, config: NeuroFlowConfig
) -> Trial:
    enable_cache(model, config)
    try:
        with cache_context(model, STREAM):
            sparse = _encoded(model, frames, of)
        stream = summary(model).streams[STREAM]
    finally:
        disable_cache(model)
    cosine = F.cosine_similarity(sparse[1:], dense[1:], -1).flatten(1).mean(1)
    skipped = stream.skipped * stream.frames / (stream.frames - 1)
    return Trial(config.threshold, skipped, cosine.mean().item(), cosine.quantile(0.05).item())


@torch.inference_mode()
def _encoded(model: nn.Module, frames: Iterable[torch.Tensor], of: Of) -> torch.Tensor:
    """What is compared of the frames, float32 [T, 1, D] or [T, N, D]."""
    encode = patch_tokens if of == "tokens" else lambda *of: frame_embeddings(*of)[:, None]
    found = [encode(model, clip) for clip in in_clips(map(_checked, frames))]
    return torch.cat(found) if found else torch.empty(0, 0, 0)


def _checked(pixels: torch.Tensor) -> torch.Tensor:
    if pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
        raise ValueError(f"frames holds a tensor {list(pixels.shape)}; accepted are [1, 3, H, W]")
    return pixels


@dataclasses.dataclass(frozen=True, eq=False)
class LogitShift:
    """A correction to a classifier's logits: what reuse takes from them on average, to be added back.

    The shift is the same for every frame. Check on clips other than the fitted ones that it helps.

    Args:
        shift: [classes] float32.

    Example:
        >>> shift = neuroflow.LogitShift.fit(torch.tensor([[2.0, 0.5]]), torch.tensor([[1.5, 0.5]]))
        >>> shift.shift
        tensor([0.5000, 0.0000])

    Source: Schmitt 2026 proposes it, without figures, for pooled embeddings that lose norm under reuse.
    """

    shift: torch.Tensor

    @classmethod
    def fit(cls, dense_logits: torch.Tensor, sparse_logits: torch.Tensor) -> "LogitShift":
        """The mean difference between dense and sparse logits over the same frames.

        Args:
            dense_logits: [T, classes], any float dtype, from the unpatched model.
            sparse_logits: [T, classes], any float dtype, from the patched model.

        Returns:
            the shift.

        Raises:
            ValueError: shapes that differ or are not [T, classes], or NaN or Inf.

        Example:
            >>> dense, sparse = torch.zeros(4, 10), torch.ones(4, 10)
            >>> shift = neuroflow.LogitShift.fit(dense, sparse)
            >>> torch.equal(shift.apply(sparse), dense)
            True
        """
        shapes = list(dense_logits.shape), list(sparse_logits.shape)
        if dense_logits.ndim != 2 or shapes[0] != shapes[1] or 0 in shapes[0]:
            raise ValueError(f"dense_logits is {shapes[0]} and sparse_logits {shapes[1]}; accepted are [T, classes]")
        shift = (dense_logits.float() - sparse_logits.float()).mean(0)
        if not shift.isfinite().all():
            raise ValueError("dense_logits or sparse_logits holds NaN or Inf; accepted are finite logits")
        return cls(shift)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Add the shift to logits of the patched model.

        Args:
            logits: [..., classes], any float dtype.

        Returns:
            the shifted logits, with the same shape, dtype and device.

        Raises:
            ValueError: another number of classes.

        Example:
            >>> shift = neuroflow.LogitShift(torch.tensor([0.5, 0.0]))
            >>> shift.apply(torch.zeros(1, 2))
            tensor([[0.5000, 0.0000]])
        """
        classes = len(self.shift)
        if logits.ndim == 0 or logits.shape[-1] != classes:
            raise ValueError(f"logits is {list(logits.shape)}; accepted is [..., {classes}], the classes of the fit")
        return logits + self.shift.to(logits)

    def save(self, path: str | Path) -> None:
        """Write the shift to a safetensors file.

        Args:
            path: the file; an existing one is replaced.

        Raises:
            OSError: the file cannot be written.

        Example:
            >>> neuroflow.LogitShift(torch.zeros(10)).save("shift.safetensors")
        """
        write(Path(path), {"shift": self.shift}, {})

    @classmethod
    def load(cls, path: str | Path) -> "LogitShift":
        """Read a shift that `save` wrote.

        Args:
            path: the file.

        Returns:
            the shift.

        Raises:
            ValueError: the file cannot be read, or holds something else.

        Example:
            >>> neuroflow.LogitShift(torch.zeros(10)).save("shift.safetensors")
            >>> neuroflow.LogitShift.load("shift.safetensors").shift.shape
            torch.Size([10])
        """
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path}: cannot be read ({error}); accepted is a file that LogitShift.save wrote"
            ) from None
        fits = list(tensors) == ["shift"] and tensors["shift"].ndim == 1 and tensors["shift"].is_floating_point()
        if not fits or not tensors["shift"].isfinite().all():
            found = {name: list(tensor.shape) for name, tensor in tensors.items()}
            raise ValueError(f"{path}: holds {found}; accepted is a file that LogitShift.save wrote, all finite")
        return cls(tensors["shift"])

"""What reuse does to a model, in rows: a function for each law that the published system is described by.

Every function takes an unpatched model and leaves it so; its copies share its weights. Frames are as the model takes
them, [T, 3, H, W], of one clip, in order; fewer than two are a ValueError. The first is dense whatever the settings,
and no row counts it; nor do the laws of tokens count the key frames after it, in which nothing is cached. Distances are
1 - cosine.

Source: Schmitt 2026 reports each of them for C.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .adapters import Anatomy, describe
from .adapters.anatomy import is_foldable
from .config import NeuroFlowConfig
from .embedding import frame_embeddings
from .evaluation import clip_embeddings
from .patch import enable_cache, last_pass
from .weights import copy_sharing_weights


class Saturation(NamedTuple):
    """`gap`: mean distance of the embeddings to dense ones, at a threshold that skips the share `skipped`."""

    arch: str
    threshold: float
    skipped: float
    gap: float


class Degradation(NamedTuple):
    """`fidelity`: mean cosine of the embeddings to dense ones, with so many patches a frame."""

    arch: str
    width: int
    height: int
    patches: int
    skipped: float
    fidelity: float


class Shift(NamedTuple):
    """Mean distance of a frame's output tokens to dense ones: `active`, of those it encoded; `cached`, of the others.

    What is encoded is off for lack of context, what is cached for age. `cached` is None where no token is.
    """

    frame: int
    skipped: float
    active: float
    cached: float | None


class Gap(NamedTuple):
    """`distance`: of the active patches' hidden states after a block to the same of dense frames, the mean of all."""

    block: int
    distance: float


class Entropy(NamedTuple):
    """Of the pooling head's attention over the tokens that it sees, in nats, the mean of its heads."""

    frame: int
    skipped: float
    dense: float
    sparse: float


class Stability(NamedTuple):
    """How well a perfect cache would have lasted: mean cosine of a frame's dense output tokens to the dense ones of the
    frame in which the gate last called for each patch; of the patches that it calls for now, and of the others.
    """

    frame: int
    skipped: float
    active: float
    inactive: float | None


class _Moment(NamedTuple):
    """One frame in both models: which patches are active [N] bool, and the tokens [T, D] that each watched module of
    the two gave; in the patched model those of the active tokens alone, in order, where it had packed them.
    """

    frame: int
    active: torch.Tensor
    dense: list[torch.Tensor]
    sparse: list[torch.Tensor]

    @property
    def skipped(self) -> float:
        return 1 - self.active.float().mean().item()


def saturation(
    model: nn.Module, frames: torch.Tensor, config: NeuroFlowConfig, thresholds: Sequence[float]
) -> list[Saturation]:
    """How far fidelity is off over how much is skipped. The published gap hardly depends on the threshold."""
    expected = _embeddings(model, frames)
    rows = []
    for threshold in thresholds:
        tried = dataclasses.replace(config, threshold=threshold, budget=None)
        fidelity, skipped = _fidelity(model, frames, tried, expected)
        rows.append(Saturation(config.arch, threshold, skipped, 1 - fidelity))
    return rows


def degradation(model: nn.Module, sizes: Iterable[torch.Tensor], config: NeuroFlowConfig) -> list[Degradation]:
    """What becomes of fidelity as positions are stretched: the same clip in each of `sizes`, [T, 3, H, W] each."""
    rows = []
    for frames in sizes:
        fidelity, skipped = _fidelity(model, frames, config, _embeddings(model, frames))
        ((rows_of_patches, columns),) = describe(model).grids({"pixel_values": frames[:1]})
        height, width = frames.shape[2:]
        rows.append(Degradation(config.arch, width, height, rows_of_patches * columns, skipped, fidelity))
    return rows


def active_shift(model: nn.Module, frames: torch.Tensor, config: NeuroFlowConfig) -> list[Shift]:
    """What the error of a frame's output tokens comes from: encoding without context, or the age of the cache."""
    prefix = describe(model).prefix
    rows = []
    for moment in _sparse_moments(model, frames, config, lambda anatomy: [anatomy.last]):
        (dense,), (sparse,) = moment.dense, moment.sparse
        active = _distance(dense[prefix:][moment.active], _active(sparse, moment, prefix))
        cached = None
        if config.arch != "active":
            cached = _distance(dense[prefix:][~moment.active], sparse[prefix:][~moment.active])
        rows.append(Shift(moment.frame, moment.skipped, active, cached))
    return rows


def representation_gap(model: nn.Module, frames: torch.Tensor, config: NeuroFlowConfig) -> list[Gap]:
    """Where in the model the active patches part from the dense ones: a row for each block."""
    prefix = describe(model).prefix
    distances: list[list[float]] = [[] for _ in describe(model).layers]
    for moment in _sparse_moments(model, frames, config, lambda anatomy: list(anatomy.layers)):
        for block, (dense, sparse) in enumerate(zip(moment.dense, moment.sparse, strict=True)):
            distances[block].append(_distance(dense[prefix:][moment.active], _active(sparse, moment, prefix)))
    return [Gap(block, sum(each) / len(each)) for block, each in enumerate(distances) if each]


def has_attention_head(model: nn.Module) -> bool:
    """Whether the model has a pooling head as SigLIP's, of one probe that attends to all tokens."""
    pool = describe(model).pool
    return pool is not None and is_foldable(pool[0])


def head_entropy(model: nn.Module, frames: torch.Tensor, config: NeuroFlowConfig) -> list[Entropy]:
    """How widely the pooling head looks, over dense tokens and over those that reuse gives it.

    Raises:
        ValueError: the model has no head that pools by attention, as SigLIP's does.
    """
    if not has_attention_head(model):
        tower = type(describe(model).tower).__name__
        raise ValueError(f"{tower} has no pooling head of one probe that attends to all tokens")
    head = describe(model).pool[0]

    def entropy(tokens: torch.Tensor) -> float:
        tokens = tokens[None].to(head.probe.dtype)
        _, weights = head.attention(head.probe, tokens, tokens, average_attn_weights=False)
        return torch.special.entr(weights.double()).sum(3).mean().item()  # [1, heads, 1, T]

    moments = _sparse_moments(model, frames, config, lambda anatomy: [anatomy.last])
    with torch.inference_mode():
        return [
            Entropy(moment.frame, moment.skipped, entropy(moment.dense[0]), entropy(moment.sparse[0]))
            for moment in moments
        ]


def token_stability(model: nn.Module, frames: torch.Tensor, config: NeuroFlowConfig) -> list[Stability]:
    """Whether the gate calls for the right patches: the cached tokens of those that it leaves should still hold."""
    prefix = describe(model).prefix
    rows = []
    for moment in _moments(model, frames, config, lambda anatomy: [anatomy.last]):
        now, active = moment.dense[0][prefix:], moment.active
        if moment.frame == 0:
            cached = now.clone()
        elif not active.all():
            rows.append(
                Stability(
                    moment.frame,
                    moment.skipped,
                    1 - _distance(now[active], cached[active]),
                    1 - _distance(now[~active], cached[~active]),
                )
            )
        cached[active] = now[active]
    return rows


def _embeddings(model: nn.Module, frames: torch.Tensor) -> torch.Tensor:
    """The model's embeddings [T, D] float32 of the frames, which go through it one by one."""
    _require_frames(frames)
    with torch.inference_mode():
        return torch.cat([frame_embeddings(model, frame) for frame in frames.split(1)])


def _require_frames(frames: torch.Tensor) -> None:
    if frames.ndim != 4 or len(frames) < 2:
        raise ValueError(f"frames is {list(frames.shape)}; accepted is [T, 3, H, W] of two frames or more")


def _fidelity(
    model: nn.Module, frames: torch.Tensor, config: NeuroFlowConfig, expected: torch.Tensor
) -> tuple[float, float]:
    """Mean cosine to `expected` [T, D] and mean share skipped."""
    sparse = copy_sharing_weights(model)
    enable_cache(sparse, config)
    found, skipped = clip_embeddings(sparse, frames)
    return F.cosine_similarity(found, expected)[1:].mean().item(), sum(skipped[1:]) / len(skipped[1:])


def _sparse_moments(
    model: nn.Module, frames: torch.Tensor, config: NeuroFlowConfig, watched: Callable[[Anatomy], list[nn.Module]]
) -> Iterator[_Moment]:
    """Those of frames that are no key frames."""
    return (moment for moment in _moments(model, frames, config, watched) if not moment.active.all())


def _moments(
    model: nn.Module, frames: torch.Tensor, config: NeuroFlowConfig, watched: Callable[[Anatomy], list[nn.Module]]
) -> Iterator[_Moment]:
    """Every frame in the unpatched model and in a patched one, and what their watched modules gave."""
    _require_frames(frames)
    anatomy, sparse = describe(model), copy_sharing_weights(model)
    enable_cache(sparse, config)
    for number, pixels in enumerate(frames.split(1)):
        with torch.inference_mode():
            with _outputs(watched(anatomy)) as expected:
                frame_embeddings(model, pixels)
            with _outputs(watched(describe(sparse))) as found:
                frame_embeddings(sparse, pixels)
        (report,) = last_pass(sparse)
        active = report.active.flatten()
        if anatomy.order is not None or len(expected[0]) != anatomy.prefix + len(active):
            raise ValueError(f"{type(anatomy.tower).__name__} does not give its tokens as rows in row-major order")
        yield _Moment(number, active, expected, found)


@contextlib.contextmanager
def _outputs(modules: list[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """The tokens [T, D] that each module gives of one frame, in the order of the modules' calls."""
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, arguments: tuple, output: torch.Tensor | tuple) -> None:
        tokens = output[0] if isinstance(output, tuple) else output
        outputs.append(tokens.flatten(0, -2).float())

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _active(tokens: torch.Tensor, moment: _Moment, prefix: int) -> torch.Tensor:
    """The active patches among a sparse frame's tokens [T, D], or packed ones."""
    patches = tokens[prefix:]
    return patches if len(patches) < len(moment.active) else patches[moment.active]


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean distance of rows [M, D]."""
    return (1 - F.cosine_similarity(one, other, 1)).mean().item()

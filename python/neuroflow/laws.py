"""What reuse does to a model, as rows of figures: one function for each law that describes the published system.

Every function takes an unpatched model and leaves it unpatched; its copies share the weights. Frames are those of one
clip, in order, as the model takes them, [T, 3, H, W]; fewer than two raise ValueError. The first frame is dense under
any settings and no row includes it. The laws of tokens also leave out later key frames, in which nothing is cached.
Distances are 1 - cosine.

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
    """Fidelity lost at one threshold.

    Args:
        arch: architecture.
        threshold: of the gate.
        skipped: mean share of patches that were not encoded, 0 to 1.
        gap: mean distance of the embeddings to dense ones.
    """

    arch: str
    threshold: float
    skipped: float
    gap: float


class Degradation(NamedTuple):
    """Fidelity at one frame size.

    Args:
        arch: architecture.
        width: of a frame, in pixels.
        height: of a frame, in pixels.
        patches: patches in a frame.
        skipped: mean share of patches that were not encoded, 0 to 1.
        fidelity: mean cosine of the embeddings to dense ones.
    """

    arch: str
    width: int
    height: int
    patches: int
    skipped: float
    fidelity: float


class Shift(NamedTuple):
    """Error of one frame's output tokens: encoded ones lack context, cached ones are old.

    Args:
        frame: its index.
        skipped: share of patches that were not encoded, 0 to 1.
        active: mean distance to dense tokens, of the patches that the frame encoded.
        cached: the same for the other patches; None if there is no cache.
    """

    frame: int
    skipped: float
    active: float
    cached: float | None


class Gap(NamedTuple):
    """Error of active patches after one block.

    Args:
        block: its index.
        distance: mean distance of active patches' hidden states to those of dense frames.
    """

    block: int
    distance: float


class Entropy(NamedTuple):
    """How widely the pooling head attends in one frame.

    Args:
        frame: its index.
        skipped: share of patches that were not encoded, 0 to 1.
        dense: entropy of its attention over dense tokens, in nats, mean over heads.
        sparse: the same over the tokens that the patched model gives it.
    """

    frame: int
    skipped: float
    dense: float
    sparse: float


class Stability(NamedTuple):
    """How well a perfect cache would have held up in one frame.

    Both cosines compare the frame's dense output tokens with those of the frame in which the gate last selected each
    patch.

    Args:
        frame: its index.
        skipped: share of patches that were not encoded, 0 to 1.
        active: mean cosine over the patches that the gate selects now.
        inactive: mean cosine over the others.
    """

    frame: int
    skipped: float
    active: float
    inactive: float | None


class _Moment(NamedTuple):
    """One frame in both models: the active patches, bool [N], and the tokens [T, D] that each watched module gave.

    In the patched model these are the active tokens only, in order, where it packs them.
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
    """Measure how fidelity depends on the skip rate, by threshold.

    The published gap hardly depends on the threshold.

    Args:
        model: an unpatched model; it stays unpatched.
        frames: [T, 3, H, W], T of at least 2: consecutive frames of one clip, as the model takes them.
        config: the gate under test.
        thresholds: the thresholds to try, in place of the one in `config`.

    Returns:
        a row for each threshold.

    Raises:
        ValueError: fewer than two frames.

    Example:
        >>> from neuroflow.laws import saturation
        >>> rows = saturation(model, frames, neuroflow.NeuroFlowConfig(arch="dual"), [0.05, 0.2])
        >>> [row.threshold for row in rows]
        [0.05, 0.2]

    Source: Schmitt 2026.
    """
    expected = _embeddings(model, frames)
    rows = []
    for threshold in thresholds:
        tried = dataclasses.replace(config, threshold=threshold, budget=None)
        fidelity, skipped = _fidelity(model, frames, tried, expected)
        rows.append(Saturation(config.arch, threshold, skipped, 1 - fidelity))
    return rows


def degradation(model: nn.Module, sizes: Iterable[torch.Tensor], config: NeuroFlowConfig) -> list[Degradation]:
    """Measure how fidelity falls as positions are stretched to larger frames.

    Args:
        model: an unpatched model; it stays unpatched.
        sizes: the same clip in several sizes, [T, 3, H, W] each, T of at least 2.
        config: the gate under test.

    Returns:
        a row for each size.

    Raises:
        ValueError: fewer than two frames.

    Example:
        >>> from neuroflow.laws import degradation
        >>> rows = degradation(model, [frames], neuroflow.NeuroFlowConfig(arch="dual"))
        >>> [(row.width, row.height, row.patches) for row in rows]
        [(32, 32, 16)]

    Source: Schmitt 2026.
    """
    rows = []
    for frames in sizes:
        fidelity, skipped = _fidelity(model, frames, config, _embeddings(model, frames))
        ((rows_of_patches, columns),) = describe(model).grids({"pixel_values": frames[:1]})
        height, width = frames.shape[2:]
        rows.append(Degradation(config.arch, width, height, rows_of_patches * columns, skipped, fidelity))
    return rows


def active_shift(model: nn.Module, frames: torch.Tensor, config: NeuroFlowConfig) -> list[Shift]:
    """Separate the error of a frame's output tokens into missing context and cache age.

    Args:
        model: an unpatched model; it stays unpatched.
        frames: [T, 3, H, W], T of at least 2: consecutive frames of one clip, as the model takes them.
        config: the gate under test.

    Returns:
        a row for each frame that is not a key frame.

    Raises:
        ValueError: fewer than two frames, or a tower whose tokens are not in row-major order.

    Example:
        >>> from neuroflow.laws import active_shift
        >>> rows = active_shift(model, frames, neuroflow.NeuroFlowConfig(arch="dual"))
        >>> rows[0].frame
        1

    Source: Schmitt 2026.
    """
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
    """Measure block by block how far the active patches drift from dense ones.

    Args:
        model: an unpatched model; it stays unpatched.
        frames: [T, 3, H, W], T of at least 2: consecutive frames of one clip, as the model takes them.
        config: the gate under test.

    Returns:
        a row for each block.

    Raises:
        ValueError: fewer than two frames, or a tower whose tokens are not in row-major order.

    Example:
        >>> from neuroflow.laws import representation_gap
        >>> rows = representation_gap(model, frames, neuroflow.NeuroFlowConfig(arch="dual"))
        >>> [row.block for row in rows]
        [0, 1]

    Source: Schmitt 2026.
    """
    prefix = describe(model).prefix
    distances: list[list[float]] = [[] for _ in describe(model).layers]
    for moment in _sparse_moments(model, frames, config, lambda anatomy: list(anatomy.layers)):
        for block, (dense, sparse) in enumerate(zip(moment.dense, moment.sparse, strict=True)):
            distances[block].append(_distance(dense[prefix:][moment.active], _active(sparse, moment, prefix)))
    return [Gap(block, sum(each) / len(each)) for block, each in enumerate(distances) if each]


def has_attention_head(model: nn.Module) -> bool:
    """Whether the model has a pooling head like SigLIP's: one probe that attends to all tokens.

    Args:
        model: a model with a vision tower that NeuroFlow knows.

    Returns:
        True if `head_entropy` applies to it.

    Raises:
        TypeError: no adapter knows the model.

    Example:
        >>> from neuroflow.laws import has_attention_head
        >>> has_attention_head(model)
        True
    """
    pool = describe(model).pool
    return pool is not None and is_foldable(pool[0])


def head_entropy(model: nn.Module, frames: torch.Tensor, config: NeuroFlowConfig) -> list[Entropy]:
    """Measure how widely the pooling head attends, over dense tokens and over reused ones.

    Args:
        model: an unpatched model; it stays unpatched.
        frames: [T, 3, H, W], T of at least 2: consecutive frames of one clip, as the model takes them.
        config: the gate under test.

    Returns:
        a row for each frame that is not a key frame.

    Raises:
        ValueError: fewer than two frames, a tower whose tokens are not in row-major order, or a model without such a
            head.

    Example:
        >>> from neuroflow.laws import head_entropy
        >>> rows = head_entropy(model, frames, neuroflow.NeuroFlowConfig(arch="dual"))
        >>> rows[0].frame
        1

    Source: Schmitt 2026.
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
    """Check that the gate selects the right patches: cached tokens of the others should still hold.

    Args:
        model: an unpatched model; it stays unpatched.
        frames: [T, 3, H, W], T of at least 2: consecutive frames of one clip, as the model takes them.
        config: the gate under test.

    Returns:
        a row for each frame that is not a key frame.

    Raises:
        ValueError: fewer than two frames, or a tower whose tokens are not in row-major order.

    Example:
        >>> from neuroflow.laws import token_stability
        >>> rows = token_stability(model, frames, neuroflow.NeuroFlowConfig(arch="dual"))
        >>> rows[0].inactive > 0.9
        True

    Source: Schmitt 2026.
    """
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
    """Embeddings [T, D] float32 of the frames, which go through the model one by one."""
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
    """Moments of the frames that are not key frames."""
    return (moment for moment in _moments(model, frames, config, watched) if not moment.active.all())


def _moments(
    model: nn.Module, frames: torch.Tensor, config: NeuroFlowConfig, watched: Callable[[Anatomy], list[nn.Module]]
) -> Iterator[_Moment]:
    """Run every frame through the unpatched model and a patched copy, and yield what their watched modules gave."""
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
    """The tokens [T, D] that each module gives for one frame, in the order in which the modules are called."""
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
    """The active patches among a sparse frame's tokens [T, D], packed or not."""
    patches = tokens[prefix:]
    return patches if len(patches) < len(moment.active) else patches[moment.active]


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean distance between corresponding rows [M, D]."""
    return (1 - F.cosine_similarity(one, other, 1)).mean().item()

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .. import checks
from ..dispatch import Operator


def _fake(
    surprise: torch.Tensor, threshold: torch.Tensor | None, budget: torch.Tensor | None, floor: int
) -> tuple[torch.Tensor, torch.Tensor]:
    streams, tokens = surprise.shape
    return (
        surprise.new_empty((streams * tokens,), dtype=torch.int32),
        surprise.new_empty((streams + 1,), dtype=torch.int32),
    )


_operator = Operator(
    __name__, "compact(Tensor surprise, Tensor? threshold, Tensor? budget, int floor) -> (Tensor, Tensor)", _fake
)


def rule_arguments(
    streams: int,
    device: torch.device,
    threshold: torch.Tensor | float | None,
    budget: torch.Tensor | int | None,
    floor: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """Check the rule that `compact` and `ema_gate_` take alike; returns threshold [S] or budget [S], and floor."""
    if threshold is not None and budget is None:
        threshold = checks.per_stream("threshold", threshold, streams, device, torch.float32)
        return threshold, None, checks.count("floor", floor)
    if budget is not None and threshold is None:
        budget = checks.per_stream("budget", budget, streams, device, torch.int32)
        return None, budget, checks.count("floor", floor)
    raise ValueError(f"threshold is {threshold!r} and budget is {budget!r}; accepted is exactly one of the two")


def compact(
    surprise: torch.Tensor,
    threshold: torch.Tensor | float | None = None,
    budget: torch.Tensor | int | None = None,
    floor: int = 4,
    ladder: Sequence[int] | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers of the active tokens, packed to the left.

    With `threshold`, a token is active where `surprise > threshold`; in a stream whose threshold is 0 all are. With
    `budget`, the `budget` most surprising tokens of a stream are active. If either leaves fewer than `floor`, the
    `floor` most surprising are active instead. Ties go to the lower token; NaN counts as +inf.

    Args:
        surprise: [S, N] float32.
        threshold: a number or a float tensor [S]. Give exactly one of threshold and budget.
        budget: tokens per stream, a number or an integer tensor [S]; more than N means N.
        floor: the least number of active tokens in a stream (N where N is smaller).
        ladder: ascending token counts, a list, a tuple or an int32 tensor [K] on surprise's device. The active tokens
            of all streams are topped up to the first count that holds them, or to all S * N, with the most surprising
            of the tokens left out, from whichever stream. Code compiled or captured for a few counts then serves every
            frame without padding and without a copy to the host. During CUDA graph capture, which allows no copy from
            the host,
            only the tensor works; its order is not checked.

    Returns:
        index [S * N] int32: rows of the flattened [S * N], ascending within each stream, stream after stream, -1 past
        the last; cu_seqlens [S + 1] int32: stream s owns index[cu_seqlens[s] : cu_seqlens[s + 1]].

    Raises:
        ValueError: a shape, dtype or device does not fit, both or neither of threshold and budget are given, or the
            ladder does not ascend.
        BackendUnavailable: the backend asked for cannot serve this call.

    Example:
        >>> import torch
        >>> from neuroflow_kernels import compact
        >>> surprise = torch.tensor([[0.0, 0.3, 0.0, 0.2], [0.4, 0.0, 0.0, 0.0]])  # two streams of four tokens
        >>> index, cu_seqlens = compact(surprise, threshold=0.1, floor=1)
        >>> index.tolist()
        [1, 3, 4, -1, -1, -1, -1, -1]
        >>> cu_seqlens.tolist()
        [0, 2, 3]

    Source: Schmitt 2026, the gate; the tie rule and the ladder are ours.
    """
    checks.rank("surprise", surprise, "[S, N]", torch.float32)
    streams, tokens = surprise.shape
    checks.require(streams * tokens < 2**31, "surprise", surprise, "at most 2**31 - 1 tokens, as rows are int32")
    rule = rule_arguments(streams, surprise.device, threshold, budget, floor)
    surprise = checks.contiguous("surprise", surprise)
    if ladder is None:
        return _operator(surprise, *rule)
    if isinstance(ladder, torch.Tensor):
        checks.rank("ladder", ladder, "[K]", torch.int32)
        checks.same("ladder", ladder, ladder.shape, surprise.device, torch.int32)
        ladder = checks.contiguous("ladder", ladder)
    else:
        checks.ascending("ladder", ladder)
        rungs = [min(rung, streams * tokens) for rung in ladder]
        ladder = torch.tensor(rungs, dtype=torch.int32, device=surprise.device)
    return _filled(surprise, *_operator(surprise, *rule), ladder)


def _filled(
    surprise: torch.Tensor, index: torch.Tensor, cu_seqlens: torch.Tensor, ladder: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The active tokens of `index`, topped up to the next count of `ladder`."""
    streams, tokens = surprise.shape
    rungs = F.pad(ladder, (0, 1), value=streams * tokens)
    enough = rungs[torch.searchsorted(ladder, cu_seqlens[-1:])].clamp_max(streams * tokens)
    # Active tokens come before all others; the -1 past the last of them go to an extra slot at the end.
    places = index.masked_fill(index < 0, streams * tokens).long()
    active = torch.zeros(streams * tokens + 1, dtype=torch.bool, device=surprise.device).index_fill_(0, places, True)
    most = torch.finfo(surprise.dtype).max
    order = surprise.flatten().nan_to_num(most, most).masked_fill(active[:-1], torch.inf)
    index, _ = _operator(order[None], None, enough, 0)
    starts = torch.arange(1, streams + 1, dtype=torch.int32, device=surprise.device) * tokens
    ordered = index.masked_fill(index < 0, streams * tokens)
    return index, F.pad(torch.searchsorted(ordered, starts, out_int32=True), (1, 0))

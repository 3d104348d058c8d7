import torch

from .. import checks
from ..dispatch import Operator
from .compact import rule_arguments
from .ema_surprise import gate_arguments


def _fake(
    h: torch.Tensor,
    ema: torch.Tensor,
    decay: float,
    threshold: torch.Tensor | None,
    budget: torch.Tensor | None,
    floor: int,
    rows: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    streams, tokens, dim = h.shape
    packed = torch.library.get_ctx().new_dynamic_size() if rows is None else rows
    return (
        h.new_empty((streams, tokens), dtype=torch.float32),
        h.new_empty((streams * tokens,), dtype=torch.int32),
        h.new_empty((streams + 1,), dtype=torch.int32),
        h.new_empty((packed, dim)),
    )


_operator = Operator(
    __name__,
    "ema_gate_(Tensor h, Tensor(a!) ema, float decay, Tensor? threshold, Tensor? budget, int floor, SymInt? rows) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _fake,
)


def ema_gate_(
    h: torch.Tensor,
    ema: torch.Tensor,
    *,
    decay: float,
    threshold: torch.Tensor | float | None = None,
    budget: torch.Tensor | int | None = None,
    floor: int = 4,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ema_surprise_`, `compact` and `gather_rows` in one call.

    With a threshold, the CUDA backend fuses all three into one kernel, or the first two where `rows` is None; otherwise
    they run one after the other.

    Args:
        h, ema, decay: as in `ema_surprise_`.
        threshold, budget, floor: as in `compact`.
        rows: rows of `packed`, as in `gather_rows`; None makes it the true count, which waits for a GPU.

    Returns:
        surprise [S, N] float32; index [S * N] int32; cu_seqlens [S + 1] int32; packed [rows, D], h's dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        RuntimeError: ema requires grad, outside of `torch.no_grad`: there are no gradients.
    """
    h, decay = gate_arguments(h, ema, decay)
    checks.require(h.shape[0] * h.shape[1] < 2**31, "h", h, "at most 2**31 - 1 tokens, as rows are int32")
    rule = rule_arguments(h.shape[0], h.device, threshold, budget, floor)
    return _operator(h, ema, decay, *rule, None if rows is None else checks.count("rows", rows))

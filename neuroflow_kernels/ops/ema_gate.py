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

    With a threshold, the CUDA backend fuses all three into one kernel, or the first two if `rows` is None; otherwise
    they run one after the other. There are no gradients.

    Args:
        h: tokens [S, N, D], as `ema_surprise_` takes them.
        ema: references [S, N, D], updated in place, as `ema_surprise_` takes them.
        decay: weight of the new token, 0 to 1.
        threshold: a number or a float tensor [S]. Give exactly one of threshold and budget.
        budget: tokens per stream, a number or an integer tensor [S].
        floor: the least number of active tokens in a stream.
        rows: rows of `packed`, as in `gather_rows`; None means the true count, which makes the host wait for a GPU.

    Returns:
        surprise [S, N] float32; index [S * N] int32; cu_seqlens [S + 1] int32; packed [rows, D], h's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, or both or neither of threshold and budget are given.
        RuntimeError: ema requires grad and grad mode is on.
        BackendUnavailable: the backend asked for cannot serve this call.

    Example:
        >>> import torch
        >>> from neuroflow_kernels import ema_gate_
        >>> ema = torch.eye(4)[None]  # [1, 4, 4]
        >>> h = ema.clone()
        >>> h[0, 2] = torch.tensor([1.0, 0.0, 0.0, 0.0])  # token 2 changes
        >>> surprise, index, cu_seqlens, packed = ema_gate_(h, ema, decay=0.5, threshold=0.1, floor=1)
        >>> surprise.tolist(), index.tolist(), cu_seqlens.tolist()
        ([[0.0, 0.0, 1.0, 0.0]], [2, -1, -1, -1], [0, 1])
        >>> packed.tolist(), ema[0, 2].tolist()
        ([[1.0, 0.0, 0.0, 0.0]], [0.5, 0.0, 0.5, 0.0])

    Source: Schmitt 2026, the gate.
    """
    h, decay = gate_arguments(h, ema, decay)
    checks.require(h.shape[0] * h.shape[1] < 2**31, "h", h, "at most 2**31 - 1 tokens, as rows are int32")
    rule = rule_arguments(h.shape[0], h.device, threshold, budget, floor)
    return _operator(h, ema, decay, *rule, None if rows is None else checks.count("rows", rows))

import torch

from .. import checks
from ..dispatch import Operator


def _fake(h: torch.Tensor, ema: torch.Tensor, decay: float) -> torch.Tensor:
    return h.new_empty(h.shape[:2], dtype=torch.float32)


_operator = Operator(__name__, "ema_surprise_(Tensor h, Tensor(a!) ema, float decay) -> Tensor", _fake)


def gate_arguments(h: torch.Tensor, ema: torch.Tensor, decay: float) -> tuple[torch.Tensor, float]:
    """Check what `ema_surprise_` and `ema_gate_` take alike; returns h contiguous and decay as a float."""
    checks.rank("h", h, "[S, N, D]", *checks.FLOATS)
    checks.same("ema", ema, h.shape, h.device, h.dtype, torch.promote_types(h.dtype, torch.float32))
    checks.updated("ema", ema)
    return checks.contiguous("h", h), checks.fraction("decay", decay)


def ema_surprise_(h: torch.Tensor, ema: torch.Tensor, decay: float) -> torch.Tensor:
    """Surprise of every token against its running reference, which then moves towards the token.

    `s = 1 - cos(h, ema)`, against `ema` as it was before this call; then `ema = (1 - decay) ema + decay h`. Norms below
    1e-8 count as 1e-8. A row whose squared norm is not finite (a NaN, an Inf, an overflow) has surprise +inf and leaves
    its reference unchanged. There are no gradients.

    Args:
        h: tokens [S, N, D] in float32, bfloat16, float16 or float64; sums are kept in float32 (float64 for float64).
        ema: references [S, N, D], updated in place; h's dtype or float32. With h in 16 bits a small decay needs
            float32: a step of less than half a unit in the last place would be lost.
        decay: weight of the new token, 0 to 1. 0 leaves the reference unchanged.

    Returns:
        surprise [S, N] float32, from 0 (same direction) to 2, or +inf.

    Raises:
        ValueError: a shape, dtype or device does not fit, or decay is not between 0 and 1.
        RuntimeError: ema requires grad and grad mode is on.
        BackendUnavailable: the backend asked for cannot serve this call.

    Example:
        >>> import torch
        >>> from neuroflow_kernels import ema_surprise_
        >>> ema = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # one stream, two tokens
        >>> h = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # the second token turned by 90 degrees
        >>> ema_surprise_(h, ema, decay=0.5).tolist()
        [[0.0, 1.0]]
        >>> ema.tolist()
        [[[1.0, 0.0], [0.5, 0.5]]]

    Source: Schmitt 2026, "EMA-Gated Temporal Sequence Compression in Vision Transformers", the gate.
    """
    h, decay = gate_arguments(h, ema, decay)
    return _operator(h, ema, decay)

import torch

from .compact import compact
from .ema_surprise import ema_surprise_
from .gather_rows import gather_rows


def ema_gate_(
    h: torch.Tensor,
    ema: torch.Tensor,
    decay: float,
    threshold: torch.Tensor | None,
    budget: torch.Tensor | None,
    floor: int,
    rows: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    surprise = ema_surprise_(h, ema, decay)
    index, cu_seqlens = compact(surprise, threshold, budget, floor)
    rows = int(cu_seqlens[-1]) if rows is None else rows
    packed = gather_rows(h, index, cu_seqlens, rows, None, None, 0.0)
    return surprise, index, cu_seqlens, packed

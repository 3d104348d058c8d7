import torch

from ..reference.attend_versions import attend_versions as reference
from .attend_rows import WIDEST_HEAD, attend


def attend_versions(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    if query.dtype == torch.float64 or query.shape[2] > WIDEST_HEAD:
        return reference(query, key, value, table, cu_seqlens, scale)
    return attend(query, key, value, table, cu_seqlens, scale)

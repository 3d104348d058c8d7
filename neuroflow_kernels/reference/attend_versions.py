import torch

from .attend_rows import attend_rows


def attend_versions(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    rows = table.long()
    return attend_rows(query, key[rows], value[rows], cu_seqlens, scale)

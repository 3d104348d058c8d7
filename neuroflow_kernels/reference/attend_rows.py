import torch
import torch.nn.functional as F


def attend_rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    by_head = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))  # [1, heads, *, head_dim]
    return F.scaled_dot_product_attention(*by_head, scale=scale)[0].transpose(0, 1).contiguous()

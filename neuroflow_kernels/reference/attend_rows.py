import torch
import torch.nn.functional as F


def attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor | None, scale: float
) -> torch.Tensor:
    streams = key.shape[0]
    by_head = query.transpose(0, 1).expand(streams, -1, -1, -1), key.transpose(1, 2), value.transpose(1, 2)
    attended = F.scaled_dot_product_attention(*by_head, scale=scale)  # [S, heads, M, head_dim]
    if cu_seqlens is None:
        return attended[0].transpose(0, 1).contiguous()
    if streams == 0:
        return torch.zeros_like(query)
    # Every row to every stream, as only the device knows whose it is.
    row = torch.arange(query.shape[0], device=query.device)
    stream = torch.searchsorted(cu_seqlens[1:], row, right=True)
    own = attended[stream.clamp(max=streams - 1), :, row]  # [M, heads, head_dim]
    return own.where((stream < streams)[:, None, None], 0)

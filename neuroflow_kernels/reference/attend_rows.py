import torch


def attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """softmax(scale query keyᵀ) value, taken literally. A score of -Inf has weight 0; a score of NaN or +Inf, or a row
    of -Inf only, makes the query's whole head NaN. NaN or Inf in a value reaches every query of its head, even with
    weight 0. Torch's own attention gives zeros in some of these cases.
    """
    streams = key.shape[0]
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = torch.einsum("mhd,sthd->shmt", query.to(accumulate), key.to(accumulate)) * scale
    attended = torch.einsum("shmt,sthd->smhd", scores.softmax(-1), value.to(accumulate)).to(query.dtype)
    if cu_seqlens is None:
        return attended[0].contiguous()
    if streams == 0:
        return torch.zeros_like(query, memory_format=torch.contiguous_format)
    # Every row attends to every stream, because only the device knows which stream is its own.
    row = torch.arange(query.shape[0], device=query.device)
    stream = torch.searchsorted(cu_seqlens[1:], row, right=True)
    own = attended[stream.clamp(max=streams - 1), row]  # [M, heads, head_dim]
    return own.where((stream < streams)[:, None, None], 0)

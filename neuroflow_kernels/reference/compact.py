import torch


def compact(
    surprise: torch.Tensor, threshold: torch.Tensor | None, budget: torch.Tensor | None, floor: int
) -> tuple[torch.Tensor, torch.Tensor]:
    streams, tokens = surprise.shape
    key = torch.where(surprise.isnan(), torch.inf, surprise)
    if threshold is not None:
        count = (key > threshold[:, None]).sum(-1)
        count = torch.where(threshold <= 0, tokens, count)
    else:
        count = budget.long()
    count = count.clamp(min=floor).clamp(max=tokens)
    # Tokens above a threshold also come first in this order, so one rule covers threshold, budget and floor.
    order = key.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(tokens, device=key.device).expand(streams, -1))
    rows = (rank < count[:, None]).flatten().nonzero()[:, 0]
    index = torch.full((streams * tokens,), -1, dtype=torch.int32, device=key.device)
    index[: rows.numel()] = rows.to(torch.int32)
    cu_seqlens = torch.zeros(streams + 1, dtype=torch.int32, device=key.device)
    cu_seqlens[1:] = count.cumsum(0)
    return index, cu_seqlens

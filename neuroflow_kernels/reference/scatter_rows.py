import torch

from .gather_rows import active_count


def scatter_rows_(
    cache: torch.Tensor, packed: torch.Tensor, index: torch.Tensor, cu_seqlens: torch.Tensor, blend: float
) -> None:
    count = min(active_count(index, cu_seqlens), packed.shape[0])
    rows, fresh = index[:count], packed[:count]
    flat = cache.flatten(0, 1)
    if blend != 1:
        accumulate = torch.float64 if cache.dtype == torch.float64 else torch.float32
        kept = flat.index_select(0, rows).to(accumulate)
        fresh = ((1 - blend) * kept + blend * fresh.to(accumulate)).to(cache.dtype)
    flat.index_copy_(0, rows.long(), fresh)

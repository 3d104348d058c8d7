import torch


def scatter_kv_(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> None:
    rows = min(key.shape[0], index.shape[0])
    if rows == 0:
        return
    # The count is never read back: padding repeats the first row or, if there is none, what the cache holds.
    filled = (torch.arange(rows, device=index.device) < cu_seqlens[-1])[:, None]
    first = index[:1].where(filled[0], 0).long()
    target = index[:rows].where(filled[:, 0], first).long()
    for cache, fresh in ((key_cache, key), (value_cache, value)):
        flat, fresh = cache.flatten(0, 1), fresh[:rows].flatten(1)
        flat.index_copy_(0, target, fresh.where(filled, fresh[:1].where(filled[:1], flat[first])))

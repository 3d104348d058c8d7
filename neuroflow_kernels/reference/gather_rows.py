import torch


def active_count(index: torch.Tensor, cu_seqlens: torch.Tensor) -> int:
    count = int(cu_seqlens[-1])
    if not 0 <= count <= index.shape[0]:
        raise IndexError(f"cu_seqlens ends in {count}; accepted is 0 to {index.shape[0]}, the length of index")
    return count


def gather_rows(
    x: torch.Tensor,
    index: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rows: int,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    dim = x.shape[2]
    count = min(active_count(index, cu_seqlens), rows)
    active = x.flatten(0, 1).index_select(0, index[:count])
    if norm_weight is not None:
        accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
        # Not torch's own LayerNorm, which turns a row whose variance overflows into NaN.
        wide = active.to(accumulate)
        centred = wide - wide.mean(1, keepdim=True)
        scale = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
        active = (centred * scale * norm_weight + norm_bias).to(x.dtype)
    packed = x.new_zeros((rows, dim))
    packed[:count] = active
    return packed

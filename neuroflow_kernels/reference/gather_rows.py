import torch
import torch.nn.functional as F


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
    count = min(int(cu_seqlens[-1]), rows)
    active = x.flatten(0, 1).index_select(0, index[:count])
    if norm_weight is not None:
        accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
        wide = F.layer_norm(active.to(accumulate), (dim,), norm_weight.to(accumulate), norm_bias.to(accumulate), eps)
        active = wide.to(x.dtype)
    packed = x.new_zeros((rows, dim))
    packed[:count] = active
    return packed

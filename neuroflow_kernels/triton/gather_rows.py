import torch
import triton
import triton.language as tl

from .common import quotient, row_tile, square_root


@triton.jit(do_not_specialize=["streams", "rows", "slots", "sources"])
def _gather_rows_kernel(
    x: tl.tensor,
    index: tl.tensor,
    cu_seqlens: tl.tensor,
    norm_weight: tl.tensor,
    norm_bias: tl.tensor,
    packed: tl.tensor,
    streams: tl.tensor,
    rows: tl.tensor,
    slots: tl.tensor,
    sources: tl.tensor,
    dim: tl.tensor,
    eps: tl.float64,
    ACCUMULATE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    active = row < tl.minimum(tl.load(cu_seqlens + streams), slots)
    source = tl.load(index + row, mask=active, other=-1).to(tl.int64)
    # The host cannot see what index holds: a row outside x must not be read.
    active = active & (source >= 0) & (source < sources)
    inside = (column < dim)[None, :]  # [1, BLOCK_DIM]
    value = tl.load(x + source[:, None] * dim + column[None, :], mask=active[:, None] & inside, other=0)
    if NORM:
        wide = value.to(ACCUMULATE)  # [BLOCK_ROWS, BLOCK_DIM]
        length = tl.full((1,), dim, ACCUMULATE)
        mean = quotient(tl.sum(wide, axis=1), length)
        centred = tl.where(inside, wide - mean[:, None], 0)
        variance = quotient(tl.sum(centred * centred, axis=1), length)
        deviation = square_root(variance + tl.full((1,), eps, ACCUMULATE))
        weight = tl.load(norm_weight + column, mask=column < dim, other=0).to(ACCUMULATE)
        bias = tl.load(norm_bias + column, mask=column < dim, other=0).to(ACCUMULATE)
        wide = centred * quotient(tl.full((1,), 1, ACCUMULATE), deviation)[:, None] * weight[None, :] + bias[None, :]
        value = tl.where(active[:, None], wide, 0).to(value.dtype)
    at = row[:, None] * dim + column[None, :]
    tl.store(packed + at, value, mask=(row < rows)[:, None] & inside)


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
    packed = x.new_empty((rows, dim))
    if packed.numel() == 0:
        return packed
    tile = row_tile(dim, x.dtype)
    with torch.cuda.device_of(x):
        _gather_rows_kernel[(triton.cdiv(rows, tile["BLOCK_ROWS"]),)](
            x,
            index,
            cu_seqlens,
            norm_weight,
            norm_bias,
            packed,
            cu_seqlens.shape[0] - 1,
            rows,
            min(rows, index.shape[0]),
            x.shape[0] * x.shape[1],
            dim,
            eps,
            ACCUMULATE=tl.float64 if x.dtype == torch.float64 else tl.float32,
            NORM=norm_weight is not None,
            **tile,
        )
    return packed

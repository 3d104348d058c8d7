import torch
import triton
import triton.language as tl

from .common import row_tile


@triton.jit(do_not_specialize=["streams", "slots", "targets"])
def _scatter_rows_kernel(
    cache: tl.tensor,
    packed: tl.tensor,
    index: tl.tensor,
    cu_seqlens: tl.tensor,
    streams: tl.tensor,
    slots: tl.tensor,
    targets: tl.tensor,
    dim: tl.tensor,
    kept: tl.float64,
    blend: tl.float64,
    ACCUMULATE: tl.constexpr,
    REPLACE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    active = row < tl.minimum(tl.load(cu_seqlens + streams), slots)
    target = tl.load(index + row, mask=active, other=-1).to(tl.int64)
    # The host cannot see what index holds: a row outside cache must not be written.
    active = active & (target >= 0) & (target < targets)
    inside = active[:, None] & (column < dim)[None, :]  # [BLOCK_ROWS, BLOCK_DIM]
    value = tl.load(packed + row[:, None] * dim + column[None, :], mask=inside, other=0)
    at = target[:, None] * dim + column[None, :]
    if not REPLACE:
        old = tl.load(cache + at, mask=inside, other=0).to(ACCUMULATE)
        # As full tensors, since float64 scalars would widen float32 arithmetic.
        kept = tl.full((1, 1), kept, ACCUMULATE)
        blend = tl.full((1, 1), blend, ACCUMULATE)
        value = (kept * old + blend * value.to(ACCUMULATE)).to(value.dtype)
    tl.store(cache + at, value, mask=inside)


def scatter_rows_(
    cache: torch.Tensor, packed: torch.Tensor, index: torch.Tensor, cu_seqlens: torch.Tensor, blend: float
) -> None:
    slots = min(packed.shape[0], index.shape[0])
    dim = cache.shape[2]
    if slots * dim == 0:
        return
    tile = row_tile(dim, cache.dtype)
    with torch.cuda.device_of(cache):
        _scatter_rows_kernel[(triton.cdiv(slots, tile["BLOCK_ROWS"]),)](
            cache,
            packed,
            index,
            cu_seqlens,
            cu_seqlens.shape[0] - 1,
            slots,
            cache.shape[0] * cache.shape[1],
            dim,
            1 - blend,
            blend,
            ACCUMULATE=tl.float64 if cache.dtype == torch.float64 else tl.float32,
            REPLACE=blend == 1,
            **tile,
        )

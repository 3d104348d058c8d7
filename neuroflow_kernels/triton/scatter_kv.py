import torch
import triton
import triton.language as tl

from .common import row_tile, stride_unit


@triton.jit(
    do_not_specialize=[
        "streams",
        "slots",
        "targets",
        "heads",
        "key_stride",
        "key_head_stride",
        "value_stride",
        "value_head_stride",
    ]
)
def _scatter_kv_kernel(
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    index: tl.tensor,
    cu_seqlens: tl.tensor,
    streams: tl.tensor,
    slots: tl.tensor,
    targets: tl.tensor,
    heads: tl.tensor,
    key_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_stride: tl.tensor,
    value_head_stride: tl.tensor,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """Strides are in units of `UNIT` elements."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    width = heads * HEAD_DIM
    active = row < tl.minimum(tl.load(cu_seqlens + streams), slots)
    target = tl.load(index + row, mask=active, other=-1).to(tl.int64)
    # The host cannot see what index holds: a row outside the caches must not be written.
    active = active & (target >= 0) & (target < targets)
    inside = active[:, None] & (column < width)[None, :]  # [BLOCK_ROWS, BLOCK_DIM]
    head = (column // HEAD_DIM).to(tl.int64)[None, :]
    element = (column % HEAD_DIM)[None, :]
    key_at = (row[:, None] * key_stride + head * key_head_stride) * UNIT + element
    value_at = (row[:, None] * value_stride + head * value_head_stride) * UNIT + element
    keys = tl.load(key + key_at, mask=inside, other=0)
    values = tl.load(value + value_at, mask=inside, other=0)
    at = target[:, None] * width + column[None, :]
    tl.store(key_cache + at, keys, mask=inside)
    tl.store(value_cache + at, values, mask=inside)


def scatter_kv_(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> None:
    slots, width = min(key.shape[0], index.shape[0]), key_cache.shape[2]
    if slots * width == 0:
        return
    tile, unit = row_tile(width, key_cache.dtype), stride_unit(key, value)
    with torch.cuda.device_of(key_cache):
        _scatter_kv_kernel[(triton.cdiv(slots, tile["BLOCK_ROWS"]),)](
            key_cache,
            value_cache,
            key,
            value,
            index,
            cu_seqlens,
            cu_seqlens.shape[0] - 1,
            slots,
            key_cache.shape[0] * key_cache.shape[1],
            key.shape[1],
            key.stride(0) // unit,
            key.stride(1) // unit,
            value.stride(0) // unit,
            value.stride(1) // unit,
            UNIT=unit,
            HEAD_DIM=key.shape[2],
            **tile,
        )

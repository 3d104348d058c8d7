import torch
import triton
import triton.language as tl

from .common import quotient, row_tile, square_root

NORM_FLOOR = tl.constexpr(1e-8)


@triton.jit(do_not_specialize=["rows"])
def _ema_surprise_kernel(
    h: tl.tensor,
    ema: tl.tensor,
    surprise: tl.tensor,
    rows: tl.tensor,
    dim: tl.tensor,
    kept: tl.float64,
    decay: tl.float64,
    ACCUMULATE: tl.constexpr,
    MOVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    at = row[:, None] * dim + column[None, :]  # [BLOCK_ROWS, BLOCK_DIM]
    inside = (row < rows)[:, None] & (column < dim)[None, :]
    token = tl.load(h + at, mask=inside, other=0).to(ACCUMULATE)
    reference = tl.load(ema + at, mask=inside, other=0).to(ACCUMULATE)

    square = tl.sum(token * token, axis=1)  # [BLOCK_ROWS]
    token_norm = tl.maximum(square_root(square), NORM_FLOOR)
    reference_norm = tl.maximum(square_root(tl.sum(reference * reference, axis=1)), NORM_FLOOR)
    cosine = quotient(tl.sum(token * reference, axis=1), token_norm * reference_norm)
    finite = square < float("inf")  # false for NaN as well
    value = tl.where(finite & (cosine == cosine), 1 - cosine, float("inf"))
    tl.store(surprise + row, value.to(tl.float32), mask=row < rows)

    if MOVE:
        # As full tensors, since float64 scalars would widen float32 arithmetic.
        kept = tl.full((1, 1), kept, ACCUMULATE)
        decay = tl.full((1, 1), decay, ACCUMULATE)
        moved = kept * reference + decay * token
        tl.store(ema + at, moved.to(ema.dtype.element_ty), mask=inside & finite[:, None])


def ema_surprise_(h: torch.Tensor, ema: torch.Tensor, decay: float) -> torch.Tensor:
    streams, tokens, dim = h.shape
    surprise = h.new_empty((streams, tokens), dtype=torch.float32)
    rows = streams * tokens
    if rows == 0:
        return surprise
    tile = row_tile(dim, h.dtype)
    with torch.cuda.device_of(h):
        _ema_surprise_kernel[(triton.cdiv(rows, tile["BLOCK_ROWS"]),)](
            h,
            ema,
            surprise,
            rows,
            dim,
            1 - decay,
            decay,
            ACCUMULATE=tl.float64 if h.dtype == torch.float64 else tl.float32,
            MOVE=decay != 0,
            **tile,
        )
    return surprise

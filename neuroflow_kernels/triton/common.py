"""Shared by the row kernels: their tile, and correctly rounded arithmetic."""

import math

import torch
import triton
import triton.language as tl

# Explicit, because Triton's default differs between versions, and with it the rounding.
FUSE_MULTIPLY_ADD = {"enable_fp_fusion": True}


def row_tile(dim: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Launch options for programs that hold whole rows of `dim` elements in registers.

    Narrow rows share a program. A warp has 1024 elements, 32 a lane: several 16-byte loads in flight for each tensor,
    reductions that mostly stay within the warp, and about 100 registers where two tensors are held in float32. float64
    takes twice the registers, so it gets half the elements.
    """
    elements = 512 if dtype == torch.float64 else 1024
    block_dim = max(16, triton.next_power_of_2(dim))
    block_rows = max(1, elements // block_dim)
    return {
        "BLOCK_ROWS": block_rows,
        "BLOCK_DIM": block_dim,
        "num_warps": min(32, block_rows * block_dim // elements),
        **FUSE_MULTIPLY_ADD,
    }


def stride_unit(*tensors: torch.Tensor) -> int:
    """The largest power of two, up to 16 elements, that divides the first two strides of all tensors. A kernel that
    takes strides in this unit lets the compiler load as many elements at once.
    """
    return math.gcd(16, *(stride for tensor in tensors for stride in tensor.stride()[:2]))


@triton.jit
def square_root(value: tl.tensor) -> tl.tensor:
    # In float32 the plain operation is approximate; float64 has only the exact one.
    if value.dtype == tl.float32:
        return tl.sqrt_rn(value)
    else:
        return tl.sqrt(value)


@triton.jit
def quotient(numerator: tl.tensor, denominator: tl.tensor) -> tl.tensor:
    if numerator.dtype == tl.float32:
        return tl.div_rn(numerator, denominator)
    else:
        return numerator / denominator

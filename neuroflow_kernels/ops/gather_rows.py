import torch

from .. import checks
from ..dispatch import Operator


def _fake(
    x: torch.Tensor,
    index: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rows: int,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    return x.new_empty((rows, x.shape[2]))


_operator = Operator(
    __name__,
    "gather_rows(Tensor x, Tensor index, Tensor cu_seqlens, SymInt rows, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps) -> Tensor",
    _fake,
)


def gather_rows(
    x: torch.Tensor,
    index: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rows: int | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Copy the active rows of `x` into a packed tensor, through a LayerNorm where its weights are given.

    Args:
        x: [S, N, D] in float32, bfloat16, float16 or float64.
        index, cu_seqlens: as `compact` returns them, for the same S and N.
        rows: rows of the result. More than `cu_seqlens[-1]` pads with zeros (a bucket); fewer drops the last. None
            reads the count from `cu_seqlens`, which waits for a GPU.
        norm_weight, norm_bias: [D], x's dtype, both or neither: the rows are normalised (in float32; float64 for
            float64), padding stays zero.
        eps: added to the variance.

    Returns:
        packed [rows, D], x's dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit. IndexError, on the CPU: an index outside [0, S * N).
    """
    checks.rank("x", x, "[S, N, D]", *checks.FLOATS)
    checks.selection(index, cu_seqlens, x.device)
    rows = int(cu_seqlens[-1]) if rows is None else checks.count("rows", rows)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias go together; accepted is both or neither")
    for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if value is not None:
            checks.same(name, value, x.shape[2:], x.device, x.dtype)
    return _operator(x.contiguous(), index, cu_seqlens, rows, norm_weight, norm_bias, float(eps))

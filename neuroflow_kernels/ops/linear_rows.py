import torch

from .. import checks
from ..dispatch import Operator


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


_operator = Operator(__name__, "linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _fake, triton=False)


def linear_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer over few rows, where the time goes into reading the weights: `x weightᵀ + bias`.

    Made for the packed tokens of a sparse frame on a CPU; weights are used as they lie, nothing is packed or kept. With
    the C++ backend a row's result does not depend on how many rows come with it. There is no kernel for GPUs: cuBLAS,
    behind the reference, serves them.

    Args:
        x: [M, K] in float32, bfloat16, float16 or float64; sums are kept in float32 (float64 for float64).
        weight: [N, K], of x's dtype.
        bias: [N], of x's dtype, or None.

    Returns:
        [M, N], x's dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    checks.rank("x", x, "[M, K]", *checks.FLOATS)
    checks.rank("weight", weight, "[N, K]", x.dtype)
    checks.same("weight", weight, (weight.shape[0], x.shape[1]), x.device, x.dtype)
    if bias is not None:
        checks.same("bias", bias, weight.shape[:1], x.device, x.dtype)
        bias = checks.contiguous("bias", bias)
    return _operator(checks.contiguous("x", x), checks.contiguous("weight", weight), bias)

import torch

from .. import checks
from ..dispatch import Operator


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


_operator = Operator(__name__, "linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _fake, triton=False)


def linear_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer over few rows, where reading the weights takes most of the time: `x weightᵀ + bias`.

    Made for the packed tokens of a sparse frame on a CPU. Weights are read where they are; nothing is packed or kept.
    With the C++ backend a row's result does not depend on which rows come with it. There is no kernel for GPUs, where
    the reference calls cuBLAS. There are no gradients.

    Args:
        x: [M, K] in float32, bfloat16, float16 or float64; sums are kept in float32 (float64 for float64).
        weight: [N, K], x's dtype.
        bias: [N], x's dtype, or None.

    Returns:
        [M, N], x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        BackendUnavailable: the backend asked for cannot serve this call.

    Example:
        >>> import torch
        >>> from neuroflow_kernels import linear_rows
        >>> linear_rows(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([0.5, 0.0]))
        tensor([[11.5000, 17.0000]])
    """
    checks.rank("x", x, "[M, K]", *checks.FLOATS)
    checks.rank("weight", weight, "[N, K]", x.dtype)
    checks.same("weight", weight, (weight.shape[0], x.shape[1]), x.device, x.dtype)
    if bias is not None:
        checks.same("bias", bias, weight.shape[:1], x.device, x.dtype)
        bias = checks.contiguous("bias", bias)
    return _operator(checks.contiguous("x", x), checks.contiguous("weight", weight), bias)

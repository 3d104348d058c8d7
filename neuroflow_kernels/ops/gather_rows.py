from typing import Any

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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, index, cu_seqlens, _, norm_weight, _, ctx.eps = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(index, cu_seqlens, None if norm_weight is None else x, norm_weight)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    index, cu_seqlens, x, weight = ctx.saved_tensors
    index, gradient = index[: gradient.shape[0]], gradient[: index.shape[0]]
    # Masked, because cutting to the count would wait for a GPU.
    filled = (torch.arange(index.shape[0], device=index.device) < cu_seqlens[-1])[:, None]
    index = index.where(filled[:, 0], 0)
    gradient = gradient.where(filled, 0)
    of_weight = of_bias = None
    if weight is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        active = x.flatten(0, 1).index_select(0, index).to(wide)
        variance, mean = torch.var_mean(active, 1, correction=0, keepdim=True)
        scale = (variance + ctx.eps).rsqrt()
        normal = ((active - mean) * scale).where(filled, 0)
        of_weight = (gradient.to(wide) * normal).sum(0).to(x.dtype)
        of_bias = gradient.sum(0, dtype=wide).to(x.dtype)
        of_normal = gradient.to(wide) * weight.to(wide)
        centred = of_normal - of_normal.mean(1, keepdim=True) - normal * (of_normal * normal).mean(1, keepdim=True)
        gradient = (scale * centred).where(filled, 0).to(x.dtype)
    of_x = gradient.new_zeros(ctx.shape).flatten(0, 1).index_add(0, index, gradient).view(ctx.shape)
    return of_x, None, None, None, of_weight, of_bias, None


_operator = Operator(
    __name__,
    "gather_rows(Tensor x, Tensor index, Tensor cu_seqlens, SymInt rows, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps) -> Tensor",
    _fake,
    gradient=(_setup_context, _backward),
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
    """Copy the active rows of `x` into a packed tensor, through a LayerNorm if its weights are given.

    Gradients flow to `x` and to the LayerNorm's weights.

    Args:
        x: [S, N, D] in float32, bfloat16, float16 or float64.
        index: [S * N] int32, as `compact` returns it for the same S and N.
        cu_seqlens: [S + 1] int32, as `compact` returns it.
        rows: rows of the result. More than `cu_seqlens[-1]` pads with zeros; fewer drops the last. None reads the count
            from `cu_seqlens`, which makes the host wait for a GPU.
        norm_weight: [D], x's dtype; given together with norm_bias, it normalises the rows (in float32; float64 for
            float64). Padding stays zero.
        norm_bias: [D], x's dtype.
        eps: added to the variance.

    Returns:
        packed [rows, D], x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, or only one of norm_weight and norm_bias is given.
        IndexError: on the CPU, an index outside [0, S * N).
        BackendUnavailable: the backend asked for cannot serve this call.

    Example:
        >>> import torch
        >>> from neuroflow_kernels import compact, gather_rows
        >>> x = torch.arange(8.0).view(1, 4, 2)
        >>> index, cu_seqlens = compact(torch.tensor([[0.0, 0.3, 0.0, 0.2]]), threshold=0.1, floor=1)
        >>> gather_rows(x, index, cu_seqlens, rows=3).tolist()  # two rows are active, the third is padding
        [[2.0, 3.0], [6.0, 7.0], [0.0, 0.0]]
    """
    checks.rank("x", x, "[S, N, D]", *checks.FLOATS)
    checks.selection(index, cu_seqlens, x.device)
    rows = int(cu_seqlens[-1]) if rows is None else checks.count("rows", rows)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias go together; accepted is both or neither")
    if norm_weight is not None and norm_bias is not None:
        for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            checks.same(name, value, x.shape[2:], x.device, x.dtype)
        norm_weight = checks.contiguous("norm_weight", norm_weight)
        norm_bias = checks.contiguous("norm_bias", norm_bias)
    return _operator(checks.contiguous("x", x), index, cu_seqlens, rows, norm_weight, norm_bias, float(eps))

from typing import Any

import torch

from .. import checks
from ..dispatch import Operator
from .gather_rows import gather_rows


def _fake(
    cache: torch.Tensor, packed: torch.Tensor, index: torch.Tensor, cu_seqlens: torch.Tensor, blend: float
) -> None:
    return None


_operator = Operator(
    __name__,
    "scatter_rows_(Tensor(a!) cache, Tensor packed, Tensor index, Tensor cu_seqlens, float blend) -> ()",
    _fake,
)


class _ScatterRows(torch.autograd.Function):
    """The op with gradients: torch.library registers none for an op that writes into its argument."""

    @staticmethod
    def forward(
        ctx: Any,
        cache: torch.Tensor,
        packed: torch.Tensor,
        index: torch.Tensor,
        cu_seqlens: torch.Tensor,
        blend: float,
    ) -> torch.Tensor:
        ctx.mark_dirty(cache)
        ctx.save_for_backward(index, cu_seqlens)
        ctx.rows, ctx.blend = packed.shape[0], blend
        _operator(cache, packed, index, cu_seqlens, blend)
        return cache

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        index, cu_seqlens = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_packed = ctx.blend * gather_rows(gradient, index, cu_seqlens, ctx.rows)
        kept = gradient.new_zeros(ctx.rows, gradient.shape[2])
        of_cache = scatter_rows_(gradient.clone(), kept, index, cu_seqlens, ctx.blend)
        return of_cache, of_packed, None, None, None


def scatter_rows_(
    cache: torch.Tensor, packed: torch.Tensor, index: torch.Tensor, cu_seqlens: torch.Tensor, blend: float = 1.0
) -> torch.Tensor:
    """Write packed rows back to where `gather_rows` took them from: `cache = (1 - blend) cache + blend packed`.

    Gradients flow to `packed` and to `cache`, which then must not be a leaf, as for every in-place op.

    Args:
        cache: [S, N, D] in float32, bfloat16, float16 or float64, updated in place.
        packed: [rows, D], cache's dtype; rows past `cu_seqlens[-1]` are padding and are not read.
        index: [S * N] int32, as `compact` returns it for the same S and N.
        cu_seqlens: [S + 1] int32, as `compact` returns it.
        blend: weight of the new row, 0 to 1. 1 replaces the old row without reading it.

    Returns:
        cache.

    Raises:
        ValueError: a shape, dtype or device does not fit, or blend is not between 0 and 1.
        IndexError: on the CPU, an index outside [0, S * N).
        RuntimeError: cache is a leaf that requires grad and grad mode is on.
        BackendUnavailable: the backend asked for cannot serve this call.

    Example:
        >>> import torch
        >>> from neuroflow_kernels import compact, scatter_rows_
        >>> cache = torch.zeros(1, 4, 2)
        >>> index, cu_seqlens = compact(torch.tensor([[0.0, 0.3, 0.0, 0.2]]), threshold=0.1, floor=1)
        >>> scatter_rows_(cache, torch.ones(2, 2), index, cu_seqlens, blend=0.5).tolist()
        [[[0.0, 0.0], [0.5, 0.5], [0.0, 0.0], [0.5, 0.5]]]

    Source: Schmitt 2026, architecture C (dual memory); the blend is the paper's proposal against flicker.
    """
    checks.rank("cache", cache, "[S, N, D]", *checks.FLOATS)
    checks.updated("cache", cache)
    checks.selection(index, cu_seqlens, cache.device)
    checks.rank("packed", packed, "[rows, D]", cache.dtype)
    checks.same("packed", packed, (packed.shape[0], cache.shape[2]), cache.device, cache.dtype)
    arguments = cache, checks.contiguous("packed", packed), index, cu_seqlens, checks.fraction("blend", blend)
    if torch.is_grad_enabled() and (cache.requires_grad or packed.requires_grad):
        written: torch.Tensor = _ScatterRows.apply(*arguments)  # type: ignore[no-untyped-call]
        return written
    _operator(*arguments)
    return cache

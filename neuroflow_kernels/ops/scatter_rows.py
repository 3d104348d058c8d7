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
    """The op where gradients are wanted: torch.library registers none for an op that writes into its argument."""

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

    Gradients flow to `cache`, which then must not be a leaf, as with every op in place, and to `packed`.

    Args:
        cache: [S, N, D] in float32, bfloat16, float16 or float64, updated in place.
        packed: [rows, D], cache's dtype; rows past `cu_seqlens[-1]` are padding and are not read.
        index, cu_seqlens: as `compact` returns them, for the same S and N.
        blend: weight of the new row, 0 to 1. 1 replaces, and reads nothing of the old row, whatever it holds.

    Returns:
        cache.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        IndexError: on the CPU, an index outside [0, S * N).

    Source: Schmitt 2026, dual memory; the blend is the paper's proposal against flicker.
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

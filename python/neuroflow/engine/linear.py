"""Linear layers on the few rows of a partial frame, in bfloat16 if asked for."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .kernels import Kernels, Layer
from .passes import Pass


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes what `linear_rows` does."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def in_bfloat16(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The layer's weight and bias in bfloat16; None without a bias."""
    return linear.weight.bfloat16(), None if linear.bias is None else linear.bias.bfloat16()


def multiply(
    current: Pass, kernels: Kernels, module: nn.Linear, forward: Callable, tokens: torch.Tensor
) -> torch.Tensor:
    """A linear layer of a tower: rows of partial frames use the fastest kernel, in bfloat16 if asked for.

    Other rows use its `forward`, and so do all if only that knows what it computes.
    """
    rounds = current.packed and current.rounded
    if not (rounds or current.measured):
        return forward(tokens)
    layer = kernels.layer(module, forward, tokens, torch.bfloat16 if rounds else tokens.dtype)
    if layer is None:
        return forward(tokens)
    if rounds:
        return map_each(current, forward, lambda rows: _multiply_rounded(current, kernels, module, layer, rows), tokens)
    return kernels.multiply(layer, tokens)


def _multiply_rounded(
    current: Pass, kernels: Kernels, module: nn.Linear, layer: Layer, tokens: torch.Tensor
) -> torch.Tensor:
    rows = tokens.bfloat16()
    if current.measured:
        product = kernels.multiply(layer, rows)
    elif torch.is_grad_enabled():
        product = F.linear(rows, *in_bfloat16(module))
    else:
        product = F.linear(rows, layer.weight, layer.bias)
    return product.to(tokens.dtype)


def map_each(current: Pass, forward: Callable, distilled: Callable, tokens: torch.Tensor) -> torch.Tensor:
    """A module that maps each token on its own: `forward` for whole frames, `distilled` for the others."""
    if current.part or all(current.whole):
        return forward(tokens)
    if current.part is False or not any(current.whole):
        return distilled(tokens)
    rows = tokens.flatten(0, -2)
    runs = current.runs(len(rows))
    mapped = []
    for (whole, _), part in zip(runs, rows.split([count for _, count in runs]), strict=True):
        with current.only(whole):
            mapped.append((forward if whole else distilled)(part))
    return torch.cat(mapped).unflatten(0, tokens.shape[:-1])

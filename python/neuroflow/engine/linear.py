"""Linear layers of the rows that a partial frame has: few of them, in bfloat16 where that was asked for."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from neuroflow_kernels import linear_rows

from ..adapters.anatomy import is_ordinary
from .derived import Derived
from .passes import Pass

# Up to here reading the weights takes a good part of the time; from here on torch's own products are as fast.
FEW_ROWS = 512
_OF_TORCH = (nn.Linear.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.MultiheadAttention.forward)


def are_few(tokens: torch.Tensor) -> bool:
    """Whether tokens [..., D] are so few rows that `linear_rows` is the faster way."""
    return tokens.numel() <= FEW_ROWS * tokens.shape[-1]


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes what `linear_rows` does."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def is_plain(module: nn.Module, forward: Callable, tokens: torch.Tensor) -> bool:
    """Whether `forward`, that of `module`, does what torch's own does of weights that kernels can read beside `tokens`.

    Else only the module knows what it computes: one with an adapter in front of its method, or weights that are
    computed, offloaded or quantized. Its hooks are not looked at: they are of calls of the module.
    """
    weights = module._parameters
    return (
        getattr(forward, "__func__", None) in _OF_TORCH
        and ("weight" in weights or "in_proj_weight" in weights)  # else it is computed
        and all(weight is None or is_ordinary(weight, tokens) for weight in weights.values())
        and not torch.is_autocast_enabled(tokens.device.type)
    )


def in_bfloat16(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Its weight, and its bias where it has one."""
    return linear.weight.bfloat16(), None if linear.bias is None else linear.bias.bfloat16()


def multiply(
    current: Pass, derived: Derived, module: nn.Linear, forward: Callable, tokens: torch.Tensor
) -> torch.Tensor:
    """A linear layer of a tower, or its `forward` where that is faster, or knows more; rounded for the rows of partial
    frames.
    """
    rounds = current.packed and current.rounded
    if not (rounds or (current.row_kernels and are_few(tokens))) or not is_plain(module, forward, tokens):
        return forward(tokens)
    if rounds:
        return map_each(current, forward, lambda rows: _multiply_rounded(current, derived, module, rows), tokens)
    return linear_rows(tokens.flatten(0, -2), module.weight, module.bias).unflatten(0, tokens.shape[:-1])


def _multiply_rounded(current: Pass, derived: Derived, module: nn.Linear, tokens: torch.Tensor) -> torch.Tensor:
    rows = tokens.flatten(0, -2).bfloat16()
    weight, bias = derived(module, (module, "rounded"), lambda: in_bfloat16(module))
    few = current.row_kernels and are_few(tokens)
    product = linear_rows(rows, weight, bias) if few else F.linear(rows, weight, bias)
    return product.to(tokens.dtype).unflatten(0, tokens.shape[:-1])


def map_each(current: Pass, forward: Callable, distilled: Callable, tokens: torch.Tensor) -> torch.Tensor:
    """A module that maps each token by itself: `forward` for those of whole frames, `distilled` for the others."""
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

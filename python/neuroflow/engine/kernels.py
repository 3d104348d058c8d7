"""Which kernels multiply the rows of partial frames: the fastest, as timed in the passes themselves."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from neuroflow_kernels.ways import ATTENTION, LINEAR, Choice, LinearWeights, attention_ways, linear_ways

from ..adapters.anatomy import is_ordinary

MOST_ROWS = 512  # above this, the time per row is constant
_OF_TORCH = (nn.Linear.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.MultiheadAttention.forward)


def is_plain(module: nn.Module, forward: Callable, tokens: torch.Tensor) -> bool:
    """Whether `forward` of `module` is torch's own, with weights that kernels can read together with `tokens`.

    Otherwise only the module knows what it computes, for example if an adapter wraps the method, or if weights are
    computed, offloaded or quantized. Hooks do not matter here, since they belong to calls of the module.
    """
    weights = module._parameters
    return (
        getattr(forward, "__func__", None) in _OF_TORCH
        and ("weight" in weights or "in_proj_weight" in weights)  # otherwise it is computed
        and all(weight is None or is_ordinary(weight, tokens) for weight in weights.values())
        and not torch.is_autocast_enabled(tokens.device.type)
    )


class Case(NamedTuple):
    """What a kernel is chosen for: rows from `rows` up to twice as many.

    The shape is [N, K] for a linear layer, and (heads, head_dim, number of tokens) for attention.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: int
    threads: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        what = f"linear {self.shape[1]} -> {self.shape[0]}"
        if self.kind == "attention":
            heads, width, tokens = self.shape
            what = f"attention of {heads} heads of {width} to {tokens} tokens"
        return f"{what}, {dtype}, from {self.rows} rows, {self.threads} thread(s)"


class Layer(LinearWeights):
    """A linear layer of a tower, as kernels use it.

    Attributes:
        choices: for its shape and dtype, by power of two of rows and number of threads.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, choices: dict[tuple[int, int], Choice]) -> None:
        super().__init__(weight, bias)
        self.choices = choices
        self._holders: set[Choice] = set()

    def hold(self, choice: Choice) -> bool:
        """Keep packed weights for a choice. Returns whether they existed."""
        found = self.packed is not None
        self.pack()
        self._holders.add(choice)
        return found

    def release(self, choice: Choice) -> None:
        """A choice no longer needs packed weights."""
        self._holders.discard(choice)
        if not self._holders:
            self.packed = None


class Kernels:
    """The linear layers and attentions of a tower in partial frames, and the fastest kernel for each.

    In the first frames with a given number of rows, kernels take turns among the layers of a shape, for about two
    frames of 12 blocks; afterwards all use the fastest.

    Args:
        only: a fixed kernel, "rows" or "torch", or "measured" for the fastest.

    Attributes:
        countable: changes of the weights are detected, so they may be packed.
        resident: the weights stay in memory; otherwise nothing is kept and each layer is called.
        exploring: candidates take turns; otherwise an unknown case uses the kernel of the nearest number of rows.
        trying: set when a call was used to find the fastest kernel.
    """

    def __init__(self, only: str = "measured") -> None:
        self._only = None if only == "measured" else only
        self.countable = True
        self.resident = True
        self.exploring = True
        self.trying = False
        self._layers: dict[tuple[nn.Module, torch.dtype], Layer | None] = {}
        self._choices: dict[tuple[str, tuple[int, ...], torch.dtype], dict[tuple[int, int], Choice]] = {}

    def forget(self) -> None:
        """The weights changed; which kernel is fastest stays known."""
        self._layers.clear()

    @property
    def packed_bytes(self) -> int:
        """Memory of weights packed by oneDNN, on top of the model's."""
        return sum(layer.packed_bytes for layer in list(self._layers.values()) if layer is not None)

    def fastest(self) -> dict[Case, str]:
        """The fastest kernel of each case, where known."""
        return {
            Case(*kind, 2 ** (power - 1), threads): choice.fastest
            for kind, choices in list(self._choices.items())
            for (power, threads), choice in list(choices.items())
            if choice.fastest is not None
        }

    def layer(self, module: nn.Linear, forward: Callable, tokens: torch.Tensor, dtype: torch.dtype) -> Layer | None:
        """A linear layer with its weights in `dtype`; None if only its `forward` knows what it computes."""
        if not self.resident or torch.is_autocast_enabled(tokens.device.type):
            return None
        key = module, dtype
        if key not in self._layers:
            self._layers[key] = self._made(module, dtype) if is_plain(module, forward, tokens) else None
        return self._layers[key]

    def _made(self, module: nn.Linear, dtype: torch.dtype) -> Layer:
        weight = module.weight.detach().to(dtype)
        bias = None if module.bias is None else module.bias.detach().to(dtype)
        return Layer(weight, bias, self._choices.setdefault(("linear", tuple(weight.shape), dtype), {}))

    def multiply(self, layer: Layer, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [..., K] -> [..., N]."""
        rows = tokens.shape[:-1].numel()
        if not rows or self._only:
            return LINEAR[self._only if rows else "torch"](tokens, layer)
        key = _power(rows), torch.get_num_threads()
        choice = layer.choices.get(key)
        if choice is None:
            ways = [way for way in linear_ways(tokens.dtype) if way != "packed" or self.countable]
            choice = layer.choices[key] = Choice(ways)
        if choice.fastest is None and self.exploring:
            return self._try(choice, layer, tokens)
        way = choice.fastest or _nearest(layer.choices, key, linear_ways(tokens.dtype)[0])
        if way == "packed":
            layer.hold(choice)
        return LINEAR[way](tokens, layer)

    def _try(self, choice: Choice, layer: Layer, tokens: torch.Tensor) -> torch.Tensor:
        self.trying, way = True, choice.turn()
        ready = layer.hold(choice) if way == "packed" else True
        start = time.perf_counter()
        product = LINEAR[way](tokens, layer)
        choice.note(way, time.perf_counter() - start, ready)
        if choice.fastest not in (None, "packed"):
            for other in list(self._layers.values()):
                if other is not None:
                    other.release(choice)
        return product

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Attention of rows [M, heads, head_dim] to all tokens of their stream [T, heads, head_dim]."""
        rows, heads, width = query.shape
        if not rows or self._only:
            return ATTENTION[self._only if rows else "torch"](query, key, value, scale)
        kind = "attention", (heads, width, 2 ** (len(key).bit_length() - 1)), query.dtype
        choices, number = self._choices.setdefault(kind, {}), (_power(rows), torch.get_num_threads())
        choice = choices.get(number)
        if choice is None:
            choice = choices[number] = Choice(attention_ways(query.dtype, rows * len(key) * heads))
        if choice.fastest is not None or not self.exploring:
            way = choice.fastest or _nearest(choices, number, next(iter(choice.seconds)))
            return ATTENTION[way](query, key, value, scale)
        self.trying, way, start = True, choice.turn(), time.perf_counter()
        attended = ATTENTION[way](query, key, value, scale)
        choice.note(way, time.perf_counter() - start)
        return attended


def _nearest(choices: dict[tuple[int, int], Choice], number: tuple[int, int], default: str) -> str:
    """The fastest kernel for the nearest number of rows for which it is known."""
    known = [(abs(each[0] - number[0]), choice.fastest) for each, choice in list(choices.items()) if choice.fastest]
    return min(known, default=(0, default))[1]


def _power(rows: int) -> int:
    return min(rows, MOST_ROWS).bit_length()

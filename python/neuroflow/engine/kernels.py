"""Which kernels multiply the rows of partial frames: the fastest, by what they take in the passes at hand."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from neuroflow_kernels.ways import ATTENTION, LINEAR, Choice, LinearWeights, attention_ways, linear_ways

from ..adapters.anatomy import is_ordinary

MOST_ROWS = 512  # more of them take as long each
_OF_TORCH = (nn.Linear.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.MultiheadAttention.forward)


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


class Case(NamedTuple):
    """What a way is chosen for: linear layers [N, K], or attention of [heads, head_dim] to so many tokens, of `rows`
    and more, up to twice as many.
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
    """A linear layer of a tower as kernels multiply by it.

    Attributes:
        choices: of its shape and dtype, by the power of two of the rows and the threads.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, choices: dict[tuple[int, int], Choice]) -> None:
        super().__init__(weight, bias)
        self.choices = choices
        self._holders: set[Choice] = set()

    def hold(self, choice: Choice) -> bool:
        """Keep packed weights for a choice. Returns whether they were there."""
        found = self.packed is not None
        self.pack()
        self._holders.add(choice)
        return found

    def release(self, choice: Choice) -> None:
        """A choice needs no packed weights any more."""
        self._holders.discard(choice)
        if not self._holders:
            self.packed = None


class Kernels:
    """The linear layers and attentions of a tower in partial frames, and the fastest way through each.

    In the first frames of a number of rows, the ways take turns among the layers of a shape, in some two frames of 12
    blocks; from then on all go the fastest.

    Args:
        only: the one way that is taken, "rows" or "torch", or "measured" for the fastest.

    Attributes:
        countable: changes of the weights are noticed, so that they may be packed.
        resident: the weights stay in memory; else nothing is kept of them, and each layer is called.
        exploring: ways that may be the fastest take turns; else what is not known goes the way of the nearest number of
            rows.
        trying: set wherever a call served to find the fastest way.
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
        """The weights are others now; which way is the fastest stays as it is."""
        self._layers.clear()

    @property
    def packed_bytes(self) -> int:
        """Of weights as oneDNN has packed them, beside the model's own."""
        return sum(layer.packed_bytes for layer in list(self._layers.values()) if layer is not None)

    def fastest(self) -> dict[Case, str]:
        """The way of each case in which it is known."""
        return {
            Case(*kind, 2 ** (power - 1), threads): choice.fastest
            for kind, choices in list(self._choices.items())
            for (power, threads), choice in list(choices.items())
            if choice.fastest is not None
        }

    def layer(self, module: nn.Linear, forward: Callable, tokens: torch.Tensor, dtype: torch.dtype) -> Layer | None:
        """A linear layer with its weights in `dtype`; None where only its `forward` knows what it computes."""
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
        """Rows [M, heads, head_dim] to all tokens of their stream [T, heads, head_dim], as `attend_rows`."""
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
    """The way that is the fastest for the nearest number of rows for which it is known."""
    known = [(abs(each[0] - number[0]), choice.fastest) for each, choice in list(choices.items()) if choice.fastest]
    return min(known, default=(0, default))[1]


def _power(rows: int) -> int:
    return min(rows, MOST_ROWS).bit_length()

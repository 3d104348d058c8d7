"""Which kernels multiply the rows of partial frames: the fastest, measured on the machine and the weights at hand."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from neuroflow_kernels.ways import ATTENTION, LINEAR, LinearWeights, Way, attention_ways, linear_ways, seconds_of

from ..adapters.anatomy import is_ordinary

MOST_ROWS = 512  # that are measured; more of them take as long each
LAYERS = 4  # of a shape that are measured with, so that weights do not all come from the cache
CACHES_BYTES = 2**26  # of keys and values, likewise
PACKED_GAIN = 1.15  # packed weights take as much memory again, and are worth it if they are faster by this
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
        ways: of its shape and dtype, the fastest by the power of two of its rows and the threads.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, ways: dict[tuple[int, int], Way | None]
    ) -> None:
        super().__init__(weight, bias)
        self.ways = ways


class Kernels:
    """The linear layers and attentions of a tower in partial frames, and the fastest way through each.

    Args:
        only: the one way that is taken, "rows" or "torch", or "measured" for the fastest.

    What was not measured goes through `linear_rows` and `attend_rows` where those have fast kernels, else through
    torch's own; after the pass `measure` finds what is faster, for the passes that follow.

    Attributes:
        times: the least seconds of each way, by case, as far as they were measured.
        seconds: that measuring took, all together.
    """

    def __init__(self, only: str = "measured") -> None:
        self._only = None if only == "measured" else only
        self.countable = True  # changes of the weights are noticed, so that they may be packed
        self.times: dict[Case, dict[str, float]] = {}
        self.seconds = 0.0
        self._layers: dict[tuple[nn.Module, torch.dtype], Layer | None] = {}
        self._ways: dict[tuple[str, tuple[int, ...], torch.dtype], dict[tuple[int, int], Way | None]] = {}
        self._wanted: dict[Case, Callable[[], dict[str, Callable[[int], object]]]] = {}

    def forget(self) -> None:
        """The weights are others now; how fast they are multiplied stays as it is."""
        self._layers.clear()

    @property
    def packed_bytes(self) -> int:
        """Of weights as oneDNN has packed them, beside the model's own."""
        return sum(layer.packed_bytes for layer in self._layers.values() if layer is not None)

    def fastest(self) -> dict[Case, str]:
        """The way of each case that was measured."""
        return {case: _fastest(times) for case, times in self.times.items()}

    def layer(self, module: nn.Module, forward: Callable, tokens: torch.Tensor, dtype: torch.dtype) -> Layer | None:
        """A linear layer, or a convolution over windows that tile what it sees, with its weights in `dtype`; None where
        only its `forward` knows what it computes.
        """
        key = module, dtype
        if key not in self._layers:
            self._layers[key] = self._made(module, dtype) if is_plain(module, forward, tokens) else None
        return self._layers[key]

    def _made(self, module: nn.Module, dtype: torch.dtype) -> Layer:
        weight = module.weight.detach().flatten(1).to(dtype)
        bias = None if module.bias is None else module.bias.detach().to(dtype)
        return Layer(weight, bias, self._ways.setdefault(("linear", tuple(weight.shape), dtype), {}))

    def multiply(self, layer: Layer, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [..., K] -> [..., N]."""
        rows = tokens.shape[:-1].numel()
        only = self._only if rows else "torch"
        threads = torch.get_num_threads()
        way = LINEAR[only] if only else layer.ways.get((_power(rows), threads))
        if way is None:
            case = Case("linear", tuple(layer.weight.shape), tokens.dtype, 2 ** (_power(rows) - 1), threads)
            self._wanted.setdefault(case, lambda: self._linear_ways(layer, rows))
            way = LINEAR[linear_ways(tokens.dtype)[0]]
        if way is LINEAR["packed"]:
            layer.pack()
        return way(tokens, layer)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Rows [M, heads, head_dim] to all tokens of their stream [T, heads, head_dim], as `attend_rows`."""
        rows, tokens = len(query), len(key)
        shape = *query.shape[1:], 2 ** (tokens.bit_length() - 1)
        ways = self._ways.setdefault(("attention", shape, query.dtype), {})
        only = self._only if rows else "torch"
        threads = torch.get_num_threads()
        way = ATTENTION[only] if only else ways.get((_power(rows), threads))
        if way is None:
            case = Case("attention", shape, query.dtype, 2 ** (_power(rows) - 1), threads)
            self._wanted.setdefault(case, lambda: _attention_ways(query, key))
            way = ATTENTION[attention_ways(query.dtype, rows * tokens * query.shape[1])[0]]
        return way(query, key, value, scale)

    def measure(self) -> None:
        """Find the fastest way for what was met and not measured so far."""
        wanted, self._wanted = self._wanted, {}
        start = time.perf_counter()
        for case, ways in wanted.items():
            self.times[case] = times = seconds_of(ways())
            functions = LINEAR if case.kind == "linear" else ATTENTION
            self._ways[case.kind, case.shape, case.dtype][_power(case.rows), case.threads] = functions[_fastest(times)]
        self.seconds += time.perf_counter() - start

    def _linear_ways(self, layer: Layer, rows: int) -> dict[str, Callable[[int], object]]:
        alike = [each for each in self._layers.values() if each is not None and each.ways is layer.ways][:LAYERS]
        copies = [LinearWeights(each.weight, each.bias) for each in alike]
        tokens = layer.weight.new_ones(1, min(rows, MOST_ROWS), layer.weight.shape[1])
        ways = [way for way in linear_ways(tokens.dtype) if way != "packed" or self.countable]
        for each in copies if "packed" in ways else ():
            each.pack()
        return {way: lambda turn, way=way: LINEAR[way](tokens, copies[turn % len(copies)]) for way in ways}


def _attention_ways(query: torch.Tensor, key: torch.Tensor) -> dict[str, Callable[[int], object]]:
    query = query.new_ones(min(len(query), MOST_ROWS), *query.shape[1:])
    count = max(min(LAYERS, CACHES_BYTES // (2 * key.nbytes)), 1)
    caches = [(key.new_ones(key.shape), key.new_ones(key.shape)) for _ in range(count)]
    ways = attention_ways(query.dtype, len(query) * len(key) * query.shape[1])
    return {way: lambda turn, way=way: ATTENTION[way](query, *caches[turn % count], None) for way in ways}


def _power(rows: int) -> int:
    return min(rows, MOST_ROWS).bit_length()


def _fastest(times: dict[str, float]) -> str:
    return min(times, key=lambda way: times[way] * (PACKED_GAIN if way == "packed" else 1))

"""Ways to compute the same product on a CPU. The fastest depends on processor, shape, dtype and number of rows.

A linear layer can go through `linear_rows`, torch's own layer, or oneDNN's with weights that oneDNN has packed;
attention of one stream's rows through `attend_rows`, torch's own attention, or two products and a softmax. A `Choice`
finds the fastest.
"""

import statistics
import threading
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .dispatch import Operator, without_row_kernels
from .ops.attend_rows import attend_rows

Way = Callable[..., torch.Tensor]
COUNTED = 4  # timed calls of each way before the fastest is chosen
PATIENCE = 0.04  # seconds of timed calls of a way, which are enough if they come first
HOPELESS = 2.0  # a way that takes this many times the fastest is dropped after half as many calls
PACKED_GAIN = 1.15  # packed weights double the memory, so they have to be faster by this factor
_linear_rows = Operator.registry["linear_rows"].overload  # for arguments that need no check
LARGEST_SCORES = 2**22  # for attention as two products, which writes all scores to memory


class LinearWeights:
    """The weight [N, K] and bias [N] of a linear layer, and on demand the weight as oneDNN packs it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.packed: torch.Tensor | None = None

    def pack(self) -> torch.Tensor:
        packed = self.packed
        if packed is None:
            packed = self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous())
        return packed

    @property
    def packed_bytes(self) -> int:
        return 0 if self.packed is None else self.packed.numel() * self.packed.element_size()


def _linear_by_rows(x: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    rows = x.contiguous().flatten(0, -2)
    return _linear_rows(rows, weights.weight, weights.bias).unflatten(0, x.shape[:-1])


def _linear_by_torch(x: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    return F.linear(x, weights.weight, weights.bias)


def _linear_by_packed(x: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weights.pack(), weights.bias, "none", [], "")


def _attend_by_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    heads = (each.transpose(0, 1)[None] for each in (query, key, value))
    return F.scaled_dot_product_attention(*heads, scale=scale)[0].transpose(0, 1)


def _attend_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    scale = query.shape[2] ** -0.5 if scale is None else scale
    nothing = query.new_zeros(1, 1, 1)
    scores = torch.baddbmm(nothing, query.transpose(0, 1), key.permute(1, 2, 0), beta=0, alpha=scale)
    return torch.bmm(scores.softmax(2), value.transpose(0, 1)).transpose(0, 1)


LINEAR: dict[str, Way] = {"rows": _linear_by_rows, "torch": _linear_by_torch, "packed": _linear_by_packed}
ATTENTION: dict[str, Way] = {"rows": attend_rows, "torch": _attend_by_torch, "products": _attend_by_products}


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN can multiply by packed weights of `dtype` on this machine."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear_ways(dtype: torch.dtype) -> list[str]:
    """The ways through a linear layer of `dtype` on this machine; the first is the default until one is measured."""
    rows = ["rows"] if without_row_kernels() is None else []
    return [*rows, "torch", *(["packed"] if can_pack(dtype) else [])]


def attention_ways(dtype: torch.dtype, scores: int) -> list[str]:
    """The ways of an attention with so many scores over all heads; the first is the default until one is measured."""
    rows = ["rows"] if without_row_kernels() is None else []
    # In bfloat16 two products would round the scores.
    products = ["products"] if dtype == torch.float32 and scores <= LARGEST_SCORES else []
    return [*rows, "torch", *products]


class Choice:
    """Finds the fastest of several ways by letting them take turns at real calls. Threads may share it.

    Timing one call in a loop says little about the same call inside a model, because in a loop its weights and code are
    already in the cache.

    Args:
        ways: their names.

    Attributes:
        seconds: the timed calls of each way.
        fastest: the name of the fastest way once it is known, None before.
    """

    def __init__(self, ways: Sequence[str]) -> None:
        self.seconds: dict[str, list[float]] = {way: [] for way in ways}
        self.fastest = ways[0] if len(ways) == 1 else None
        self._calls = dict.fromkeys(ways, 0)  # of the ways that may still be the fastest
        self._lock = threading.Lock()  # as threads may share a model

    def turn(self) -> str:
        """The way that the next call should take."""
        with self._lock:
            return min(self._calls, key=self._calls.__getitem__)

    def note(self, way: str, seconds: float, counts: bool = True) -> None:
        """Record how long a call took. The first call of a way never counts, nor one that had to prepare something."""
        with self._lock:
            if self.fastest is None and way in self._calls:
                self._note(way, seconds, counts)

    def _note(self, way: str, seconds: float, counts: bool) -> None:
        self._calls[way] += 1
        if not counts or self._calls[way] == 1:
            return
        self.seconds[way].append(seconds)
        least = {other: min(taken) for other, taken in self.seconds.items() if taken}
        for other, one in least.items():
            if one > HOPELESS * min(least.values()) and len(self.seconds[other]) >= COUNTED // 2:
                self._calls.pop(other, None)
        counted = {left: len(self.seconds[left]) for left in self._calls}
        if all(count >= COUNTED or (count and count * least[left] >= PATIENCE) for left, count in counted.items()):
            medians = self.medians()
            self.fastest = min(self._calls, key=lambda left: medians[left] * (PACKED_GAIN if left == "packed" else 1))

    def medians(self) -> dict[str, float]:
        """Median seconds of each way that has timed calls."""
        return {way: statistics.median(taken) for way, taken in self.seconds.items() if taken}

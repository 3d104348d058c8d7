"""Ways to the same product on a CPU, of which the fastest depends on the processor, the shape, the dtype and the rows.

A linear layer goes through `linear_rows`, through torch's own, or through oneDNN's with weights that oneDNN has packed
for itself; attention of one stream's rows through `attend_rows`, through torch's own, or through two products and a
softmax. `seconds_of` says what each takes.
"""

import math
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from .dispatch import without_row_kernels
from .ops.attend_rows import attend_rows
from .ops.linear_rows import linear_rows

Way = Callable[..., torch.Tensor]
ROUNDS = 3  # at least
PATIENCE = 0.02  # seconds in which there are more rounds, for what is over in no time
LARGEST_SCORES = 2**22  # of an attention as two products, which writes them all


class LinearWeights:
    """The weight [N, K] and bias [N] of a linear layer, and the weight as oneDNN packs it, once that was asked for."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.packed: torch.Tensor | None = None

    def pack(self) -> None:
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous())

    @property
    def packed_bytes(self) -> int:
        return 0 if self.packed is None else self.packed.numel() * self.packed.element_size()


def _linear_by_rows(x: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    return linear_rows(x.flatten(0, -2), weights.weight, weights.bias).unflatten(0, x.shape[:-1])


def _linear_by_torch(x: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    return F.linear(x, weights.weight, weights.bias)


def _linear_by_packed(x: torch.Tensor, weights: LinearWeights) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weights.packed, weights.bias, "none", [], "")


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
    """Whether oneDNN multiplies by weights of `dtype` that it has packed here."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear_ways(dtype: torch.dtype) -> list[str]:
    """The ways through a linear layer of `dtype` that there are here; the first serves where none was measured."""
    rows = ["rows"] if without_row_kernels() is None else []
    return [*rows, "torch", *(["packed"] if can_pack(dtype) else [])]


def attention_ways(dtype: torch.dtype, scores: int) -> list[str]:
    """The ways of an attention with so many scores over all heads; the first serves where none was measured."""
    rows = ["rows"] if without_row_kernels() is None else []
    # In bfloat16 two products would round the scores.
    products = ["products"] if dtype == torch.float32 and scores <= LARGEST_SCORES else []
    return [*rows, "torch", *products]


def seconds_of(ways: Mapping[str, Callable[[int], object]]) -> dict[str, float]:
    """The least seconds that each of several ways takes, called in turns: what disturbs a call only makes it slower.

    Args:
        ways: by name, called with the number of their turn, by which they may take inputs from elsewhere in memory.
    """
    for run in ways.values():
        run(0)  # what is made once
    least = dict.fromkeys(ways, math.inf)
    start = time.perf_counter()
    for turn in range(1, 4 * ROUNDS):
        if turn > ROUNDS and time.perf_counter() - start > PATIENCE:
            break
        for way, run in ways.items():
            begin = time.perf_counter()
            run(turn)
            least[way] = min(least[way], time.perf_counter() - begin)
    return least

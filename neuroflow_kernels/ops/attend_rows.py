import torch

from .. import checks
from ..dispatch import Operator


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    return query.new_empty(query.shape)


_operator = Operator(
    __name__, "attend_rows(Tensor query, Tensor key, Tensor value, float scale) -> Tensor", _fake, triton=False
)


def attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Attention of the active tokens of one stream to the cached keys and values of all of them.

    Everything lies token by token, as a projection writes it and a cache keeps it. There is no kernel for GPUs:
    FlashAttention, behind the reference, serves them.

    Args:
        query: [M, heads, head_dim] in float32, bfloat16, float16 or float64; sums are kept in float32 (float64 for
            float64), and with bfloat16 the weights are rounded before they meet the values, as FlashAttention does.
        key, value: [T, heads, head_dim], T at least 1, of query's dtype.
        scale: of the products; None means head_dim ** -0.5.

    Returns:
        [M, heads, head_dim], query's dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    checks.rank("query", query, "[M, heads, head_dim]", *checks.FLOATS)
    checks.rank("key", key, "[T, heads, head_dim]", query.dtype)
    checks.require(key.shape[0] > 0, "key", key, "at least one token to attend to")
    for name, value_ in (("key", key), ("value", value)):
        checks.same(name, value_, (key.shape[0], *query.shape[1:]), query.device, query.dtype)
    scale = query.shape[2] ** -0.5 if scale is None else float(scale)
    return _operator(query.contiguous(), key.contiguous(), value.contiguous(), scale)

import torch

from .. import checks
from ..dispatch import Operator
from .scatter_kv import whole_heads


def _fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor | None, scale: float
) -> torch.Tensor:
    return query.new_empty(query.shape)


_operator = Operator(
    __name__, "attend_rows(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens, float scale) -> Tensor", _fake
)


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the active tokens to the cached keys and values of all tokens of their own stream.

    Everything lies token by token, as a projection writes it and a cache keeps it. With the C++ backend a row's result
    does not depend on the rows and streams that come with it; on a GPU its last bits may, as the keys are split by how
    many there are.

    Args:
        query: [M, heads, head_dim] in float32, bfloat16, float16 or float64; sums are kept in float32 (float64 for
            float64), and with bfloat16 the weights are rounded before they meet the values, as FlashAttention does.
            Strides are free; a copy is made only where head_dim is not contiguous.
        key, value: [T, heads, head_dim] of one stream, or with `cu_seqlens` [S, T, heads, head_dim]; T at least 1, of
            query's dtype.
        scale: of the products; None means head_dim ** -0.5.
        cu_seqlens: [S + 1] int32, as `compact` returns it: stream s owns query[cu_seqlens[s] : cu_seqlens[s + 1]]. Rows
            past the last are padding. None gives all rows to one stream.

    Returns:
        [M, heads, head_dim], query's dtype, zeros where a row is padding.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    checks.rank("query", query, "[M, heads, head_dim]", *checks.FLOATS)
    if cu_seqlens is None:
        checks.rank("key", key, "[T, heads, head_dim]", query.dtype)
    else:
        checks.rank("key", key, "[S, T, heads, head_dim]", query.dtype)
        checks.same("cu_seqlens", cu_seqlens, (key.shape[0] + 1,), query.device, torch.int32)
    checks.require(key.shape[-3] > 0, "key", key, "at least one token to attend to")
    for name, tensor in (("key", key), ("value", value)):
        checks.same(name, tensor, (*key.shape[:-2], *query.shape[1:]), query.device, query.dtype)
    scale = max(query.shape[2], 1) ** -0.5 if scale is None else float(scale)
    if cu_seqlens is None:
        key, value = key[None], value[None]
    else:
        cu_seqlens = checks.contiguous("cu_seqlens", cu_seqlens)
    key, value = checks.contiguous("key", key), checks.contiguous("value", value)
    return _operator(whole_heads("query", query), key, value, cu_seqlens, scale)

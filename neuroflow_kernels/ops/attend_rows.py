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
    """Attention from the active tokens to the cached keys and values of all tokens of their stream.

    Queries, keys and values lie token by token, as a projection writes them and a cache keeps them. With the C++
    backend a row's result does not depend on which rows and streams come with it; on a GPU the last bits may, because
    the number of splits of the keys depends on the number of rows. There are no gradients.

    Args:
        query: [M, heads, head_dim] in float32, bfloat16, float16 or float64; sums are kept in float32 (float64 for
            float64). In bfloat16 the softmax weights are rounded before they multiply the values, as in FlashAttention.
            Any strides will do; it is copied only if head_dim is not contiguous.
        key: [T, heads, head_dim] of one stream, or [S, T, heads, head_dim] with `cu_seqlens`; T at least 1, query's
            dtype.
        value: [T, heads, head_dim] or [S, T, heads, head_dim], as key.
        scale: multiplies query · key; None means head_dim ** -0.5.
        cu_seqlens: [S + 1] int32, as `compact` returns it: stream s owns query[cu_seqlens[s] : cu_seqlens[s + 1]]. Rows
            past the last are padding. None gives all rows to one stream.

    Returns:
        [M, heads, head_dim], query's dtype, zeros where a row is padding.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        BackendUnavailable: the backend asked for cannot serve this call.

    Example:
        >>> import torch
        >>> from neuroflow_kernels import attend_rows
        >>> query = torch.randn(3, 2, 8)  # three active tokens, two heads
        >>> key, value = torch.randn(2, 2, 5, 2, 8)  # two streams of five tokens
        >>> out = attend_rows(query, key, value, cu_seqlens=torch.tensor([0, 2, 3], dtype=torch.int32))
        >>> out.shape
        torch.Size([3, 2, 8])
        >>> torch.equal(out[:2], attend_rows(query[:2], key[0], value[0]))  # the first two belong to stream 0
        True
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

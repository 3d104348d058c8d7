import torch

from .. import checks
from ..dispatch import Operator
from .scatter_kv import whole_heads


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return query.new_empty(query.shape)


_operator = Operator(
    __name__,
    "attend_versions(Tensor query, Tensor key, Tensor value, Tensor table, Tensor cu_seqlens, float scale) -> Tensor",
    _fake,
)


def attend_versions(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention as in `attend_rows`, of several frames at once, where each frame picks its own version of every token.

    The frames of a clip share most keys and values, so a table of the row that each frame uses for each token replaces
    a copy of the cache per frame. A GPU attends from all frames in one launch. The C++ backend has no kernel for it: on
    a CPU the reference gathers each frame's keys and values, and `scatter_kv_` and `attend_rows`, frame after frame,
    compute the same. There are no gradients.

    Args:
        query: [M, heads, head_dim], as `attend_rows` takes it, the active tokens of one frame after those of another.
        key: [R, heads, head_dim], every version of every token, query's dtype.
        value: [R, heads, head_dim], query's dtype.
        table: [S, T] int32, for each of S frames the row of `key` and `value` that holds each of its T tokens, T at
            least 1.
        cu_seqlens: [S + 1] int32: frame s owns query[cu_seqlens[s] : cu_seqlens[s + 1]]. Rows past the last are
            padding.
        scale: multiplies query · key; None means head_dim ** -0.5.

    Returns:
        [M, heads, head_dim], query's dtype, zeros where a row is padding.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        IndexError: on the CPU, a row of the table outside [-R, R). On a GPU one outside [0, R) counts as zeros.
        BackendUnavailable: the backend asked for cannot serve this call.

    Example:
        >>> import torch
        >>> from neuroflow_kernels import attend_rows, attend_versions
        >>> query = torch.randn(3, 2, 8)  # two active tokens in frame 0, one in frame 1
        >>> key, value = torch.randn(2, 5, 2, 8)  # four tokens, and a second version of token 3
        >>> table = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], dtype=torch.int32)
        >>> out = attend_versions(query, key, value, table, torch.tensor([0, 2, 3], dtype=torch.int32))
        >>> second = table[1].long()
        >>> torch.allclose(out[2:], attend_rows(query[2:], key[second], value[second]), atol=1e-6)
        True
    """
    checks.rank("query", query, "[M, heads, head_dim]", *checks.FLOATS)
    checks.rank("key", key, "[R, heads, head_dim]", query.dtype)
    for name, tensor in (("key", key), ("value", value)):
        checks.same(name, tensor, (key.shape[0], *query.shape[1:]), query.device, query.dtype)
    checks.rank("table", table, "[S, T]", torch.int32)
    checks.require(table.device == query.device and table.shape[1] > 0, "table", table, "[S, T] on query's device")
    checks.same("cu_seqlens", cu_seqlens, (table.shape[0] + 1,), query.device, torch.int32)
    scale = query.shape[2] ** -0.5 if scale is None else float(scale)
    given = {"key": key, "value": value, "table": table, "cu_seqlens": cu_seqlens}
    whole = (checks.contiguous(name, tensor) for name, tensor in given.items())
    return _operator(whole_heads("query", query), *whole, scale)

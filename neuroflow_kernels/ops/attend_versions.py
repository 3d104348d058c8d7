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
    """Attention as `attend_rows`, of several frames at once: each sees its own choice among the versions of a token.

    The frames of a clip share most keys and values, so that a table of which row serves which token of a frame takes
    the place of a copy for each. Where a CPU attends to one frame after the other, a GPU does in one launch.

    Args:
        query: [M, heads, head_dim] as `attend_rows` takes it, the active tokens of one frame after those of another.
        key, value: [R, heads, head_dim], every version of every token, of query's dtype.
        table: [S, T] int32, of each of S frames the row of `key` and `value` that holds each of its T tokens, T at
            least 1.
        cu_seqlens: [S + 1] int32: frame s owns query[cu_seqlens[s] : cu_seqlens[s + 1]]. Rows past the last are
            padding.
        scale: of the products; None means head_dim ** -0.5.

    Returns:
        [M, heads, head_dim], query's dtype, zeros where a row is padding.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        IndexError: on the CPU, a row outside [-R, R). On a GPU one outside [0, R) counts as zeros.

    Example:
        table = torch.arange(196, dtype=torch.int32).repeat(2, 1)  # both frames see the first 196 rows,
        table[1, 7] = 196  # but the second has a token 7 of its own
        attend_versions(query, key, value, table, torch.tensor([0, 31, 32], dtype=torch.int32))
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

import torch

from .. import checks
from ..dispatch import Operator


def _fake(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> None:
    return None


_operator = Operator(
    __name__,
    "scatter_kv_(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, Tensor index, "
    "Tensor cu_seqlens) -> ()",
    _fake,
)


def whole_heads(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """[M, heads, head_dim] in any layout in which a head's elements are adjacent; copied only if they are not."""
    return tensor if tensor.stride(2) == 1 else checks.contiguous(name, tensor)


def scatter_kv_(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the active tokens' keys and values into the caches that `attend_rows` reads, both at once.

    Keys and values are taken as a projection leaves them, split into heads: transposed, or as slices of a fused
    product. There are no gradients.

    Args:
        key_cache: [S, N, heads * head_dim] in float32, bfloat16, float16 or float64, updated in place.
        value_cache: [S, N, heads * head_dim], key_cache's dtype, updated in place.
        key: [M, heads, head_dim], the caches' dtype; rows past `cu_seqlens[-1]` are padding and are not written. Any
            strides will do; it is copied only if head_dim is not contiguous.
        value: [M, heads, head_dim], as key.
        index: [S * N] int32, as `compact` returns it for the same S and N.
        cu_seqlens: [S + 1] int32, as `compact` returns it.

    Returns:
        key_cache, value_cache.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        IndexError: on the CPU, an index outside [0, S * N).
        RuntimeError: a cache requires grad and grad mode is on.
        BackendUnavailable: the backend asked for cannot serve this call.

    Example:
        >>> import torch
        >>> from neuroflow_kernels import compact, scatter_kv_
        >>> key_cache, value_cache = torch.zeros(2, 1, 4, 6)  # one stream of four tokens, two heads of three
        >>> index, cu_seqlens = compact(torch.tensor([[0.0, 0.3, 0.0, 0.2]]), threshold=0.1, floor=1)
        >>> key, value = torch.ones(2, 2, 2, 3)  # of the two active tokens
        >>> key_cache, value_cache = scatter_kv_(key_cache, value_cache, key, 2 * value, index, cu_seqlens)
        >>> key_cache[0, :, 0].tolist(), value_cache[0, :, 0].tolist()
        ([0.0, 1.0, 0.0, 1.0], [0.0, 2.0, 0.0, 2.0])
    """
    checks.rank("key_cache", key_cache, "[S, N, heads * head_dim]", *checks.FLOATS)
    checks.same("value_cache", value_cache, key_cache.shape, key_cache.device, key_cache.dtype)
    checks.updated("key_cache", key_cache)
    checks.updated("value_cache", value_cache)
    checks.selection(index, cu_seqlens, key_cache.device)
    checks.rank("key", key, "[M, heads, head_dim]", key_cache.dtype)
    width = key_cache.shape[2]
    checks.require(
        key.device == key_cache.device and key.shape[1:].numel() == width,
        "key",
        key,
        f"a tensor of shape [M, heads, head_dim] on {key_cache.device}, where heads * head_dim is {width}",
    )
    checks.same("value", value, key.shape, key.device, key.dtype)
    _operator(key_cache, value_cache, whole_heads("key", key), whole_heads("value", value), index, cu_seqlens)
    return key_cache, value_cache

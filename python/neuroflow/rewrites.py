"""Two modules of a vision tower, computed in a cheaper way that is equal up to rounding."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from neuroflow_kernels import linear_rows, unavailable

# Up to here reading the weights takes a good part of the time; from here on torch's own products are as fast.
FEW_ROWS = 256


@functools.cache
def _has_row_kernels() -> bool:
    return unavailable("cpp") is None and torch.backends.cpu.get_cpu_capability() == "AVX512"


def few_rows(tokens: torch.Tensor) -> bool:
    """Whether the kernels for few rows beat torch's on tokens [..., D]: a CPU with AVX-512, a dtype it multiplies."""
    return (
        tokens.device.type == "cpu"
        and tokens.dtype in (torch.float32, torch.bfloat16)
        and tokens.numel() <= FEW_ROWS * tokens.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and _has_row_kernels()
    )


def linear(tokens: torch.Tensor, module: nn.Linear) -> torch.Tensor:
    """`module` on tokens [..., K], few of them."""
    return linear_rows(tokens.flatten(0, -2), module.weight, module.bias).view(*tokens.shape[:-1], -1)


def is_patch_projection(module: nn.Module) -> bool:
    """Whether `project_patches` can stand in for `module`: a convolution over windows that tile the image."""
    return (
        isinstance(module, nn.Conv2d)
        and module.stride == module.kernel_size
        and module.padding in ("valid", (0, 0))
        and module.dilation == (1, 1)
        and module.groups == 1
    )


def patch_windows(convolution: nn.Conv2d, pixels: torch.Tensor) -> torch.Tensor:
    """The windows that the convolution sees, one row a patch: [S, C, H, W] -> [S, N, C * height * width]."""
    if pixels.ndim != 4 or pixels.shape[1] != convolution.in_channels:
        accepted = f"{convolution.in_channels} channels, [S, {convolution.in_channels}, H, W]"
        raise ValueError(f"pixel_values has shape {list(pixels.shape)}; accepted is {accepted}")
    height, width = convolution.kernel_size
    rows, columns = pixels.shape[2] // height, pixels.shape[3] // width
    windows = pixels[:, :, : rows * height, : columns * width]
    windows = windows.unflatten(3, (columns, width)).unflatten(
        2, (rows, height)
    )  # [S, C, rows, height, columns, width]
    return windows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def project_patches(convolution: nn.Conv2d, pixels: torch.Tensor) -> torch.Tensor:
    """The convolution as one matrix product, [S, C, H, W] -> [S, D, rows, columns].

    The result is a view of rows [S, N, D] that are contiguous, which is the order that the gate and the blocks read; a
    convolution leaves the channels outermost.
    """
    projected = F.linear(patch_windows(convolution, pixels), convolution.weight.flatten(1), convolution.bias)
    return projected.transpose(1, 2).unflatten(2, (pixels.shape[2] // convolution.kernel_size[0], -1))


def attention_pool(
    head: nn.Module, tokens: torch.Tensor, lengths: list[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """SigLIP's pooling head, [S, N, D] -> [S, D], without projecting every token to a key and a value.

    The one query is a constant q, so a score q (W x + b) is (q W) x plus a constant that the softmax drops; and the
    weighted sum of projected values is the projection of the weighted sum of tokens. What is left per token is two
    products with a [heads, D] matrix. Scores and sums are kept in float32 or wider.

    Args:
        lengths: how many tokens of each stream count, from the left; None means all.

    Returns:
        the pooled tokens, and the attention that each token got, the mean of all heads: [S, N].
    """
    attention = head.attention
    dim, heads = attention.embed_dim, attention.num_heads
    wide = torch.promote_types(tokens.dtype, torch.float32)
    query_weight, key_weight, value_weight = attention.in_proj_weight.to(wide).chunk(3)
    query_bias, _, value_bias = attention.in_proj_bias.to(wide).chunk(3)
    query = F.linear(head.probe[0, 0].to(wide), query_weight, query_bias) * (dim // heads) ** -0.5
    probe = torch.einsum("hk,hkd->hd", query.view(heads, -1), key_weight.view(heads, -1, dim))
    tokens = tokens.to(wide)
    scores = tokens @ probe.T  # [S, N, heads]
    if lengths is not None:
        position = torch.arange(tokens.shape[1], device=tokens.device)
        past_end = position >= torch.tensor(lengths, device=tokens.device)[:, None]
        scores = scores.masked_fill(past_end[..., None], -torch.inf)
    weights = scores.softmax(1)
    mixed = weights.transpose(1, 2) @ tokens  # [S, heads, D]
    values = torch.einsum("shd,hkd->shk", mixed, value_weight.view(heads, -1, dim)).flatten(1) + value_bias
    pooled = attention.out_proj(values.to(attention.out_proj.weight.dtype))
    return pooled + head.mlp(head.layernorm(pooled)), weights.mean(2)

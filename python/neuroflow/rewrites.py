"""Two modules of a vision tower, computed in a cheaper way that is equal up to rounding."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from neuroflow_kernels import linear_rows, without_row_kernels

# Up to here reading the weights takes a good part of the time; from here on torch's own products are as fast.
FEW_ROWS = 512


def row_kernels_serve(tokens: torch.Tensor) -> bool:
    """Whether `linear_rows` and `attend_rows`, which have no gradient, have fast kernels for such tokens here."""
    return (
        not torch.is_grad_enabled()
        and tokens.device.type == "cpu"
        and tokens.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_autocast_enabled("cpu")
        and without_row_kernels() is None
    )


def are_few(tokens: torch.Tensor) -> bool:
    """Whether tokens [..., D] are so few rows that `linear_rows` is the faster way."""
    return tokens.numel() <= FEW_ROWS * tokens.shape[-1]


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes what `linear_rows` does."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def in_bfloat16(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Its weight, and its bias where it has one."""
    return linear.weight.bfloat16(), None if linear.bias is None else linear.bias.bfloat16()


def is_patch_projection(module: nn.Module) -> bool:
    """Whether `project_windows` can stand in for `module`: a convolution over windows that tile the image or clip."""
    return (
        isinstance(module, nn.Conv2d | nn.Conv3d)
        and module.stride == module.kernel_size
        and module.padding in ("valid", (0, 0), (0, 0, 0))
        and set(module.dilation) == {1}
        and module.groups == 1
    )


def patch_windows(convolution: nn.Conv2d | nn.Conv3d, pixels: torch.Tensor) -> torch.Tensor:
    """The windows that the convolution sees, one row a patch: [S, C, H, W] -> [S, N, C * height * width].

    Those of a clip [S, C, T, H, W] are tubelets, [S, N, C * frames * height * width].
    """
    axes = len(convolution.kernel_size)
    if pixels.ndim != 2 + axes or pixels.shape[1] != convolution.in_channels:
        lengths = ", ".join("THW"[-axes:])
        accepted = f"{convolution.in_channels} channels, [S, {convolution.in_channels}, {lengths}]"
        raise ValueError(f"pixel_values has shape {list(pixels.shape)}; accepted is {accepted}")
    windows, within = pixels, range(3, 3 + 2 * axes, 2)
    for axis, size in zip(within, convolution.kernel_size, strict=True):
        count = windows.shape[axis - 1] // size
        windows = windows.narrow(axis - 1, 0, count * size).unflatten(axis - 1, (count, size))
    windows = windows.permute(0, *(axis - 1 for axis in within), 1, *within)  # [S, rows, columns, C, height, width]
    return windows.flatten(1 + axes).flatten(1, axes)


def project_windows(convolution: nn.Conv2d | nn.Conv3d, windows: torch.Tensor) -> torch.Tensor:
    """The convolution as a matrix product: `patch_windows` [*, values of a window] -> [*, D].

    The rows are contiguous, which is the order that the gate and the blocks read; a convolution leaves the channels
    outermost.
    """
    weight = convolution.weight.flatten(1)
    if are_few(windows) and row_kernels_serve(windows):
        return linear_rows(windows.flatten(0, -2), weight, convolution.bias).unflatten(0, windows.shape[:-1])
    return F.linear(windows, weight, convolution.bias)


def is_foldable(head: nn.Module) -> bool:
    """Whether `head` is a pooling head that `fold_head` knows: one learned probe that attends to all tokens."""
    return hasattr(head, "probe") and isinstance(getattr(head, "attention", None), nn.MultiheadAttention)


class FoldedHead(NamedTuple):
    """What `attention_pool` multiplies by, in float32 or wider: scores are tokens times probe [heads, D], and the
    weighted sums of tokens go through value_weight [heads, head_dim, D] and value_bias [D].
    """

    probe: torch.Tensor
    value_weight: torch.Tensor
    value_bias: torch.Tensor


def fold_head(head: nn.Module) -> FoldedHead:
    """SigLIP's pooling head without projecting every token to a key and a value.

    The one query is a constant q, so a score q (W x + b) is (q W) x plus a constant that the softmax drops; and the
    weighted sum of projected values is the projection of the weighted sum of tokens. What is left per token is two
    products with a [heads, D] matrix.
    """
    attention = head.attention
    dim, heads = attention.embed_dim, attention.num_heads
    wide = torch.promote_types(attention.in_proj_weight.dtype, torch.float32)
    query_weight, key_weight, value_weight = attention.in_proj_weight.to(wide).chunk(3)
    query_bias, _, value_bias = attention.in_proj_bias.to(wide).chunk(3)
    query = F.linear(head.probe[0, 0].to(wide), query_weight, query_bias) * (dim // heads) ** -0.5
    probe = torch.einsum("hk,hkd->hd", query.view(heads, -1), key_weight.view(heads, -1, dim))
    return FoldedHead(probe, value_weight.view(heads, -1, dim), value_bias)


def attention_pool(
    head: nn.Module, folded: FoldedHead, tokens: torch.Tensor, lengths: list[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """SigLIP's pooling head, [S, N, D] -> [S, D]; scores and sums are kept in float32 or wider.

    Args:
        folded: of `head`'s weights as they are.
        lengths: how many tokens of each stream count, from the left; None means all.

    Returns:
        the pooled tokens, and the attention that each token got, the mean of all heads: [S, N].
    """
    out_proj = head.attention.out_proj
    tokens = tokens.to(folded.probe.dtype)
    if row_kernels_serve(tokens):
        scores = torch.stack([linear_rows(folded.probe, own) for own in tokens])
    else:
        scores = folded.probe @ tokens.mT  # [S, heads, N]
    if lengths is not None:
        position = torch.arange(tokens.shape[1], device=tokens.device)
        past_end = position >= torch.tensor(lengths, device=tokens.device)[:, None]
        scores = scores.masked_fill(past_end[:, None], -torch.inf)
    weights = scores.softmax(2)
    mixed = weights @ tokens  # [S, heads, D]
    values = torch.einsum("shd,hkd->shk", mixed, folded.value_weight).flatten(1) + folded.value_bias
    pooled = out_proj(values.to(out_proj.weight.dtype))
    return pooled + head.mlp(head.layernorm(pooled)), weights.mean(1)

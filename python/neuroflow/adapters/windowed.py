"""Towers most of whose blocks attend within windows of the grid: SAM and ViTDet.

While such a tower runs its windows are not cut: tokens stay in row-major order, and each query is led to the keys and
values of its window. Where a window sticks out of the grid, the model pads with zeros behind the norm, so that such a
position has the biases of the projection for its key and value.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .anatomy import Anatomy, Grid, grids_of_images, is_ordinary, with_stages


def sam(tower: nn.Module) -> Anatomy:
    """SAM's image encoder. All tokens are back after the last block, as its neck convolves their map."""
    layers = tuple(tower.layers)
    projection = tower.patch_embed.projection

    def uncut(window_partition: Callable, tokens: torch.Tensor, size: int) -> tuple[torch.Tensor, None]:
        return tokens, None

    def as_they_are(window_unpartition: Callable, tokens: torch.Tensor, *shapes: Any) -> torch.Tensor:
        return tokens

    attentions = tuple(layer.attn for layer in layers)
    return Anatomy(
        tower=tower,
        projection=projection,
        layers=layers,
        attentions=attentions,
        mlps=tuple((layer.mlp, layer.mlp) for layer in layers),
        last=layers[-1],
        prefix=0,
        grids=grids_of_images(projection),
        embedding=lambda output: output.last_hidden_state.mean((2, 3)),
        needs_every_token=True,
        attention=_attention(tower.config.num_attention_heads, layers, attentions),
        overrides=tuple(
            (layer, method, override)
            for layer in layers
            for method, override in (("window_partition", uncut), ("window_unpartition", as_they_are))
        ),
    )


def vitdet(tower: nn.Module) -> Anatomy:
    """ViTDet, the model or the backbone. Its blocks take channels first; while the tower runs they take them last.

    Raises:
        ValueError: blocks with convolutions.
    """
    layers = tuple(tower.encoder.layer)
    with_convolution = [number for number, layer in enumerate(layers) if layer.use_residual_block]
    if with_convolution:
        raise ValueError(
            f"residual_block_indices is {with_convolution}; accepted is [], as a convolution over neighbouring tokens "
            "cannot do with the active ones"
        )
    projection = tower.embeddings.projection

    attentions = tuple(layer.attention for layer in layers)
    blocks = tuple((layer, "forward", functools.partial(_block, layer)) for layer in layers)
    anatomy = Anatomy(
        tower=tower,
        projection=projection,
        layers=layers,
        attentions=attentions,
        mlps=tuple((layer.mlp, layer.mlp) for layer in layers),
        last=layers[-1],
        prefix=0,
        grids=grids_of_images(projection, "head_mask"),
        embedding=lambda output: output.last_hidden_state.mean((2, 3)),
        needs_every_token=True,
        tables=((tower.embeddings, "get_absolute_positions"),),
        attention=_attention(tower.config.num_attention_heads, layers, attentions),
        overrides=((tower.encoder, "forward", _channels_last), *blocks),
    )
    return with_stages(anatomy)


def _channels_last(forward: Callable, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """ViTDet's encoder, tokens [S, D, rows, columns], around blocks that take [S, rows, columns, D]."""
    output = forward(tokens.permute(0, 2, 3, 1), *args, **kwargs)
    if isinstance(output, tuple):
        return _channels_first(output)
    for name, value in output.items():
        output[name] = _channels_first(value)
    return output


def _channels_first(value: Any) -> Any:
    """Maps as the model gives them, in tuples too; packed tokens [1, M, D] as they are."""
    if isinstance(value, tuple):
        return tuple(_channels_first(each) for each in value)
    return value.permute(0, 3, 1, 2) if isinstance(value, torch.Tensor) and value.ndim == 4 else value


def _block(layer: nn.Module, forward: Callable, tokens: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, None]:
    """ViTDet's block for tokens [S, rows, columns, D] or [1, M, D]; it has no use for a head mask that is None."""
    tokens = tokens + layer.drop_path(layer.attention(layer.norm1(tokens))[0])
    return tokens + layer.drop_path(layer.mlp(layer.norm2(tokens))), None


def _attention(heads: int, layers: tuple[nn.Module, ...], attentions: tuple[nn.Module, ...]) -> Callable:
    """`Anatomy.attention` for tokens [S, rows, columns, D] or [1, M, D]; a block of window_size 0 attends globally."""
    sizes = {module: layer.window_size for layer, module in zip(layers, attentions, strict=True)}

    def attention(
        module: nn.Module, attend: Callable, hidden_states: torch.Tensor, output_attentions: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        projected = module.qkv(hidden_states).flatten(1, -2).unflatten(2, (3, heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # [S, heads, T, head_dim] each
        size = sizes[module]
        product = functools.partial(_in_windows, module, size) if size else functools.partial(_everywhere, module)
        attended, weights = attend(query, key, value, None, product=product, scaling=module.scale)
        return module.proj(attended.flatten(2)).reshape(hidden_states.shape), weights

    return attention


def _everywhere(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor | None,
    key_rows: torch.Tensor | None,
    grid: Grid,
) -> torch.Tensor:
    """`product` of `attend`, from every query to every key."""
    at = torch.arange(query.shape[2], device=query.device) if rows is None else rows.long()
    bias = _position_bias(module, query, at[None] // grid[1], at[None] % grid[1], grid)
    if key_rows is not None:
        bias = bias[..., key_rows]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=module.scale).transpose(1, 2)


def _in_windows(
    module: nn.Module,
    size: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor | None,
    key_rows: torch.Tensor | None,
    grid: Grid,
) -> torch.Tensor:
    """`product` of `attend`, from every query to the keys in its window of size x size and the padding there."""
    device, (height, width) = query.device, grid
    at = torch.arange(query.shape[2], device=device) if rows is None else rows.long()
    row, column = at // width, at % width
    across = -(-width // size)  # windows side by side
    windows, window, counts = (row // size * across + column // size).unique(return_inverse=True, return_counts=True)
    order = window.argsort()  # only windows that hold a query are served
    slots = nn.utils.rnn.pad_sequence(order.split(counts.tolist()), batch_first=True)  # [W, M] queries

    steps = torch.arange(size, device=device)
    rows_in = (windows // across * size)[:, None] + steps  # [W, size]
    columns_in = (windows % across * size)[:, None] + steps
    outside = ((rows_in >= height)[:, :, None] | (columns_in >= width)[:, None]).flatten(1)  # [W, size * size]
    index = (rows_in[:, :, None] * width + columns_in[:, None]).flatten(1).masked_fill(outside, 0)
    queries = query[0].transpose(0, 1)[slots].transpose(1, 2)  # [W, heads, M, head_dim]
    bias = _position_bias(module, queries, row[slots] % size, column[slots] % size, (size, size))
    if key_rows is not None:
        place = torch.full((height * width,), -1, device=device)
        place[key_rows.long()] = torch.arange(key_rows.numel(), device=device)
        index = place[index]
        bias = bias.masked_fill(((index < 0) & ~outside)[:, None, None], -torch.inf)
        index = index.clamp_min(0)
    of_windows = []
    for heads, padding in zip((key, value), _padding(module.qkv, key), strict=True):
        of_window = heads[0].transpose(0, 1)[index]  # [W, size * size, heads, head_dim]
        of_window[outside] = padding
        of_windows.append(of_window.transpose(1, 2))
    attended = F.scaled_dot_product_attention(queries, *of_windows, attn_mask=bias, scale=module.scale).transpose(1, 2)
    result = attended.new_empty(1, at.numel(), *attended.shape[2:])
    result[0, order] = attended[torch.arange(slots.shape[1], device=device) < counts[:, None]]
    return result


def _padding(qkv: nn.Module, key: torch.Tensor) -> torch.Tensor:
    """What `qkv` makes of a token that is zero: its key and value, [2, heads, head_dim]."""
    _, heads, _, head_dim = key.shape
    projected = qkv.bias
    is_bias = isinstance(qkv, nn.Linear) and not qkv._forward_hooks and not qkv._forward_pre_hooks
    if projected is None and is_bias:
        return key.new_zeros(2, heads, head_dim)
    dtype = key.dtype if projected is None else projected.dtype
    zero = key.new_zeros(1, heads * head_dim, dtype=dtype)
    if not is_bias or not is_ordinary(projected, zero):
        projected = qkv(zero)
    return projected.to(key.dtype).view(3, heads, head_dim)[1:]


def _position_bias(
    module: nn.Module, query: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, size: Grid
) -> torch.Tensor:
    """What relative positions, decomposed into rows and columns, add to the scores.

    Args:
        query: [W, heads, M, head_dim], at `rows` and `columns` [W, M] of a window.
        size: rows and columns of a window; tables for another are interpolated.

    Returns:
        [W, heads, M, positions of a window], or zeros that broadcast to it where the model has no such tables.
    """
    if not hasattr(module, "rel_pos_h"):
        return query.new_zeros(query.shape[0], 1, 1, size[0] * size[1])
    along = []
    for table, at, length in ((module.rel_pos_h, rows, size[0]), (module.rel_pos_w, columns, size[1])):
        if table.shape[0] != 2 * length - 1:
            table = F.interpolate(table.T[None], size=2 * length - 1, mode="linear")[0].T
        distance = at[..., None] - torch.arange(length, device=at.device) + length - 1  # [W, M, length]
        products = query @ table.T.to(query.dtype)  # [W, heads, M, distances]
        along.append(products.gather(-1, distance[:, None].expand(*products.shape[:-1], -1)))
    return (along[0][..., None] + along[1][..., None, :]).flatten(-2)

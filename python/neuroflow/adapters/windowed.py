"""Towers in which most blocks attend within windows of the grid: SAM and its copies, SAM 3 and ViTDet.

While such a tower runs, windows are not cut out. Tokens stay in row-major order, and each query attends to the keys and
values of its window. Where a window extends past the grid the model pads with zeros after the norm, so the key and
value there are the biases of the projection.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .anatomy import Anatomy, Grid, grids_of_images, is_ordinary, is_patch_projection, mean_of_last, with_stages
from .frames import Images, first_argument
from .general import own_sizes

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, float32 [1, positions of a window or grid, head_dim]


def has_windows(module: nn.Module) -> bool:
    """Whether `module` is built like SAM's image encoder.

    It has a list of blocks with their own methods to cut windows, a convolution over patches, and a declared frame
    size.
    """
    return len(_lists(module)) == 1 and any(map(is_patch_projection, module.modules())) and bool(own_sizes(module))


def _lists(module: nn.Module) -> list[nn.ModuleList]:
    methods = ("window_partition", "window_unpartition")
    return [
        blocks
        for blocks in module.children()
        if isinstance(blocks, nn.ModuleList)
        and len(blocks) > 0
        and all(hasattr(block, name) for block in blocks for name in ("window_size", *methods))
        and all(hasattr(getattr(block, "attn", None), name) for block in blocks for name in ("qkv", "proj"))
    ]


def sam(tower: nn.Module) -> Anatomy:
    """A tower that `has_windows`. All tokens are restored after the last block, since its neck convolves their map."""
    ((*layers,),) = _lists(tower)
    projection = next(filter(is_patch_projection, tower.modules()))
    attentions = tuple(layer.attn for layer in layers)
    form = Images(first_argument(tower), projection, projection.kernel_size, channels=projection.in_channels)
    # Only a tower that selects blocks by their windows reads their outputs.
    picks = "window_size" in inspect.unwrap(type(tower).forward).__code__.co_names
    read = [number for number, layer in enumerate(layers[:-1]) if picks and not layer.window_size]

    def uncut(window_partition: Callable, tokens: torch.Tensor, size: int) -> tuple[torch.Tensor, None]:
        return tokens, None

    def as_they_are(window_unpartition: Callable, tokens: torch.Tensor, *shapes: Any) -> torch.Tensor:
        return tokens

    return Anatomy(
        tower=tower,
        projection=projection,
        layers=tuple(layers),
        attentions=attentions,
        mlps=tuple((layer.mlp, layer.mlp) for layer in layers),
        last=layers[-1],
        prefix=0,
        grids=grids_of_images(projection),
        embedding=_embedding,
        needs_every_token=True,
        attention=_attention(attentions[0].num_attention_heads, layers, attentions),
        overrides=tuple(
            (layer, method, override)
            for layer in layers
            for method, override in (("window_partition", uncut), ("window_unpartition", as_they_are))
        ),
        reads=lambda arguments: read,
        example=functools.partial(form.make, tower, own_sizes(tower)[0]),
    )


def sam3(tower: nn.Module) -> Anatomy:
    """SAM 3's image encoder, whose attention rotates queries and keys by their place in a window or the grid."""
    layers = tuple(tower.layers)
    projection = tower.embeddings.patch_embeddings.projection
    attentions = tuple(layer.attention for layer in layers)
    sizes = {attention: layer.window_size for layer, attention in zip(layers, attentions, strict=True)}

    def attention(
        module: nn.Module, attend: Callable, hidden_states: torch.Tensor, rotary: Rotary, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens = hidden_states.flatten(1, -2)
        heads = [
            part(tokens).unflatten(2, (module.num_attention_heads, -1)).transpose(1, 2)
            for part in (module.q_proj, module.k_proj, module.v_proj)
        ]
        product = _product(module, sizes[module], module.scaling, (module.k_proj, module.v_proj), rotary)
        attended, weights = attend(*heads, None, product=product, scaling=module.scaling)
        return module.o_proj(attended.flatten(2)).reshape(hidden_states.shape), weights

    return Anatomy(
        tower=tower,
        projection=projection,
        layers=layers,
        attentions=attentions,
        mlps=tuple((layer.mlp, layer.mlp) for layer in layers),
        last=layers[-1],
        prefix=0,
        grids=grids_of_images(projection),
        embedding=_embedding,
        needs_every_token=True,
        attention=attention,
        overrides=tuple((layer, "forward", functools.partial(_block_of_sam3, layer)) for layer in layers),
    )


def _block_of_sam3(layer: nn.Module, forward: Callable, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """SAM 3's block for tokens [S, rows, columns, D] or [1, M, D]."""
    rotary = layer.rotary_emb(tokens, layer.position_ids)
    tokens = tokens + layer.attention(layer.layer_norm1(tokens), rotary, **kwargs)[0]
    return tokens + layer.dropout(layer.mlp(layer.layer_norm2(tokens)))


def _embedding(output: Any) -> torch.Tensor:
    return mean_of_last([output.last_hidden_state])


def vitdet(tower: nn.Module) -> Anatomy:
    """ViTDet, as a model or a backbone. Its blocks take channels first, and channels last while the patched tower runs.

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
        embedding=_embedding,
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
    """Maps with channels first, also inside tuples; packed tokens [1, M, D] unchanged."""
    if isinstance(value, tuple):
        return tuple(_channels_first(each) for each in value)
    return value.permute(0, 3, 1, 2) if isinstance(value, torch.Tensor) and value.ndim == 4 else value


def _block(layer: nn.Module, forward: Callable, tokens: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, None]:
    """ViTDet's block for tokens [S, rows, columns, D] or [1, M, D]; it has no use for a head mask that is None."""
    tokens = tokens + layer.drop_path(layer.attention(layer.norm1(tokens))[0])
    return tokens + layer.drop_path(layer.mlp(layer.norm2(tokens))), None


def _attention(heads: int, layers: Sequence[nn.Module], attentions: tuple[nn.Module, ...]) -> Callable:
    """`Anatomy.attention` for tokens [S, rows, columns, D] or [1, M, D]; a block of window_size 0 attends globally."""
    sizes = {module: layer.window_size for layer, module in zip(layers, attentions, strict=True)}

    def attention(
        module: nn.Module, attend: Callable, hidden_states: torch.Tensor, output_attentions: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        projected = module.qkv(hidden_states).flatten(1, -2).unflatten(2, (3, heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # [S, heads, T, head_dim] each
        product = _product(module, sizes[module], module.scale, (module.qkv,))
        attended, weights = attend(query, key, value, None, product=product, scaling=module.scale)
        return module.proj(attended.flatten(2)).reshape(hidden_states.shape), weights

    return attention


def _product(
    module: nn.Module, size: int, scale: float, projections: tuple[nn.Module, ...], rotary: Rotary | None = None
) -> Callable:
    """`product` of `attend`, within windows of size x size, or over the grid if that is 0.

    Args:
        projections: what turns tokens into keys and values, which come last.
        rotary: rotations of queries and keys at each position of a window, or of the grid.
    """
    if size:
        return functools.partial(_in_windows, module, size, scale, projections, rotary)
    return functools.partial(_everywhere, module, scale, rotary)


def _everywhere(
    module: nn.Module,
    scale: float,
    rotary: Rotary | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor | None,
    key_rows: torch.Tensor | None,
    grid: Grid,
) -> torch.Tensor:
    """From every query to every key."""
    at = torch.arange(query.shape[2], device=query.device) if rows is None else rows.long()
    bias = _position_bias(module, query, at[None] // grid[1], at[None] % grid[1], grid)
    if key_rows is not None:
        bias = bias[..., key_rows]
    query, key = _turned(query, rotary, rows), _turned(key, rotary, key_rows)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale).transpose(1, 2)


def _in_windows(
    module: nn.Module,
    size: int,
    scale: float,
    projections: tuple[nn.Module, ...],
    rotary: Rotary | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor | None,
    key_rows: torch.Tensor | None,
    grid: Grid,
) -> torch.Tensor:
    """From every query to the keys in its window of size x size, and to the padding there."""
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
    row, column = row[slots] % size, column[slots] % size
    bias = _position_bias(module, queries, row, column, (size, size))
    if key_rows is not None:
        place = torch.full((height * width,), -1, device=device)
        place[key_rows.long()] = torch.arange(key_rows.numel(), device=device)
        index = place[index]
        bias = bias.masked_fill(((index < 0) & ~outside)[:, None, None], -torch.inf)
        index = index.clamp_min(0)
    of_windows = []
    for heads, padding in zip((key, value), _padding(projections, key), strict=True):
        of_window = heads[0].transpose(0, 1)[index]  # [W, size * size, heads, head_dim]
        of_window[outside] = padding
        of_windows.append(of_window.transpose(1, 2))
    queries, keys = _turned(queries, rotary, row * size + column), _turned(of_windows[0], rotary)
    attended = F.scaled_dot_product_attention(queries, keys, of_windows[1], attn_mask=bias, scale=scale).transpose(1, 2)
    result = attended.new_empty(1, at.numel(), *attended.shape[2:])
    result[0, order] = attended[torch.arange(slots.shape[1], device=device) < counts[:, None]]
    return result


def _turned(heads: torch.Tensor, rotary: Rotary | None, places: torch.Tensor | None = None) -> torch.Tensor:
    """Queries or keys [W, heads, M, head_dim], rotated for their places, [M] or [W, M]; None: all, in order."""
    if rotary is None:
        return heads
    cos, sin = (each if places is None else each[0, places.long()] for each in rotary)
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    wide = heads.float()
    pairs = wide.unflatten(3, (-1, 2))
    across = torch.stack((-pairs[..., 1], pairs[..., 0]), 4).flatten(3)
    return (wide * cos + across * sin).to(heads.dtype)


def _padding(projections: tuple[nn.Module, ...], key: torch.Tensor) -> torch.Tensor:
    """The key and value that `projections` give for a zero token, [2, heads, head_dim]."""
    _, heads, _, head_dim = key.shape
    of_zero = torch.cat([_of_zero(projection, heads * head_dim, key) for projection in projections])
    return of_zero.to(key.dtype).view(-1, heads, head_dim)[-2:]


def _of_zero(linear: nn.Module, width: int, like: torch.Tensor) -> torch.Tensor:
    """What a linear layer gives for a zero token [width], [out]."""
    projected = linear.bias
    is_bias = isinstance(linear, nn.Linear) and not linear._forward_hooks and not linear._forward_pre_hooks
    if projected is None and is_bias:
        return like.new_zeros(linear.out_features)
    zero = like.new_zeros(1, width, dtype=like.dtype if projected is None else projected.dtype)
    return projected if is_bias and is_ordinary(projected, zero) else linear(zero)[0]


def _position_bias(
    module: nn.Module, query: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, size: Grid
) -> torch.Tensor:
    """What relative positions, decomposed into rows and columns, add to the scores.

    Args:
        query: [W, heads, M, head_dim], at `rows` and `columns` [W, M] of a window.
        size: rows and columns of a window; tables for another size are interpolated.

    Returns:
        [W, heads, M, positions of a window], or zeros that broadcast to it if the model has no such tables.
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

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .anatomy import Anatomy, Grid, cos_and_sin


def qwen3_vl(tower: nn.Module) -> Anatomy:
    """Qwen3-VL, dense or with experts, vision side. An image is a frame, and so is each step in time of a video.

    The images of a pass lie end to end in the output, which does not say where one ends: its embedding is the mean of
    all merged tokens, [1, D], a frame's where there is one image in a pass.
    """
    merge = tower.spatial_merge_size

    def order(arguments: dict[str, Any]) -> list[torch.Tensor]:
        device = arguments["hidden_states"].device
        return [_merge_order(grid, merge, device).flatten() for grid in _grids(merge, arguments)]

    return Anatomy(
        **_parts(tower),
        projection=tower.patch_embed,
        attention=_attention,
        order=order,
        reads=lambda arguments: tower.deepstack_visual_indexes,
    )


def qwen2_5_vl(tower: nn.Module) -> Anatomy:
    """Qwen2.5-VL, vision side; as Qwen3-VL, but most blocks attend within windows, and tokens lie window after window.

    The patch projection lies in another order. Nothing is added to it, so that the gate reads it where the first block
    does.
    """
    merge = tower.spatial_merge_size
    side = tower.window_size // merge // tower.patch_size  # of a window, in merged tokens
    windowed = {block.attn for layer, block in enumerate(tower.blocks) if layer not in tower.fullatt_block_indexes}

    def order(arguments: dict[str, Any]) -> list[torch.Tensor]:
        device = arguments["hidden_states"].device
        return [
            _merge_order(grid, merge, device)[_windows(grid, merge, side, device)[0]].flatten()
            for grid in _grids(merge, arguments)
        ]

    def product(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: torch.Tensor | None,
        key_rows: torch.Tensor | None,
        grid: Grid,
    ) -> torch.Tensor:
        starts = _windows(grid, merge, side, query.device)[1]
        own, others = (
            itertools.pairwise((starts if among is None else torch.searchsorted(among, starts)).tolist())
            for among in (rows, key_rows)
        )
        parts = [
            F.scaled_dot_product_attention(query[:, :, start:end], key[:, :, first:last], value[:, :, first:last])
            for (start, end), (first, last) in zip(own, others, strict=True)
            if start < end
        ]
        return torch.cat(parts, 2).transpose(1, 2)

    def attention(module: nn.Module, attend: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _attention(module, attend, *args, product=product if module in windowed else None, **kwargs)

    return Anatomy(**_parts(tower), projection=None, attention=attention, order=order)


def _parts(tower: nn.Module) -> dict[str, Any]:
    layers = tuple(tower.blocks)
    return {
        "tower": tower,
        "layers": layers,
        "attentions": tuple(layer.attn for layer in layers),
        "mlps": tuple((layer.mlp, layer.mlp) for layer in layers),
        "last": layers[-1],
        "prefix": 0,
        "grids": functools.partial(_grids, tower.spatial_merge_size),
        "times": _times,
        "part": ({"hidden_states", "grid_thw"}, functools.partial(_part, tower.spatial_merge_size)),
        "embedding": _embedding,
        "needs_every_token": True,
        "positions": (("position_embeddings", cos_and_sin),),
    }


def _grids(merge: int, arguments: dict[str, Any]) -> list[Grid]:
    grids = arguments["grid_thw"].tolist()
    for times, rows, columns in grids:
        if rows % merge or columns % merge:
            raise ValueError(
                f"grid_thw holds {[times, rows, columns]}; accepted are rows and columns that are multiples of {merge}"
            )
    return [(rows, columns) for times, rows, columns in grids for _ in range(times)]


def _times(arguments: dict[str, Any]) -> list[int]:
    return arguments["grid_thw"][:, 0].tolist()


def _part(merge: int, arguments: dict[str, Any], frames: slice) -> dict[str, Any]:
    grids, grid_thw = _grids(merge, arguments), arguments["grid_thw"]
    ends = [0, *itertools.accumulate(rows * columns for rows, columns in grids)]
    owners = grid_thw.new_tensor(range(len(grid_thw))).repeat_interleave(grid_thw[:, 0])[frames]
    own, times = owners.unique_consecutive(return_counts=True)
    return {
        "hidden_states": arguments["hidden_states"][ends[frames.start] : ends[frames.stop]],
        "grid_thw": torch.cat((times[:, None], grid_thw[own, 1:]), 1),
    }


def _embedding(output: Any) -> torch.Tensor:
    # Up to transformers 4.57 the merged tokens by themselves, or before those of the deepstack.
    if isinstance(output, tuple):
        output = output[0]
    merged = output if isinstance(output, torch.Tensor) else output.pooler_output
    return merged.mean(0, keepdim=True)


@functools.lru_cache
def _merge_order(grid: Grid, merge: int, device: torch.device) -> torch.Tensor:
    """The row-major patches of each merged token, [merged tokens, merge * merge]."""
    rows, columns = grid
    patches = torch.arange(rows * columns, device=device)
    patches = patches.view(rows // merge, merge, columns // merge, merge)
    return patches.transpose(1, 2).reshape(-1, merge * merge)


@functools.lru_cache
def _windows(grid: Grid, merge: int, side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged tokens window after window, and the patches in front of each window and after the last one, int32.

    Windows are side x side merged tokens, fewer at the right and the lower edge.
    """
    rows, columns = (torch.arange(length // merge, device=device) // side for length in grid)
    window = (rows[:, None] * len(columns) + columns).flatten()
    sizes = window.unique(return_counts=True)[1] * merge * merge
    return window.argsort(stable=True), F.pad(sizes.cumsum(0), (1, 0)).int()


def _attention(
    module: nn.Module,
    attend: Callable,
    tokens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    product: Callable | None = None,
    **_: Any,
) -> torch.Tensor:
    query, key, value = module.qkv(tokens).view(-1, 3, module.num_heads, module.head_dim).unbind(1)
    cos, sin = (table.float()[:, None] for table in position_embeddings)  # [rows, 1, head_dim]
    turned = (_turned(query, cos, sin), _turned(key, cos, sin), value)
    heads = (each.transpose(0, 1)[None] for each in turned)  # [1, heads, rows, head_dim]
    outputs, _ = attend(*heads, None, product=product, scaling=module.scaling)
    return module.proj(outputs.reshape(tokens.shape))


def _turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """In float32, as the model does, even where heads are float64."""
    wide = heads.float()
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-second, first), -1) * sin).to(heads.dtype)

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .anatomy import Anatomy, Grid, pack_rows
from .ragged import attend_in_windows, mean_of_merged, token_order


def vllm_qwen(tower: nn.Module) -> Anatomy:
    """The towers of Qwen2.5-VL and Qwen3-VL as vLLM builds them, with parallel layers and their own attention.

    An image is a frame, and so is each time step of a video. The output does not say where one ends; the embedding is
    the mean of all merged tokens, [1, D].
    """
    merge, layers = tower.spatial_merge_size, tuple(tower.blocks)
    attentions = tuple(layer.attn.attn for layer in layers)
    side, products = None, {}
    if hasattr(tower, "fullatt_block_indexes"):
        side = tower.window_size // merge // tower.patch_size
        in_windows = functools.partial(attend_in_windows, merge, side)
        everywhere = tower.fullatt_block_indexes
        products = {each: in_windows for number, each in enumerate(attentions) if number not in everywhere}
    deepstack = tuple(getattr(tower, "deepstack_visual_indexes", ()))

    def sizes(arguments: dict[str, Any]) -> list[list[int]]:
        given = arguments["grid_thw"]
        return given.tolist() if isinstance(given, torch.Tensor) else given

    def grids(arguments: dict[str, Any]) -> list[Grid]:
        if arguments.get("encoder_metadata") is not None:
            raise ValueError("encoder_metadata is given; accepted is None, as it describes whole frames")
        return [(height, width) for times, height, width in sizes(arguments) for _ in range(times)]

    def order(arguments: dict[str, Any]) -> list[torch.Tensor]:
        return [token_order(grid, merge, side, arguments["x"].device) for grid in grids(arguments)]

    def part(arguments: dict[str, Any], frames: slice) -> dict[str, Any]:
        counts, given = [math.prod(grid) for grid in grids(arguments)], sizes(arguments)
        owners = [number for number, (times, _, _) in enumerate(given) for _ in range(times)][frames]
        own = [[len(list(steps)), *given[owner][1:]] for owner, steps in itertools.groupby(owners)]
        return {"x": arguments["x"].narrow(0, sum(counts[: frames.start]), sum(counts[frames])), "grid_thw": own}

    return Anatomy(
        tower=tower,
        projection=tower.patch_embed if side is None else None,  # windows reorder its rows
        layers=layers,
        attentions=attentions,
        mlps=tuple((layer.mlp, layer.mlp) for layer in layers),
        last=layers[-1],
        prefix=0,
        grids=grids,
        embedding=mean_of_merged,
        needs_every_token=True,
        positions=tuple(
            (name, functools.partial(pack_rows, (0,))) for name in ("rotary_pos_emb_cos", "rotary_pos_emb_sin")
        ),
        attention=functools.partial(_attention, products),
        order=order,
        times=lambda arguments: [times for times, _, _ in sizes(arguments)],
        part=({"x", "grid_thw"}, part),
        run_block=_run_block,
        reads=lambda arguments: deepstack,
    )


def _attention(
    products: dict[nn.Module, Callable],
    module: nn.Module,
    attend: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    **of_segments: Any,
) -> torch.Tensor:
    """`MMEncoderAttention` of heads [1, tokens, heads, head_dim]; its segments are those of whole frames."""
    heads = (each.transpose(1, 2) for each in (query, key, value))
    return attend(*heads, None, products.get(module), scaling=module.scale)[0]


def _run_block(forward: Callable, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A block that takes [tokens, 1, D], called with packed tokens [1, M, D] as well."""
    if tokens.shape[1] == 1:
        return forward(tokens, *args, **kwargs)
    return forward(tokens.transpose(0, 1), *args, **kwargs).transpose(0, 1)

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .anatomy import Anatomy, Grid, convolution_of, cos_and_sin, grids_of_images


def eomt(tower: nn.Module) -> Anatomy:
    """EoMT, on DINOv2 or DINOv3, up to the block where the queries join.

    From there on queries and patches change each other, through masks made from all patches. Those last three or four
    blocks run on all tokens.

    Raises:
        ValueError: a tower whose queries join before the first block.
    """
    blocks, queries = tower.config.num_blocks, tower.config.num_queries
    layers = tuple(tower.layers)[: len(tower.layers) - blocks]
    if not layers:
        raise ValueError(
            f"num_blocks is {blocks}; accepted is less than {len(tower.layers)}, as blocks with queries take all tokens"
        )
    prefix = 1 + tower.config.num_register_tokens
    projection = convolution_of(tower.embeddings.patch_embeddings)
    rotary = getattr(tower, "rope_embeddings", None)

    def reads(arguments: dict[str, Any]) -> Iterable[int]:
        return range(len(layers)) if arguments.get("output_hidden_states") else ()  # counted among all blocks

    return Anatomy(
        tower=tower,
        projection=projection,
        layers=layers,
        attentions=tuple(layer.attention for layer in layers),
        mlps=tuple((layer.mlp, layer.mlp) for layer in layers),
        last=layers[-1],
        prefix=prefix,
        grids=grids_of_images(projection, "mask_labels", "class_labels"),
        embedding=lambda output: output.last_hidden_state[:, queries + prefix :].mean(1),
        needs_every_token=True,
        tables=() if rotary is None else ((rotary, "forward"),),
        positions=() if rotary is None else (("position_embeddings", cos_and_sin),),
        reads=reads,
    )


def videomt(tower: nn.Module) -> Anatomy:
    """VidEoMT: an EoMT that passes the queries of each frame on to the next one of its clip [T, 3, H, W]."""
    anatomy = eomt(tower)

    def grids(arguments: dict[str, Any]) -> list[Grid]:
        name, clips = next(iter(arguments.items()))
        if clips.ndim != 5:
            raise ValueError(f"{name} has shape {list(clips.shape)}; accepted is [S, T, 3, H, W]")
        return anatomy.grids(arguments | {name: clips.flatten(0, 1)})

    def times(arguments: dict[str, torch.Tensor]) -> list[int]:
        clips = next(iter(arguments.values()))
        return [clips.shape[1]] * len(clips)

    return dataclasses.replace(anatomy, grids=grids, times=times)

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .anatomy import Anatomy, Grid, convolution_of, refuse
from .vit import vit


def tubelets(tower: nn.Module) -> Anatomy:
    """VideoMAE's encoder with nothing masked, and ViViT. A clip [T, 3, H, W] takes the place of a frame.

    Tokens are tubelets, compared with those at the same place and time index in the stream's previous clip. In the grid
    the time steps of a clip are stacked, [times * rows, columns], so the last row of one step and the first row of the
    next count as neighbours.
    """
    anatomy = vit(tower)
    grids_of_clips = _grids_of_clips(anatomy.projection)

    def grids(arguments: dict[str, Any]) -> list[Grid]:
        refuse(arguments, "attention_mask", "head_mask")
        masked = arguments.get("bool_masked_pos")
        if masked is not None and masked.any():
            raise ValueError(
                f"bool_masked_pos masks {int(masked.sum())} tubelets; accepted is None or one that masks none, as a "
                "sparse clip has no place for it"
            )
        return grids_of_clips(arguments)

    last = anatomy.layers[-1] if anatomy.last is None else anatomy.last  # VideoMAE's classifier norms the mean instead
    return dataclasses.replace(anatomy, grids=grids, last=last, tables=())


def vjepa2(tower: nn.Module) -> Anatomy:
    """V-JEPA 2's encoder, with clips as in `tubelets`. All that reads its tokens, the predictor too, reads all."""
    layers = tuple(tower.layer)
    projection = tower.embeddings.patch_embeddings.proj
    grids_of_clips = _grids_of_clips(projection)

    def grids(arguments: dict[str, Any]) -> list[Grid]:
        if not isinstance(arguments.get("head_mask"), list):  # of None for each block, by models of transformers 4
            refuse(arguments, "head_mask")
        return grids_of_clips(arguments)

    return Anatomy(
        tower=tower,
        projection=projection,
        layers=layers,
        attentions=tuple(layer.attention for layer in layers),
        mlps=tuple((layer.mlp.fc1, layer.mlp.fc2) for layer in layers),
        last=tower.layernorm,
        prefix=0,
        grids=grids,
        embedding=lambda output: output.last_hidden_state.mean(1),
        needs_every_token=True,
        positions=(("position_mask", _numbers),),
    )


def _numbers(value: None, take: Callable) -> torch.Tensor:
    """`Anatomy.positions` for blocks that derive a token's time, row and column from its index, [1, M]."""
    return take(None, 0)[None]


def _grids_of_clips(projection: nn.Module) -> Callable[[dict[str, Any]], list[Grid]]:
    """`Anatomy.grids` for towers whose first argument holds clips [S, T, C, H, W]."""
    convolution = convolution_of(projection)
    channels, (frames, height, width) = convolution.in_channels, convolution.kernel_size

    def grids(arguments: dict[str, Any]) -> list[Grid]:
        name, clips = next(iter(arguments.items()))
        if clips.ndim != 5 or clips.shape[2] != channels:
            raise ValueError(
                f"{name} has shape {list(clips.shape)}; accepted is [S, T, {channels}, H, W], one clip of each stream"
            )
        times = clips.shape[1] // frames or clips.shape[1]  # V-JEPA 2 repeats a clip that is shorter than a tubelet
        rows, columns = clips.shape[3] // height, clips.shape[4] // width
        return [(times * rows, columns)] * clips.shape[0]

    return grids

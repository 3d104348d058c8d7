import dataclasses
from typing import Any

from torch import nn

from .anatomy import Anatomy, Grid, convolution_of, refuse
from .vit import vit


def tubelets(tower: nn.Module) -> Anatomy:
    """VideoMAE's encoder with nothing masked, and ViViT: a clip [T, 3, H, W] is what a frame is to other towers.

    Its tokens are tubelets, compared with those at the same place and time index of the stream's last clip. In the grid
    the times of a clip lie one below the other, [times * rows, columns], so that the lowest row of one and the highest
    of the next pass for neighbours.
    """
    anatomy = vit(tower)
    convolution = convolution_of(anatomy.projection)
    channels, (frames, height, width) = convolution.in_channels, convolution.kernel_size

    def grids(arguments: dict[str, Any]) -> list[Grid]:
        refuse(arguments, "attention_mask", "head_mask")
        masked = arguments.get("bool_masked_pos")
        if masked is not None and masked.any():
            raise ValueError(
                f"bool_masked_pos masks {int(masked.sum())} tubelets; accepted is None or one that masks none, as a "
                "sparse clip has no place for it"
            )
        clips = arguments["pixel_values"]
        if clips.ndim != 5 or clips.shape[2] != channels:
            raise ValueError(
                f"pixel_values has shape {list(clips.shape)}; accepted is [S, T, {channels}, H, W], one clip of each "
                "stream"
            )
        times, rows, columns = clips.shape[1] // frames, clips.shape[3] // height, clips.shape[4] // width
        return [(times * rows, columns)] * clips.shape[0]

    last = anatomy.layers[-1] if anatomy.last is None else anatomy.last  # VideoMAE's classifier norms the mean instead
    return dataclasses.replace(anatomy, grids=grids, last=last, tables=())

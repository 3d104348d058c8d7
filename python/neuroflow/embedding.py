"""Embeddings of frames from any model with a vision tower that NeuroFlow knows, patched or not."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .adapters import describe
from .adapters.anatomy import interpolation

CLIP = 16  # frames of a recording in one call of a model


def encode_frames(tower: nn.Module, pixels: torch.Tensor) -> Any:
    """Run a vision tower on frames [S, 3, H, W], of a size other than its own too if it can interpolate positions.

    The frames are moved to the tower's device and dtype.
    """
    weight = next(tower.parameters())
    return tower(pixels.to(weight.device, weight.dtype), **interpolation(tower, pixels))


def frame_embeddings(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The model's embeddings [S, D] float32 of frames [S, 3, H, W]."""
    anatomy = describe(model)
    return anatomy.embedding(encode_frames(anatomy.tower, pixels)).float()


def patch_tokens(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Patch tokens [S, N, D] float32 after the last block and its norm, for frames [S, 3, H, W] of one size."""
    anatomy, found = describe(model), []
    hook = anatomy.last.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        encode_frames(anatomy.tower, pixels)
    finally:
        hook.remove()
    (tokens,) = found
    tokens = tokens[0] if isinstance(tokens, tuple) else tokens
    return tokens.reshape(len(pixels), -1, tokens.shape[-1])[:, anatomy.prefix :].float()


def in_clips(frames: Iterable[torch.Tensor], length: int = CLIP) -> Iterator[torch.Tensor]:
    """Group frames [1, 3, H, W], in order: the first alone, then clips [T, 3, H, W] of one size, up to `length` frames.

    The first is dense in any case, and tells the gate what the pooled output reads in the others.
    """
    clip: list[torch.Tensor] = []
    wanted = 1
    for frame in frames:
        if clip and (len(clip) == wanted or frame.shape != clip[0].shape):
            yield torch.cat(clip)
            clip, wanted = [], length
        clip.append(frame)
    if clip:
        yield torch.cat(clip)

"""Embeddings of frames, by any model with a vision tower that NeuroFlow knows, patched or not."""

from typing import Any

import torch
from torch import nn

from .adapters import describe
from .adapters.anatomy import interpolation


def encode_frames(tower: nn.Module, pixels: torch.Tensor) -> Any:
    """The output of a vision tower for frames [S, 3, H, W], of another size than its own too where it can take them.

    The frames are brought to the tower's device and dtype.
    """
    weight = next(tower.parameters())
    return tower(pixels.to(weight.device, weight.dtype), **interpolation(tower, pixels))


def frame_embeddings(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Frames [S, 3, H, W] -> the model's embeddings of them [S, D] float32."""
    anatomy = describe(model)
    return anatomy.embedding(encode_frames(anatomy.tower, pixels)).float()

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """The parts of one vision tower, found in a model's structure and never replaced.

    Args:
        tower: the module whose forward takes a batch of frames.
        projection: maps pixels to one vector a patch, before the positional embedding.
        layers: the blocks, in order; each maps tokens [S, T, D] to tokens [S, T, D] as its first argument and result.
        attentions: of each block, the module that calls transformers' attention interface.
        mlps: of each block, the first and the last linear of its MLP.
        norm: the module through which every token goes after the last block.
        head: an attention pooling head with a learned probe, or None.
        prefix: how many tokens before the patches are no patches (CLS, registers).
        grid: (projection's output, the tower's arguments by name) -> (rows, columns) of patches; raises ValueError for
            arguments that a sparse frame cannot honour.
        embedding: the model's output -> the frame's embedding [S, D].
    """

    tower: nn.Module
    projection: nn.Module
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    mlps: tuple[tuple[nn.Module, nn.Module], ...]
    norm: nn.Module
    head: nn.Module | None
    prefix: int
    grid: Callable[[torch.Tensor, dict[str, Any]], Grid]
    embedding: Callable[[Any], torch.Tensor]

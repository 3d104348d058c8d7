from typing import Any

import torch
from torch import nn

from .anatomy import Anatomy, Grid


def _grid(projected: torch.Tensor, arguments: dict[str, Any]) -> Grid:
    for name in ("bool_masked_pos", "attention_mask", "head_mask"):
        if arguments.get(name) is not None:
            raise ValueError(f"{name} is given; accepted is None, as a sparse frame has no place for it")
    return projected.shape[-2], projected.shape[-1]  # [S, D, rows, columns]


def vit(tower: nn.Module) -> Anatomy:
    """ViT. Up to transformers 5.8 its blocks are `encoder.layer`, with the MLP in two modules; from 5.9 `layers`."""
    if hasattr(tower, "layers"):
        layers = tuple(tower.layers)
        attentions = tuple(layer.attention for layer in layers)
        mlps = tuple((layer.mlp.fc1, layer.mlp.fc2) for layer in layers)
    else:
        layers = tuple(tower.encoder.layer)
        attentions = tuple(layer.attention.attention for layer in layers)
        mlps = tuple((layer.intermediate.dense, layer.output.dense) for layer in layers)
    return Anatomy(
        tower=tower,
        projection=tower.embeddings.patch_embeddings.projection,
        layers=layers,
        attentions=attentions,
        mlps=mlps,
        norm=tower.layernorm,
        head=None,
        prefix=1,
        grid=_grid,
        embedding=lambda output: output.last_hidden_state[:, 0],
    )

from typing import Any

import torch
from torch import nn

from .anatomy import Anatomy, Grid


def _grid(projected: torch.Tensor, arguments: dict[str, Any]) -> Grid:
    if "spatial_shapes" not in arguments:
        return projected.shape[-2], projected.shape[-1]  # [S, D, rows, columns]
    shapes = {tuple(shape) for shape in arguments["spatial_shapes"].tolist()}
    rows, columns = next(iter(shapes))
    if len(shapes) > 1 or rows * columns != projected.shape[1]:
        raise ValueError(
            f"spatial_shapes holds {sorted(shapes)} for {projected.shape[1]} patches a frame; accepted is one shape "
            "for the whole batch, without padding"
        )
    return rows, columns


def _embedding(output: Any) -> torch.Tensor:
    return output.last_hidden_state.mean(1) if output.pooler_output is None else output.pooler_output


def siglip(tower: nn.Module) -> Anatomy:
    """SigLIP and SigLIP 2, vision side."""
    layers = tuple(tower.encoder.layers)
    return Anatomy(
        tower=tower,
        projection=tower.embeddings.patch_embedding,
        layers=layers,
        attentions=tuple(layer.self_attn for layer in layers),
        mlps=tuple((layer.mlp.fc1, layer.mlp.fc2) for layer in layers),
        norm=tower.post_layernorm,
        head=getattr(tower, "head", None),
        prefix=0,
        grid=_grid,
        embedding=_embedding,
    )

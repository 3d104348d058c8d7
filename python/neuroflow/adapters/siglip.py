from typing import Any

import torch
from torch import nn

from .anatomy import Anatomy, Grid, grids_of_images


def _embedding(output: Any) -> torch.Tensor:
    return output.last_hidden_state.mean(1) if output.pooler_output is None else output.pooler_output


def siglip(tower: nn.Module) -> Anatomy:
    """The vision towers of SigLIP and of SigLIP 2, with fixed resolution or NaFlex."""
    projection = tower.embeddings.patch_embedding

    def grids(arguments: dict[str, Any]) -> list[Grid]:
        if arguments.get("spatial_shapes") is not None:
            return [(rows, columns) for rows, columns in arguments["spatial_shapes"].tolist()]
        return grids_of_images(projection)(arguments)

    layers = tuple(tower.encoder.layers)
    head = getattr(tower, "head", None)
    interpolates = hasattr(tower.embeddings, "interpolate_pos_encoding")
    return Anatomy(
        tower=tower,
        projection=projection,
        layers=layers,
        attentions=tuple(layer.self_attn for layer in layers),
        mlps=tuple((layer.mlp.fc1, layer.mlp.fc2) for layer in layers),
        last=tower.post_layernorm,
        prefix=0,
        grids=grids,
        embedding=_embedding,
        pool=None if head is None else (head, "forward"),
        tables=((tower.embeddings, "interpolate_pos_encoding"),) if interpolates else (),
    )

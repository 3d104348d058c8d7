from typing import Any

import torch
from torch import nn

from .anatomy import Anatomy, grids_of_images


def _embedding(output: Any) -> torch.Tensor:
    return output.last_hidden_state.mean(1) if output.pooler_output is None else output.pooler_output


def aimv2(tower: nn.Module) -> Anatomy:
    """AIMv2's vision tower, with or without its pooling head."""
    layers = tuple(tower.encoder.layers)
    projection = tower.embeddings.patch_embed

    return Anatomy(
        tower=tower,
        projection=projection,
        layers=layers,
        attentions=tuple(layer.attention for layer in layers),
        mlps=tuple((layer.ffn, layer.ffn) for layer in layers),
        last=tower.rms_norm,
        prefix=0,
        grids=grids_of_images(projection),
        embedding=_embedding,
        pool=(tower.head, "forward") if tower.use_head else None,
    )

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .anatomy import Anatomy, Grid, grids_of_images, refuse


def vit(tower: nn.Module) -> Anatomy:
    """ViT, DeiT with its distillation token, and I-JEPA, which has no CLS.

    Up to transformers 5.8 (some up to 5.16) the blocks are `encoder.layer`, with the MLP in two modules; later
    `layers`.
    """
    if hasattr(tower, "layers"):
        layers = tuple(tower.layers)
        attentions = tuple(layer.attention for layer in layers)
        mlps = tuple((layer.mlp.fc1, layer.mlp.fc2) for layer in layers)
    else:
        layers = tuple(tower.encoder.layer)
        attentions = tuple(layer.attention.attention for layer in layers)
        mlps = tuple((layer.intermediate.dense, layer.output.dense) for layer in layers)
    projection = tower.embeddings.patch_embeddings.projection
    prefix = sum(hasattr(tower.embeddings, token) for token in ("cls_token", "distillation_token"))

    def embedding(output: Any) -> torch.Tensor:
        return output.last_hidden_state[:, 0] if prefix else output.last_hidden_state.mean(1)

    return Anatomy(
        tower=tower,
        projection=projection,
        layers=layers,
        attentions=attentions,
        mlps=mlps,
        last=tower.layernorm,
        prefix=prefix,
        grids=grids_of_images(projection, "bool_masked_pos", "attention_mask", "head_mask"),
        embedding=embedding,
        tables=((tower.embeddings, "interpolate_pos_encoding"),),
    )


def vit_mae(tower: nn.Module) -> Anatomy:
    """The encoder of ViT-MAE with nothing masked; patches keep their order, which it would shuffle otherwise."""
    anatomy = vit(tower)

    def grids(arguments: dict[str, Any]) -> list[Grid]:
        if tower.config.mask_ratio:
            raise ValueError(
                f"mask_ratio is {tower.config.mask_ratio}; accepted is 0, as a video has no masked patches"
            )
        refuse(arguments, "noise")
        return anatomy.grids(arguments)

    def in_order(
        random_masking: Callable, tokens: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        order = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
        return tokens, torch.zeros(tokens.shape[:2], device=tokens.device), order

    overrides = ((tower.embeddings, "random_masking", in_order),)
    return dataclasses.replace(anatomy, grids=grids, overrides=overrides)

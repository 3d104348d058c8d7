from torch import nn

from .anatomy import Anatomy, cos_and_sin, grids_of_images, with_stages


def dinov2(tower: nn.Module) -> Anatomy:
    """DINOv2, with or without registers, as a model or a backbone.

    Its attention was nested one module deeper before transformers 5.23.
    """
    layers = tuple(tower.encoder.layer)
    projection = tower.embeddings.patch_embeddings.projection

    anatomy = Anatomy(
        tower=tower,
        projection=projection,
        layers=layers,
        attentions=tuple(getattr(layer.attention, "attention", layer.attention) for layer in layers),
        mlps=tuple((layer.mlp, layer.mlp) for layer in layers),
        last=tower.layernorm,
        prefix=1 + getattr(tower.config, "num_register_tokens", 0),
        grids=grids_of_images(projection, "bool_masked_pos", "attention_mask", "head_mask"),
        embedding=lambda output: output.last_hidden_state[:, 0],
        tables=((tower.embeddings, "interpolate_pos_encoding"),),
    )
    return with_stages(anatomy)


def dinov3(tower: nn.Module) -> Anatomy:
    """DINOv3 as a ViT, as a model or a backbone.

    Its blocks are `layer` up to transformers 5.5 and `model.layer` later.
    """
    layers = tuple((tower.model if hasattr(tower, "model") else tower).layer)
    projection = tower.embeddings.patch_embeddings

    anatomy = Anatomy(
        tower=tower,
        projection=projection,
        layers=layers,
        attentions=tuple(layer.attention for layer in layers),
        mlps=tuple((layer.mlp, layer.mlp) for layer in layers),
        last=tower.norm,
        prefix=1 + tower.config.num_register_tokens,
        grids=grids_of_images(projection, "bool_masked_pos"),
        embedding=lambda output: output.last_hidden_state[:, 0],
        tables=((tower.rope_embeddings, "forward"),),
        positions=(("position_embeddings", cos_and_sin),),
    )
    return with_stages(anatomy)

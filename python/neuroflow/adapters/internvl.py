from torch import nn

from .anatomy import Anatomy, grids_of_images


def internvl(tower: nn.Module) -> Anatomy:
    """InternVL's vision tower; the language model reads all of its tokens."""
    layers = tuple(tower.encoder.layer)
    projection = tower.embeddings.patch_embeddings.projection

    return Anatomy(
        tower=tower,
        projection=projection,
        layers=layers,
        attentions=tuple(layer.attention for layer in layers),
        mlps=tuple((layer.mlp, layer.mlp) for layer in layers),
        last=tower.layernorm,
        prefix=1,
        grids=grids_of_images(projection, "bool_masked_pos"),
        embedding=lambda output: output.last_hidden_state[:, 1:].mean(1),
        tables=((tower.embeddings, "interpolate_pos_encoding"),),
    )

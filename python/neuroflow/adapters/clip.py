from torch import nn

from .anatomy import Anatomy, grids_of_images


def clip(tower: nn.Module) -> Anatomy:
    """CLIP's vision tower. Its last norm sees only the pooled CLS, so all tokens are restored after the last block."""
    layers = tuple(tower.encoder.layers)
    projection = tower.embeddings.patch_embedding

    return Anatomy(
        tower=tower,
        projection=projection,
        layers=layers,
        attentions=tuple(layer.self_attn for layer in layers),
        mlps=tuple((layer.mlp, layer.mlp) for layer in layers),
        last=layers[-1],
        prefix=1,
        grids=grids_of_images(projection),
        embedding=lambda output: output.image_embeds if "image_embeds" in output else output.pooler_output,
        tables=((tower.embeddings, "interpolate_pos_encoding"),),
    )

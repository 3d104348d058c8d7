"""What the engine needs to know of a model: where its parts are. One file for each family of models."""

from collections.abc import Callable

from torch import nn

from .anatomy import Anatomy, Grid
from .siglip import siglip
from .vit import vit

# By the class of the module that turns pixels into tokens: it kept its name where the modules around it moved between
# releases of transformers.
ADAPTERS: dict[str, Callable[[nn.Module], Anatomy]] = {
    "SiglipVisionEmbeddings": siglip,
    "Siglip2VisionEmbeddings": siglip,
    "ViTEmbeddings": vit,
}


def describe(model: nn.Module) -> Anatomy:
    """The anatomy of `model`'s vision tower, wherever in the model it lies.

    Raises:
        TypeError: `model` is no module, or has no vision tower of a supported family.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r} ({type(model).__name__}); accepted is a torch.nn.Module")
    for module in model.modules():
        adapter = ADAPTERS.get(type(getattr(module, "embeddings", None)).__name__)
        if adapter is not None:
            return adapter(module)
    raise TypeError(
        f"{type(model).__name__} has no vision tower that NeuroFlow knows; supported are SigLIP, SigLIP 2 and ViT of "
        "transformers"
    )


__all__ = ["ADAPTERS", "Anatomy", "Grid", "describe"]

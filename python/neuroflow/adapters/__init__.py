"""What the engine needs to know about a model: where its parts are. One file for each kind of tower."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from .aimv2 import aimv2
from .anatomy import Anatomy, Grid, is_in
from .clip import clip
from .dino import dinov2, dinov3
from .eomt import eomt, videomt
from .general import general, towers_by_structure
from .internvl import internvl
from .missing import missing_parts
from .ragged import is_ragged, ragged
from .siglip import siglip
from .timm import vision_transformer
from .tracing import in_evaluation
from .tubelets import tubelets, vjepa2
from .vit import vit, vit_mae
from .vllm_qwen import vllm_qwen
from .windowed import has_windows, sam, sam3, vitdet

Adapter = Callable[[nn.Module], Anatomy]
ENGINE = "_neuroflow_engine"  # the attribute of a patched tower that holds its engine


class Family(NamedTuple):
    """Models that share one adapter.

    Args:
        name: name of the family.
        library: package that defines its towers, such as "transformers".
        found_by: class names in that package, of a tower or of its `embeddings` (whose names stayed the same when
            transformers renamed the modules around them); or a function that recognises towers by their structure.
        adapter: function from a tower to its `Anatomy`.
        architectures: letters of the architectures that the family supports.

    Example:
        >>> family = neuroflow.supported_models()[0]
        >>> family.name, family.library, family.architectures
        ('SigLIP', 'transformers', 'ABCDE')
    """

    name: str
    library: str
    found_by: tuple[str, ...] | Callable[[nn.Module], bool]
    adapter: Adapter
    architectures: str = "ABCDE"

    def knows(self, module: nn.Module) -> bool:
        """Whether `module` is a tower of this family.

        Args:
            module: any module.

        Returns:
            True if the family's adapter describes it.

        Example:
            >>> neuroflow.supported_models()[0].knows(model)
            True
        """
        if callable(self.found_by):
            return self.found_by(module)
        for kind in (type(module), type(module._modules.get("embeddings"))):  # its own, not that of what it wraps
            if kind.__name__ in self.found_by and kind.__module__.partition(".")[0] == self.library:
                return True
        return False


FAMILIES = (
    Family("SigLIP", "transformers", ("SiglipVisionEmbeddings",), siglip),
    Family("SigLIP 2, fixed and NaFlex", "transformers", ("Siglip2VisionEmbeddings",), siglip),
    Family("CLIP", "transformers", ("CLIPVisionEmbeddings",), clip),
    Family("ViT", "transformers", ("ViTEmbeddings",), vit),
    Family("DeiT", "transformers", ("DeiTEmbeddings",), vit),
    Family("I-JEPA", "transformers", ("IJepaEmbeddings",), vit),
    Family("ViT-MAE encoder", "transformers", ("ViTMAEEmbeddings",), vit_mae),
    Family("DINOv2", "transformers", ("Dinov2Embeddings", "Dinov2WithRegistersEmbeddings"), dinov2),
    Family("DINOv3 ViT", "transformers", ("DINOv3ViTEmbeddings",), dinov3),
    Family("AIMv2", "transformers", ("Aimv2VisionEmbeddings",), aimv2),
    Family("InternVL", "transformers", ("InternVLVisionEmbeddings",), internvl),
    Family("SAM image encoder", "transformers", ("SamVisionEncoder",), sam, "ACDE"),
    Family("Any copy of SAM's image encoder", "transformers", has_windows, sam, "ACDE"),
    Family("SAM 3 image encoder", "transformers", ("Sam3ViTModel",), sam3, "ACDE"),
    Family("ViTDet", "transformers", ("VitDetEmbeddings",), vitdet, "ACDE"),
    Family("Qwen2.5-VL", "transformers", ("Qwen2_5_VisionTransformerPretrainedModel",), ragged, "ACDE"),
    Family("Qwen3-VL", "transformers", ("Qwen3VLVisionModel", "Qwen3VLMoeVisionModel"), ragged, "ACDE"),
    Family("VideoMAE", "transformers", ("VideoMAEEmbeddings",), tubelets),
    Family("ViViT", "transformers", ("VivitEmbeddings",), tubelets),
    Family("V-JEPA 2", "transformers", ("VJEPA2Embeddings",), vjepa2, "ACDE"),
    Family("EoMT, on DINOv2 and DINOv3", "transformers", ("EomtEmbeddings", "EomtDinov3Embeddings"), eomt, "ACDE"),
    Family("VidEoMT", "transformers", ("VideomtEmbeddings",), videomt, "ACDE"),
    Family("VisionTransformer", "timm", ("VisionTransformer", "VisionTransformerDistilled"), vision_transformer),
    Family("Eva", "timm", ("Eva",), vision_transformer),
    Family("Qwen2.5-VL in vLLM", "vllm", ("Qwen2_5_VisionTransformer",), vllm_qwen, "ACDE"),
    Family("Qwen3-VL in vLLM", "vllm", ("Qwen3_VisionTransformer",), vllm_qwen, "ACDE"),
    Family("Any tower of images end to end", "transformers", is_ragged, ragged, "ACDE"),
)
BY_STRUCTURE = Family("Any plain ViT", "torch", towers_by_structure, general, "ACDE")
_registered: dict[type[nn.Module], Family] = {}


def supported_models() -> tuple[Family, ...]:
    """List the model families that `enable_cache` takes.

    Returns:
        the families known by name, then the one found by structure, then those added by `register_adapter`.

    Example:
        >>> "DINOv2" in [family.name for family in neuroflow.supported_models()]
        True
    """
    return (*FAMILIES, BY_STRUCTURE, *_registered.values())


def register_adapter(tower: type[nn.Module], adapter: Adapter) -> None:
    """Teach `enable_cache` a tower of your own.

    Args:
        tower: class of the module that takes frames. It takes precedence over what NeuroFlow knows about the class.
        adapter: function from such a module to the `neuroflow.Anatomy` that says where its parts are.

    Raises:
        TypeError: `tower` is not a subclass of `torch.nn.Module`.

    Example:
        >>> class MyTower(type(model)):
        ...     pass
        >>> neuroflow.register_adapter(MyTower, neuroflow.adapters.general)
        >>> neuroflow.supported_models()[-1].name
        'MyTower'
    """
    if not (isinstance(tower, type) and issubclass(tower, nn.Module)):
        given = tower.__name__ if isinstance(tower, type) else f"a {type(tower).__name__}"
        raise TypeError(f"tower is {given}; accepted is a subclass of torch.nn.Module")
    _registered[tower] = Family(tower.__name__, tower.__module__.partition(".")[0], (tower.__name__,), adapter)


def towers(model: nn.Module) -> dict[str, tuple[nn.Module, Family]]:
    """Find the vision towers in `model` that NeuroFlow knows, leaving out towers inside others.

    If there are none, modules that look like a vision tower by their structure.

    Args:
        model: any module.

    Returns:
        name in the model ("" is the model itself) -> (tower, family).

    Raises:
        TypeError: `model` is not a module, or has no such tower.

    Example:
        >>> from neuroflow.adapters import towers
        >>> list(towers(model))
        ['']
    """
    if not isinstance(model, nn.Module):
        inner = ", as its attribute model is" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise TypeError(f"model is a {type(model).__name__}; accepted is a torch.nn.Module{inner}")
    found: dict[str, tuple[nn.Module, Family]] = {}
    for name, module in model.named_modules():
        if any(is_in(name, outer) for outer in found):
            continue
        family = _registered.get(type(module)) or next((family for family in FAMILIES if family.knows(module)), None)
        if family is not None:
            found[name] = module, family
    found = found or {name: (module, BY_STRUCTURE) for name, module in towers_by_structure(model).items()}
    if found:
        return found
    names = ", ".join(family.name for family in (*FAMILIES, *_registered.values()))
    raise TypeError(
        f"{type(model).__name__} has no vision tower that NeuroFlow knows or can find; supported are {names}, and any "
        f"plain ViT. neuroflow.register_adapter adds others. {missing_parts(model)}"
    )


def describe(model: nn.Module, tower: str | None = None) -> Anatomy:
    """Find the parts of `model`'s vision tower, wherever it sits in the model.

    For a patched tower this is the anatomy it was patched with. A tower that is found by its structure runs a synthetic
    frame.

    Args:
        model: a model with a vision tower.
        tower: name of the tower in the model, or of a module that contains only this tower. Required if there are
            several.

    Returns:
        the tower's `Anatomy`.

    Raises:
        TypeError: `model` is not a module, has no vision tower that NeuroFlow supports, or has one that is not built as
            its adapter expects.
        ValueError: a ViTDet that cannot run sparse; several towers and no name, or an unknown name.

    Example:
        >>> anatomy = neuroflow.describe(model)
        >>> len(anatomy.layers), anatomy.prefix
        (2, 0)
    """
    found = towers(model)
    named = {name: of for name, of in found.items() if tower is None or is_in(name, tower)}
    if len(named) != 1:
        names = ", ".join(repr(name) for name in found)
        given = f"tower is {tower!r}" if tower is not None else f"{type(model).__name__} has {len(found)} vision towers"
        raise ValueError(f"{given}; accepted is tower=... with one of {names}, in one call for each tower to patch")
    ((module, family),) = named.values()
    engine = vars(module).get(ENGINE)
    if engine is not None:
        return engine.anatomy
    try:
        anatomy = family.adapter(module)
        is_known = family in FAMILIES and isinstance(family.found_by, tuple)
        return dataclasses.replace(anatomy, example=None) if is_known else anatomy
    except AttributeError as error:
        library = family.library
        if family in FAMILIES:
            library += f" {importlib.import_module(library).__version__}"
        message = f"{type(module).__name__} of {library} is not built as the adapter of {family.name} expects"
        raise TypeError(f"{message}: {error}") from error


__all__ = [
    "BY_STRUCTURE",
    "ENGINE",
    "FAMILIES",
    "Anatomy",
    "Family",
    "Grid",
    "describe",
    "general",
    "in_evaluation",
    "register_adapter",
    "supported_models",
    "towers",
]

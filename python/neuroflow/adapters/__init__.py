"""What the engine needs to know of a model: where its parts are. One file for each kind of tower."""

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
    """Models that one adapter describes.

    Args:
        name: what the family is called.
        library: the package that its towers come from.
        found_by: class names there, of a tower or of its `embeddings`. The latter kept theirs where the modules around
            them moved between releases of transformers. Or a function that finds them by their structure.
        adapter: tower -> Anatomy.
        architectures: the letters of those that it can run.
    """

    name: str
    library: str
    found_by: tuple[str, ...] | Callable[[nn.Module], bool]
    adapter: Adapter
    architectures: str = "ABCDE"

    def knows(self, module: nn.Module) -> bool:
        """Whether `module` is such a tower."""
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
    """The families that `enable_cache` takes: those it knows by name, what it finds by structure, and those of
    `register_adapter` last.
    """
    return (*FAMILIES, BY_STRUCTURE, *_registered.values())


def register_adapter(tower: type[nn.Module], adapter: Adapter) -> None:
    """Teach `enable_cache` a tower of your own.

    Args:
        tower: the class of the module that takes frames; it comes before whatever NeuroFlow knows of that class.
        adapter: such a module -> `neuroflow.Anatomy`, which says where its parts are.

    Raises:
        TypeError: `tower` is no class of modules.
    """
    if not (isinstance(tower, type) and issubclass(tower, nn.Module)):
        given = tower.__name__ if isinstance(tower, type) else f"a {type(tower).__name__}"
        raise TypeError(f"tower is {given}; accepted is a subclass of torch.nn.Module")
    _registered[tower] = Family(tower.__name__, tower.__module__.partition(".")[0], (tower.__name__,), adapter)


def towers(model: nn.Module) -> dict[str, tuple[nn.Module, Family]]:
    """The vision towers in `model` that NeuroFlow knows, by their names in it ("" is itself), but none within another;
    where there is none, those that look like one by their structure.

    Raises:
        TypeError: `model` is no module, or has no such tower.
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
        f"{type(model).__name__} has no vision tower that NeuroFlow knows, or can find; supported are {names}, and any "
        f"plain ViT. neuroflow.register_adapter takes another. {missing_parts(model)}"
    )


def describe(model: nn.Module, tower: str | None = None) -> Anatomy:
    """The anatomy of `model`'s vision tower, wherever in the model it lies; of one that is patched, as it was then.

    A tower that is found by structure runs a made frame for it.

    Args:
        tower: its name in the model, or that of a module which holds no other; needed where there are several.

    Raises:
        TypeError: `model` is no module, has no vision tower of a supported family, or one that is built otherwise than
            its adapter expects.
        ValueError: a ViTDet that cannot be sparse; several towers and no name, or the name of none.
    """
    found = towers(model)
    named = {name: of for name, of in found.items() if tower is None or is_in(name, tower)}
    if len(named) != 1:
        names = ", ".join(repr(name) for name in found)
        given = f"tower is {tower!r}" if tower is not None else f"{type(model).__name__} has {len(found)} vision towers"
        raise ValueError(
            f"{given}; accepted is tower=... with one of {names}, in a call for each that is to be patched"
        )
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

"""Load the vision tower of a transformers model, without the rest."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from . import CommandError

STANDARD = tuple(IMAGENET_STANDARD_MEAN), tuple(IMAGENET_STANDARD_STD)  # 0.5
IMAGENET = tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)
OPENAI = tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)


class Tower(NamedTuple):
    """How towers of one model type are loaded, and what input they take.

    Args:
        normalisation: mean and standard deviation of red, green and blue that its checkpoints usually ask for.
        pools: it has an optional pooling layer, which many checkpoints lack.
        prefix: pattern of the prefix that its weights have in a larger model, if transformers does not know it.
        fixed: function from its configuration to whether it takes a single size only.
    """

    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    pools: bool = False
    prefix: str | None = None
    fixed: Callable[[PretrainedConfig], bool] = lambda config: False


TOWERS = {
    "siglip_vision_model": Tower(STANDARD),
    "clip_vision_model": Tower(OPENAI),
    "vit": Tower(STANDARD, pools=True),
    "deit": Tower(IMAGENET, pools=True),
    "ijepa": Tower(IMAGENET),
    "vit_mae": Tower(IMAGENET),
    "dinov2": Tower(IMAGENET),
    "dinov2_with_registers": Tower(IMAGENET),
    "dinov3_vit": Tower(IMAGENET),
    "aimv2_vision_model": Tower(OPENAI, prefix=r"^vision_model\.", fixed=lambda config: not config.is_native),
    "internvl_vision": Tower(IMAGENET),
    "sam_vision_model": Tower(IMAGENET, fixed=lambda config: True),
    "vitdet": Tower(IMAGENET),
}
SUPPORTED = f"supported, alone or in a larger model, are {', '.join(TOWERS)}"
# Their processors cut frames into patches, and the towers take those.
TAKE_PATCHES = ("siglip2_vision_model", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
IN_LARGER_MODEL = r"^(model\.)?vision_tower\."


def load_tower(name: str, device: torch.device, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The vision tower of a Hugging Face id or local directory, in evaluation mode.

    Raises:
        CommandError: the model cannot be loaded, is of another type, or lacks weights.
    """
    # A failure is reported below, in one line.
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise CommandError(f"model {name}: no such directory; give a saved model, or a Hugging Face id")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        config = getattr(config, "vision_config", None) or config
        tower, missing = _load(name, config, dtype)
    except CommandError:
        raise
    # Hub, configuration and weights each fail in their own ways: no network, no such id, no config, a damaged file.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CommandError(f"model {name}: cannot be loaded ({reason}); {SUPPORTED}") from None
    if missing:
        message = f"model {name}: {len(missing)} weights are missing, {min(missing)} first; give a whole checkpoint"
        raise CommandError(message)
    require_finite(name, tower)
    return tower.eval().to(device)


def require_finite(name: str, model: nn.Module) -> None:
    """Refuse a model with NaN or Inf in its weights, whose output would be all NaN.

    Raises:
        CommandError: there are some.
    """
    for parameter, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise CommandError(f"model {name}: {parameter} holds NaN or Inf; give an undamaged checkpoint")


def _load(
    name: str, config: PretrainedConfig, dtype: torch.dtype
) -> tuple[transformers.PreTrainedModel, set[str] | list[str]]:
    """The tower, and the names of the weights missing from its checkpoint."""
    kind = config.model_type
    if kind.removesuffix("_vision") in TAKE_PATCHES:
        raise CommandError(
            f"model {name}: its type, {kind}, takes patches cut by its processor, while this command gives whole "
            f"frames; neuroflow.enable_cache patches it in Python. {SUPPORTED}"
        )
    if kind not in TOWERS:
        raise CommandError(f"model {name}: its type is {kind}; {SUPPORTED}")
    if getattr(config, "mask_ratio", 0):
        warnings.warn(f"{name}: mask_ratio is 0 instead of {config.mask_ratio}, so it sees all patches", stacklevel=2)
        config.mask_ratio = 0.0
    prefixes = (IN_LARGER_MODEL, TOWERS[kind].prefix)
    tower, loading = AutoModel.from_pretrained(
        name,
        config=config,
        dtype=dtype,
        key_mapping={prefix: "" for prefix in prefixes if prefix is not None},
        output_loading_info=True,
        trust_remote_code=False,
        **({"add_pooling_layer": False} if TOWERS[kind].pools else {}),
    )
    return tower, loading["missing_keys"]

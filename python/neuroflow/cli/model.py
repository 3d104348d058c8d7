"""Loading the vision tower of a transformers model, alone."""

from pathlib import Path

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig, SiglipVisionModel, ViTModel

from . import CommandError

SUPPORTED = "supported types are siglip, siglip_vision_model (SigLIP, SigLIP 2 of fixed resolution) and vit (ViT)"


def load_tower(name: str, device: torch.device, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The vision tower of a Hugging Face id or local directory, in evaluation mode.

    Raises:
        CommandError: the model cannot be loaded, is of another type, or lacks weights.
    """
    # What these would say of a failure comes below, in one line.
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise CommandError(f"model {name}: no such directory; give a saved model, or a Hugging Face id")
    try:
        model_type = AutoConfig.from_pretrained(name).model_type
        if model_type in ("siglip", "siglip_vision_model"):
            tower, loading = SiglipVisionModel.from_pretrained(name, dtype=dtype, output_loading_info=True)
        elif model_type == "vit":
            options = {"add_pooling_layer": False, "dtype": dtype, "output_loading_info": True}
            tower, loading = ViTModel.from_pretrained(name, **options)
        else:
            raise CommandError(f"model {name}: its type is {model_type}; {SUPPORTED}")
    except CommandError:
        raise
    # Hub, configuration and weights each fail in their own ways: no network, no such id, no config, a damaged file.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CommandError(f"model {name}: cannot be loaded ({reason}); {SUPPORTED}") from None
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        message = f"model {name}: {len(missing)} weights are missing, {missing[0]} first; give a whole checkpoint"
        raise CommandError(message)
    return tower.eval().to(device)

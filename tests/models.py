"""Models that the tests share: tiny random ones of every family, and the real ViT-Ti as a Hugging Face directory."""

import neuroflow
import torch
from transformers import (
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from bench.vit_tiny import vit_tiny as vit_tiny

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
PATCH = 8


def tiny(family, size=48):
    """A random model of `family` ("siglip", "siglip2", "vit") whose native input is size x size, in 8-pixel patches."""
    torch.manual_seed(0)
    if family == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=size, patch_size=PATCH))
    elif family == "siglip2":
        model = Siglip2VisionModel(Siglip2VisionConfig(**SIZES, num_patches=(size // PATCH) ** 2, patch_size=PATCH))
    else:
        model = ViTModel(ViTConfig(**SIZES, image_size=size, patch_size=PATCH), add_pooling_layer=False)
    # Freshly made models have zero biases and unit norms, which would hide a forgotten one.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def exact(**settings):
    """A configuration under which just those patches are active whose surprise lies above the threshold."""
    plain = {"score": "surprise", "max_age": None, "cut_share": None, "cut_surprise": None}
    return neuroflow.NeuroFlowConfig(**plain | settings)


def inputs(family, pixels):
    """What a model of `family` takes for pixels [S, 3, H, W]."""
    if family != "siglip2":
        return {"pixel_values": pixels, "interpolate_pos_encoding": True}
    rows, columns = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
    windows = pixels.unflatten(3, (columns, PATCH)).unflatten(2, (rows, PATCH))
    windows = windows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [S, N, PATCH * PATCH * 3]
    return {
        "pixel_values": windows,
        "pixel_attention_mask": torch.ones(windows.shape[:2], dtype=torch.int64),
        "spatial_shapes": torch.tensor([[rows, columns]] * len(pixels)),
    }


def clip(frames=6, size=(48, 48), seed=0, changed=4):
    """Random pixels [T, 3, H, W] of which `changed` patches change from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.rand(3, *size, generator=generator) * 2 - 1
    result = []
    for _ in range(frames):
        still = still.clone()
        for patch in torch.randperm(size[0] * size[1] // PATCH**2, generator=generator)[:changed].tolist():
            row, column = divmod(patch, size[1] // PATCH)
            window = still[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            window.copy_(torch.rand(window.shape, generator=generator) * 2 - 1)
        result.append(still)
    return torch.stack(result)

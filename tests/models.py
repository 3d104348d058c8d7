"""Models that the tests share: tiny random ones of every family, and the real ViT-Ti as a Hugging Face directory."""

import json
from pathlib import Path

import neuroflow
import torch
from safetensors.torch import load_file
from transformers import (
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

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


def vit_tiny(weights, directory):
    """Save the ImageNet ViT-Ti in `weights` (timm's names) as a Hugging Face directory; returns the classifier."""
    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        layer_norm_eps=1e-6,
        image_size=224,
        patch_size=16,
        num_labels=1000,
    )
    model = ViTForImageClassification(config).eval()
    loaded = load_file(weights)
    vit, embeddings = model.vit, model.vit.embeddings

    def fill(module, name):
        module.weight.copy_(loaded[f"{name}.weight"])
        module.bias.copy_(loaded[f"{name}.bias"])

    with torch.no_grad():
        embeddings.cls_token.copy_(loaded["cls_token"])
        embeddings.position_embeddings.copy_(loaded["pos_embed"])
        fill(embeddings.patch_embeddings.projection, "patch_embed.proj")
        for i, layer in enumerate(vit.layers if hasattr(vit, "layers") else vit.encoder.layer):
            if hasattr(layer, "mlp"):
                attention, mlp = layer.attention, layer.mlp
                projections = (attention.q_proj, attention.k_proj, attention.v_proj)
                rest = {"attn.proj": attention.o_proj, "mlp.fc1": mlp.fc1, "mlp.fc2": mlp.fc2}
            else:
                attention = layer.attention.attention
                projections = (attention.query, attention.key, attention.value)
                rest = {"attn.proj": layer.attention.output.dense, "mlp.fc1": layer.intermediate.dense}
                rest["mlp.fc2"] = layer.output.dense
            weights, biases = (loaded[f"blocks.{i}.attn.qkv.{kind}"].chunk(3) for kind in ("weight", "bias"))
            for projection, weight, bias in zip(projections, weights, biases, strict=True):
                projection.weight.copy_(weight)
                projection.bias.copy_(bias)
            rest |= {"norm1": layer.layernorm_before, "norm2": layer.layernorm_after}
            for name, module in rest.items():
                fill(module, f"blocks.{i}.{name}")
        fill(vit.layernorm, "norm")
        fill(model.classifier, "head")
    model.save_pretrained(directory)
    normalise = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "size": 224}
    normalise["image_processor_type"] = "ViTImageProcessor"
    Path(directory, "preprocessor_config.json").write_text(json.dumps(normalise))
    return model

"""The real ImageNet ViT-Ti for tests and benchmarks; the project does not carry its weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification


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

"""Models that the tests share: tiny random ones of every family, and the real ViT-Ti as a Hugging Face directory."""

import functools
import importlib
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import neuroflow
import numpy as np
import pytest
import torch
import transformers
from neuroflow.adapters.anatomy import by_name
from PIL import Image
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from bench.studies.vit_tiny import vit_tiny as vit_tiny

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
PATCH = 8


class Tiny(NamedTuple):
    """A tiny model of one family.

    Args:
        make: native size in pixels -> a model with random weights, in 8-pixel patches.
        inputs: frames [S, 3, H, W] -> the model's arguments.
        sizes: it takes any size, not only its native one.
        architectures: those that it can run.
    """

    make: Callable[[int], torch.nn.Module]
    inputs: Callable[[torch.Tensor], dict]
    sizes: bool = True
    architectures: str = "ABCDE"


def plain(pixels):
    return {"pixel_values": pixels}


def interpolated(pixels):
    return {"pixel_values": pixels, "interpolate_pos_encoding": True}


def first(pixels):
    return {"x": pixels}


def naflex(frames):
    """What SigLIP 2 takes for frames [3, H, W], of different sizes too, padded to the longest."""
    windows, shapes = [], []
    for frame in frames:
        rows, columns = frame.shape[1] // PATCH, frame.shape[2] // PATCH
        patches = frame.unflatten(2, (columns, PATCH)).unflatten(1, (rows, PATCH))
        windows.append(patches.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1))  # [N, PATCH * PATCH * 3]
        shapes.append((rows, columns))
    lengths = torch.tensor([len(each) for each in windows])
    return {
        "pixel_values": torch.nn.utils.rnn.pad_sequence(windows, batch_first=True),
        "pixel_attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "spatial_shapes": torch.tensor(shapes),
    }


def merged_pairs(frames):
    """What Qwen's towers take for frames [3, H, W], of different sizes too: end to end, in blocks of 2 x 2 patches."""
    windows, grids = [], []
    for frame in frames:
        rows, columns = frame.shape[1] // PATCH, frame.shape[2] // PATCH
        patches = frame.unflatten(2, (columns // 2, 2, PATCH)).unflatten(1, (rows // 2, 2, PATCH))
        patches = patches.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)  # [N, 3, PATCH, PATCH]
        windows.append(patches[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1))  # a still lasts two moments
        grids.append((1, rows, columns))
    return {"hidden_states": torch.cat(windows), "grid_thw": torch.tensor(grids)}


def placed(frames):
    """What Gemma 4's tower takes for frames [3, H, W], of different sizes too: rows of patches, and their places."""
    taken = naflex([frame / 2 + 0.5 for frame in frames])
    places = [torch.cartesian_prod(*map(torch.arange, shape.tolist())).flip(1) for shape in taken["spatial_shapes"]]
    padded = torch.nn.utils.rnn.pad_sequence(places, batch_first=True, padding_value=-1)
    return {"pixel_values": taken["pixel_values"], "pixel_position_ids": padded}


def clips(frames):
    """What video models take for frames [S, 3, H, W]: their four quarters one after another, each of which fades."""
    quarters = frames.unflatten(3, (2, -1)).unflatten(2, (2, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return {"pixel_values": torch.stack((quarters, quarters / 2), 2).flatten(1, 2)}  # [S, 8, 3, H / 2, W / 2]


def videos(frames):
    """`clips`, under the name that V-JEPA 2 has for them."""
    return {"pixel_values_videos": clips(frames)["pixel_values"]}


def installed(name):
    """The class `name` of transformers; skips the test where the installed release has none."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


def of(name, inputs, sizes=True, model=(), **settings):
    """`name`Model of transformers, made with `model`'s arguments, of the sizes that all have here."""

    def make(size):
        config = installed(f"{name}Config")(**SIZES, **{"image_size": size, "patch_size": PATCH} | settings)
        return installed(f"{name}Model")(config, **dict(model))

    return Tiny(make, inputs, sizes)


def _siglip2(size):
    config = installed("Siglip2VisionConfig")(**SIZES, num_patches=(size // PATCH) ** 2, patch_size=PATCH)
    model = installed("Siglip2VisionModel")(config)
    # As transformers 5.5 draws them, they magnify what hardly moves.
    torch.manual_seed(0)
    for matrix in (parameter for parameter in model.parameters() if parameter.ndim > 1):
        torch.nn.init.normal_(matrix, std=0.08)
    return model


def _internvl(size):
    config = {"image_size": [size] * 2, "patch_size": [PATCH] * 2, "layer_scale_init_value": 0.3}
    return installed("InternVLVisionModel")(installed("InternVLVisionConfig")(**SIZES, **config))


def _gemma4(size):
    sizes = SIZES | {"num_key_value_heads": 4, "head_dim": 16, "patch_size": PATCH, "pooling_kernel_size": 2}
    model = installed("Gemma4VisionModel")(installed("Gemma4VisionConfig")(**sizes))
    with torch.no_grad():  # behind attention and MLP, where they would magnify what a random model makes of noise
        for layer in model.encoder.layers:
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                norm.weight.fill_(0.03)
    return model


def _llama4(size):
    sizes = SIZES | {"intermediate_size": 256, "image_size": size, "patch_size": PATCH, "pixel_shuffle_ratio": 0.5}
    sizes |= {"projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64}
    return installed("Llama4VisionModel")(installed("Llama4VisionConfig")(**sizes))


def of_clips(name, **settings):
    """`name`Model of transformers, for `clips` in tubelets of 2 frames, as many as the frames have patches."""

    def make(size):
        config = installed(f"{name}Config")(**SIZES, image_size=size // 2, num_frames=8, **settings)
        return installed(f"{name}Model")(config)

    return Tiny(make, clips, sizes=False)


def _vjepa2(size):
    config = {"crop_size": size // 2, "patch_size": PATCH, "frames_per_clip": 8, "tubelet_size": 2, "mlp_ratio": 2}
    predictor = {"pred_hidden_size": 32, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 2}
    return installed("VJEPA2Model")(installed("VJEPA2Config")(**SIZES, **config, **predictor))


def of_eomt(name, inputs, **settings):
    """`name`ForUniversalSegmentation of transformers, whose queries are joined in front of the last of four blocks."""
    sizes = {"patch_size": PATCH, "num_blocks": 1, "num_queries": 5, "num_register_tokens": 2, "num_upscale_blocks": 1}

    def make(size):
        config = installed(f"{name}Config")(**SIZES, image_size=size, layerscale_value=0.3, **sizes | settings)
        return installed(f"{name}ForUniversalSegmentation")(config)

    return Tiny(make, inputs, sizes=False, architectures="ACDE")


def of_timm(model, **settings):
    """A tower of timm, of the sizes that all have here; it takes any size if `dynamic_img_size` is among `settings`."""
    module = {"VisionTransformer": "vision_transformer", "VisionTransformerDistilled": "deit", "Eva": "eva"}[model]
    sizes = {"embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2, "num_classes": 10, "patch_size": PATCH}

    def make(size):
        return getattr(importlib.import_module(f"timm.models.{module}"), model)(size, **sizes | settings)

    return Tiny(make, first, settings.get("dynamic_img_size", False))


QWEN = {"depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": PATCH}
QWEN |= {"out_hidden_size": 64, "spatial_merge_size": 2}


def _qwen2(size):
    config = {"depth": 4, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": PATCH}
    return Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**config))


def qwen2_5_config():
    return Qwen2_5_VLVisionConfig(**QWEN, window_size=4 * PATCH, fullatt_block_indexes=[1, 3])


def qwen3_config(size=48):
    grid = (size // PATCH) ** 2
    return Qwen3VLVisionConfig(**QWEN, num_position_embeddings=grid, deepstack_visual_indexes=[0, 2, 3])


unpooled = {"model": {"add_pooling_layer": False}}
dinov2 = {"mlp_ratio": 2, "layerscale_value": 0.3}
relative = {"use_relative_position_bias": True, "use_mask_token": False}
# Windows that do not tile 6 x 6 patches; of those of 5 x 5, one holds a single patch.
sam = {"mlp_ratio": 2.0, "output_channels": 32, "window_size": 4, "global_attn_indexes": [1, 3]}
sam3 = {"pretrain_image_size": 24, "window_size": 4, "global_attn_indexes": [1, 3]}
vitdet = {"mlp_ratio": 2, "window_size": 5, "window_block_indices": [0, 2], "use_relative_position_embeddings": True}
FAMILIES = {
    "siglip": of("SiglipVision", interpolated),
    "siglip2": Tiny(_siglip2, naflex),
    "clip": of("CLIPVision", interpolated),
    "vit": of("ViT", interpolated, **unpooled),
    "deit": of("DeiT", interpolated, **unpooled),
    "ijepa": of("IJepa", interpolated),
    "vit_mae": of("ViTMAE", interpolated, mask_ratio=0.0),
    "dinov2": of("Dinov2", plain, **dinov2),
    "dinov2 with swiglu": of("Dinov2", plain, **dinov2, use_swiglu_ffn=True),
    "dinov2 with registers": of("Dinov2WithRegisters", plain, **dinov2, num_register_tokens=3),
    "dinov3": of("DINOv3ViT", plain, num_register_tokens=2, layerscale_value=0.3),
    "dinov3 gated": of("DINOv3ViT", plain, use_gated_mlp=True),
    "aimv2": of("Aimv2Vision", plain, sizes=False),
    "internvl": Tiny(_internvl, plain),
    "sam": of("SamVision", plain, sizes=False, **sam)._replace(architectures="ACDE"),
    "sam 3": of("Sam3ViT", plain, sizes=False, **sam3)._replace(architectures="ACDE"),
    "sam-hq": of("SamHQVision", plain, sizes=False, **sam, mlp_dim=128)._replace(architectures="ACDE"),
    "vitdet": of("VitDet", plain, **vitdet)._replace(architectures="ACDE"),
    # Found by their structure: images end to end, positions added to scores, keys that queries share, a class token
    # behind the patches, rows of patches with their places.
    "pixtral": of("PixtralVision", plain)._replace(architectures="ACDE"),
    "beit": of("Beit", plain, **relative, sizes=False, model={"add_pooling_layer": False})._replace(
        architectures="CDE"  # up to transformers 5, its MLP lies in two modules
    ),
    "sapiens2": of("Sapiens2", plain, num_key_value_heads_per_layer=[4, 2, 2, 4])._replace(architectures="ACDE"),
    "llama4": Tiny(_llama4, plain, sizes=False, architectures="ACDE"),
    "gemma4": Tiny(_gemma4, placed, architectures="ACDE"),
    "videomae": of_clips("VideoMAE", patch_size=PATCH, tubelet_size=2),
    "vivit": of_clips("Vivit", tubelet_size=[2, PATCH, PATCH]),
    "vjepa2": Tiny(_vjepa2, videos, architectures="ACDE"),
    "eomt": of_eomt("Eomt", plain, mlp_ratio=2),
    "eomt with dinov3": of_eomt("EomtDinov3", plain),
    "videomt": of_eomt("Videomt", lambda frames: {"pixel_values_videos": frames[:, None]}, mlp_ratio=2),
    "qwen2-vl": Tiny(_qwen2, merged_pairs, architectures="ACDE"),
    "qwen2.5-vl": Tiny(
        lambda size: Qwen2_5_VisionTransformerPretrainedModel(qwen2_5_config()), merged_pairs, architectures="ACDE"
    ),
    "qwen3-vl": Tiny(lambda size: Qwen3VLVisionModel(qwen3_config(size)), merged_pairs, architectures="ACDE"),
}
rope = {"use_rot_pos_emb": True, "num_reg_tokens": 2, "no_embed_class": True}
perception = {"use_rot_pos_emb": True, "rope_grid_indexing": "xy", "rope_grid_offset": 1.0}
TIMM = {
    "timm vit": of_timm("VisionTransformer"),
    "timm vit, averaged": of_timm("VisionTransformer", global_pool="avg", qk_norm=True, dynamic_img_size=True),
    "timm deit": of_timm("VisionTransformerDistilled"),
    "timm siglip": of_timm("VisionTransformer", class_token=False, global_pool="map"),
    "timm clip": of_timm("VisionTransformer", pre_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    "timm dinov2": of_timm(
        "VisionTransformer", reg_tokens=3, no_embed_class=True, init_values=0.3, dynamic_img_size=True, global_pool=""
    ),
    "timm eva02": of_timm("Eva", use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
    "timm dinov3": of_timm(
        "Eva", **rope, rope_type="dinov3", rope_rotate_half=True, init_values=0.3, dynamic_img_size=True
    ),
    "timm pe": of_timm("Eva", **perception, attn_type="rope", use_pre_transformer_norm=True, global_pool="map"),
    "timm rope mixed": of_timm("Eva", **rope, rope_type="mixed", attn_type="rope", qk_norm=True),
}
if find_spec("timm") and find_spec("torchvision"):  # which it needs; tests/adapters/test_timm.py sees to both
    FAMILIES |= TIMM


def tiny(family, size=48):
    """A random model of `family`, a key of FAMILIES, whose native input is size x size, in 8-pixel patches."""
    torch.manual_seed(0)
    model = FAMILIES[family].make(size)
    # Freshly made models have zero biases and unit norms, which would hide a forgotten one.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def redrawn(model):
    """`model` with weights that hardly differ between releases of torch, which draw their own for a new module."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in (parameter for parameter in model.parameters() if parameter.ndim > 1 and parameter.numel()):
            matrix.copy_(torch.randn(matrix.shape, generator=generator) * matrix.std())
    return model


def exact(**settings):
    """A configuration under which just those patches are active whose surprise lies above the threshold, and equal
    frames give equal bits.
    """
    plain = {"kernels": "rows", "score": "surprise", "max_age": None, "dense_above": 1.0}
    plain |= {"cut_share": None, "cut_surprise": None, "cut_light": None}
    return neuroflow.NeuroFlowConfig(**plain | settings)


class OldRows:
    """The reference for architecture E: an unpatched tower each of whose blocks takes, and gives, its old tokens where
    patches are inactive.

    Args:
        anatomy: of the tower. It stays as long as the model lives.
        streams: how many take turns at the frames.

    `active` is bool [rows, columns] of the frame at hand, or [frames, rows, columns].
    """

    def __init__(self, anatomy, streams=1):
        self.anatomy, self.streams, self.active, self.held, self.order = anatomy, streams, None, {}, None
        for layer in anatomy.layers:  # inside of whatever captures hidden states
            layer.forward = functools.partial(self.run, layer, layer.forward)
        if anatomy.order is not None:
            anatomy.tower.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, tower, args, kwargs):
        self.order = self.anatomy.order(by_name(inspect.signature(tower.forward).bind(*args, **kwargs)))

    def run(self, layer, forward, *args, **kwargs):
        tokens, *args = args or [kwargs.pop(next(iter(inspect.signature(forward).parameters)))]
        if layer is self.anatomy.layers[0]:
            tokens = self.mixed("first", tokens)
        output = forward(tokens, *args, **kwargs)
        if isinstance(output, tuple):  # some blocks of transformers 4 return tuples
            return self.mixed(layer, output[0]), *output[1:]
        return self.mixed(layer, output)

    def mixed(self, name, tokens):
        frames = tokens if tokens.ndim == 4 else tokens.reshape(self.active[..., 0, 0].numel(), -1, tokens.shape[-1])
        mixed = []
        for number, frame in enumerate(frames):
            fresh, key = self.fresh(number, frame), (name, number % self.streams)
            self.held[key] = torch.where(fresh, frame, self.held.get(key, frame))
            mixed.append(self.held[key])
        return torch.stack(mixed).view_as(tokens)

    def fresh(self, number, frame):
        """Where the tokens of a frame, or its map with channels first or last, are new."""
        active = self.active if self.active.ndim == 2 else self.active[number]
        if frame.ndim == 3:
            return active[:, :, None] if frame.shape[:2] == active.shape else active
        active = active.flatten() if self.order is None else active.flatten()[self.order[number]]
        fresh = torch.ones(len(frame), dtype=torch.bool)
        fresh[self.anatomy.prefix :][: len(active)] = active
        return fresh[:, None]


def inputs(family, pixels):
    """What a model of `family` takes for pixels [S, 3, H, W]."""
    return FAMILIES[family].inputs(pixels)


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


def smooth_clip(frames=8, size=(48, 48)):
    """A picture without edges that drifts slowly, and a soft spot that crosses it: [T, 3, H, W]."""
    rows, columns = torch.meshgrid(*(torch.linspace(0, 1, length) for length in size), indexing="ij")
    result = []
    for time in torch.linspace(0, 1, frames):
        waves = [torch.sin(3 * (k + 1) * rows + 4 * columns + 0.1 * time + k) for k in range(3)]
        spot = torch.exp(-((rows - 0.2 - 0.5 * time) ** 2 + (columns - 0.5) ** 2) / 0.02)
        result.append(torch.stack(waves) * 0.5 + spot)
    return torch.stack(result)


def outputs(model, family, frames):
    torch.manual_seed(0)  # of ViT-MAE's shuffling
    with torch.inference_mode():
        return [model(**inputs(family, frame[None])) for frame in frames]


def values(output):
    """The tensors of a model's output that are about the frame, by name."""
    if isinstance(output, torch.Tensor):
        return {"output": output}
    if isinstance(output, tuple):  # Qwen3-VL up to transformers 4.57
        return {"pooler_output": output[0]} | {f"deepstack {k}": each for k, each in enumerate(output[1])}
    found = {name: output.get(name) for name in ("last_hidden_state", "pooler_output")}
    found = {name: value for name, value in found.items() if value is not None}
    found |= {f"deepstack {k}": each for k, each in enumerate(output.get("deepstack_features") or [])}
    if "ids_restore" in output:  # ViT-MAE shuffles its patches
        patches = found["last_hidden_state"][:, 1:]
        found["last_hidden_state"] = patches.gather(1, output.ids_restore[..., None].expand_as(patches))
    return found


def assert_close(actual, expected, tolerance):
    ours, theirs = values(actual), values(expected)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].shape == theirs[name].shape
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * theirs[name].abs().max()


def photograph(path):
    """The middle 224 x 224 of a photograph whose short side is 256."""
    image = Image.open(path).convert("RGB")
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1

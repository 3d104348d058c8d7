"""Whole models of random weights, tiny ones: how each is made, and what it is given for a picture and for a clip."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from models import PATCH, QWEN, SIZES, clips, installed, merged_pairs, naflex
from torch import nn

BLOCKS = {"hidden_size": 64, "mlp_ratio": 2, "num_hidden_layers": 4, "num_attention_heads": 4}
IMAGE = {"image_size": 48, "patch_size": PATCH}
PATCHES = 36
TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 128}
WORDS = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
PICTURE, VIDEO, START, END = 5, 6, 9, 10  # tokens
MERGED = PATCHES // 4


class Case(NamedTuple):
    """A whole model.

    Args:
        make: -> the model.
        picture: frame [1, 3, 48, 48] -> what the model is given for it.
        outputs: names of what its output says about the frame: tensors, or tuples of tensors.
        streams: how many frames the tower sees of one picture.
        video: frames [T, 3, 48, 48] -> what the model is given for a clip in one call; None where it takes none.
        method: which of the model's methods is called.
    """

    make: Callable[[], nn.Module]
    picture: Callable[[torch.Tensor], dict[str, Any]]
    outputs: Sequence[str] = ("logits",)
    streams: int = 1
    video: Callable[[torch.Tensor], dict[str, Any]] | None = None
    method: str = "forward"


def made(name):
    """The model of a case, in float64, without biases of zero and norms of one, which would hide a forgotten one."""
    torch.manual_seed(0)
    model = WHOLE[name].make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().double()


def run(case, model, frames):
    """What a model makes of a frame [3, 48, 48], or of a clip [T, 3, 48, 48] in one call."""
    method = getattr(model, case.method)
    with torch.inference_mode():
        output = method(**_given(case, method, frames))
    if isinstance(output, torch.Tensor):
        return [output]
    found = []
    for name in case.outputs:
        value = output[name]
        found += [value] if isinstance(value, torch.Tensor) else value[name == "hidden_states" :]  # after each block
    return found


def generate(case, model, frames):
    """The tokens with which a language model goes on, and the logits [4, 1, 128] that it chose them by."""
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    with torch.inference_mode():
        output = model.generate(**_given(case, model.forward, frames), **settings)
    return output.sequences[0].tolist(), torch.stack(output.logits)


def _given(case, method, frames):
    """What a method of the installed release takes."""
    frames = frames.double()
    given = case.picture(frames[None]) if frames.ndim == 3 else case.video(frames)
    names = {*inspect.signature(method).parameters, "output_hidden_states"}
    return {name: value for name, value in given.items() if name in names}


def assert_close(actual, expected, tolerance):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def pixels(frame):
    return {"pixel_values": frame}


def question(*tokens, token=PICTURE, kind=1, around=((), ())):
    """About pictures, or steps of a video (kind 2), of so many tokens each."""
    ids = [1, *around[0]]
    for count in tokens:
        ids += [START, *[token] * count, END]
    ids = torch.tensor([[*ids, *around[1], 7, 8]])
    types = kind * (ids == token).int()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": types,
        "token_type_ids": types,
    }


def about(tokens, **others):
    """The frames are pictures to the model."""
    return lambda frames: question(*[tokens] * len(frames)) | pixels(frames) | others


def about_clip(tokens, rest=0):
    """The frames are a clip of `tokens` for each frame, and `rest` for all of them together."""
    return lambda frames: (
        question(tokens * len(frames) + rest, token=VIDEO, kind=2) | {"pixel_values_videos": frames[None]}
    )


def takes(name, argument):
    """Whether the forward of class `name` in the installed release has an argument."""
    return argument in inspect.signature(installed(name).forward).parameters


def language_model(name, vision, text, **settings):
    """`name`ForConditionalGeneration, from the settings of its tower and of its language model."""

    def make():
        config = installed(f"{name}Config")(vision_config=vision, text_config=TEXT | text, **settings)
        return installed(f"{name}ForConditionalGeneration")(config)

    return make


def merged_picture(frames):
    """Towers that take patches of pictures of any size end to end, and merge 2 x 2 of them."""
    given = merged_pairs(frames)
    return question(MERGED) | {"pixel_values": given["hidden_states"], "image_grid_thw": given["grid_thw"]}


def merged_clip(together=False, **settings):
    """The same towers' clips, whose steps in time lie `together` in the prompt, or each between marks."""

    def video(frames):
        given = merged_pairs(frames)
        tokens = [MERGED * len(frames)] if together else [MERGED] * len(frames)
        grid = torch.tensor([[len(frames), 6, 6]])
        asked = question(*tokens, kind=2, **settings)
        return asked | {"pixel_values_videos": given["hidden_states"], "video_grid_thw": grid}

    return video


def dinov2(name="Dinov2", **settings):
    return installed(f"{name}Config")(**SIZES, **IMAGE, mlp_ratio=2, layerscale_value=0.3, **settings)


def dinov3(**settings):
    return installed("DINOv3ViTConfig")(**SIZES, **IMAGE, num_register_tokens=2, layerscale_value=0.3, **settings)


def backbone(name, **settings):
    def make():
        stages = {"out_indices": [0, 1, 2, 4]} | settings
        return installed(f"{name}Backbone")(dinov3(**stages) if name == "DINOv3ViT" else dinov2(name, **stages))

    return Case(make, pixels, ("feature_maps",))


def every_map(frame):
    return pixels(frame) | {"output_hidden_states": True}


def vitdet():
    config = installed("VitDetConfig")(**SIZES, **IMAGE, mlp_ratio=2, window_size=5, window_block_indices=[0, 2])
    config.out_features = ["stage1", "stage3"]
    return installed("VitDetBackbone")(config)


def depth_anything(name="DepthAnything"):
    sizes = {"reassemble_hidden_size": 64, "neck_hidden_sizes": [8, 16, 16, 16], "fusion_hidden_size": 16}
    config = dinov2(out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    sizes |= {"patch_size": PATCH, "head_hidden_size": 8, "depth_estimation_type": "metric"}
    config = installed(f"{name}Config")(backbone_config=config, **sizes)
    return installed(f"{name}ForDepthEstimation")(config)


def chmv2():
    config = installed("CHMv2Config")
    stages = dinov3(out_indices=[1, 2, 3, 4], apply_layernorm=True, return_class_token=True)
    sizes = {"reassemble_factors": [4, 2, 1, 0.5], "post_process_channels": [8, 16, 16, 16], "fusion_hidden_size": 16}
    return installed("CHMv2ForDepthEstimation")(
        config(backbone_config=stages, patch_size=PATCH, head_hidden_size=8, **sizes)
    )


def upernet():
    config = dinov2(out_indices=[1, 2, 3, 4])
    sizes = {"hidden_size": 16, "num_labels": 5, "auxiliary_in_channels": 64, "auxiliary_channels": 8}
    return installed("UperNetForSemanticSegmentation")(installed("UperNetConfig")(backbone_config=config, **sizes))


def mask2former():
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32}
    sizes |= {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 32}
    config = dinov2(out_indices=[1, 2, 3, 4])
    config = installed("Mask2FormerConfig")(backbone_config=config, num_queries=5, **sizes)
    return installed("Mask2FormerForUniversalSegmentation")(config)


def eomt():
    config = installed("EomtConfig")(
        **BLOCKS,
        **IMAGE,
        layerscale_value=0.3,
        num_blocks=2,
        num_queries=5,
        num_register_tokens=2,
        num_upscale_blocks=1,
        num_labels=4,
    )
    model = installed("EomtForUniversalSegmentation")(config)
    model.attn_mask_probs.zero_()  # as at the end of training
    return model


def sam(name="Sam", **of_decoder):
    vision = {"mlp_ratio": 2.0, "output_channels": 32, "window_size": 4, "global_attn_indexes": [1, 3]}
    vision |= {"num_pos_feats": 16, "mlp_dim": 128}
    prompt = {**IMAGE, "hidden_size": 32, "image_embedding_size": 6, "mask_input_channels": 4}
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32} | of_decoder
    config = installed(f"{name}Config")(
        vision_config=SIZES | IMAGE | vision,
        prompt_encoder_config=prompt,
        mask_decoder_config=decoder,
    )
    return installed(f"{name}Model")(config)


def sam_prompt(frame):
    return pixels(frame) | {"input_points": torch.tensor([[[[20.0, 30.0]]]], dtype=frame.dtype)}


def vitpose():
    sizes = BLOCKS | {"image_size": [48, 48], "patch_size": [PATCH, PATCH]}
    config = installed("VitPoseBackboneConfig")(**sizes, out_indices=[4])
    config = installed("VitPoseConfig")(backbone_config=config, num_labels=3, scale_factor=2)
    return installed("VitPoseForPoseEstimation")(config)


def owlv2(**settings):
    if transformers.__version__.startswith("4."):
        pytest.skip("the mask of its texts overflows in float64")
    config = installed("Owlv2Config")(vision_config=SIZES | IMAGE | settings, text_config=WORDS, projection_dim=64)
    return installed("Owlv2ForObjectDetection")(config)


def two_labels(frame):
    ids = torch.tensor([[1, 7, 9, 2], [1, 8, 2, 0]])
    return pixels(frame) | {"input_ids": ids, "attention_mask": (ids > 0).long()}


def vjepa2():
    config = installed("VJEPA2Config")(
        **BLOCKS,
        patch_size=PATCH,
        crop_size=24,
        frames_per_clip=8,
        pred_hidden_size=32,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        num_pooler_layers=1,
    )
    return installed("VJEPA2ForVideoClassification")(config)


def dual(name, **settings):
    """A picture's embedding, of a model that has one of texts too."""

    def make():
        config = installed(f"{name}Config")(vision_config=SIZES | IMAGE | settings, text_config=WORDS)
        return installed(f"{name}Model")(config)

    return Case(make, pixels, ("pooler_output",), method="get_image_features")


def classifier(name, **settings):
    def make():
        config = installed(f"{name}Config")(**SIZES, **IMAGE | settings, num_labels=7)
        return installed(f"{name}ForImageClassification")(config)

    return Case(make, pixels)


def interpolated(frame):
    return pixels(frame) | {"interpolate_pos_encoding": True}


def hybrid():
    high = {"model_type": "sam_vision_model", "hidden_size": 64, "output_channels": 32, "num_hidden_layers": 4}
    high |= {"num_attention_heads": 4, "image_size": 96, "patch_size": 16, "window_size": 4, "mlp_ratio": 2.0}
    high |= {"global_attn_indexes": [1, 3]}
    settings = {"image_token_id": PICTURE, "high_res_vision_config": high}
    return language_model("DeepseekVLHybrid", SIGLIP, LLAMA, **settings)()


def of_both_sizes(frame):
    """DeepSeek-VL's picture and the same one twice as large."""
    larger = frame.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return about(PATCHES, high_res_pixel_values=larger)(frame)


def tiles(frame):
    """LLaVA-OneVision's and LLaVA-NeXT's picture as a whole, and in one piece."""
    given = {"pixel_values": frame[:, None].expand(-1, 2, -1, -1, -1), "image_sizes": torch.tensor([[48, 48]])}
    return question(2 * PATCHES + 6) | given


def of_video_llava(frame):
    name = "pixel_values" if takes("VideoLlavaForConditionalGeneration", "pixel_values") else "pixel_values_images"
    return question(PATCHES) | {name: frame}


def one_moment(windows):
    """Those of `merged_pairs`, whose two moments are alike."""
    return windows.unflatten(1, (3, 2, -1))[:, :, 0].flatten(1)


def videollama3_picture(frame):
    given = merged_picture(frame) | {"image_merge_sizes": torch.tensor([2])}
    return given | {"pixel_values": one_moment(given["pixel_values"])}


def videollama3_clip(frames):
    given = merged_clip(together=True, token=VIDEO)(frames) | {"video_merge_sizes": torch.tensor([2])}
    return given | {"pixel_values_videos": one_moment(given["pixel_values_videos"])}


def gemma4_patches(frames):
    """Windows and their (column, row), and 9 more of padding."""
    windows = torch.nn.functional.pad(naflex(frames)["pixel_values"] / 2 + 0.5, (0, 0, 0, 9))
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).flip(1)
    places = torch.nn.functional.pad(places, (0, 0, 0, 9), value=-1)
    return windows, places.expand(len(frames), -1, -1)


def gemma4_picture(frame):
    windows, places = gemma4_patches(frame)
    return question(4) | {"pixel_values": windows, "image_position_ids": places}


def gemma4_clip(frames):
    windows, places = gemma4_patches(frames)
    if not takes("Gemma4ForConditionalGeneration", "num_frames_per_video"):
        windows, places = windows[None], places[None]
    given = {"pixel_values_videos": windows, "video_position_ids": places}
    given |= {"num_frames_per_video": torch.tensor([len(frames)])}
    return question(*[4] * len(frames), token=VIDEO, kind=2) | given


def pi0():
    vlm = {"model_type": "paligemma", "vision_config": SIGLIP | {"vision_use_head": False}, "projection_dim": 64}
    vlm |= {"text_config": TEXT | GEMMA, "image_token_id": PICTURE}
    sizes = {"chunk_size": 4, "max_state_dim": 6, "max_action_dim": 6, "num_inference_steps": 2}
    config = installed("PI0Config")(vlm_config=vlm, dit_config=TEXT | GEMMA, **sizes)
    return installed("PI0ForConditionalGeneration")(config)


def two_cameras(frame):
    """That see the same."""
    noise = torch.linspace(-1, 1, 24, dtype=frame.dtype).view(1, 4, 6)
    given = {"pixel_values": frame[:, None].expand(-1, 2, -1, -1, -1), "pixel_attention_mask": torch.ones(1, 2).bool()}
    return question(2 * PATCHES) | given | {"state": noise[:, 0], "noise": noise}


CLIP = {"model_type": "clip_vision_model", **SIZES, **IMAGE}
SIGLIP = {"model_type": "siglip_vision_model", **SIZES, **IMAGE}
LLAMA, QWEN2, GEMMA = ({"model_type": name} for name in ("llama", "qwen2", "gemma"))
named = {"image_token_index": PICTURE}
both_named = named | {"video_token_index": VIDEO}
tiled = both_named | {"image_grid_pinpoints": [[48, 48]]}
marked = {"image_token_id": PICTURE, "video_token_id": VIDEO}
marked_qwen = marked | {"vision_start_token_id": START, "vision_end_token_id": END}
marked_glm = marked | {"image_start_token_id": START, "image_end_token_id": END}
marked_glm |= {"video_start_token_id": 11, "video_end_token_id": 12}
several = {"vision_feature_layer": [-2, 1]}
internvl = {"image_size": [48, 48], "patch_size": [PATCH, PATCH], "layer_scale_init_value": 0.3}
gemma4 = {"patch_size": PATCH, "num_key_value_heads": 4, "head_dim": 16}
gemma4 |= {"pooling_kernel_size": 3, "position_embedding_size": 16}
gemma4_text = {"global_head_dim": 16, "hidden_size_per_layer_input": 0}
windows = {"window_size": 4 * PATCH, "fullatt_block_indexes": [1, 3]}
positions = {"num_position_embeddings": PATCHES}
deepstack = {"deepstack_visual_indexes": [0, 2, 3]}


def turned(**settings):
    """Of language models that turn by time, row and column; up to transformers 4 it was "rope_scaling"."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], **settings}
    return {"rope_parameters": rope | {"rope_theta": 10000.0}, "rope_scaling": rope}


linear = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_value_heads": 2}
WHOLE = {
    "dinov2 backbone": backbone("Dinov2"),
    "dinov2 backbone, as they are": backbone("Dinov2", apply_layernorm=False, reshape_hidden_states=False),
    "dinov2 backbone, hidden states": backbone("Dinov2")._replace(
        picture=every_map, outputs=("feature_maps", "hidden_states")
    ),
    "dinov2 with registers backbone": backbone("Dinov2WithRegisters", num_register_tokens=3),
    "dinov3 backbone": backbone("DINOv3ViT", apply_layernorm=True),
    "dinov3 backbone, as they are": backbone("DINOv3ViT", apply_layernorm=False, reshape_hidden_states=False),
    "vitdet backbone": Case(vitdet, every_map, ("feature_maps", "hidden_states")),
    "depth anything": Case(depth_anything, pixels, ("predicted_depth",)),
    "prompt depth anything": Case(lambda: depth_anything("PromptDepthAnything"), pixels, ("predicted_depth",)),
    "chmv2": Case(chmv2, pixels, ("predicted_depth",)),
    "upernet": Case(upernet, pixels),
    "mask2former": Case(mask2former, pixels, ("masks_queries_logits",)),
    "sam": Case(sam, sam_prompt, ("pred_masks", "iou_scores")),
    "sam-hq": Case(lambda: sam("SamHQ", vit_dim=64), sam_prompt, ("pred_masks", "iou_scores")),
    "eomt": Case(eomt, pixels, ("masks_queries_logits", "class_queries_logits")),
    "owlv2": Case(owlv2, two_labels, ("logits", "pred_boxes", "image_embeds")),
    "owlv2 of another size": Case(
        lambda: owlv2(image_size=32), lambda frame: two_labels(frame) | interpolated(frame), ("logits", "pred_boxes")
    ),
    "vitpose": Case(vitpose, pixels, ("heatmaps",)),
    "v-jepa 2": Case(vjepa2, lambda frame: {"pixel_values_videos": clips(frame)["pixel_values"]}),
    "clip": dual("CLIP"),
    "siglip": dual("Siglip"),
    "siglip of another size": dual("Siglip", image_size=32)._replace(picture=interpolated),
    "vit": classifier("ViT"),
    "vit of another size": classifier("ViT", image_size=32)._replace(picture=interpolated),
    "dinov2 with registers": classifier("Dinov2WithRegisters", num_register_tokens=3, layerscale_value=0.3),
    "dinov2 of another size": classifier("Dinov2", image_size=32, layerscale_value=0.3),
    "llava": Case(language_model("Llava", CLIP, LLAMA, **named), about(PATCHES)),
    "llava, several layers": Case(language_model("Llava", CLIP, LLAMA, **named, **several), about(PATCHES)),
    "vipllava": Case(
        language_model("VipLlava", CLIP, LLAMA, **named, vision_feature_layers=[-2, -3, 1]), about(PATCHES)
    ),
    "llava-onevision": Case(
        language_model("LlavaOnevision", SIGLIP, QWEN2, **tiled, vision_feature_layer=-2),
        tiles,
        streams=2,
        video=about_clip(9, rest=1),
    ),
    "llava-next-video": Case(
        language_model("LlavaNextVideo", CLIP, LLAMA, **tiled), tiles, streams=2, video=about_clip(9)
    ),
    "video-llava": Case(
        language_model("VideoLlava", CLIP, LLAMA, **both_named), of_video_llava, video=about_clip(PATCHES + 1)
    ),
    "deepseek-vl hybrid": Case(hybrid, of_both_sizes),
    "smolvlm": Case(
        language_model("SmolVLM", SIZES | IMAGE, LLAMA, image_token_id=PICTURE),
        lambda frame: about(MERGED)(frame) | {"pixel_values": frame[None]},
        video=lambda frames: about(MERGED)(frames) | {"pixel_values": frames[None]},
    ),
    "internvl": Case(
        language_model("InternVL", SIZES | internvl, QWEN2, image_token_id=PICTURE, image_seq_length=MERGED),
        about(MERGED),
        video=about(MERGED),
    ),
    "gemma 3": Case(language_model("Gemma3", SIGLIP, {}, **named, mm_tokens_per_image=MERGED), about(MERGED)),
    "gemma 4": Case(
        language_model("Gemma4", SIZES | gemma4, gemma4_text, audio_config=None, **marked),
        gemma4_picture,
        video=gemma4_clip,
    ),
    "paligemma": Case(language_model("PaliGemma", SIGLIP, GEMMA, **named, projection_dim=64), about(PATCHES)),
    "mistral 3": Case(
        language_model("Mistral3", {**SIZES, **IMAGE, "model_type": "pixtral"}, {"model_type": "mistral"}, **named),
        about(MERGED, image_sizes=torch.tensor([[48, 48]])),
    ),
    "qwen2.5-vl": Case(
        language_model("Qwen2_5_VL", QWEN | windows, turned(), **marked_qwen),
        merged_picture,
        video=merged_clip(together=True, token=VIDEO),
    ),
    "qwen3-vl": Case(
        language_model("Qwen3VL", QWEN | positions | deepstack, turned(mrope_interleaved=True), **marked_qwen),
        merged_picture,
        video=merged_clip(token=VIDEO),
    ),
    "qwen3.5": Case(
        language_model(
            "Qwen3_5",
            QWEN | positions,
            linear | turned(mrope_interleaved=True, partial_rotary_factor=1.0),
            **marked_qwen,
        ),
        merged_picture,
        video=merged_clip(token=VIDEO),
    ),
    "glm-4v": Case(
        language_model("Glm4v", QWEN | {"image_size": 48}, turned(), **marked_glm),
        merged_picture,
        video=merged_clip(around=([11], [12])),
    ),
    "videollama 3": Case(
        language_model("VideoLlama3", SIZES | {"patch_size": PATCH}, QWEN2, **marked),
        videollama3_picture,
        video=videollama3_clip,
    ),
    "pi0": Case(pi0, two_cameras, streams=2, method="sample_actions"),
}

"""Models that read more of a tower than its output: feature maps of several stages, hidden states, a second tower.

Their outputs are compared as wholes, so that what they read is what is tested.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import neuroflow
import pytest
import torch
from models import PATCH, SIZES, OldRows, clip, exact, installed
from neuroflow.adapters import describe, towers
from neuroflow.patch import engine_of
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 128}
IMAGE = {"image_size": 48, "patch_size": PATCH}
PATCHES = 36
GRID = torch.tensor([[48, 48]])


class Case(NamedTuple):
    """A whole model.

    Args:
        make: -> the model with random weights.
        run: the model, a frame [1, 3, 48, 48] -> what it makes of it.
        streams: how many frames a tower sees of one picture.
    """

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module, torch.Tensor], list[torch.Tensor]]
    streams: int = 1


def dinov2(name="Dinov2", **settings):
    return installed(f"{name}Config")(**SIZES, **IMAGE, mlp_ratio=2, layerscale_value=0.3, **settings)


def dinov3(**settings):
    return installed("DINOv3ViTConfig")(**SIZES, **IMAGE, num_register_tokens=2, layerscale_value=0.3, **settings)


def clip_config():
    return installed("CLIPVisionConfig")(**SIZES, **IMAGE)


def maps(model, frame):
    output = model(frame, output_hidden_states=True)
    return [*output.feature_maps, *output.hidden_states[1:]]


def backbone(name, **settings):
    def make():
        stages = {"out_indices": [0, 1, 2, 4]} | settings
        return installed(f"{name}Backbone")(dinov3(**stages) if name == "DINOv3ViT" else dinov2(name, **stages))

    return Case(make, lambda model, frame: [*model(frame).feature_maps])


def vitdet():
    config = installed("VitDetConfig")(**SIZES, **IMAGE, mlp_ratio=2, window_size=5, window_block_indices=[0, 2])
    config.out_features = ["stage1", "stage3"]
    return installed("VitDetBackbone")(config)


def depth_anything(name="DepthAnything"):
    sizes = {"reassemble_hidden_size": 64, "neck_hidden_sizes": [8, 16, 16, 16], "fusion_hidden_size": 16}
    config = dinov2(out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    config = installed(f"{name}Config")(backbone_config=config, patch_size=PATCH, head_hidden_size=8, **sizes)
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


def language_model(name, vision="CLIPVision", text="Llama", **settings):
    def make():
        config = installed(f"{name}Config")(
            vision_config=installed(f"{vision}Config")(**SIZES, **IMAGE),
            text_config=installed(f"{text}Config")(**TEXT),
            **settings,
        )
        return installed(f"{name}ForConditionalGeneration")(config)

    return make


def logits(tokens=PATCHES, place=5, name="pixel_values", shape=(1, 3, 48, 48), **others):
    """Those of a prompt that holds one picture."""
    prompt = torch.tensor([[1, *[place] * tokens, 7, 8]])

    def run(model, frame):
        return [model(input_ids=prompt, **{name: frame.expand(shape)}, **others).logits]

    return run


def hybrid():
    high = {"hidden_size": 64, "output_channels": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    high |= {"image_size": 96, "patch_size": 16, "window_size": 4, "global_attn_indexes": [1, 3], "mlp_ratio": 2.0}
    return language_model(
        "DeepseekVLHybrid",
        "SiglipVision",
        image_token_id=5,
        high_res_vision_config=installed("SamVisionConfig")(**high),
    )()


def of_both_sizes(model, frame):
    """DeepSeek-VL's picture and the same one twice as large."""
    larger = frame.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return logits(high_res_pixel_values=larger)(model, frame)


SAM = {"hidden_size": 64, "output_channels": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_dim": 128}
SAM |= {"window_size": 4, "global_attn_indexes": [1, 3]} | IMAGE


def sam_hq():
    prompts = {"hidden_size": 32, "mask_input_channels": 4} | IMAGE
    decoder = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32, "vit_dim": 64}
    vision = SAM | {"num_pos_feats": 16}
    config = installed("SamHQConfig")
    return installed("SamHQModel")(
        config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    )


def masks(model, frame):
    return [model(frame, input_points=torch.full((1, 1, 1, 2), 20.0).double()).pred_masks]


def deepseek_ocr2():
    """Of its two towers the second one takes what the first one makes of patches."""
    encoder = TEXT | {"max_position_embeddings": 512}
    sam = SAM | {"downsample_channels": [16, 32]}
    config = installed("DeepseekOcr2VisionConfig")(sam_config=sam, encoder_config=encoder)
    return installed("DeepseekOcr2VisionModel")(config)


placeholders = {"image_token_index": 5, "video_token_index": 6, "image_grid_pinpoints": [[48, 48]]}
tiles = {"tokens": 2 * PATCHES + 6, "shape": (1, 2, 3, 48, 48), "image_sizes": GRID}
one_frame = {"place": 6, "name": "pixel_values_videos", "shape": (1, 1, 3, 48, 48)}
CASES = {
    "dinov2 backbone": backbone("Dinov2"),
    "dinov2 backbone, as they are": backbone("Dinov2", apply_layernorm=False, reshape_hidden_states=False),
    "dinov2 backbone, hidden states": backbone("Dinov2")._replace(run=maps),
    "dinov2 with registers backbone": backbone("Dinov2WithRegisters", num_register_tokens=3),
    "dinov3 backbone": backbone("DINOv3ViT", apply_layernorm=True),
    "dinov3 backbone, as they are": backbone("DINOv3ViT", apply_layernorm=False, reshape_hidden_states=False),
    "vitdet backbone": Case(vitdet, maps),
    "depth anything": Case(depth_anything, lambda model, frame: [model(frame).predicted_depth]),
    "prompt depth anything": Case(
        lambda: depth_anything("PromptDepthAnything"), lambda model, frame: [model(frame).predicted_depth]
    ),
    "chmv2": Case(chmv2, lambda model, frame: [model(frame).predicted_depth]),
    "upernet": Case(upernet, lambda model, frame: [model(frame).logits]),
    "mask2former": Case(mask2former, lambda model, frame: [model(frame).masks_queries_logits]),
    "llava": Case(language_model("Llava", image_token_index=5), logits()),
    "llava, several layers": Case(language_model("Llava", image_token_index=5, vision_feature_layer=[-2, 1]), logits()),
    "vipllava": Case(language_model("VipLlava", image_token_index=5, vision_feature_layers=[-2, -3, 1]), logits()),
    "llava-onevision": Case(
        language_model("LlavaOnevision", "SiglipVision", "Qwen2", **placeholders, vision_feature_layer=-2),
        logits(**tiles),
        streams=2,
    ),
    "llava-onevision, video": Case(
        language_model("LlavaOnevision", "SiglipVision", "Qwen2", **placeholders, vision_feature_layer=-2),
        logits(10, **one_frame),
    ),
    "llava-next-video": Case(language_model("LlavaNextVideo", **placeholders), logits(9, **one_frame)),
    "video-llava": Case(
        language_model("VideoLlava", image_token_index=5, video_token_index=6), logits(name="pixel_values_images")
    ),
    "deepseek-vl hybrid": Case(hybrid, of_both_sizes),
    "sam-hq": Case(sam_hq, masks),
    "deepseek-ocr 2": Case(deepseek_ocr2, lambda model, frame: [model(frame).last_hidden_state]),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def made(case):
    torch.manual_seed(0)
    model = case.make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().double()


def run(case, model, frame):
    with torch.inference_mode():
        return case.run(model, frame[None].double())


def patch(case, model, **settings):
    for name in towers(model):
        neuroflow.enable_cache(model, exact(**settings), tower=name)
    return neuroflow.cache_context(model, *range(case.streams))


def of_towers(model):
    """Which patches of the first stream each tower encoded last."""
    found = {name: neuroflow.summary(tower).streams.get(0) for name, (tower, _) in towers(model).items()}
    return {name: stream.active for name, stream in found.items() if stream is not None}


def assert_close(actual, expected, tolerance):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("arch", "AE")
def test_the_same_frame_again_is_dense(case, arch):
    """Without any patch active, so that every layer's tokens are those of the first time."""
    model, frame = made(case), clip(frames=1)[0]
    dense = run(case, model, frame)
    with patch(case, model, arch=arch, floor=0):
        again = [run(case, model, frame) for _ in range(2)]
    assert all(int(active.sum()) <= 1 for active in of_towers(model).values())
    for ours in again:
        assert_close(ours, dense, 1e-6)
    neuroflow.disable_cache(model)
    assert_close(run(case, model, frame), dense, 0)


def test_partial_frames_keep_the_old_rows_of_each_layer(case):
    model, frames = made(case), clip(frames=4)
    sparse, active = [], []
    with patch(case, model, threshold=1e-4):
        for frame in frames:
            sparse.append(run(case, model, frame))
            active.append(of_towers(model))
    neuroflow.disable_cache(model)
    references = {name: OldRows(describe(model, name)) for name in active[0]}
    for frame, ours, now in zip(frames, sparse, active, strict=True):
        for name, reference in references.items():
            reference.active = now[name]
        assert_close(ours, run(case, model, frame), 1e-5)
    assert all(0 < each.sum() < each.numel() for each in now.values())


def test_layers_are_asked_for_by_number_too():
    """The others are None, and have no cache."""
    model, frames = made(Case(lambda: installed("CLIPVisionModel")(clip_config()), None)), clip(frames=2)
    with torch.inference_mode():
        first = model(frames[:1].double(), output_hidden_states=[-2, 1])
        if [state is None for state in first.hidden_states] != [True, False, True, False, True]:
            pytest.skip("this release counts otherwise, or gives all of them")
        neuroflow.enable_cache(model, exact(threshold=1e-4))
        for frame in frames.double():
            output = model(frame[None], output_hidden_states=[-2, 1])
    shapes = [None if state is None else state.shape for state in output.hidden_states]
    assert shapes == [None, (1, PATCHES + 1, 64), None, (1, PATCHES + 1, 64), None]
    state = engine_of(model).streams["default"]
    assert {name[1] for name in state.tensors if name[0] == "hidden"} == {0, 1, 2}  # 1 is the second block's to some


def test_a_saved_stream_keeps_what_was_asked_for(tmp_path):
    case, frames = CASES["dinov2 backbone"], clip(frames=4)
    model = made(case)
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    for frame in frames[:2]:
        run(case, model, frame)
    neuroflow.save_state(model, tmp_path / "state.safetensors")
    expected = [run(case, model, frame) for frame in frames[2:]]
    neuroflow.load_state(model, tmp_path / "state.safetensors")
    for frame, theirs in zip(frames[2:], expected, strict=True):
        assert_close(run(case, model, frame), theirs, 1e-12)
    assert neuroflow.summary(model).streams["default"].key_frames == 1


def test_streams_that_ask_share_a_pass():
    case = CASES["dinov2 backbone"]
    clips = {name: clip(frames=3, seed=seed, changed=2 + seed).double() for seed, name in enumerate("ab")}
    model = made(case)
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    alone = {}
    for name, frames in clips.items():
        with neuroflow.cache_context(model, name):
            alone[name] = [run(case, model, frame) for frame in frames]
    neuroflow.reset_cache(model)
    for time in range(3):
        with torch.inference_mode():
            maps = neuroflow.encode(model, torch.stack([clips["a"][time], clips["b"][time]]), ["a", "b"]).feature_maps
        for row, name in enumerate("ab"):
            assert_close([each[row : row + 1] for each in maps], alone[name][time], 1e-9)


def test_a_blended_hidden_state_is_for_who_reads_it():
    """The blocks go on with what they encoded, so that only what is read differs."""
    model, frames = made(CASES["dinov2 backbone"]), clip(frames=3).double()
    found = {}
    for blend in (1.0, 0.5):
        neuroflow.enable_cache(model, exact(threshold=1e-4, blend=blend))
        with torch.inference_mode():
            found[blend] = [model(frame[None], output_hidden_states=True).hidden_states for frame in frames]
        keys = {name: tensor.clone() for name, tensor in engine_of(model).streams["default"].tensors.items()}
        found[blend].append([keys["key", 3], keys["value", 3]])
        neuroflow.disable_cache(model)
    whole, half = found[1.0], found[0.5]
    assert_close(half[-1], whole[-1], 1e-12)
    for before, fresh, mixed in zip(whole[0][1:], whole[1][1:], half[1][1:], strict=True):
        expected = 0.5 * before + 0.5 * fresh
        expected[:, :1] = fresh[:, :1]  # CLS follows every frame
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["dinov2 backbone", "vitdet backbone", "depth anything"])
def test_architecture_b_has_no_feature_maps(name):
    with pytest.raises(ValueError, match=r"arch is 'active'; .* makes a map of all patches"):
        neuroflow.enable_cache(made(CASES[name]), exact(arch="B"))


def test_a_model_with_two_towers_is_patched_by_name():
    case = CASES["video-llava"]
    model, frames = made(case), clip(frames=2)
    image, video = (model.get_submodule(f"model.{kind}_tower") for kind in ("image", "video"))
    names = "|".join(repr(name) for name in towers(model))
    assert len(towers(model)) == 2
    with pytest.raises(
        ValueError, match=f"has 2 vision towers; accepted is tower=... with one of ({names}), ({names})"
    ):
        neuroflow.enable_cache(model)
    with pytest.raises(ValueError, match=f"tower is 'model.tower'; accepted is .* ({names}), ({names})"):
        neuroflow.enable_cache(model, tower="model.tower")
    assert not neuroflow.is_patched(model)

    neuroflow.enable_cache(model, exact(threshold=1e-4), tower="model.image_tower")
    assert [neuroflow.is_patched(each) for each in (model, image, video)] == [True, True, False]
    with neuroflow.cache_context(model, "cam"):
        for frame in frames:
            run(case, model, frame)
    assert neuroflow.summary(model).streams["cam"].frames == 2

    neuroflow.enable_cache(model, exact(threshold=1e-4), tower="model.video_tower")
    with pytest.raises(ValueError, match=rf"of which 2 towers are patched; .*get_submodule\(\.\.\.\) with ({names}), "):
        neuroflow.summary(model)
    with neuroflow.cache_context(model, "cam"):
        run(case, model, frames[0])
        video(frames[:1].double())
    assert [neuroflow.summary(tower).streams["cam"].frames for tower in (image, video)] == [3, 1]
    with pytest.raises(KeyError, match="known are \\['cam'\\]"):
        neuroflow.reset_cache(model, "other")
    neuroflow.reset_cache(model, "cam")
    assert not any(neuroflow.summary(tower).streams for tower in (image, video))
    neuroflow.disable_cache(model)
    assert not any(neuroflow.is_patched(each) for each in (model, image, video))


def test_towers_of_one_configuration_are_patched_one_by_one():
    """Their attentions may share it, as Video-LLaVA's do: what is patched is the tower alone."""
    config = clip_config()
    one, other = (installed("CLIPVisionModel")(config).eval() for _ in range(2))
    frames = clip(frames=1)
    dense = other(frames).last_hidden_state
    neuroflow.enable_cache(one, exact(threshold=0))
    assert other(frames).last_hidden_state.equal(dense)
    assert not neuroflow.is_patched(other)
    neuroflow.enable_cache(other, exact(threshold=0))
    neuroflow.disable_cache(one)
    neuroflow.disable_cache(other)
    assert other(frames).last_hidden_state.equal(dense)
    assert not neuroflow.is_patched(other)


def test_a_patched_forward_has_the_signature_that_it_had():
    """By which `generate`, pipelines and backbones choose what they pass."""
    model = made(CASES["dinov2 backbone"])
    modules = [model, *describe(model).layers]
    before = [inspect.signature(module.forward) for module in modules]
    neuroflow.enable_cache(model)
    assert [inspect.signature(module.forward) for module in modules] == before


@pytest.mark.parametrize(
    "name", ["dinov2 backbone", "dinov2 backbone, as they are", "dinov3 backbone", "vitdet backbone"]
)
def test_a_backbone_s_embedding_is_the_mean_of_its_last_map(name):
    model, frames = made(CASES[name]).float(), clip(frames=4)
    assert neuroflow.calibrate(model, frames, fidelity=0.9).fidelity >= 0.9
    with torch.inference_mode():
        output = model(frames[:1])
    features = output.feature_maps[-1]
    patches = features.flatten(2).mean(2) if features.ndim == 4 else features.mean(1)
    torch.testing.assert_close(describe(model).embedding(output), patches)


def test_hidden_states_of_architecture_b_are_padded_as_its_output_is():
    clips = [clip(frames=2, seed=changed, changed=changed).double() for changed in (5, 8)]
    torch.manual_seed(0)
    model = installed("CLIPVisionModel")(clip_config()).eval().double()
    neuroflow.enable_cache(model, exact(arch="B", threshold=1e-4))

    def states(frames, *names):
        with torch.inference_mode(), neuroflow.cache_context(model, *names):
            return model(frames, output_hidden_states=True).hidden_states[1:]

    alone = [[states(frame[None], name) for frame in frames][-1] for name, frames in enumerate(clips)]
    neuroflow.reset_cache(model)
    together = [states(torch.stack(frames), 0, 1) for frames in zip(*clips, strict=True)][-1]
    for one, other, both in zip(*alone, together, strict=True):
        assert (one.shape, other.shape, both.shape) == ((1, 6, 64), (1, 9, 64), (2, 9, 64))
        torch.testing.assert_close(both[:1, :6], one, rtol=0, atol=1e-9)
        torch.testing.assert_close(both[1:], other, rtol=0, atol=1e-9)
        assert not both[0, 6:].any()

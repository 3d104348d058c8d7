"""timm's towers: in a process of their own with what `make` put beside the other packages, if it is not installed."""

import functools
import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import neuroflow
import pytest
import torch
from models import TIMM, OldRows, clip, exact, photograph, smooth_clip, tiny, vit_tiny
from neuroflow.adapters import describe
from torch import nn
from transformers import (
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
)

INSTALLED = bool(find_spec("timm") and find_spec("torchvision"))
BESIDE = Path(sys.prefix, "timm")
needs_timm = pytest.mark.skipif(not INSTALLED, reason="run by test_everything_about_timm_passes")


@pytest.mark.skipif(INSTALLED, reason="timm is installed: its tests run in this process")
def test_everything_about_timm_passes():
    if not BESIDE.exists():
        pytest.skip(f"timm is neither installed nor in {BESIDE}, where `make test` puts it")
    # transformers does other things where it finds torchvision, which timm needs: hence a process of its own.
    path = os.pathsep.join([str(BESIDE), *filter(None, [os.environ.get("PYTHONPATH")])])
    tests = Path(__file__).parents[1]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-k",
            "timm",
            __file__,
            tests / "adapters/test_families.py",
            tests / "engine/test_precision.py",
        ],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tests.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def timm_class(module, name):
    return getattr(importlib.import_module(f"timm.{module}"), name)


def vision_transformer(**settings):
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
    return timm_class("models.vision_transformer", "VisionTransformer")(**sizes | settings).eval()


@needs_timm
@pytest.mark.parametrize("family", TIMM)
def test_forward_features_takes_sparse_frames(family):
    """The tokens of a frame, and then the head, are what `forward` goes through."""
    model, frames = tiny(family), clip(frames=3)
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    with torch.inference_mode():
        for frame in frames.split(1):
            with neuroflow.cache_context(model, "tokens"):
                tokens = model.forward_features(frame)
            with neuroflow.cache_context(model, "output"):
                output = model(frame)
            assert model.forward_head(x=tokens).equal(output)
    streams = neuroflow.summary(model).streams
    assert streams["tokens"].active.sum() == streams["output"].active.sum() == 4


def assert_keeps_old_rows(model, run, frames):
    """`run` of partial frames is that of a tower whose blocks keep their old tokens; the same frame again is dense."""
    with torch.inference_mode():
        dense = run(frames[:1])
        neuroflow.enable_cache(model, exact(threshold=1e-4))
        sparse, active = [run(frames[:1])], [torch.ones(6, 6, dtype=torch.bool)]
        torch.testing.assert_close(sparse[0], dense, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(run(frames[:1]), dense, rtol=1e-9, atol=1e-9)
        for frame in frames[1:].split(1):
            sparse.append(run(frame))
            active.append(neuroflow.summary(model).streams["default"].active)
        neuroflow.disable_cache(model)
        reference = OldRows(describe(model))
        for frame, ours, reference.active in zip(frames.split(1), sparse, active, strict=True):
            torch.testing.assert_close(ours, run(frame), rtol=1e-9, atol=1e-9)
    assert 0 < active[-1].sum() < 36


@needs_timm
@pytest.mark.parametrize(
    "options", [{}, {"indices": [0, -2], "norm": True}, {"indices": 1, "output_fmt": "NLC"}], ids=str
)
@pytest.mark.parametrize("family", ["timm vit", "timm dinov2", "timm dinov3", "timm rope mixed"])
def test_forward_intermediates_takes_sparse_frames(family, options):
    model = tiny(family).double()

    def run(frame):
        tokens, maps = model.forward_intermediates(frame, **options)
        return [tokens, *maps]

    assert_keeps_old_rows(model, run, clip(frames=4).double())


@needs_timm
@pytest.mark.parametrize("norm", [False, True])
def test_a_backbone_of_timm_inside_of_transformers(norm):
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 5, "num_heads": 4}
    config = TimmBackboneConfig(backbone="vit_tiny_patch16_224", out_indices=[1, 3], use_pretrained_backbone=False)
    model = TimmBackbone(config, **sizes).eval().double()
    model._backbone.norm = norm
    if norm:
        model._backbone.model.norm = nn.LayerNorm(64).double()
    assert_keeps_old_rows(model, lambda frame: [*model(frame).feature_maps], clip(frames=4).double())
    neuroflow.enable_cache(model)
    with torch.inference_mode():
        output = model(clip(frames=1).double())
        assert describe(model).embedding(output).shape == (1, 64)


@needs_timm
def test_hidden_states_of_transformers_wrapper():
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args={"depth": 3, "img_size": 48, "patch_size": 8}
    )
    model = TimmWrapperModel(config).eval().double()

    def run(frame):
        output = model(pixel_values=frame, output_hidden_states=True)
        return [output.last_hidden_state, *output.hidden_states]

    assert_keeps_old_rows(model, run, clip(frames=4).double())


@needs_timm
def test_intermediates_that_stop_early_are_whole_frames():
    """Blocks behind them see nothing of such a frame, and must not go on from what they have of the one before."""
    model, frames = tiny("timm dinov2"), clip(frames=4)
    with torch.inference_mode():
        dense = [model.forward_intermediates(frame, [1], stop_early=True)[1][0] for frame in frames.split(1)]
        last = model(frames[3:])
        neuroflow.enable_cache(model, exact(threshold=1e-4))
        with pytest.warns(RuntimeWarning, match="went through only 2 of 4 blocks"):
            for frame, theirs in zip(frames.split(1), dense, strict=True):
                ours = model.forward_intermediates(frame, [1], stop_early=True)[1][0]
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        with pytest.warns(RuntimeWarning, match="other hidden states or feature maps are asked for"):
            torch.testing.assert_close(model(frames[3:]), last, rtol=0, atol=1e-5)


@needs_timm
def test_architecture_b_has_no_intermediates():
    model, frame = tiny("timm dinov2"), clip(frames=1)
    with torch.inference_mode():
        dense, _ = model.forward_intermediates(frame)
        neuroflow.enable_cache(model, exact(arch="B", threshold=1e-4))
        model(frame)
        with pytest.warns(
            RuntimeWarning, match="arch 'active' has no feature maps of all patches; .* run unpatched"
        ) as said:
            assert model.forward_intermediates(frame)[0].equal(dense)
    assert len(said) == 1


@needs_timm
def test_encode_takes_a_tower_of_timm():
    model, frames = tiny("timm vit"), clip(frames=2)
    with torch.inference_mode():
        dense = model(frames)
        neuroflow.enable_cache(model)
        output = neuroflow.encode(model, frames, ["a", "b"])
    torch.testing.assert_close(output, dense, rtol=1e-5, atol=1e-5)


@needs_timm
def test_calibrate_takes_a_tower_of_timm():
    calibration = neuroflow.calibrate(tiny("timm vit, averaged"), smooth_clip(), fidelity=0.99)
    assert calibration.fidelity >= 0.99


@needs_timm
@pytest.mark.parametrize("settings", [{}, {"do_pooling": False}, {"num_labels": 10}], ids=str)
def test_a_tower_inside_of_transformers_wrapper(settings):
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args={"depth": 2}, **settings)
    model = (TimmWrapperForImageClassification if "num_labels" in settings else TimmWrapperModel)(config).eval()
    frames = clip(frames=2, size=(224, 224))
    with torch.inference_mode():
        dense = model(pixel_values=frames[:1])
        neuroflow.enable_cache(model, exact(budget=0.5))
        sparse = [model(pixel_values=frame) for frame in (frames[:1], frames[:1], frames[1:])]
    assert [type(output) for output in sparse] == [type(dense)] * 3
    assert neuroflow.summary(model).streams["default"].active.sum() == 98
    embedding = describe(model).embedding
    if "num_labels" in settings:
        assert embedding(dense) is dense.logits
    elif "do_pooling" in settings:
        assert embedding(dense).equal(dense.last_hidden_state[:, 0])
    else:
        assert embedding(dense) is dense.pooler_output
    torch.testing.assert_close(embedding(sparse[1]), embedding(dense), rtol=1e-5, atol=1e-5)


@needs_timm
@pytest.mark.parametrize("settings", [{"global_pool": "avg"}, {"global_pool": "map"}, {"global_pool": "prr"}], ids=str)
def test_what_is_pooled_of_patches_has_at_least_one(settings):
    """CLS alone would do for a frame's tokens, but not for the mean of its patches."""
    model, frame = vision_transformer(**settings), clip(frames=1)
    neuroflow.enable_cache(model, exact(arch="B", threshold=0.5, floor=0))
    with torch.inference_mode():
        outputs = [model(frame) for _ in range(2)]
    assert neuroflow.summary(model).streams["default"].active.sum() == 1
    assert all(output.isfinite().all() for output in outputs)


def eva(**settings):
    return timm_class("models.eva", "Eva")(48, 8, embed_dim=64, depth=4, num_heads=4, **settings).eval()


def gated():
    model = vision_transformer(depth=4)
    for block in model.blocks:
        block.attn.gate = nn.Linear(64, 64)
    return model


def grouped():
    """Two heads of queries to each of keys and values."""
    return eva(attn_type="rope", qkv_fused=False, qk_norm=True, num_kv_heads=2, use_rot_pos_emb=True)


def post_normed():
    return vision_transformer(depth=4, block_fn=timm_class("models.vision_transformer", "ResPostBlock"))


def eva_post_normed():
    return eva(use_post_norm=True, global_pool="token")


def checkpointed():
    model = vision_transformer(depth=4)
    model.set_grad_checkpointing()
    return model


@needs_timm
@pytest.mark.parametrize("arch", "AE")
@pytest.mark.parametrize("make", [gated, grouped, post_normed, eva_post_normed, checkpointed])
def test_rarer_settings(make, arch):
    """An unchanged frame has an unchanged output, whichever of its patches are encoded again."""
    model, frame = make(), clip(frames=1)
    with torch.inference_mode():
        dense = model(frame)
        neuroflow.enable_cache(model, exact(arch=arch, budget=0.5))
        for _ in range(2):
            torch.testing.assert_close(model(frame), dense, rtol=1e-5, atol=1e-5 * float(dense.abs().max()))


@needs_timm
def test_frames_that_the_tower_pads_to_whole_patches():
    model, frames = vision_transformer(dynamic_img_size=True, dynamic_img_pad=True), clip(frames=3)[..., :43]
    with torch.inference_mode():
        dense = [model(frame) for frame in frames.split(1)]
        neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(threshold=0))
        for frame, output in zip(frames.split(1), dense, strict=True):
            torch.testing.assert_close(model(frame), output, rtol=1e-5, atol=1e-5)
    assert neuroflow.summary(model).streams["default"].grid == (6, 6)


@needs_timm
@pytest.mark.parametrize("family", ["timm dinov3", "timm pe"])
def test_rotary_positions_are_kept(family):
    model, frames = tiny(family), clip(frames=3)
    get_embed, calls = model.rope.get_embed, []
    model.rope.get_embed = lambda **shape: calls.append(shape) or get_embed(**shape)
    neuroflow.enable_cache(model)
    with torch.inference_mode():
        for frame in frames.split(1):
            model(frame)
    assert len(calls) == 1


@needs_timm
def test_rotary_positions_follow_the_size():
    model = tiny("timm dinov3")
    frames = [clip(frames=1, size=size) for size in ((32, 64), (64, 32), (32, 64))]
    with torch.inference_mode():
        dense = [model(frame) for frame in frames]
        neuroflow.enable_cache(model, exact(arch="E"))
        for stream, (frame, output) in enumerate(zip(frames, dense, strict=True)):
            with neuroflow.cache_context(model, stream):
                torch.testing.assert_close(model(frame), output, rtol=1e-5, atol=1e-5)


@needs_timm
@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"attn_mask": torch.zeros(37, 37)}, "attn_mask is given"), ({"is_causal": True}, "is_causal is True")],
    ids=["mask", "causal"],
)
def test_masks_are_refused(arguments, message):
    model, frame = vision_transformer(), clip(frames=1)
    neuroflow.enable_cache(model)
    with pytest.raises(ValueError, match=message):
        model(frame, **arguments)
    with pytest.raises(ValueError, match=message):
        model.forward_features(frame, **arguments)
    assert model(frame).shape == (1, 10)


@needs_timm
def test_dropping_patches_is_refused():
    model, frame = vision_transformer(patch_drop_rate=0.5), clip(frames=1)
    neuroflow.enable_cache(model)
    model(frame)
    with pytest.raises(ValueError, match=r"patch_drop_rate is 0\.5 in training mode"):
        model.train()(frame)


@needs_timm
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"attn_layer": "diff"}, "attention is a DiffAttention"),
        ({"block_fn": "ParallelScalingBlock"}, "blocks is a ParallelScalingBlock"),
        ({"block_fn": "DiffParallelScalingBlock"}, "blocks is a DiffParallelScalingBlock"),
        ({"block_fn": "ParallelThingsBlock"}, "blocks is a ParallelThingsBlock"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_what_is_computed_otherwise_is_refused(settings, named):
    if "block_fn" in settings:
        settings = {"block_fn": timm_class("models.vision_transformer", settings["block_fn"])}
    model = vision_transformer(**settings)
    attributes = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(TypeError, match=named):
        neuroflow.enable_cache(model)
    assert [dict(vars(module)) for module in model.modules()] == attributes


@needs_timm
def test_towers_that_begin_with_a_convolutional_network_are_refused():
    hybrid = timm_class("layers", "HybridEmbed")
    embed = functools.partial(hybrid, backbone=nn.Conv2d(3, 8, 8, 8))
    with pytest.raises(TypeError, match="patch_embed is a HybridEmbed"):
        neuroflow.enable_cache(vision_transformer(patch_size=1, embed_layer=embed))


@needs_timm
@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "beit_base_patch16_224"])
def test_other_towers_of_timm_are_unknown(name):
    with torch.device("meta"):
        model = timm_class("models", "create_model")(name, depth=1)
    with pytest.raises(TypeError, match=rf"{type(model).__name__} has no vision tower that NeuroFlow knows"):
        neuroflow.enable_cache(model)


@needs_timm
def test_the_real_vit_is_the_one_of_transformers(data, tmp_path):
    """Weights as timm names them, a photograph, and the same one with a dark square: tokens chosen and logits alike."""
    weights = data("weights/vit_tiny_patch16_224.safetensors")
    ours = timm_class("models", "create_model")("vit_tiny_patch16_224", checkpoint_path=str(weights)).eval()
    theirs = vit_tiny(weights, tmp_path)
    photo = photograph(sorted(data("imagenet256").glob("*.jpg"))[0])[None]
    darker = photo.clone()
    darker[..., 96:128, 64:112] *= 0.5
    for model in (ours, theirs):
        neuroflow.enable_cache(model)
    with torch.inference_mode():
        for frame in (photo, darker, darker):
            torch.testing.assert_close(ours(frame), theirs(pixel_values=frame).logits, rtol=1e-4, atol=1e-4)
    streams = [neuroflow.summary(model).streams["default"] for model in (ours, theirs)]
    assert streams[0].skipped == streams[1].skipped > 0.5
    assert streams[0].active.equal(streams[1].active)

"""Weights for partial frames: which frames they are of, alone and beside whole frames of other streams."""

import copy
import dataclasses
import json

import neuroflow
import pytest
import torch
from models import clip, inputs, tiny
from neuroflow.adapters import describe
from neuroflow.config import NeuroFlowConfig
from neuroflow.distillation import _trained
from neuroflow.engine import pooling
from neuroflow.engine.pooling import fold_head
from neuroflow.patch import engine_of
from neuroflow.weights import copy_sharing_weights, distilled_config, distilled_modules, load_weights, write
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")
GATE = NeuroFlowConfig(arch="B", budget=0.25, cut_share=None, cut_surprise=None, dense_above=1.0)


def saved(model, path, gate=GATE, scale=0.1):
    """Write other weights for all that may have some, and return them."""
    generator = torch.Generator().manual_seed(0)
    changed = {
        name: own.detach() + scale * torch.randn(own.shape, generator=generator).to(own)
        for name, own in _trained(model, describe(model), "all").items()
    }
    write(path, changed, {"config": json.dumps(dataclasses.asdict(gate))})
    return changed


def dense(name, model, frames):
    """The embeddings of a model that is not patched, or outside of any stream."""
    anatomy = describe(model)
    return anatomy.embedding(anatomy.tower(**inputs(name, frames))).detach().clone()


def embed(name, model, frames, *streams):
    """The embeddings of frames of some streams, one each."""
    with neuroflow.cache_context(model, *streams):
        return dense(name, model, frames)


ARCHITECTURES = [
    *(("siglip", arch) for arch in "ABCDE"),
    *(("vit", arch) for arch in "ABE"),
    *((name, arch) for name in ("clip", "dinov2", "dinov3") for arch in "BE"),
]


@pytest.mark.parametrize(("name", "arch"), ARCHITECTURES)
def test_whole_frames_keep_the_models_own(name, arch, tmp_path):
    """Key frames are the model's own to the bit, partial frames those of a model that has the other weights, which
    finds in its caches what the key frame left there.
    """
    path, gate = tmp_path / "weights.safetensors", dataclasses.replace(GATE, arch=arch)
    model = tiny(name)
    weights, other = saved(model, path, gate), copy.deepcopy(model)
    before, frames = copy.deepcopy(model.state_dict()), clip(4)
    neuroflow.enable_cache(other, gate)
    plain = embed(name, other, frames[:1], "a")
    neuroflow.enable_cache(model, weights=path)
    assert engine_of(model).config == gate
    assert torch.equal(embed(name, model, frames[:1], "a"), plain)
    for key, weight in weights.items():
        other.get_parameter(key).data.copy_(weight)  # unnoticed, so that the caches stay
    engine_of(other).derived.clear()
    for frame in frames[1:].split(1):
        found, expected = embed(name, model, frame, "a"), embed(name, other, frame, "a")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert neuroflow.summary(model).streams["a"].skipped > 0.5
    neuroflow.disable_cache(model)
    assert not torch.allclose(found, dense(name, model, frames[-1:]), atol=1e-2)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(dense(name, model, frames[:1]), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "arch"), [*ARCHITECTURES, ("siglip2", "E"), ("siglip2", "B")])
def test_beside_whole_frames_of_other_streams(name, arch, tmp_path):
    """Each stream as if it were alone, in whatever order."""
    path = tmp_path / "weights.safetensors"
    model = tiny(name)
    saved(model, path, dataclasses.replace(GATE, arch=arch))
    alone = copy_sharing_weights(model)
    neuroflow.enable_cache(model, weights=path)
    neuroflow.enable_cache(alone, weights=path)
    clips = dict(zip("abcd", (clip(4, seed=seed) for seed in range(4)), strict=True))
    starts = {"a": 1, "b": 0, "c": 1, "d": 2}  # the step that is a stream's first one
    whole = 0
    for step in range(4):
        streams = [stream for stream, start in starts.items() if start <= step]
        frames = [clips[stream][step - starts[stream]] for stream in streams]
        together = embed(name, model, torch.stack(frames), *streams)
        whole += {starts[stream] == step for stream in streams} == {True, False}
        for stream, frame, row in zip(streams, frames, together, strict=True):
            torch.testing.assert_close(row, embed(name, alone, frame[None], stream)[0], rtol=0, atol=1e-5)
    assert whole == 2


@pytest.mark.parametrize("arch", "AE")
def test_beside_whole_frames_end_to_end(arch, tmp_path):
    """In a tower whose tokens are no batch, with streams of different sizes."""
    path = tmp_path / "weights.safetensors"
    model, sizes = tiny("qwen3-vl"), {"a": (48, 48), "b": (32, 64), "c": (64, 64)}
    saved(model, path, dataclasses.replace(GATE, arch=arch))
    alone = copy_sharing_weights(model)
    neuroflow.enable_cache(model, weights=path)
    neuroflow.enable_cache(alone, weights=path)
    clips = {name: clip(3, size, seed) for seed, (name, size) in enumerate(sizes.items())}

    def merged(model, frames):
        with neuroflow.cache_context(model, *frames):
            return model(**inputs("qwen3-vl", [*frames.values()])).pooler_output.clone()

    for step in range(3):
        frames = {name: clips[name][step - start] for name, start in (("a", 0), ("b", 1), ("c", 0)) if step >= start}
        expected = [merged(alone, {name: frame}) for name, frame in frames.items()]
        torch.testing.assert_close(merged(model, frames), torch.cat(expected), rtol=0, atol=1e-5)


def test_what_is_derived_from_weights_is_kept_of_both(tmp_path, monkeypatch):
    path, folded = tmp_path / "weights.safetensors", []
    model = tiny("siglip")
    saved(model, path)
    monkeypatch.setattr(pooling, "fold_head", lambda head: folded.append(head) or fold_head(head))
    neuroflow.enable_cache(model, weights=path)
    frames = clip(4)
    for stream in "bcd":  # the first frame of a stream beside one of a stream that goes on
        embed("siglip", model, frames[:1], "a")
        embed("siglip", model, frames[1:3], "a", stream)
    assert folded == [describe(model).pool[0], engine_of(model).distilled[describe(model).pool[0]]]


def test_rounded_products_have_them_too(tmp_path):
    path = tmp_path / "weights.safetensors"
    model, frames = tiny("siglip"), clip(3)
    saved(model, path, scale=0.02)
    found = []
    for precision in ("model", "bfloat16"):
        neuroflow.enable_cache(model, dataclasses.replace(GATE, precision=precision), weights=path)
        found.append(torch.cat([embed("siglip", model, frame, "a") for frame in frames.split(1)]))
        engine = engine_of(model)
        neuroflow.disable_cache(model)
    rounded = {module for module, dtype in engine.kernels._layers if dtype == torch.bfloat16}
    parts = [part for module in engine.distilled.values() for part in module.modules()]
    assert rounded == {part for part in parts if isinstance(part, nn.Linear)}
    own = dense("siglip", model, frames)
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0], found[1])
    assert (found[0] - found[1]).norm() < 0.1 * (found[0] - own).norm()


@pytest.mark.parametrize("distilled", [False, True])
def test_whole_frames_beside_rounded_ones_are_not_rounded(distilled, tmp_path):
    """A stream's first frame in one pass with a later one of another."""
    path = tmp_path / "weights.safetensors"
    model, frames = tiny("siglip"), clip(3)
    saved(model, path, scale=0.02)
    expected = dense("siglip", model, frames[2:])
    config = dataclasses.replace(GATE, precision="bfloat16")
    neuroflow.enable_cache(model, config, weights=path if distilled else None)
    embed("siglip", model, frames[:1], "a")
    together = embed("siglip", model, frames[1:], "a", "b")
    neuroflow.reset_cache(model)
    embed("siglip", model, frames[:1], "a")
    alone = embed("siglip", model, frames[1:2], "a")
    torch.testing.assert_close(together[1:], expected, rtol=0, atol=1e-5)
    assert (together[:1] - alone).norm() < 1e-2 * alone.norm()


def test_of_the_models_dtype(tmp_path):
    path = tmp_path / "weights.safetensors"
    model = tiny("siglip")
    saved(model, path)
    model = model.bfloat16()
    assert {weight.dtype for weight in load_weights(model, path).values()} == {torch.bfloat16}
    neuroflow.enable_cache(model, weights=path)
    for frame in clip(3).bfloat16().split(1):
        assert embed("siglip", model, frame, "a").isfinite().all()


def test_patched_with_others(tmp_path):
    path = tmp_path / "weights.safetensors"
    model = tiny("siglip")
    saved(model, path)
    neuroflow.enable_cache(model, weights=path)
    engine = engine_of(model)
    neuroflow.enable_cache(model, GATE, weights=str(path))
    assert engine_of(model) is engine
    with pytest.raises(RuntimeError, match=r"already patched, with the weights .*weights.safetensors; call"):
        neuroflow.enable_cache(model, GATE)
    with pytest.raises(RuntimeError, match="already patched, with NeuroFlowConfig"):
        neuroflow.enable_cache(model, arch_c := dataclasses.replace(GATE, arch="C"), weights=path)
    neuroflow.disable_cache(model)
    neuroflow.enable_cache(model, arch_c, weights=path)
    assert engine_of(model).config.arch == "dual"


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "weights.safetensors"
    model = tiny("siglip")
    saved(model, path)
    wide = type(model)(type(model.config)(hidden_size=48)).eval()
    with pytest.raises(ValueError, match=r"has .*, which SiglipVisionModel does not have"):
        neuroflow.enable_cache(wide, weights=path)
    write(path, {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="holds no distilled weights; accepted is a file that neuroflow distill wrote"):
        neuroflow.enable_cache(model, weights=path)
    with pytest.raises(ValueError, match=r"missing: cannot be read .*; accepted is a safetensors file"):
        distilled_config(tmp_path / "missing")
    assert not neuroflow.is_patched(model) and not neuroflow.is_patched(wide)


def test_weights_of_what_has_parts_are_refused():
    model = tiny("siglip")
    model.get_submodule("encoder.layers.1.mlp").scale = nn.Parameter(torch.ones(()))
    weight = {"encoder.layers.1.mlp.scale": nn.Parameter(torch.ones(()))}
    with pytest.raises(
        ValueError, match=r"encoder.layers.1.mlp.scale belongs to a SiglipMLP, which has submodules; accepted"
    ):
        distilled_modules(model, describe(model), weight)


def test_states_are_of_these_weights_too(tmp_path):
    path, state = tmp_path / "weights.safetensors", tmp_path / "state.safetensors"
    model = tiny("siglip")
    saved(model, path)
    neuroflow.enable_cache(model, weights=path)
    embed("siglip", model, clip(1), "a")
    neuroflow.save_state(model, state)
    assert neuroflow.load_state(model, state) == ["a"]
    neuroflow.disable_cache(model)
    neuroflow.enable_cache(model, GATE)
    with pytest.raises(ValueError, match="its weights is"):
        neuroflow.load_state(model, state)

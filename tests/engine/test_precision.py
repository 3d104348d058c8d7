"""precision="bfloat16": that what is encoded in part is multiplied in bfloat16, and nothing else is."""

import functools

import neuroflow
import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES, clip, exact, inputs, tiny
from neuroflow.adapters import describe
from neuroflow.engine import kernels
from neuroflow.patch import engine_of
from torch import nn
from torch.overrides import TorchFunctionMode

from neuroflow_kernels import use_backend, ways

pytestmark = pytest.mark.usefixtures("one_thread")
ARCHITECTURES = ("B", "C", "D", "E")


def run(model, family, frames, names=("default",), **settings):
    """Embeddings [T, S, D] of frames [T, S, 3, H, W], the active patches [T, S, N], and the streams' caches."""
    neuroflow.enable_cache(model, exact(**{"threshold": 1e-4, "floor": 2} | settings))
    results, active = [], []
    for batch in frames:
        with torch.inference_mode(), neuroflow.cache_context(model, *names):
            results.append(describe(model).embedding(model(**inputs(family, batch))))
        active.append(torch.stack([engine_of(model).streams[name].active for name in names]))
    caches = [dict(engine_of(model).streams[name].tensors) for name in names]
    neuroflow.disable_cache(model)
    return torch.stack(results), torch.stack(active), caches


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_frames_in_part_are_rounded_and_key_frames_are_not(family, arch):
    model = tiny(family)
    if arch == "B" and describe(model).needs_every_token:
        pytest.skip(f"{family} makes a map of all patches, which B does not serve")
    frames = clip(frames=4)[:, None]
    plain, active, _ = run(model, family, frames, arch=arch)
    rounded, same, (caches,) = run(model, family, frames, arch=arch, precision="bfloat16")
    assert torch.equal(active, same) and active[0].all() and not active[1:].all()
    assert torch.equal(rounded[0], plain[0])
    assert rounded.dtype == torch.float32 and not torch.equal(rounded[1:], plain[1:])
    assert F.cosine_similarity(rounded[1:].flatten(1), plain[1:].flatten(1)).min() > 0.9995
    dtypes = {name: {of.dtype for key, of in caches.items() if key[0] == name} for name in ("key", "value")}
    assert dtypes == dict.fromkeys(("key", "value"), {torch.bfloat16} if arch == "E" else set())
    assert caches.get("output", rounded).dtype == torch.float32


@pytest.mark.parametrize("way", ["rows", "torch", "packed", None])
def test_products_are_of_bfloat16_factors(monkeypatch, way):
    """Every linear layer and attention of a frame in part, as the operator got them, whichever way it multiplies."""
    model, frames = tiny("siglip"), clip(frames=2)[:, None]
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (F.linear, F.scaled_dot_product_attention):
                seen.append([each.dtype for each in args if isinstance(each, torch.Tensor)])
            return function(*args, **kwargs or {})

    def by_kernel(tokens, layer, kernel):
        seen.append([tokens.dtype, layer.weight.dtype, layer.bias.dtype])
        return kernel(tokens, layer)

    def attending(*heads, kernel):
        seen.append([each.dtype for each in heads[:3]])
        return kernel(*heads)

    for name in ("rows", "packed"):
        monkeypatch.setitem(ways.LINEAR, name, functools.partial(by_kernel, kernel=ways.LINEAR[name]))
    monkeypatch.setitem(ways.ATTENTION, "rows", functools.partial(attending, kernel=ways.ATTENTION["rows"]))
    attention = "rows" if way == "rows" else "torch"
    monkeypatch.setattr(kernels, "linear_ways", lambda dtype: [way])
    monkeypatch.setattr(kernels, "attention_ways", lambda dtype, scores: [attention])
    between = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, given, made: between.append((given[0].dtype, made.dtype)))
    neuroflow.enable_cache(model, exact(threshold=1e-4, precision="bfloat16"))
    with use_backend("auto" if way else "reference"), Watch():
        model(pixel_values=frames[0])
        assert seen and all(dtype == torch.float32 for dtypes in seen for dtype in dtypes)
        seen.clear()
        model(pixel_values=frames[1])
    rounded = [dtypes for dtypes in seen if torch.bfloat16 in dtypes]
    assert len(rounded) == 4 * (6 + 1) + 3 and all(set(dtypes) == {torch.bfloat16} for dtypes in rounded)
    assert set(between) == {(torch.float32, torch.float32)}


def test_streams_beside_each_other():
    """Of which one has a key frame: it is as by itself, up to rounding, and so are the others."""
    model = tiny("siglip")
    clips = [clip(seed=0, frames=4), clip(seed=1, frames=4)]
    clips[1][2] = clip(seed=7, frames=1)[0]  # another scene
    frames = torch.stack(clips, 1)
    together, active, _ = run(model, "siglip", frames, ("a", "b"), precision="bfloat16", cut_share=0.5)
    assert active[2, 1].all() and not active[2, 0].all()
    for number in range(2):
        alone, same, _ = run(model, "siglip", frames[:, number : number + 1], precision="bfloat16", cut_share=0.5)
        assert torch.equal(active[:, number], same[:, 0])
        torch.testing.assert_close(together[:, number], alone[:, 0], rtol=0, atol=0.05)


def test_new_weights_take_effect_at_once():
    model, frames = tiny("siglip"), clip(frames=4)[:, None]
    settings = exact(threshold=1e-4, precision="bfloat16", arch="B")
    neuroflow.enable_cache(model, settings)
    with torch.no_grad():
        for batch in frames[:2]:
            model(pixel_values=batch)
        for layer in describe(model).layers:
            layer.mlp.fc1.weight.mul_(2)
        found = [model(pixel_values=batch).pooler_output for batch in frames[2:]]  # a key frame, and a part of one
        neuroflow.disable_cache(model)
        neuroflow.enable_cache(model, settings)
        expected = [model(pixel_values=batch).pooler_output for batch in frames[2:]]
    assert all(map(torch.equal, found, expected))


def test_weights_are_rounded_once(monkeypatch):
    model, rounded = tiny("siglip"), []

    class Counted(kernels.Layer):
        def __init__(self, weight, *others):
            super().__init__(weight, *others)
            if weight.dtype == torch.bfloat16:
                rounded.append(weight)

    monkeypatch.setattr(kernels, "Layer", Counted)
    run(model, "siglip", clip(frames=4)[:, None], precision="bfloat16")
    assert len(rounded) == 4 * 6 + 3


def test_autocast_has_no_say_once_it_is_off():
    """Nor is what was found out under it kept: rows are rounded again, and to the same."""
    model, frames = tiny("siglip"), clip(frames=4)[:, None]
    expected, _, _ = run(model, "siglip", frames, precision="bfloat16")
    neuroflow.enable_cache(model, exact(threshold=1e-4, floor=2, precision="bfloat16"))
    with torch.autocast("cpu", torch.bfloat16):
        for batch in frames[:2]:
            model(pixel_values=batch)
    neuroflow.reset_cache(model, "default")
    found = [model(pixel_values=batch).pooler_output for batch in frames]
    assert torch.equal(torch.stack(found), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes_stay_as_they_are(dtype):
    model, frames = tiny("siglip").to(dtype), clip(frames=3)[:, None].to(dtype)
    plain, _, before = run(model, "siglip", frames)
    found, _, after = run(model, "siglip", frames, precision="bfloat16")
    assert torch.equal(found, plain)
    assert [tensor.dtype for tensor in after[0].values()] == [tensor.dtype for tensor in before[0].values()]


def test_keys_and_values_take_half():
    model, frames = tiny("siglip"), clip(frames=2)[:, None]

    def held(precision):
        caches = run(model, "siglip", frames, precision=precision)[2][0]
        return sum(of.nbytes for name, of in caches.items() if name[0] in ("key", "value"))

    assert 0 < 2 * held("bfloat16") == held("model")

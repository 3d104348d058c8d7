"""Passes of many frames of one stream: a clip in one call is its frames one after the other."""

import neuroflow
import pytest
import torch
from models import FAMILIES, clip, exact, inputs, tiny, values
from neuroflow.adapters import describe
from neuroflow.patch import engine_of
from torch.utils._pytree import tree_leaves
from transformers import AutoBackbone

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:neuroflow")]

PICKED = ("siglip", "clip", "vit", "dinov2 with registers", "dinov3", "sam", "qwen2.5-vl", "qwen3-vl")
CASES = [(family, arch) for family in PICKED for arch in FAMILIES[family].architectures]
ORDER = "abacabcabaaab"  # whose frame each is: streams of unequal length, interleaved


def frames_of(names):
    """A frame for each of `names` [E, 3, H, W]: each stream's own, with a cut, a NaN and a still frame among them."""
    own = {name: list(clip(frames=names.count(name), seed=ord(name))) for name in set(names)}
    own["a"][2] = clip(frames=1, seed=99)[0]  # a cut
    own["a"][4] = own["a"][3]
    own["b"][1] = own["b"][1].clone()
    own["b"][1][0, 0, 0] = torch.nan
    return torch.stack([own[name].pop(0) for name in names])


def run(model, family, names, frames, length):
    """What calls of so many frames give, by name of output, and the reports, all in the order of the frames."""
    outputs, reports = [], []
    with torch.inference_mode(), neuroflow.cache_context(model, *names):
        for pixels in frames.split(length):
            torch.manual_seed(0)
            outputs.append(values(model(**inputs(family, pixels))))
            reports += neuroflow.last_pass(model)
    neuroflow.reset_cache(model)
    joined = {}
    for name in outputs[0]:
        parts = [output[name] for output in outputs]
        if parts[0].ndim == 3:  # B pads to its longest frame
            longest = max(part.shape[1] for part in parts)
            parts = [torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts]
        joined[name] = torch.cat(parts)
    return joined, reports


@pytest.fixture
def parallel(monkeypatch):
    """Attention as a GPU has it: all entries at once, by a table of which row is whose."""
    monkeypatch.setattr("neuroflow.engine.passes.is_parallel", lambda device: True)


@pytest.mark.parametrize("family", ["siglip", "clip", "dinov2 with registers", "dinov3"])
def test_a_clip_whose_frames_are_attended_from_at_once(family, parallel):
    test_a_clip_is_its_frames_one_after_the_other(family, "E", torch.float64)


@pytest.mark.usefixtures("parallel")
@pytest.mark.parametrize("length", [2, 5])
def test_a_clip_attended_from_at_once_may_go_on(length):
    test_a_clip_may_go_on_in_the_next_call(length)


def test_entries_attended_from_at_once_tell_the_gate_the_same(monkeypatch):
    model, frames, found = tiny("vit").double(), clip(frames=9).double(), []
    neuroflow.enable_cache(model, exact(score="staleness", threshold=0.05))
    for at_once in (False, True):
        monkeypatch.setattr("neuroflow.engine.passes.is_parallel", lambda device, at_once=at_once: at_once)
        with torch.inference_mode(), neuroflow.cache_context(model, "a"):
            for pixels in frames.split(3):
                output = model(pixel_values=pixels)
        skipped = [report.skipped for report in neuroflow.last_pass(model)]
        found.append((*values(output).values(), engine_of(model).streams["a"].attention, torch.tensor(skipped)))
        neuroflow.reset_cache(model)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10 if one.dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize(
    ("family", "arch", "dtype"),
    [(*case, torch.float32) for case in CASES] + [(family, "E", torch.float64) for family in PICKED],
    ids=str,
)
def test_a_clip_is_its_frames_one_after_the_other(family, arch, dtype):
    """Of three streams interleaved, with key frames of every kind within the pass."""
    model, frames = tiny(family).to(dtype), frames_of(ORDER).to(dtype)
    config = exact(arch=arch, threshold=1e-4, cut_share=0.5, max_age=3)
    neuroflow.enable_cache(model, config)
    expected, single = run(model, family, ORDER, frames, 1)
    found, reports = run(model, family, ORDER, frames, len(frames))
    assert [report.key_frame for report in reports] == [report.key_frame for report in single]
    assert {report.key_frame for report in reports} == {"first", "cut", "nonfinite", "age", None}
    for ours, theirs in zip(reports, single, strict=True):
        assert ours.stream == theirs.stream and torch.equal(ours.active, theirs.active)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for name, theirs in expected.items():
        ours = found[name]
        assert ours.shape == theirs.shape and torch.equal(ours.isnan(), theirs.isnan())
        scale = theirs.nan_to_num().abs().max()
        assert (ours - theirs).nan_to_num().abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("length", [2, 5])
def test_a_clip_may_go_on_in_the_next_call(length):
    model, frames = tiny("siglip").double(), frames_of(ORDER).double()
    neuroflow.enable_cache(model, exact(arch="E", threshold=1e-4, cut_share=0.5, max_age=3))
    expected, _ = run(model, "siglip", ORDER, frames, 1)
    found, _ = run(model, "siglip", ORDER, frames, length)
    for name, theirs in expected.items():
        torch.testing.assert_close(found[name], theirs, rtol=0, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("settings", [{"reference": "ema"}, {"reference": "dual"}, {"refresh": "rolling"},
    {"budget": 5, "threshold": None}, {"precision": "bfloat16"}, {"signal": "pixel"}, {"signal": "embedding"},
    {"blend": 0.5}, {"ladder": (4, 8, 16)}, {"dilation": 1}, {"dense_above": 0.2}], ids=str)  # fmt: skip
def test_whatever_the_gate(settings):
    """Frames of which every patch differs from every other, so that nothing hangs on the last bit."""
    model = tiny("siglip")
    frames = clip(frames=8, changed=9)
    frames[4] = frames[3]
    neuroflow.enable_cache(model, exact(**{"threshold": 1e-3, "max_age": 5} | settings))
    expected, single = run(model, "siglip", "a", frames, 1)
    found, reports = run(model, "siglip", "a", frames, 8)
    assert [report.key_frame for report in reports] == [report.key_frame for report in single]
    assert any(0 < report.skipped < 1 for report in reports)
    if "budget" not in settings and "ladder" not in settings:
        assert all(torch.equal(a.active, b.active) for a, b in zip(reports, single, strict=True))
        for name, theirs in expected.items():
            torch.testing.assert_close(found[name], theirs, rtol=0, atol=1e-4 if "precision" not in settings else 1e-2)


def test_names_are_dealt_across_calls():
    """Three cameras in one batch, in three calls, or two calls of two names: the same streams."""
    model, frames = neuroflow.enable_cache(tiny("siglip"), exact(threshold=1e-4)), clip(frames=6)
    for lengths in ((3, 3), (1,) * 6, (2, 2, 2), (6,)):
        streams = []
        with torch.inference_mode(), neuroflow.cache_context(model, "base", "left", "right"):
            for pixels in frames.split(lengths):
                model(pixel_values=pixels)
                streams += [report.stream for report in neuroflow.last_pass(model)]
        assert streams == ["base", "left", "right"] * 2
        assert {stream.frames for stream in neuroflow.summary(model).streams.values()} == {2}
        neuroflow.reset_cache(model)


def test_a_block_that_ends_between_its_names_says_so():
    model, frames = neuroflow.enable_cache(tiny("siglip")), clip(frames=4)
    said = r"streams is \('a', 'b', 'c'\), and 4 frames were encoded; accepted is a multiple of 3"
    with pytest.raises(ValueError, match=said), neuroflow.cache_context(model, "a", "b", "c"):
        model(pixel_values=frames)
    with pytest.raises(KeyError), neuroflow.cache_context(model, "a", "b", "c"):
        model(pixel_values=frames[:1])
        raise KeyError("the block's own error is the one that is seen")


def test_a_call_that_fails_is_dealt_no_name():
    model, frames = neuroflow.enable_cache(tiny("siglip"), exact(threshold=1e-4)), clip(frames=2)
    layer = neuroflow.adapters.describe(model).layers[1]
    with neuroflow.cache_context(model, "a", "b"):
        model(pixel_values=frames[:1])
        hook = layer.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(pixel_values=frames[1:])
        hook.remove()
        model(pixel_values=frames[1:])
    assert [*neuroflow.summary(model).streams] == ["a", "b"]


def test_a_pass_that_fails_makes_the_next_frame_of_each_of_its_streams_a_key_frame():
    model, frames = neuroflow.enable_cache(tiny("siglip"), exact(threshold=1e-4)), clip(frames=4)
    neuroflow.encode(model, frames[:3], ["a", "b", "other"])
    layer = neuroflow.adapters.describe(model).layers[1]
    hook = layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        neuroflow.encode(model, frames, ["a", "b", "a", "a"])
    hook.remove()
    neuroflow.encode(model, frames, ["a", "b", "other", "a"])
    assert [report.key_frame for report in neuroflow.last_pass(model)] == ["failed", "failed", None, None]


def test_gaps_within_a_clip():
    model, frames = neuroflow.enable_cache(tiny("siglip"), exact(threshold=1e-4)), clip(frames=5)
    neuroflow.encode(model, frames, ["a", "a", "b", "a", "b"], [7, 8, 1, 10, 2])
    reasons = [report.key_frame for report in neuroflow.last_pass(model)]
    assert reasons == ["first", None, "first", "gap", None]
    neuroflow.encode(model, frames[:2], ["a", "b"], [11, 4])
    assert [report.key_frame for report in neuroflow.last_pass(model)] == [None, "gap"]
    with pytest.raises(ValueError, match="frame_ids holds 1 numbers for 2 streams"):
        neuroflow.encode(model, frames[:2], ["a", "b"], [11])


@pytest.mark.parametrize("arch", "ABCDE")
def test_a_clip_without_a_name_leaves_nothing_behind(arch):
    model, frames = tiny("siglip"), clip(frames=5)
    neuroflow.enable_cache(model, exact(arch=arch, threshold=1e-4))
    with torch.inference_mode():
        first, second = (model(pixel_values=frames).pooler_output for _ in range(2))
    assert torch.equal(first, second) and not neuroflow.summary(model).streams
    assert [report.key_frame for report in neuroflow.last_pass(model)] == ["first", None, None, None, None]
    expected, _ = run(model, "siglip", "a", frames, 5)
    assert torch.equal(first, expected["pooler_output"])


@pytest.mark.parametrize("family", PICKED)
def test_nothing_skipped_is_the_models_own_batch(family):
    model, frames = tiny(family), clip(frames=5)
    with torch.inference_mode():
        expected = values(model(**inputs(family, frames)))
        neuroflow.enable_cache(model, exact(threshold=0))
        found = values(model(**inputs(family, frames)))
    for name, theirs in expected.items():
        torch.testing.assert_close(found[name], theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"cut_share": None, "cut_surprise": None}], ids=str)
def test_unrelated_images_are_key_frames_whatever_the_settings(settings):
    model = tiny("siglip")
    images = torch.cat([clip(frames=1, seed=seed) for seed in range(4)])
    with torch.inference_mode():
        expected = model(pixel_values=images).pooler_output
        neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(**settings))
        found = model(pixel_values=images).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [report.key_frame for report in neuroflow.last_pass(model)] == ["first", "cut", "cut", "cut"]


def test_a_batch_may_be_streams_or_run_dense():
    model, frames = tiny("siglip"), clip(frames=3)
    neuroflow.enable_cache(model, exact(threshold=1e-4, batch="streams"))
    for _ in range(2):
        model(pixel_values=frames)
    assert [*neuroflow.summary(model).streams] == [0, 1, 2]
    assert [report.skipped for report in neuroflow.last_pass(model)] == pytest.approx([32 / 36] * 3)
    neuroflow.disable_cache(model)
    expected = model(pixel_values=frames).pooler_output
    neuroflow.enable_cache(model, exact(threshold=1e-4, batch="dense"))
    with pytest.warns(RuntimeWarning, match="holds 3 frames without names, and batch is 'dense'; they run unpatched"):
        found = model(pixel_values=frames).pooler_output
    assert torch.equal(found, expected) and not neuroflow.last_pass(model)
    model(pixel_values=frames[:1])
    assert [*neuroflow.summary(model).streams] == ["default"]


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_a_video_of_qwen_is_a_clip(family):
    """A row of grid_thw has one name, and each step in time is a frame of it; two videos and an image in one call."""
    model, frames = tiny(family).double(), clip(frames=6).double()
    given = inputs(family, frames)
    grid = given["grid_thw"][0].tolist()[1:]
    one = {**given, "grid_thw": torch.tensor([[3, *grid], [2, *grid], [1, *grid]])}
    with torch.inference_mode():
        plain, together = values(model(**given)), values(model(**one))
    for name, theirs in plain.items():  # a step in time attends to itself
        torch.testing.assert_close(together[name], theirs, rtol=0, atol=1e-12)
    neuroflow.enable_cache(model, exact(arch="E", threshold=1e-4))
    expected, _ = run(model, family, "aaabbc", frames, 1)
    with torch.inference_mode(), neuroflow.cache_context(model, "a", "b", "c"):
        found = values(model(**one))
    reports = neuroflow.last_pass(model)
    assert [report.stream for report in reports] == [*"aaabbc"]
    assert [report.key_frame for report in reports] == ["first", None, None, "first", None, "first"]
    for name, theirs in expected.items():
        torch.testing.assert_close(found[name], theirs, rtol=0, atol=1e-10)
    with torch.inference_mode():
        nameless = values(model(**one))
    assert [report.key_frame for report in neuroflow.last_pass(model)] == ["first", None, None, "first", None, "first"]
    for name, theirs in expected.items():
        torch.testing.assert_close(nameless[name], theirs, rtol=0, atol=1e-10)


def test_hidden_states_of_a_clip():
    model, frames = tiny("siglip").double(), clip(frames=4).double()
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    with torch.inference_mode(), neuroflow.cache_context(model, "a"):
        singles = [model(pixel_values=frame, output_hidden_states=True).hidden_states for frame in frames.split(1)]
    neuroflow.reset_cache(model)
    with torch.inference_mode(), neuroflow.cache_context(model, "a"):
        together = model(pixel_values=frames, output_hidden_states=True).hidden_states
    for number, ours in enumerate(together):
        torch.testing.assert_close(ours, torch.cat([each[number] for each in singles]), rtol=0, atol=1e-10)


def test_what_the_pooled_output_reads_is_known_from_the_pass_before():
    model, frames = tiny("vit"), clip(frames=6)
    neuroflow.enable_cache(model, exact(score="staleness", threshold=0.05))
    for pixels in frames.split(3):
        neuroflow.encode(model, pixels, ["a"] * 3)
        attention = engine_of(model).streams["a"].attention
        assert attention is not None and attention.mean() == pytest.approx(1, abs=1e-5)


def test_a_call_of_more_patches_than_a_pass_may_hold_is_several_passes():
    model, frames = tiny("siglip").double(), frames_of(ORDER).double()
    neuroflow.enable_cache(model, exact(threshold=1e-4, cut_share=0.5, max_age=3))
    expected, single = run(model, "siglip", ORDER, frames, 13)
    neuroflow.disable_cache(model)
    neuroflow.enable_cache(model, exact(threshold=1e-4, cut_share=0.5, max_age=3, pass_patches=3 * 36 + 1))
    packed = []
    describe(model).last.register_forward_hook(lambda _, given, output: packed.append(given[0].shape))
    found, reports = run(model, "siglip", ORDER, frames, 13)
    assert len(packed) == 5 and neuroflow.summary(model).pass_patches == 109
    assert [report.key_frame for report in reports] == [report.key_frame for report in single]
    for name, theirs in expected.items():
        torch.testing.assert_close(found[name], theirs, rtol=0, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("family", ["dinov2 backbone", "naflex", "qwen3-vl", "qwen2.5-vl"])
def test_whatever_the_outputs(family):
    """Feature maps, padded batches and tokens that lie end to end are put together again."""
    make = {"naflex": "siglip2", "dinov2 backbone": "dinov2"}.get(family, family)
    model, frames = tiny(make), clip(frames=5)
    if family == "dinov2 backbone":
        settings = {name: value for name, value in model.config.to_dict().items() if not name.startswith("out_")}
        config = type(model.config)(**settings, out_indices=[1, 3])
        model = AutoBackbone.from_config(config).eval()
    given, outputs, blocks = inputs(make, frames), [], []
    if "grid_thw" in given:  # videos of three steps and of two
        rows, columns = given["grid_thw"][0, 1:].tolist()
        given["grid_thw"] = torch.tensor([[3, rows, columns], [2, rows, columns]])
    describe(model).layers[0].register_forward_hook(lambda *_: blocks.append(1))
    for most in (2**16, 2 * 36):
        neuroflow.enable_cache(model, exact(threshold=1e-4, pass_patches=most))
        with torch.inference_mode():
            outputs.append(tree_leaves(model(**given)))
        neuroflow.disable_cache(model)
    assert len(blocks) == 1 + 3
    assert len(outputs[0]) == len(outputs[1])
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

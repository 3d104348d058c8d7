"""Models that read more of a tower than its output: feature maps of several stages, hidden states, a second tower.

What they make of it as wholes is in tests/adapters/test_whole_models.py.
"""

import inspect

import neuroflow
import pytest
import torch
from models import clip, exact, installed
from neuroflow.adapters import describe, towers
from neuroflow.patch import engine_of
from whole_models import CLIP, PATCHES, WHOLE, assert_close, made, run

pytestmark = pytest.mark.usefixtures("one_thread")


def clip_tower():
    torch.manual_seed(0)
    return installed("CLIPVisionModel")(installed("CLIPVisionConfig")(**CLIP)).eval()


def test_layers_are_asked_for_by_number_too():
    """The others are None, and have no cache."""
    model, frames = clip_tower().double(), clip(frames=2)
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
    case, frames = WHOLE["dinov2 backbone"], clip(frames=4)
    model = made("dinov2 backbone")
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
    case = WHOLE["dinov2 backbone"]
    clips = {name: clip(frames=3, seed=seed, changed=2 + seed).double() for seed, name in enumerate("ab")}
    model = made("dinov2 backbone")
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
    model, frames = made("dinov2 backbone"), clip(frames=3).double()
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
        neuroflow.enable_cache(made(name), exact(arch="B"))


def test_a_model_with_two_towers_is_patched_by_name():
    case = WHOLE["video-llava"]
    model, frames = made("video-llava"), clip(frames=2)
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
    with pytest.raises(ValueError, match=rf"with 2 patched towers; .*get_submodule\(\.\.\.\) with ({names}), "):
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
    config = installed("CLIPVisionConfig")(**CLIP)
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
    model = made("dinov2 backbone")
    modules = [model, *describe(model).layers]
    before = [inspect.signature(module.forward) for module in modules]
    neuroflow.enable_cache(model)
    assert [inspect.signature(module.forward) for module in modules] == before


@pytest.mark.parametrize(
    "name", ["dinov2 backbone", "dinov2 backbone, as they are", "dinov3 backbone", "vitdet backbone"]
)
def test_a_backbone_s_embedding_is_the_mean_of_its_last_map(name):
    model, frames = made(name).float(), clip(frames=4)
    assert neuroflow.calibrate(model, frames, fidelity=0.9).fidelity >= 0.9
    with torch.inference_mode():
        output = model(frames[:1])
    features = output.feature_maps[-1]
    patches = features.flatten(2).mean(2) if features.ndim == 4 else features.mean(1)
    torch.testing.assert_close(describe(model).embedding(output), patches)


def test_hidden_states_of_architecture_b_are_padded_as_its_output_is():
    clips = [clip(frames=2, seed=changed, changed=changed).double() for changed in (5, 8)]
    model = clip_tower().double()
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

"""Key frames of another light: a camera that turns to infrared, fog that lifts, a change of contrast."""

import math

import neuroflow
import pytest
import torch
from models import clip, exact, tiny, values
from neuroflow.engine import scores
from neuroflow.patch import engine_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:neuroflow")]
NEVER = 100.0  # a threshold that no surprise reaches


def coloured(frames=6, moving=0, seed=0):
    """The same colourful picture again and again [T, 3, 48, 48], of which so many patches are new in each frame."""
    return clip(frames=frames, changed=moving, seed=seed) * 0.8


def grey(frames):
    return frames.mean(1, keepdim=True).expand_as(frames)


def faded(frames, contrast):
    return frames.mean((1, 2, 3), keepdim=True) * (1 - contrast) + frames * contrast


def reasons(model, frames, names=()):
    with torch.inference_mode():
        if names:
            with neuroflow.cache_context(model, *names):
                model(pixel_values=frames)
            return [report.key_frame for report in neuroflow.last_pass(model)]
        return [neuroflow.last_pass(model)[0].key_frame for frame in frames.split(1) if model(pixel_values=frame)]


def test_it_is_contrast_or_saturation_of_what_is_not_encoded():
    generator = torch.Generator().manual_seed(0)
    held = torch.rand(2, 35, 3, generator=generator) * 2 - 1
    active = torch.rand(2, 35, generator=generator) < 0.3
    assert scores.light_change(held, held, active).eq(0).all()
    twice = held * torch.tensor([2.0, 1.0])[:, None, None]
    moved = torch.where(active[..., None], torch.nan, twice)
    change = scores.light_change(moved, held, active)
    assert change[0] == pytest.approx(math.log(2), abs=1e-2) and change[1] == 0
    without_colour = held.mean(2, keepdim=True).expand_as(held)
    assert (scores.light_change(without_colour, held, active) > 1).all()
    assert scores.light_change(held, held + 0.3, active).lt(0.2).all()  # brighter is no other contrast
    assert scores.light_change(held, held, torch.ones_like(active)).eq(0).all()


@pytest.mark.parametrize("family", ["siglip", "vit"])
def test_another_light_is_a_key_frame(family):
    model = neuroflow.enable_cache(
        tiny(family), exact(threshold=NEVER, floor=0 if family == "vit" else 1, cut_light=0.12)
    )
    day = coloured()
    assert reasons(model, torch.cat((day, grey(day), day))) == [
        "first",
        *[None] * 5,
        "cut",
        *[None] * 5,
        "cut",
        *[None] * 5,
    ]
    lifting = torch.cat([faded(day[:1], 0.3 + 0.05 * step) for step in range(15)])
    neuroflow.reset_cache(model)
    found = reasons(model, lifting)
    assert 5 <= found.count("cut") < 15 and found[-1] in ("cut", None)
    neuroflow.disable_cache(model)
    neuroflow.enable_cache(model, exact(threshold=NEVER, floor=1))
    assert reasons(model, torch.cat((day, grey(day)))).count("cut") == 0


def test_what_moves_does_not_change_the_light_of_the_rest():
    model = neuroflow.enable_cache(tiny("siglip"), exact(threshold=1e-4, cut_light=0.12))
    frames = coloured(frames=20, moving=12)
    assert set(reasons(model, frames)[1:]) == {None}
    neuroflow.disable_cache(model)
    neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig.published())
    assert "colours" not in engine_of(model).streams and neuroflow.NeuroFlowConfig.published().cut_light is None


def test_slow_change_adds_up_since_each_patch_was_encoded():
    """Every patch is encoded in its turn, so that what is not stays near: there is no key frame."""
    model = neuroflow.enable_cache(tiny("siglip"), exact(threshold=NEVER, floor=1, cut_light=0.12))
    day = coloured(frames=1)
    lifting = torch.cat([faded(day, 0.5 + 0.02 * step) for step in range(12)])
    assert "cut" in reasons(model, lifting)
    neuroflow.disable_cache(model)
    neuroflow.enable_cache(model, exact(budget=18, threshold=None, score="staleness", cut_light=0.12))
    assert "cut" not in reasons(model, lifting)


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")], ids=["a clip", "three cameras"])
def test_each_stream_of_a_pass_has_its_own_light(names):
    model = neuroflow.enable_cache(tiny("siglip").double(), exact(threshold=NEVER, cut_light=0.12))
    day = coloured(frames=3).double()
    mixed = torch.cat((day[:2], grey(day[:1]))) if len(names) > 1 else day
    assert reasons(model, day, names)[0] == "first"
    expected = [None, None, "cut"] if len(names) > 1 else [None] * 3
    assert reasons(model, mixed, names) == expected


def test_the_light_is_saved_with_a_stream(tmp_path):
    model = neuroflow.enable_cache(tiny("siglip"), exact(threshold=NEVER, cut_light=0.12))
    day = coloured(frames=2)
    reasons(model, day)
    neuroflow.save_state(model, tmp_path / "state.safetensors")
    neuroflow.reset_cache(model)
    neuroflow.load_state(model, tmp_path / "state.safetensors")
    assert reasons(model, grey(day[:1])) == ["cut"]
    assert values(model(pixel_values=day[:1]))["pooler_output"].isfinite().all()

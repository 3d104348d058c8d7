"""Streams in which nothing is ever skipped: cameras that take turns in one, and a camera that moves."""

import warnings

import neuroflow
import pytest
import torch
from models import clip, tiny
from neuroflow.engine.turns import IN_TURN, LONG

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("left", "right", "wrist", "base")


def told(model, batches, *names):
    """What is said, and why frames were key frames, while a model encodes batches [S, 3, H, W] one after the other."""
    reasons = []
    with warnings.catch_warnings(record=True) as caught, torch.inference_mode():
        warnings.simplefilter("always")
        for batch in batches:
            if names:
                with neuroflow.cache_context(model, *names):
                    for frame in batch.split(1):
                        model(pixel_values=frame)
                        reasons += neuroflow.last_pass(model)
            else:
                model(pixel_values=batch)
                reasons += neuroflow.last_pass(model)
    return [str(each.message) for each in caught], [report.key_frame for report in reasons]


def turns(scenes, steps=12):
    """Frames [steps, scenes, 3, H, W] of cameras, in each of which a patch changes from step to step."""
    return torch.stack([clip(steps, seed=seed, changed=1) for seed in range(scenes)], 1)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("scenes", [2, 3, 4])
def test_cameras_that_take_turns_without_names_are_noticed(scenes, together):
    model, steps = neuroflow.enable_cache(tiny("siglip")), turns(scenes)
    batches = steps if together else steps.flatten(0, 1).split(1)
    (message,), reasons = told(model, batches)
    assert set(reasons) == {"first", "cut"}
    assert f"frames of {scenes} scenes alternate, so each is a key frame" in message
    assert ("calls without names:" if together else "stream 'default':") in message
    assert message.count("'cam-") == scenes
    assert told(model, steps, *NAMES[:scenes]) == ([], scenes * ["first"] + 11 * scenes * [None])


def test_they_are_noticed_after_a_few_frames():
    model, frames = neuroflow.enable_cache(tiny("siglip")), turns(3).flatten(0, 1)
    soon = 3 + 1 + IN_TURN  # there and back again, and often enough
    assert told(model, frames[:soon].split(1))[0] == []
    assert len(told(model, frames[soon : soon + 1].split(1))[0]) == 1


@pytest.mark.parametrize("name", [(), ("drone",)])
@pytest.mark.parametrize(
    ("settings", "said"),
    [({}, "a larger threshold, with larger cut_share"), ({"budget": 30}, "a smaller budget, with larger cut_share")],
    ids=["threshold", "budget"],
)
def test_a_stream_that_never_skips_is_noticed_once(settings, said, name):
    model = neuroflow.enable_cache(tiny("siglip"), neuroflow.NeuroFlowConfig(**settings))
    frames = torch.cat([clip(1, seed=seed) for seed in range(2 * LONG + 2)])
    assert told(model, frames[:LONG].split(1), *name)[0] == []
    (message,), reasons = told(model, frames[LONG:].split(1), *name)
    assert set(reasons) == {"cut"}
    assert f"stream {(*name, 'default')[0]!r}: {LONG} frames in a row" in message and said in message


def test_frames_that_are_dense_for_speed_count_unless_that_was_asked_for(monkeypatch):
    monkeypatch.setattr("neuroflow.engine.crossover.measure", lambda *_: 1 / 8)
    frames = clip(LONG + 3, changed=12)
    settings = {"score": "surprise", "threshold": 1e-3, "cut_surprise": None}
    for dense_above, times in ((None, 1), (1 / 8, 0)):
        model = neuroflow.enable_cache(tiny("siglip"), neuroflow.NeuroFlowConfig(dense_above=dense_above, **settings))
        messages, reasons = told(model, frames.split(1))
        assert reasons[2:] == (LONG + 1) * ["dense"] and len(messages) == times


def film():
    """Shots of two frames, from two cameras by turns, and one cut after another in between."""
    shots = [clip(2, seed=seed, changed=1) for seed in 20 * (0, 1)]
    return torch.cat([*shots[:20], *(clip(1, seed=seed) for seed in range(2, 8)), *shots[20:]])


def unrelated():
    return torch.cat([clip(1, seed=seed) for seed in range(LONG + 10)])


@pytest.mark.parametrize(
    ("frames", "settings"),
    [
        (film, {}),
        (lambda: turns(2).flatten(0, 1), {"threshold": 0}),
        (lambda: turns(2).flatten(0, 1), {"budget": 36}),
        (unrelated, {"threshold": 0}),
        (unrelated, {"max_age": 1}),
        (unrelated, {"dense_above": 0, "cut_share": None, "cut_surprise": None, "cut_light": None}),
    ],
    ids=["film", "turns under threshold 0", "turns under a whole budget", "threshold 0", "age", "dense"],
)
def test_nothing_is_said_of_films_and_of_what_was_asked_for(frames, settings):
    model = neuroflow.enable_cache(tiny("siglip"), neuroflow.NeuroFlowConfig(**settings))
    messages, reasons = told(model, frames().split(1))
    assert messages == [] and reasons.count("first") == 1


def test_a_batch_of_unrelated_images_is_none_of_cameras():
    model = neuroflow.enable_cache(tiny("siglip"))
    messages, reasons = told(model, unrelated().split(8))
    assert messages == [] and None not in reasons


def test_a_cut_keeps_nothing_and_what_a_run_keeps_is_counted():
    model, frames = neuroflow.enable_cache(tiny("siglip")), film()
    told(model, frames[:2].split(1))
    held = neuroflow.summary(model).streams["default"].state_bytes
    told(model, frames[2:40].split(1))
    assert neuroflow.summary(model).streams["default"].state_bytes == held
    told(model, unrelated()[2:5].split(1))
    assert neuroflow.summary(model).streams["default"].state_bytes == held + 2 * 32 * 64 * 4

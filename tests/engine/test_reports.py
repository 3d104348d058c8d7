"""What a pass says of itself, in place of what a caller would have to infer from counters."""

import threading

import neuroflow
import pytest
import torch
from models import clip, exact, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def encode(model, frame, stream="a", **arguments):
    with torch.inference_mode(), neuroflow.cache_context(model, stream):
        model(pixel_values=frame[None], **arguments)
    (report,) = neuroflow.last_pass(model)
    return report


def gap(model, frames):
    for frame, frame_id in zip(frames, (7, 9), strict=True):
        neuroflow.encode(model, frame[None], ["a"], [frame_id])
    return neuroflow.last_pass(model)[0]


def size(model, frames):
    encode(model, frames[0])
    return encode(model, frames[1, :, 8:], interpolate_pos_encoding=True)


def outputs(model, frames):
    encode(model, frames[0])
    return encode(model, frames[1], output_hidden_states=True)


def failed(model, frames):
    encode(model, frames[0])
    layer = neuroflow.adapters.describe(model).layers[2]
    hook = layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(model, frames[1])
    assert neuroflow.last_pass(model) == ()
    hook.remove()
    return encode(model, frames[1])


def nonfinite(model, frames):
    encode(model, frames[0])
    damaged = frames[1].clone()
    damaged[0, 0, 0] = torch.nan
    report = encode(model, damaged)
    assert report.key_frame is None and report.surprise[0, 0].isinf() and report.active[0, 0]
    return encode(model, frames[1])


def again(model, frames):
    encode(model, frames[0])
    return encode(model, frames[1])


@pytest.mark.parametrize(
    ("reason", "frames", "settings"),
    [
        ("gap", gap, {}),
        ("size", size, {}),
        ("outputs", outputs, {}),
        ("failed", failed, {}),
        ("nonfinite", nonfinite, {}),
        ("age", again, {"max_age": 1}),
        ("cut", again, {"cut_share": 1 / 36}),
        ("dense", again, {"dense_above": 1 / 36}),
        (None, again, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:neuroflow")
def test_why_a_frame_is_a_key_frame(reason, frames, settings):
    model = neuroflow.enable_cache(tiny("siglip"), exact(threshold=1e-4, **settings))
    report = frames(model, clip(frames=2))
    assert report.key_frame == reason and report.stream == "a"
    if reason is not None:
        assert report.active.all() and report.surprise.isnan().all() and report.skipped == 0


def test_reports_are_what_the_stream_holds_and_stay_when_it_goes_on():
    model, frames = neuroflow.enable_cache(tiny("siglip"), exact(threshold=1e-4)), clip(frames=3)
    first, second = encode(model, frames[0]), encode(model, frames[1])
    assert first.key_frame == "first"
    stream = neuroflow.summary(model).streams["a"]
    assert second.active.shape == (6, 6) and torch.equal(second.active, stream.active)
    assert torch.equal(second.surprise, stream.surprise)
    assert second.skipped == pytest.approx(32 / 36) == pytest.approx(2 * stream.skipped)
    before = second.active.clone(), second.surprise.clone()
    encode(model, frames[2])
    assert torch.equal(second.active, before[0]) and torch.equal(second.surprise, before[1])
    assert first.active.all()


def test_the_reports_of_a_pass_are_in_the_order_of_its_frames():
    model, frames = neuroflow.enable_cache(tiny("siglip"), exact(threshold=1e-4)), clip(frames=3)
    encode(model, frames[0], "old")
    neuroflow.encode(model, frames[1:], ["new", "old"])
    assert [(report.stream, report.key_frame) for report in neuroflow.last_pass(model)] == [
        ("new", "first"),
        ("old", None),
    ]


def test_a_thread_has_reports_of_its_own():
    model, frames = neuroflow.enable_cache(tiny("siglip")), clip(frames=2)
    encode(model, frames[0])
    seen = []

    def other():
        seen.append(neuroflow.last_pass(model))
        seen.append(encode(model, frames[1], "b").stream)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [(), "b"] and neuroflow.last_pass(model)[0].stream == "a"


def test_a_call_that_runs_unpatched_reports_nothing():
    model = neuroflow.enable_cache(tiny("siglip"), exact(batch="dense"))
    encode(model, clip(frames=1)[0])
    with pytest.warns(RuntimeWarning, match="run unpatched"):
        model(pixel_values=clip(frames=2))
    assert neuroflow.last_pass(model) == ()


def test_only_a_patched_model_has_reports():
    with pytest.raises(RuntimeError, match="is not patched"):
        neuroflow.last_pass(tiny("siglip"))

"""Promise 6: above which share of active patches a pass runs dense, how that is measured, and that it harms nothing."""

from unittest import mock

import neuroflow
import pytest
import torch
from models import FAMILIES, clip, exact, inputs, tiny
from neuroflow.adapters import describe
from neuroflow.cli.track import background_gate
from neuroflow.distillation import DistillationConfig
from neuroflow.engine import crossover
from neuroflow.engine.passes import Pass, current_pass
from neuroflow.engine.state import PATCHES
from neuroflow.saving import COUNTERS

pytestmark = pytest.mark.usefixtures("one_thread")

measure = crossover.measure  # in its place conftest.py puts one that does not
CPU = torch.device("cpu")
SHARES = [4 / 36, 18 / 36, 32 / 36]  # SHARES of 6 x 6 patches


@pytest.fixture
def measured(monkeypatch):
    """measured(share) puts a mock that returns it in the place of `measure`, and returns the mock."""

    def give(share):
        monkeypatch.setattr(crossover, "measure", stand_in := mock.Mock(return_value=share))
        return stand_in

    return give


def patched(family="siglip", **config):
    model = tiny(family)
    neuroflow.enable_cache(model, exact(**{"threshold": 1e-4, "floor": 0, "dense_above": None} | config))
    return model


def encode(model, frames, streams=("default",), family="siglip"):
    with torch.inference_mode(), neuroflow.cache_context(model, *streams):
        return describe(model).embedding(model(**inputs(family, frames)))


def changing(*counts):
    """Frames of which each differs from the one before in so many of 36 patches."""
    frames = [clip(frames=1, changed=0)[0]]
    for seed, count in enumerate(counts):
        before, after = clip(frames=2, changed=count, seed=seed + 1)
        frames.append(torch.where(before == after, frames[-1], after))
    return torch.stack(frames)


def active(model):
    return [int(stream.active.sum()) for stream in neuroflow.summary(model).streams.values()]


def states(model):
    return [state for _, state in describe(model).tower._neuroflow_engine.streams.items()]


def counters(model):
    return [{name: getattr(state, name) for name in COUNTERS} for state in states(model)]


def tensors(model):
    named = [state.tensors | {name: getattr(state, name) for name in PATCHES} for state in states(model)]
    return [{name: tensor for name, tensor in each.items() if tensor is not None} for each in named]


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_the_crossover_lies_on_a_line_between_shares():
    assert crossover.SHARES == (1 / 8, 1 / 2, 7 / 8)
    assert crossover.crossing([0.2, 0.6, 1.2]) == pytest.approx(1 / 2 + 3 / 8 * 2 / 3)
    assert crossover.crossing([0.5, 1.1, 1.5]) == pytest.approx(1 / 8 + 3 / 8 * 5 / 6)
    assert crossover.crossing([0.5, 1.0, 1.5]) == 1 / 2
    assert crossover.crossing([0.2, 0.6, 1.0]) == 7 / 8
    assert crossover.crossing([0.2, 0.6, 0.99]) == 1
    assert crossover.crossing([1.0, 1.1, 1.5]) == 0


def test_a_share_slower_than_a_larger_one_was_disturbed():
    assert crossover.crossing([9.0, 9.0, 0.9]) == 1
    assert crossover.crossing([9.0, 0.6, 1.2]) == crossover.crossing([0.6, 0.6, 1.2])


@pytest.mark.parametrize(("arch", "once", "blocks"), [("A", 0, 4), ("B", 1, 4), ("C", 2, 4), ("D", 2, 2), ("E", 2, 4)])
def test_times_of_the_first_block_and_its_part_of_what_is_done_once(arch, once, blocks, measured, monkeypatch):
    """On a clock that moves only in the block, one run of which is disturbed, and in packing and restoring."""
    model, stand_in, now, shares = patched("vit", arch=arch), measured(1.0), [0.0], []
    encode(model, clip(frames=2), "ab", "vit")
    frame, tokens, block = stand_in.call_args.args

    def timed(some):
        assert not torch.is_grad_enabled()
        scratch = current_pass.get()
        patches = scratch.index[scratch.index % 37 > 0].unique().numel() if scratch.partial else None  # beside CLS
        shares.append(patches and patches / 72)
        now[0] += (shares[-1] or 0.9) + 9 * (len(shares) == 3)
        return block(some)

    def slowed(function):
        def slow(*args):
            now[0] += 0.1
            return function(*args)

        return slow

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(crossover, "crossing", lambda ratios: ratios)
    for name in ("pack", "restored") if once else ():  # A calls them in the block
        monkeypatch.setattr(Pass, name, slowed(getattr(Pass, name)))
    ratios = measure(frame, tokens, timed)
    assert shares == [None, *SHARES] * 3
    assert ratios == pytest.approx([(share + 0.1 * once / blocks) / 0.9 for share in SHARES])


@pytest.mark.parametrize("arch", "ABCDE")
@pytest.mark.parametrize("family", ["siglip", "siglip2", "vit", "dinov3", "sam", "vitdet", "qwen2.5-vl", "qwen3-vl"])
def test_measuring_leaves_no_trace(family, arch, monkeypatch):
    """Outputs, streams and the generator, bit for bit; two streams, of two sizes where a batch may mix them."""
    if arch not in FAMILIES[family].architectures:
        return
    frames = changing(4, 20)
    pairs = [[frame, frame.flip(1)] for frame in frames]
    if family in ("siglip2", "qwen2.5-vl", "qwen3-vl"):
        pairs = [[one, other[:, :32]] for one, other in pairs]
    else:
        pairs = [torch.stack(pair) for pair in pairs]
    shares, found = [], []

    def measuring(*args):
        shares.append(measure(*args))
        return 1.0

    for each in (lambda *_: 1.0, measuring):
        monkeypatch.setattr(crossover, "measure", each)
        model = patched(family, arch=arch, score="staleness", threshold=None, budget=20)
        torch.manual_seed(0)
        embeddings = [encode(model, pair, "ab", family) for pair in pairs]
        assert active(model) == [20, 20]
        found.append((counters(model), embeddings, tensors(model), torch.random.get_rng_state()))
    assert len(shares) == 1 and 0 <= shares[0] <= 1
    assert found[1][0] == found[0][0]
    assert_equal(found[1][1:], found[0][1:])


@pytest.mark.parametrize("measures", [True, False], ids=["measured", "given"])
@pytest.mark.parametrize(("family", "arch"), [*(("siglip", arch) for arch in "ABCDE"), ("vit", "E"), ("sam", "E")])
def test_above_it_a_pass_is_dense_and_below_it_is_not(family, arch, measures, measured):
    """Dense is the unpatched model's output, all caches as a first frame leaves them, and a key frame."""
    share = 12 / 36
    measured(share)
    frames, unpatched = changing(12, 13, 1), tiny(family)
    with torch.inference_mode():
        dense = describe(unpatched).embedding(unpatched(**inputs(family, frames[2:3])))
    model = patched(family, arch=arch, dense_above=None if measures else share)
    for frame, expected in zip(frames[:3], (36, 12, 36), strict=True):
        output = encode(model, frame[None], family=family)
        assert active(model) == [expected]
    fresh = patched(family, arch=arch, dense_above=1.0)
    encode(fresh, frames[2:3], family=family)
    assert_equal(tensors(model), tensors(fresh))
    assert [counters(model)[0][name] for name in ("frames", "key_frames", "since_key_frame")] == [3, 2, 0]
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)
    encode(model, frames[3:], family=family)
    assert active(model) == [1]


def test_the_streams_of_a_pass_count_together(measured):
    measured(14 / 72)
    model = patched()
    calm, lively = changing(2, 2, 1), changing(12, 13, 1)
    for *frames, expected in zip(calm, lively, ([36, 36], [2, 12], [36, 36], [1, 1]), strict=True):
        encode(model, torch.stack(frames), "ab")
        assert active(model) == expected
    encode(model, torch.stack([calm[3], lively[3]]), "ac")  # where a stream begins all of its patches are active
    assert active(model) == [1, 36, 36]
    assert [stream.key_frames for stream in neuroflow.summary(model).streams.values()] == [2, 3, 1]


def test_it_is_measured_once_for_each_size(measured):
    measure, frames, wide = measured(0.75), changing(1, 20), clip(frames=1, size=(32, 64))
    model = patched()
    found = []
    for names, shown in (("a", frames[:1]), ("a", frames[1:2]), ("ab", frames[:2]), ("ba", frames[:2]), ("c", wide)):
        encode(model, shown, names)
        found.append(measure.call_count)
    assert found == [1, 1, 2, 2, 3]
    encode(model.double(), frames[:1].double(), "d")
    assert measure.call_count == 4
    crossovers = neuroflow.summary(model).crossovers
    assert crossovers == dict.fromkeys(
        [
            (1, (6, 6), torch.float32, CPU),
            (2, (6, 6), torch.float32, CPU),
            (1, (4, 8), torch.float32, CPU),
            (1, (6, 6), torch.float64, CPU),
        ],
        0.75,
    )
    text = str(neuroflow.summary(model))
    assert "\n  2 frame(s) of 6x6 patches, float32 on cpu: dense above 75.0% active\n" in text
    neuroflow.disable_cache(model)
    neuroflow.enable_cache(model)
    assert neuroflow.summary(model).crossovers == {}
    measured(1.0)
    encode(model, frames[:1].double(), "a")
    assert str(neuroflow.summary(model)).endswith("\n  1 frame(s) of 6x6 patches, float64 on cpu: never dense")


def test_it_is_measured_where_it_matters(tmp_path, measured):
    """Not in a partial pass at the least share, nor where the share is given."""
    model, frames = patched(), changing(4, 5)
    encode(model, frames[:1])
    neuroflow.save_state(model, tmp_path / "state.safetensors")
    stand_in, model = measured(0.0), patched()
    neuroflow.load_state(model, tmp_path / "state.safetensors")
    encode(model, frames[1:2])
    assert (stand_in.call_count, active(model)) == (0, [4])
    encode(model, frames[2:])
    assert (stand_in.call_count, active(model)) == (1, [5])  # the pass itself is over
    neuroflow.load_state(model, tmp_path / "state.safetensors")
    encode(model, frames[1:2])
    assert active(model) == [36]
    stand_in, model = measured(0.0), patched(dense_above=1.0)
    encode(model, frames[:1])
    assert (stand_in.call_count, neuroflow.summary(model).crossovers) == (0, {})


def test_what_the_model_records_is_of_the_pass_alone(monkeypatch):
    monkeypatch.setattr(crossover, "measure", measure)
    model = patched()
    output = model(pixel_values=changing()[:1], output_hidden_states=True)
    assert len(output.hidden_states) == 5
    assert len(neuroflow.summary(model).crossovers) == 1
    assert not any(tensor.requires_grad for tensor in output.hidden_states)


def test_what_must_not_depend_on_speed_does_not():
    """What is published, what is learnt, and a background that no refresh may set back."""
    assert neuroflow.NeuroFlowConfig.published().dense_above == 1
    assert DistillationConfig().gate().dense_above == 1
    assert background_gate(1.3, 0.05).dense_above == 1


def test_a_pass_that_fails_measures_nothing(measured):
    stand_in, model = measured(1.0), patched()
    describe(model).layers[2].register_forward_pre_hook(mock.Mock(side_effect=RuntimeError("hook")))
    with pytest.raises(RuntimeError, match="hook"):
        encode(model, clip(frames=1))
    assert stand_in.call_count == 0

"""Interrupts at any point of a pass: the stream goes on as if the frame had come, as if it had not, or starts over."""

import contextlib
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import neuroflow
import pytest
import torch
from interrupts import Interrupt, traced
from models import clip, exact, tiny
from neuroflow.engine.passes import current_pass
from neuroflow.patch import engine_of

SAMPLED = 60  # of some thousands of lines that a pass goes through


def encode(model, frames):
    with torch.inference_mode():
        output = neuroflow.encode(model, frames, ["a"] * len(frames), interpolate_pos_encoding=True)
    return output.last_hidden_state[-1]


FRAMES = clip(changed=5).double()
CALLS = {  # of a stream: what comes before, what is interrupted, what comes after
    "first": (None, FRAMES[:1], FRAMES[1:2]),
    "frame": (FRAMES[:2], FRAMES[2:3], FRAMES[3:4]),
    "clip": (FRAMES[:2], FRAMES[2:4], FRAMES[4:]),
    "size": (FRAMES[:2], clip(frames=1, size=(32, 64)).double(), FRAMES[2:3]),
}


@pytest.mark.filterwarnings("ignore:neuroflow")
@pytest.mark.parametrize(("family", "arch"), [("vit", "E"), ("siglip", "A")])
@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("sampled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_stream_survives_an_interrupt_anywhere(family, arch, case, sampled):
    model = tiny(family).double()
    neuroflow.enable_cache(model, exact(arch=arch, threshold=1e-4, score="staleness"))
    before, interrupted, after = CALLS[case]
    engine = engine_of(model)

    def outcome(*calls):
        engine.streams.close([name for name, _ in engine.streams.items()])
        return [encode(model, frames) for frames in calls if frames is not None]

    possible = [outcome(*calls)[-1] for calls in ((before, after), (before, interrupted, after), (after,))]
    outcome(before)
    points = range(1, 1 + traced(lambda: encode(model, interrupted)))
    for at in random.Random(0).sample(points, SAMPLED) if sampled else points:
        outcome(before)
        with pytest.raises(Interrupt) as caught:
            traced(lambda: encode(model, interrupted), at)
        assert current_pass.get() is engine.named.get() is engine.numbered.get() is None, caught.value
        found = encode(model, after)
        assert any(torch.allclose(found, each, rtol=0, atol=1e-10) for each in possible), caught.value


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers")
def test_a_stream_survives_interrupts_at_any_time(one_thread):
    """Of the operating system, wherever Python takes them, its library and torch too; other threads go on with it."""
    model, chance = tiny("vit").double(), random.Random(0)
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    engine, interrupted = engine_of(model), 0

    def probe():
        return encode(model, FRAMES[3:4]), encode(model, FRAMES[4:5])

    fresh = encode(model, FRAMES[4:5])
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    start = time.perf_counter()
    encode(model, FRAMES[:2])
    seconds = time.perf_counter() - start
    try:
        with ThreadPoolExecutor(1) as pool:
            for _ in range(100):
                with contextlib.suppress(KeyboardInterrupt):
                    interrupted += 1
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, seconds))
                    encode(model, FRAMES[1:3])
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    interrupted -= 1
                assert current_pass.get() is engine.named.get() is engine.numbered.get() is None
                for found in pool.submit(probe).result(20):
                    assert found.isfinite().all()
                neuroflow.reset_cache(model, "a")
                assert torch.allclose(pool.submit(encode, model, FRAMES[4:5]).result(20), fresh, atol=1e-10)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 20

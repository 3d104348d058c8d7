"""Interrupts at any point of a pass: the stream goes on as if the frame had come, as if it had not, or starts over."""

import ast
import functools
import random
import sys
from pathlib import Path

import neuroflow
import pytest
import torch
from models import clip, exact, tiny
from neuroflow.engine.passes import current_pass
from neuroflow.patch import engine_of

PACKAGE = str(Path(neuroflow.__file__).parent)
SAMPLED = 60  # of some thousands of lines that a pass goes through


class Interrupt(BaseException):
    """What code that deals with errors does not expect."""


@functools.cache
def uninterruptible(path):
    """The lines of a file right behind `finally:`; Python looks for signals once their first call is over."""
    tries = [node for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.Try)]
    return {node.finalbody[0].lineno for node in tries if node.finalbody}


def traced(call, at=None):
    """How many lines of the package `call` goes through; it raises Interrupt in front of number `at`."""
    count = 0

    def in_frame(frame, event, _):
        nonlocal count
        path = frame.f_code.co_filename
        if event == "line" and frame.f_lineno not in uninterruptible(path):
            count += 1
            if count == at:
                raise Interrupt(f"{path}:{frame.f_lineno}")
        return in_frame

    sys.settrace(lambda frame, *_: in_frame if frame.f_code.co_filename.startswith(PACKAGE) else None)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


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

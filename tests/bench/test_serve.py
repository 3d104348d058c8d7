"""What the benchmark of the server counts; its clients are tested in tests/serve."""

import itertools
import threading

import numpy as np
import pytest

from bench import serve
from bench.clients import Answer, hostile


def test_footage_goes_forwards_and_backwards_from_a_place_of_each_camera():
    clip = [bytes([number]) for number in range(5)]
    shown = list(itertools.islice(serve.footage([clip, clip], 0), 10))
    assert b"".join(shown) == bytes([0, 1, 2, 3, 4, 3, 2, 1, 0, 1])
    other = list(itertools.islice(serve.footage([clip, clip], 1), 16))
    assert other[:8] != shown[:8] and other[:8] == other[8:]


def test_frames_in_a_pass_are_counted_by_pass():
    """One pass of three frames and one of one: two on average."""
    answers = [Answer(np.zeros(1), 0.5, 10.0, 1.0, together, 0.02) for together in (3, 3, 3, 1)]
    row = serve.measures(answers, 2.0)
    assert (row["frames/s"], row["together"], row["skipped"]) == pytest.approx((2, 2, 0.5))
    assert row["latency"] == pytest.approx([20, 20])


def test_hostile_requests_that_are_taken_are_told(monkeypatch):
    kinds = [name for name, _ in hostile()]
    contents = iter(range(100))
    monkeypatch.setattr(serve, "sent", lambda address, content: 200 if next(contents) == 3 else None)
    assert serve.attack(None, 5, 0.0, threading.Event()) == (5, [(kinds[3], 200)])

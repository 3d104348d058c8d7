"""Frames that are prepared ahead of the model: the same ones, in order, and no thread is left behind."""

import contextlib
import itertools
import threading
import time
from dataclasses import replace
from fractions import Fraction

import neuroflow
import numpy as np
import pytest
import torch
from models import tiny
from neuroflow.cli import encoding
from neuroflow.cli.common import INTERRUPTED
from neuroflow.cli.encoding import encode_video, shares
from neuroflow.cli.report import format_report
from neuroflow.report.figures import Figures, Stages
from neuroflow.video.ahead import ReadAhead, prepare
from neuroflow.video.encode import VideoWriter
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.results import Record, Results
from neuroflow.video.source import Source
from neuroflow.video.stream import encode_stream

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES, SIZE = 12, 48


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "read-ahead"] == []


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (72, 96, 3), np.uint8)
    with VideoWriter(path, Fraction(10)) as writer:
        for number in range(FRAMES):
            image[8:24, 8 * number % 80 :][:, :16] = random.integers(0, 256, 3, np.uint8)
            writer.write(image)
    return path


class Numbers:
    """Gives 0 to `stop` - 1, then raises `error`; `given` are those given so far."""

    def __init__(self, stop, error=None):
        self.given = []
        self._stop, self._error = stop, error
        self._steps = threading.Semaphore(0)

    def __iter__(self):
        for number in range(self._stop):
            self.given.append(number)
            self._steps.release()
            yield number
        if self._error is not None:
            raise self._error

    def wait_for(self, count):
        for _ in range(count):
            assert self._steps.acquire(timeout=5)


@pytest.mark.parametrize("depth", [1, 3])
def test_every_item_comes_in_order(depth):
    with ReadAhead(iter(Numbers(200)), depth=depth) as ahead:
        assert list(ahead) == list(range(200))
        assert list(ahead) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_it_runs_ahead_by_its_depth_and_no_further(depth):
    numbers = Numbers(100)
    with ReadAhead(iter(numbers), depth=depth) as ahead:
        assert next(ahead) == 0
        numbers.wait_for(1 + depth)
        time.sleep(0.05)
    assert numbers.given == list(range(1 + depth))


def test_an_error_comes_after_the_items_before_it():
    with ReadAhead(iter(Numbers(5, KeyError("damaged")))) as ahead:
        assert list(itertools.islice(ahead, 5)) == list(range(5))
        with pytest.raises(KeyError, match="damaged"):
            next(ahead)


def test_leaving_wakes_a_thread_that_waits_for_room():
    numbers = Numbers(100)
    with pytest.raises(ZeroDivisionError), ReadAhead(iter(numbers)):
        numbers.wait_for(3)
        raise ZeroDivisionError
    assert len(numbers.given) == 3


def test_leaving_does_not_wait_for_a_read_that_hangs(clip):
    hangs, release, source = threading.Event(), threading.Event(), Source(str(clip))

    def stuck():
        yield from itertools.islice(whole, 2)
        hangs.set()
        release.wait(30)

    whole, source._frames = source._frames, stuck()
    with ReadAhead(iter(source), patience=0.1) as ahead:
        assert [frame.index for frame in itertools.islice(ahead, 3)] == [0, 1, 2]
        assert hangs.wait(5)
    source.close()
    (left,) = (thread for thread in threading.enumerate() if thread.name == "read-ahead")
    release.set()
    left.join(5)


def encoded(clip, ahead, length=1):
    """What every frame of the clip gives: index, share skipped, embedding, active patches."""
    model = tiny("siglip", SIZE)
    neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(score="surprise", threshold=1e-3).reproducible())
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(contextlib.closing(Source(str(clip))))
        inputs = prepare(source, Preprocessor(SIZE, SIZE))
        if ahead:
            inputs = stack.enter_context(ReadAhead(inputs))
        return [
            (one.record.frame, one.record.skipped, one.embedding, one.active)
            for one in encode_stream(inputs, model, length=length)
        ]


def test_results_are_the_same_bits_ahead_and_in_turn(clip):
    in_turn, ahead = encoded(clip, False), encoded(clip, True)
    assert [row[0] for row in ahead] == list(range(FRAMES))
    assert [row[:2] for row in ahead] == [row[:2] for row in in_turn]
    for (*_, embedding, active), (*_, expected, expected_active) in zip(ahead, in_turn, strict=True):
        assert np.array_equal(embedding, expected) and torch.equal(active, expected_active)


@pytest.mark.parametrize("length", [2, 5, 100])
def test_frames_that_go_together_give_what_they_give_one_by_one(clip, length):
    together, alone = encoded(clip, True, length), encoded(clip, True)
    assert [row[:2] for row in together] == [row[:2] for row in alone]
    assert any(row[1] for row in alone)
    for (*_, embedding, active), (*_, expected, expected_active) in zip(together, alone, strict=True):
        assert torch.equal(active, expected_active)
        np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-4)


@pytest.fixture
def encode(clip, monkeypatch):
    """encode(**options) -> exit code, and the stages that were reported; runs a tiny model over the clip."""
    reported = []
    monkeypatch.setattr(encoding, "format_report", lambda figures: reported.extend(figures.stages))

    def call(*, source=None, preprocess=None, **options):
        preprocess = preprocess or Preprocessor(SIZE, SIZE)
        with contextlib.closing(source or Source(str(clip))) as frames:
            config = neuroflow.NeuroFlowConfig()
            return encode_video(frames, tiny("siglip", SIZE), preprocess, config, **options), reported

    return call


def lines(path):
    return len(path.with_name(path.name + ".journal").read_text().splitlines()) - 1


@pytest.mark.parametrize("length", [1, 4, 16])
def test_what_fails_ahead_leaves_the_frames_before_it(encode, tmp_path, length):
    class Failing(Preprocessor):
        def __call__(self, frame):
            if frame.index == 5:
                raise MemoryError("too large")
            return super().__call__(frame)

    results = Results(tmp_path / "result.jsonl", {})
    with pytest.raises(MemoryError, match="too large"):
        encode(preprocess=Failing(SIZE, SIZE), results=results, clip=length)
    assert lines(tmp_path / "result.jsonl") == 5


def test_interruption_leaves_no_thread(encode, tmp_path, monkeypatch):
    results = Results(tmp_path / "result.jsonl", {})
    append = results.append

    def interrupted(record, embedding):
        append(record, embedding)
        if record.frame == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(results, "append", interrupted)
    assert encode(results=results)[0] == INTERRUPTED
    assert lines(tmp_path / "result.jsonl") == 4


class Watched(Source):
    """Notes the thread that every frame is asked for in."""

    def __iter__(self):
        self.threads = []
        for frame in super().__iter__():
            self.threads.append(threading.current_thread())
            yield frame


def test_files_are_read_ahead_and_not_past_the_last_frame_wanted(encode, clip):
    source = Watched(str(clip))
    code, stages = encode(source=source, max_frames=3)
    assert code == 0 and len(stages) == 3
    assert [thread.name for thread in source.threads] == ["read-ahead"] * 3


def test_live_sources_are_not_read_ahead(encode, clip):
    source = Watched(str(clip))
    source.live = True
    assert encode(source=source)[0] == 0
    assert set(source.threads) == {threading.current_thread()}


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("compare", [False, True])
def test_the_stages_of_a_frame_fit_into_it(encode, tmp_path, compare, length):
    start = time.perf_counter()
    _, stages = encode(compare=compare, clip=length, results=Results(tmp_path / "result.jsonl", {}))
    elapsed = (time.perf_counter() - start) * 1e3
    assert len(stages) == FRAMES and sum(one.total for one in stages) <= elapsed
    for one in stages:
        assert min(one.decode, one.preprocess, one.wait, one.encode, one.write) > 0
        assert (one.dense is not None) == compare
        # The share of each is rounded on its own.
        assert one.wait + one.encode + (one.dense or 0) + one.write <= one.total * (1 + 1e-9)


def test_frames_that_went_together_share_what_their_call_took():
    slow = Stages(decode=1, preprocess=1, wait=2, encode=4, dense=None, write=9, total=30)
    quick = replace(slow, write=1, total=1)
    assert shares([slow, quick, quick]) == [replace(slow, write=11 / 3, total=32 / 3)] * 3


def test_in_turn_the_wait_is_for_decoding_and_preprocessing(clip):
    model = tiny("siglip", SIZE)
    neuroflow.enable_cache(model)
    with contextlib.closing(Source(str(clip))) as source:
        for one in encode_stream(prepare(source, Preprocessor(SIZE, SIZE)), model):
            assert one.prepared.decode_ms + one.prepared.preprocess_ms <= one.wait_ms


def test_the_pipeline_line_adds_up_and_leaves_the_first_frame_out():
    records = [Record(n, n, 0.5, 8, n == 0, 40.0, 400.0, 1.0, n == 0) for n in range(3)]
    first = Stages(decode=90, preprocess=90, wait=90, encode=900, dense=900, write=90, total=9000)
    second = Stages(decode=2, preprocess=3, wait=0.25, encode=40, dense=400, write=1, total=442)
    third = Stages(decode=4, preprocess=3, wait=0.75, encode=50, dense=410, write=2, total=464)

    def line(stages):
        table = format_report(Figures(records, stages, 0, "", "", ""))
        return [line for line in table.splitlines() if line.startswith("pipeline")]

    assert line([first, second, third]) == [
        "pipeline          453.0 ms/frame (mean): encode 45.0, dense 405.0, wait for input 0.5, write 1.5, other 1.0; "
        "the input took decode 3.0, preprocess 3.0"
    ]
    (alone,) = line([replace(one, dense=None, total=one.encode + 5) for one in (first, second, third)])
    assert (
        "dense" not in alone and "50.0 ms/frame (mean): encode 45.0, wait for input 0.5, write 1.5, other 3.0" in alone
    )
    assert line([first]) == line([]) == []

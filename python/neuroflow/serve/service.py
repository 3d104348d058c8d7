"""Frames of many streams through one patched model: those that arrive together go through it in one pass."""

import asyncio
import collections
import contextlib
import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import neuroflow

from ..adapters import describe
from ..adapters.anatomy import interpolation
from ..files import writing
from ..video.preprocess import Preprocessor
from .metrics import Metrics

HISTORY = 300  # frames of a stream that are remembered for whoever looks at it
WATCHED = 10.0  # seconds for which a picture of a stream's frames is kept after somebody asked for it
DECODERS = 2  # threads that decode, beside the model's

log = logging.getLogger("neuroflow.serve")
Decode = Callable[[], torch.Tensor]


class Full(Exception):
    """No room for this now. The message is one line and says what to do.

    Attributes:
        retry_after: seconds after which to try again.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type, tuple[str, float]]:
        return type(self), (str(self), self.retry_after)


@dataclass(frozen=True)
class Answer:
    """What came of one frame.

    Attributes:
        frame: its number in the stream.
        embedding: [D] float32.
        skipped: share of its patches that were not encoded, 0 to 1.
        active: how many were.
        patches: how many it has.
        key_frame: why it was encoded in full, as in `neuroflow.FrameReport`; None where it was not.
        ms: of the pass that it was part of.
        waited_ms: from its arrival until that began.
        together: how many frames the pass had.
    """

    frame: int
    embedding: np.ndarray
    skipped: float
    active: int
    patches: int
    key_frame: str | None
    ms: float
    waited_ms: float
    together: int


@dataclass(frozen=True)
class Past:
    """A frame that was answered.

    Attributes:
        frame: its number in the stream.
        time: when it was answered, Unix time in seconds.
        skipped: share of its patches that were not encoded, 0 to 1.
        ms: from its arrival to the answer.
        key_frame: why it was encoded in full, None where it was not.
    """

    frame: int
    time: float
    skipped: float
    ms: float
    key_frame: str | None


@dataclass(frozen=True)
class StreamStatus:
    """One open stream.

    Attributes:
        stream: its name.
        summary: what the model has of it.
        idle_seconds: since its last frame was answered.
        history: its last frames, the oldest first.
    """

    stream: str
    summary: neuroflow.StreamSummary
    idle_seconds: float
    history: list[Past]


@dataclass(eq=False)
class _Request:
    stream: str
    numbered: int | None  # by the client
    arrived: float
    future: asyncio.Future[list[Answer]]
    pixels: torch.Tensor | None = None  # [T, 3, H, W], once it is decoded
    ready: float = 0.0
    report: neuroflow.FrameReport | None = None  # on the last of its frames, once they are encoded


@dataclass
class _Stream:
    """What is known of a stream beside what the model holds."""

    waiting: collections.deque[_Request] = field(default_factory=collections.deque)
    number: int = -1  # of its last frame
    answers: list[Answer] = field(default_factory=list)  # to its last request
    history: collections.deque[Past] = field(default_factory=lambda: collections.deque(maxlen=HISTORY))
    used: float = field(default_factory=time.monotonic)
    watched: float = -math.inf
    report: neuroflow.FrameReport | None = None  # on its last frame
    picture: np.ndarray | None = None  # [H, W, 3] uint8


class Service:
    """A queue in front of a patched model, for one event loop.

    Frames of a stream are encoded in the order in which they came. Streams take turns, and what waits of all of them
    goes through the model together, up to `most` frames in a pass; the first waits `window_ms` for others.

    Args:
        model: a vision tower, patched with `streams`.
        preprocess: gives its input.
        streams: their limits. A new stream is refused while there are `max_streams` that are not idle, so that nobody
            can push others out by opening more.
        window_ms: how long a frame waits for those of other streams.
        most: how many frames a pass has, unless a single request has more.
        queue: how many requests wait, of one stream at most a quarter of it. Nothing more is taken either while so many
            frames wait, of clips.
        state: a directory, which is there, where the streams are kept from `stop` to `start`.

    Attributes:
        metrics: what Prometheus is told.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocessor,
        streams: neuroflow.StreamCache,
        *,
        window_ms: float = 5.0,
        most: int = 16,
        queue: int = 64,
        state: Path | None = None,
    ) -> None:
        self.preprocess = preprocess
        self.metrics = Metrics()
        self._model = model
        self._embedding_of = describe(model).embedding
        self._cache = streams
        self._window = window_ms / 1e3
        self._most = most
        self._queue = queue
        self._state = None if state is None else state / "streams.safetensors"
        self._streams: dict[str, _Stream] = {}  # whose turn it is first
        self._queued = 0
        self._ready = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self._encoder = ThreadPoolExecutor(1, "neuroflow-encoder")
        self._decoders = ThreadPoolExecutor(DECODERS, "neuroflow-decoder")

    @property
    def running(self) -> bool:
        """It takes frames."""
        return self._task is not None and not self._task.done() and not self._stopping

    async def start(self) -> None:
        """Take up the streams that an earlier service has left, run the model once, and begin."""
        await asyncio.get_running_loop().run_in_executor(self._encoder, self._warm_up)
        if self._state is not None and self._state.exists():
            try:
                neuroflow.load_state(self._model, self._state)
            except ValueError as error:
                warnings.warn(f"{error}; all streams begin anew", stacklevel=2)
        for name, summary in neuroflow.summary(self._model).streams.items():
            number = summary.frames - 1 if summary.frame_id is None else summary.frame_id
            self._streams[str(name)] = _Stream(number=number)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Answer what waits, take nothing more, and keep the streams where they are to be kept.

        Raises:
            OutputError: the streams cannot be written.
        """
        self._stopping = True
        self._ready.set()
        if self._task is not None:
            await self._task
        self._encoder.shutdown()
        self._decoders.shutdown()
        if self._state is not None:
            with writing(self._state):
                neuroflow.save_state(self._model, self._state)

    async def encode(self, stream: str, decode: Decode, frame: int | None = None) -> list[Answer]:
        """Encode the next frames of a stream.

        Args:
            stream: its name; a new one is opened.
            decode: gives [T, 3, H, W] float32, the model's input; called in another thread.
            frame: the number of the first; None for the one after the last. The numbers that were answered last are
                answered again as they were, so that a request can be repeated; others than those that follow make a key
                frame, as frames were lost.

        Raises:
            Full: the queue is full, as many streams as may be are open, or the service stops.
            Exception: what `decode` or the model raises. Other requests are none the worse for it.
        """
        if not self.running:
            raise Full("the service is stopping; try again at its successor", 1.0)
        loop = asyncio.get_running_loop()
        of_stream = self._open(stream)
        if frame is not None:
            for earlier in of_stream.waiting:
                if earlier.numbered == frame:
                    return await asyncio.shield(earlier.future)
            if of_stream.answers and of_stream.answers[0].frame == frame:
                return of_stream.answers
        if self._queued >= self._queue or len(of_stream.waiting) >= max(self._queue // 4, 1):
            self._forget_unused(stream)
            raise Full(f"{self._queued} requests wait, {len(of_stream.waiting)} of this stream; slow down", 1.0)
        request = _Request(stream, frame, time.monotonic(), loop.create_future())
        of_stream.waiting.append(request)
        self._queued += 1
        self.metrics.queue.set(self._queued)
        try:
            pixels = await loop.run_in_executor(self._decoders, decode)
            frames = self._frames_waiting()
            if frames >= self._queue:
                raise Full(f"{frames} frames wait; slow down, or send shorter clips", 1.0)
        except BaseException as error:
            self._take(request)
            self._forget_unused(stream)
            self._ready.set()
            if isinstance(error, Exception):
                request.future.set_exception(error)
                request.future.exception()  # so that it was looked at, if nobody repeats the request
            else:
                request.future.cancel()
            raise
        request.pixels, request.ready = pixels, time.monotonic()
        self._ready.set()
        return await asyncio.shield(request.future)

    def streams(self) -> list[StreamStatus]:
        """All that are open, by name."""
        now = time.monotonic()
        summaries = neuroflow.summary(self._model).streams
        return [
            StreamStatus(name, _as_answered(summaries[name], known.report), now - known.used, list(known.history))
            for name, known in sorted(self._streams.items())
            if name in summaries
        ]

    def status(self, stream: str) -> StreamStatus:
        """One of them; a picture of its frames is kept from now on, for a while.

        Raises:
            KeyError: it is not open.
        """
        self._streams[stream].watched = time.monotonic()
        by_name = {status.stream: status for status in self.streams()}
        return by_name[stream]

    def picture(self, stream: str) -> np.ndarray | None:
        """What the model saw of a stream last, [H, W, 3] uint8; None until a frame came after this was asked for.

        Raises:
            KeyError: it is not open.
        """
        known = self._streams[stream]
        known.watched = time.monotonic()
        return known.picture

    async def close(self, stream: str) -> None:
        """Forget a stream; its next frame is a key frame.

        Raises:
            KeyError: it is not open.
        """
        known = self._streams[stream]
        with contextlib.suppress(KeyError):  # it has no frame yet
            run = asyncio.get_running_loop().run_in_executor
            await run(self._encoder, neuroflow.reset_cache, self._model, stream)
        known.answers = []
        self._forget_unused(stream)

    @property
    def state_bytes(self) -> int:
        """What the streams hold."""
        return self._cache.state_bytes

    def _open(self, stream: str) -> _Stream:
        known = self._streams.get(stream)
        if known is not None:
            return known
        self._forget_unused(*self._streams)
        most, patience = self._cache.max_streams, self._cache.idle_seconds or math.inf
        if most is not None and len(self._streams) >= most:
            idle = [(time.monotonic() - each.used, name) for name, each in self._streams.items() if not each.waiting]
            longest, oldest = max(idle, default=(0.0, None))
            if oldest is None or longest < patience:
                soon = min(patience - longest, 60.0)
                raise Full(f"{most} streams are open, as many as may be; DELETE one, or raise --max-streams", soon)
            del self._streams[oldest]  # and the cache closes it for the new one
        self._streams[stream] = _Stream()
        return self._streams[stream]

    def _forget_unused(self, *names: str) -> None:
        """Forget streams that neither wait nor are open in the model."""
        for name in names:
            if name in self._streams and not self._streams[name].waiting and name not in self._cache:
                del self._streams[name]

    def _frames_waiting(self) -> int:
        requests = (request for each in self._streams.values() for request in each.waiting)
        return sum(len(request.pixels) for request in requests if request.pixels is not None)

    def _take(self, request: _Request) -> None:
        self._streams[request.stream].waiting.remove(request)
        self._queued -= 1
        self.metrics.queue.set(self._queued)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while not (self._stopping and not self._queued):
            await self._ready.wait()
            ready = [head for each in self._streams.values() if (head := next(iter(each.waiting), None)) and head.ready]
            if not ready:
                self._ready.clear()
                continue
            left = min(head.ready for head in ready) + self._window - time.monotonic()
            if left > 0 and len(ready) < self._most and not self._stopping:
                await asyncio.sleep(left)
            batch = self._next_batch()
            begun = time.monotonic()
            outcomes = await loop.run_in_executor(self._encoder, self._encode, batch, begun)
            for request, outcome in zip(batch, outcomes, strict=True):
                self._settle(request, outcome)
            self._forget_unused(*self._streams)

    def _next_batch(self) -> list[_Request]:
        """The oldest request of each stream in turn, then the next ones, until there are enough frames."""
        batch: list[_Request] = []
        frames, depth, names = 0, 0, list(self._streams)
        while names:
            for name in list(names):
                waiting = self._streams[name].waiting
                if depth >= len(waiting) or waiting[depth].pixels is None:
                    names.remove(name)
                    continue
                count = len(waiting[depth].pixels)
                if batch and frames + count > self._most:
                    names = []
                    break
                batch.append(waiting[depth])
                frames += count
            depth += 1
        for name in dict.fromkeys(request.stream for request in batch):
            self._streams[name] = self._streams.pop(name)  # behind those that have waited longer
        return batch

    def _encode(self, batch: list[_Request], begun: float) -> list[list[Answer] | Exception]:
        """The answers to requests, or what went wrong with each; where a pass fails, each is tried alone."""
        try:
            return self._pass(batch, begun)
        except Exception as error:
            if len(batch) == 1:
                log.exception("a frame of stream %s was not encoded", batch[0].stream)
                return [error]
        return [self._encode([request], begun)[0] for request in batch]

    @torch.inference_mode()
    def _pass(self, batch: list[_Request], begun: float) -> list[list[Answer] | Exception]:
        names: list[Hashable] = []
        numbers: list[int] = []
        next_number = {request.stream: self._streams[request.stream].number + 1 for request in batch}
        for request in batch:
            first = next_number[request.stream] if request.numbered is None else request.numbered
            count = len(request.pixels)
            names += [request.stream] * count
            numbers += range(first, first + count)
            next_number[request.stream] = first + count
        weight = next(self._model.parameters())
        pixels = torch.cat([request.pixels for request in batch]).to(weight.device, weight.dtype)
        start = time.perf_counter()
        output = neuroflow.encode(self._model, pixels, names, numbers, **interpolation(self._model, pixels))
        embeddings = self._embedding_of(output).float().cpu().numpy()
        ms = (time.perf_counter() - start) * 1e3
        self.metrics.passed(len(names), ms / 1e3)
        frames = iter(zip(numbers, embeddings, neuroflow.last_pass(self._model), strict=True))
        answers: list[list[Answer] | Exception] = []
        for request in batch:
            waited = (begun - request.arrived) * 1e3
            own = list(itertools.islice(frames, len(request.pixels)))
            request.report = own[-1][2]
            answers.append(
                [
                    Answer(
                        frame=number,
                        embedding=embedding,
                        skipped=report.skipped,
                        active=int(report.active.sum()),
                        patches=report.active.numel(),
                        key_frame=report.key_frame,
                        ms=ms,
                        waited_ms=waited,
                        together=len(names),
                    )
                    for number, embedding, report in own
                ]
            )
        return answers

    def _settle(self, request: _Request, outcome: Sequence[Answer] | Exception) -> None:
        self._take(request)
        if isinstance(outcome, Exception):
            if not request.future.cancelled():
                request.future.set_exception(outcome)
            return
        known, now = self._streams[request.stream], time.monotonic()
        known.number, known.answers, known.used = outcome[-1].frame, list(outcome), now
        known.report = request.report
        ms = (now - request.arrived) * 1e3
        for answer in outcome:
            past = Past(frame=answer.frame, time=time.time(), skipped=answer.skipped, ms=ms, key_frame=answer.key_frame)
            known.history.append(past)
            self.metrics.answered(answer.active, answer.patches, answer.key_frame, ms / 1e3)
        watched = now - known.watched < WATCHED
        known.picture = self.preprocess.shown(request.pixels[-1]) if watched else None
        if not request.future.cancelled():
            request.future.set_result(list(outcome))

    def _warm_up(self) -> None:
        """So that the first frame of a camera does not wait for what is measured and packed at the first call."""
        pixels = torch.zeros(1, 3, self.preprocess.height, self.preprocess.width)
        weight = next(self._model.parameters())
        pixels = pixels.to(weight.device, weight.dtype)
        name = object()  # a name that no request can have
        with torch.inference_mode():
            for shade in (0.0, 0.5):
                neuroflow.encode(self._model, pixels + shade, [name], **interpolation(self._model, pixels))
        neuroflow.reset_cache(self._model, name)


def _as_answered(summary: neuroflow.StreamSummary, report: neuroflow.FrameReport | None) -> neuroflow.StreamSummary:
    """With the patches of the last frame that was answered, where the model is at the next one already."""
    return summary if report is None else replace(summary, active=report.active, surprise=report.surprise)

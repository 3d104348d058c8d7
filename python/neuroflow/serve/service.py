"""Frames of many streams through one patched model; frames that arrive together share a pass."""

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

HISTORY = 300  # recent frames remembered for each stream
WATCHED = 10.0  # seconds for which images of a stream are kept after a request for one
DECODERS = 2  # threads that decode, besides the model's

log = logging.getLogger("neuroflow.serve")
Decode = Callable[[], torch.Tensor]


class Full(Exception):
    """No room right now. The message is one line and says what to do.

    Attributes:
        retry_after: seconds to wait before the next try.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type, tuple[str, float]]:
        return type(self), (str(self), self.retry_after)


@dataclass(frozen=True)
class Answer:
    """The result for one frame.

    Attributes:
        frame: its number in the stream.
        embedding: [D] float32.
        skipped: share of its patches that were not encoded, 0 to 1.
        active: number of patches that were encoded.
        patches: number of patches it has.
        key_frame: why it was encoded in full, as in `neuroflow.FrameReport`; None if it was not.
        ms: duration of its pass, in milliseconds.
        waited_ms: time from its arrival to the start of the pass, in milliseconds.
        together: number of frames in the pass.
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
        ms: time from its arrival to the answer, in milliseconds.
        key_frame: why it was encoded in full; None if it was not.
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
        summary: the model's summary of it.
        idle_seconds: seconds since its last frame was answered.
        history: its recent frames, oldest first.
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
    """What the service knows about a stream, besides what the model holds."""

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

    Frames of a stream are encoded in order of arrival. Streams take turns; whatever waits is encoded together, up to
    `most` frames in a pass. The first frame waits up to `window_ms` for others.

    Args:
        model: a vision tower, patched with `streams`.
        preprocess: makes its input.
        streams: the limits. While `max_streams` streams are open and none is idle, new ones are refused, so that nobody
            can push out others by opening more.
        window_ms: time a frame waits for those of other streams, in milliseconds.
        most: maximum number of frames in a pass, unless a single request has more.
        queue: maximum number of waiting requests, at most a quarter of it from one stream. Also the number of waiting
            frames, as in clips, at which no more are accepted.
        state: an existing directory in which streams are kept from `stop` to `start`; None keeps none.

    Attributes:
        metrics: the metrics for Prometheus.

    Example:
        >>> import asyncio
        >>> from neuroflow.serve.service import Service
        >>> from neuroflow.video.preprocess import Preprocessor
        >>> async def embed(frame):
        ...     streams = neuroflow.StreamCache(max_streams=64)
        ...     service = Service(neuroflow.enable_cache(model, streams=streams), Preprocessor(32, 32), streams)
        ...     await service.start()
        ...     (answer,) = await service.encode("cam-7", lambda: frame)
        ...     await service.stop()
        ...     return answer
        >>> asyncio.run(embed(frame)).key_frame
        'first'
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
        self._streams: dict[str, _Stream] = {}  # the one whose turn is next comes first
        self._queued = 0
        self._ready = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self._encoder = ThreadPoolExecutor(1, "neuroflow-encoder")
        self._decoders = ThreadPoolExecutor(DECODERS, "neuroflow-decoder")

    @property
    def running(self) -> bool:
        """Whether the service accepts frames."""
        return self._task is not None and not self._task.done() and not self._stopping

    async def start(self) -> None:
        """Load the streams that an earlier service saved, warm up the model, and begin."""
        await asyncio.get_running_loop().run_in_executor(self._encoder, self._warm_up)
        if self._state is not None and self._state.exists():
            try:
                neuroflow.load_state(self._model, self._state)
            except ValueError as error:
                warnings.warn(f"{error}; all streams start over", stacklevel=2)
        for name, summary in neuroflow.summary(self._model).streams.items():
            number = summary.frames - 1 if summary.frame_id is None else summary.frame_id
            self._streams[str(name)] = _Stream(number=number)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Answer waiting requests, accept no more, and save the streams if there is a `state` directory.

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
            stream: its name; an unknown one is opened.
            decode: returns the model's input, [T, 3, H, W] float32; called in another thread.
            frame: number of the first frame; None for the one after the last. Numbers that were just answered get the
                same answer again, so that a request can be repeated. A gap makes a key frame, because frames were lost.

        Returns:
            an answer for each frame.

        Raises:
            Full: the queue is full, the maximum number of streams is open, or the service is stopping.
            Exception: whatever `decode` or the model raises. Other requests are not affected.
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
            raise Full(
                f"{self._queued} requests are waiting, {len(of_stream.waiting)} of them for this stream; slow down", 1.0
            )
        request = _Request(stream, frame, time.monotonic(), loop.create_future())
        of_stream.waiting.append(request)
        self._queued += 1
        self.metrics.queue.set(self._queued)
        try:
            pixels = await loop.run_in_executor(self._decoders, decode)
            frames = self._frames_waiting()
            if frames >= self._queue:
                raise Full(f"{frames} frames are waiting; slow down, or send shorter clips", 1.0)
        except BaseException as error:
            self._take(request)
            self._forget_unused(stream)
            self._ready.set()
            if isinstance(error, Exception):
                request.future.set_exception(error)
                request.future.exception()  # marks it as retrieved, in case nobody repeats the request
            else:
                request.future.cancel()
            raise
        request.pixels, request.ready = pixels, time.monotonic()
        self._ready.set()
        return await asyncio.shield(request.future)

    def streams(self) -> list[StreamStatus]:
        """All open streams, by name."""
        now = time.monotonic()
        summaries = neuroflow.summary(self._model).streams
        return [
            StreamStatus(name, _as_answered(summaries[name], known.report), now - known.used, list(known.history))
            for name, known in sorted(self._streams.items())
            if name in summaries
        ]

    def status(self, stream: str) -> StreamStatus:
        """The status of one stream. An image of its frames is kept from now on, for a while.

        Raises:
            KeyError: it is not open.
        """
        self._streams[stream].watched = time.monotonic()
        by_name = {status.stream: status for status in self.streams()}
        return by_name[stream]

    def picture(self, stream: str) -> np.ndarray | None:
        """The model's last input from a stream, [H, W, 3] uint8; None until the next frame after a first call.

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
        """Memory that the streams hold, in bytes."""
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
                raise Full(f"{most} streams are open, the maximum; DELETE one, or raise --max-streams", soon)
            del self._streams[oldest]  # the cache then closes it to make room
        self._streams[stream] = _Stream()
        return self._streams[stream]

    def _forget_unused(self, *names: str) -> None:
        """Forget streams that have no waiting request and are not open in the model."""
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
            self._streams[name] = self._streams.pop(name)  # after those that have waited longer
        return batch

    def _encode(self, batch: list[_Request], begun: float) -> list[list[Answer] | Exception]:
        """The answers to requests, or the error of each; if a pass fails, each request is tried alone."""
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
        """Measure and pack kernels now, so that the first frame of a camera does not wait for it."""
        pixels = torch.zeros(1, 3, self.preprocess.height, self.preprocess.width)
        weight = next(self._model.parameters())
        pixels = pixels.to(weight.device, weight.dtype)
        name = object()  # a name that no request can have
        with torch.inference_mode():
            for shade in (0.0, 0.5):
                neuroflow.encode(self._model, pixels + shade, [name], **interpolation(self._model, pixels))
        neuroflow.reset_cache(self._model, name)


def _as_answered(summary: neuroflow.StreamSummary, report: neuroflow.FrameReport | None) -> neuroflow.StreamSummary:
    """The summary as of the last answered frame, since the model may already be at the next one."""
    return summary if report is None else replace(summary, active=report.active, surprise=report.surprise)

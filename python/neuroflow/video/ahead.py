"""Preparing a model's input, in a thread of its own while the model works."""

import collections
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch

from .preprocess import Preprocessor
from .source import Frame

Item = TypeVar("Item")


@dataclass(frozen=True)
class Prepared:
    """A frame and the input made of it, [1, 3, height, width] float32, with the milliseconds that each took.

    `region` is what of the frame is in it: left, top, right and bottom edge in the frame's pixels.
    """

    frame: Frame
    pixels: torch.Tensor
    region: tuple[float, float, float, float]
    decode_ms: float
    preprocess_ms: float


def prepare(frames: Iterable[Frame], preprocess: Preprocessor) -> Iterator[Prepared]:
    """Every frame as the model takes it."""
    start = time.perf_counter()
    for frame in frames:
        decoded = time.perf_counter()
        pixels = preprocess(frame)
        end = time.perf_counter()
        yield Prepared(frame, pixels, preprocess.region(frame.size), (decoded - start) * 1e3, (end - decoded) * 1e3)
        start = time.perf_counter()


class ReadAhead(Generic[Item]):
    """Runs an iterator in a thread, up to `depth` items ahead of its one reader, which gets every item, in order.

    What the iterator raises reaches the reader after the items before it. The thread ends with the iterator or with the
    `with` block, whichever comes first; one that hangs in the iterator then is given `patience` seconds, and left.

    Args:
        items: what is iterated; nobody else may while the thread runs.
        depth: how many items wait at most.
        patience: seconds.
    """

    def __init__(self, items: Iterator[Item], *, depth: int = 3, patience: float = 1.0) -> None:
        self._items = items
        self._depth = depth
        self._patience = patience
        self._waiting: collections.deque[Item] = collections.deque()
        self._change = threading.Condition()
        self._closing = self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._thread.join(self._patience)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._ended)
            if self._waiting:
                self._change.notify_all()
                return self._waiting.popleft()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def _read(self) -> None:
        try:
            for item in self._items:
                with self._change:
                    self._waiting.append(item)
                    self._change.notify_all()
                    self._change.wait_for(lambda: len(self._waiting) < self._depth or self._closing)
                    if self._closing:
                        break
        except BaseException as error:
            self._error = error
        finally:
            with self._change:
                self._ended = True
                self._change.notify_all()

"""Prepare a model's input in another thread while the model works."""

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
    """A frame, its model input, [1, 3, height, width] float32, and the milliseconds that each took.

    `region` is the part of the frame that the input shows: left, top, right and bottom edge, in the frame's pixels.
    """

    frame: Frame
    pixels: torch.Tensor
    region: tuple[float, float, float, float]
    decode_ms: float
    preprocess_ms: float


def prepare(frames: Iterable[Frame], preprocess: Preprocessor) -> Iterator[Prepared]:
    """Preprocess every frame."""
    start = time.perf_counter()
    for frame in frames:
        decoded = time.perf_counter()
        pixels = preprocess(frame)
        end = time.perf_counter()
        yield Prepared(frame, pixels, preprocess.region(frame.size), (decoded - start) * 1e3, (end - decoded) * 1e3)
        start = time.perf_counter()


class ReadAhead(Generic[Item]):
    """Run an iterator in a thread, up to `depth` items ahead of a single reader, which gets every item in order.

    An error in the iterator reaches the reader after the items before it. The thread ends with the iterator or with the
    `with` block. If it hangs in the iterator at the end of the block, it gets `patience` seconds and is then abandoned.

    Args:
        items: the iterator; nobody else may use it while the thread runs.
        depth: maximum number of waiting items.
        patience: seconds to wait for the thread at the end.
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

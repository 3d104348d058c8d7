import ctypes
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress

from .state import StreamState


def give_back_memory() -> None:
    """Return free pages of the heap to the system.

    Streams come and go among the short-lived tensors of a pass. The holes that this leaves would add up to more than
    all of the streams hold.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # a libc without it
            ctypes.CDLL(None).malloc_trim(0)


class StreamCache:
    """The streams of one patched model, within limits; threads may use them at once.

    A stream opens with its first frame. Beyond a limit the least recently used streams are closed, which is what
    `reset_cache(model, stream)` does by hand: their memory is given back, and a frame that comes for one after all is
    its first. Streams of the pass at hand are never closed.

    Args:
        max_streams: how many are kept; None sets no limit.
        max_bytes: what all of them may hold. Room for a new stream, or a larger size, is made before its frame is
            encoded, going by the size of the others.
        idle_seconds: one that was not used for this long is closed with the next frame of any.

    Raises:
        ValueError: a limit that is not above 0.
    """

    def __init__(
        self, max_streams: int | None = None, max_bytes: int | None = None, idle_seconds: float | None = None
    ) -> None:
        limits = {"max_streams": max_streams, "max_bytes": max_bytes, "idle_seconds": idle_seconds}
        for name, value in limits.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value!r}; accepted is None or a number above 0")
        self.max_streams = max_streams
        self.max_bytes = max_bytes
        self.idle_seconds = idle_seconds
        self._states: dict[Hashable, StreamState] = {}  # the least recently used first
        self._busy: set[Hashable] = set()
        self._changed = threading.Condition()

    def __getitem__(self, name: Hashable) -> StreamState:
        return self._states[name]

    def __contains__(self, name: Hashable) -> bool:
        return name in self._states

    def __len__(self) -> int:
        return len(self._states)

    def items(self) -> list[tuple[Hashable, StreamState]]:
        with self._changed:
            return list(self._states.items())

    @property
    def state_bytes(self) -> int:
        return sum(state.state_bytes for _, state in self.items())

    @property
    def limit_bytes(self) -> int | None:
        """What all streams together can come to hold: `max_bytes`, or `max_streams` of the largest; None: anything."""
        if self.max_bytes is not None or self.max_streams is None:
            return self.max_bytes
        return self.max_streams * max((state.state_bytes for _, state in self.items()), default=0)

    @contextmanager
    def used(self, names: tuple[Hashable, ...], patches: list[int]) -> Iterator[list[StreamState]]:
        """The states of the streams `names` for one pass of so many patches each, new ones where there are none.

        Waits while another thread encodes a frame of one of them. New ones are kept if the pass succeeds.

        Raises:
            ValueError: more names than `max_streams`, or streams too large for `max_bytes`.
        """
        if self.max_streams is not None and len(names) > self.max_streams:
            raise ValueError(f"max_streams is {self.max_streams}; accepted is at least the {len(names)} of this pass")
        with self._changed:
            self._changed.wait_for(lambda: self._busy.isdisjoint(names))
            self._busy.update(names)
        try:
            states = [self._states.get(name) or StreamState(name) for name in names]
            with self._changed:
                opened = any(state.name not in self._states for state in states)
                self._make_room(states, patches)
            yield states
            with self._changed:
                self._keep(states)
            if opened:
                give_back_memory()
        finally:
            with self._changed:
                self._busy.difference_update(names)
                self._changed.notify_all()

    def put(self, states: list[StreamState]) -> None:
        """Take in streams that were encoded elsewhere, in place of those of the same names."""
        self.close([state.name for state in states])
        with self._changed:
            self._keep(states)

    def close(self, names: Iterable[Hashable]) -> None:
        """Forget streams, each once no thread encodes a frame of it."""
        for name in list(names):
            with self._changed:
                self._changed.wait_for(lambda name=name: name not in self._busy)
                if name in self._states:
                    self._forget(name)
        give_back_memory()

    def _make_room(self, states: list[StreamState], patches: list[int]) -> None:
        if self.idle_seconds is not None:
            expired = time.monotonic() - self.idle_seconds
            for name in [name for name, state in self._states.items() if state.used < expired]:
                self._evict(name)
        if self.max_streams is not None:
            opening = sum(state.name not in self._states for state in states)
            self._evict_while(lambda: len(self._states) + opening > self.max_streams)
        if self.max_bytes is not None:
            per_patch = max((state.state_bytes / state.patches for state in self._states.values()), default=0)
            growth = sum(
                max(per_patch * count - state.state_bytes, 0)
                for state, count in zip(states, patches, strict=True)
                if count != state.patches
            )
            self._evict_while(lambda: self._held() + growth > self.max_bytes)

    def _keep(self, states: list[StreamState]) -> None:
        for state in states:
            self._states.pop(state.name, None)
            state.used = time.monotonic()
            state.state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.held())
            self._states[state.name] = state
        if self.max_streams is not None:
            self._evict_while(lambda: len(self._states) > self.max_streams)
        if self.max_bytes is not None:
            self._evict_while(lambda: self._held() > self.max_bytes)
            own = sum(state.state_bytes for state in states)
            if own > self.max_bytes:
                for state in states:
                    self._forget(state.name)
                raise ValueError(
                    f"max_bytes is {self.max_bytes}; accepted is at least the {own} of the {len(states)} stream(s) of "
                    "this pass"
                )

    def _held(self) -> int:
        return sum(state.state_bytes for state in self._states.values())

    def _evict_while(self, over: Callable[[], bool]) -> None:
        for name in list(self._states):
            if over():
                self._evict(name)

    def _evict(self, name: Hashable) -> None:
        if name not in self._busy:
            self._forget(name)

    def _forget(self, name: Hashable) -> None:
        self._states.pop(name).slab = None  # so that graphs which use it give their memory back too

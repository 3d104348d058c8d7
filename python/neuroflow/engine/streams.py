import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
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


class Hold:
    """What one thread has to itself in a `StreamCache`, or waits for, until it releases `running`.

    A lock, since its release is one call that no interrupt can leave half done.
    """

    def __init__(self) -> None:
        self.names: frozenset[Hashable] | None = frozenset()  # None: all there are, and passes of none too
        self.thread = threading.get_ident()
        self.running = threading.Lock()
        self.running.acquire()

    def excludes(self, other: "Hold") -> bool:
        return self.names is None or other.names is None or not self.names.isdisjoint(other.names)


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
        self._holds: list[Hold] = []  # in the order of their arrival
        self._lock = threading.RLock()  # of what is above, for moments
        _caches.add(self)

    def __getitem__(self, name: Hashable) -> StreamState:
        return self._states[name]

    def __contains__(self, name: Hashable) -> bool:
        return name in self._states

    def __len__(self) -> int:
        return len(self._states)

    def items(self) -> list[tuple[Hashable, StreamState]]:
        with self._lock:
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

    def wait(self, hold: Hold, names: Iterable[Hashable] | None) -> None:
        """Have streams to oneself, None: all, once those are through who asked for any of them before."""
        with self._lock:
            # What this thread held before, it lost to an interrupt.
            self._holds = [each for each in self._holds if each.running.locked() and each.thread != hold.thread]
            hold.names = None if names is None else frozenset(names)
            ahead = [each for each in self._holds if hold.excludes(each)]
            self._holds.append(hold)
        for each in ahead:
            with each.running:
                pass

    @contextmanager
    def held(self, names: Iterable[Hashable] | None) -> Iterator[None]:
        """A block that has streams to itself, None: all; for work that is no pass."""
        hold = Hold()
        try:
            self.wait(hold, names)
            yield
        finally:
            hold.running.release()

    def take(self, hold: Hold, patches: Mapping[Hashable, int]) -> dict[Hashable, StreamState]:
        """The states of streams for one pass of so many patches of each, new ones where there are none.

        Waits while another thread encodes a frame of one of them. `keep` ends what begins here, if the pass succeeds.

        Raises:
            ValueError: more names than `max_streams`, or streams too large for `max_bytes`.
        """
        self._check_count(len(patches))
        self.wait(hold, patches)
        with self._lock:
            states = {name: self._states.get(name) or StreamState(name) for name in patches}
            self._make_room(states.values(), patches)
        return states

    def keep(self, states: Iterable[StreamState]) -> None:
        """Take in the streams of a pass.

        Raises:
            ValueError: they are too large for `max_bytes`, and gone.
        """
        with self._lock:
            opened = any(state.name not in self._states for state in states)
            self._keep(states)
        if opened:
            give_back_memory()

    def put(self, states: list[StreamState]) -> None:
        """Take in streams that were encoded elsewhere, in place of those of the same names.

        Raises:
            ValueError: they are beyond the limits; nothing is replaced.
        """
        self._check_count(len(states))
        with self.held([state.name for state in states]), self._lock:
            self._check_bytes(states)
            for state in states:
                if state.name in self._states:
                    self._forget(state.name)
            self._keep(states)
        give_back_memory()

    def clear(self) -> None:
        """Forget all streams, which the caller has to itself."""
        with self._lock:
            for name in list(self._states):
                self._forget(name)
        give_back_memory()

    def close(self, names: Iterable[Hashable]) -> None:
        """Forget streams, each once no thread encodes a frame of it."""
        for name in list(names):
            with self.held([name]), self._lock:
                if name in self._states:
                    self._forget(name)
        give_back_memory()

    def _check_count(self, count: int) -> None:
        if self.max_streams is not None and count > self.max_streams:
            raise ValueError(f"max_streams is {self.max_streams}; accepted is at least the {count} that come together")

    def _check_bytes(self, states: Iterable[StreamState]) -> None:
        own = [_bytes_of(state) for state in states]
        if self.max_bytes is not None and sum(own) > self.max_bytes:
            raise ValueError(
                f"max_bytes is {self.max_bytes}; accepted is at least the {sum(own)} of the {len(own)} stream(s) that "
                "come together"
            )

    def _make_room(self, states: Iterable[StreamState], patches: Mapping[Hashable, int]) -> None:
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
                max(per_patch * patches[state.name] - state.state_bytes, 0)
                for state in states
                if patches[state.name] != state.patches
            )
            self._evict_while(lambda: self._held() + growth > self.max_bytes)

    def _keep(self, states: Iterable[StreamState]) -> None:
        for state in states:
            self._states.pop(state.name, None)
            state.used = time.monotonic()
            state.state_bytes = _bytes_of(state)
            self._states[state.name] = state
        if self.max_streams is not None:
            self._evict_while(lambda: len(self._states) > self.max_streams)
        if self.max_bytes is not None:
            self._evict_while(lambda: self._held() > self.max_bytes)
            try:
                self._check_bytes(states)
            except ValueError:
                for state in states:
                    self._forget(state.name)
                raise

    def _held(self) -> int:
        return sum(state.state_bytes for state in self._states.values())

    def _evict_while(self, over: Callable[[], bool]) -> None:
        for name in list(self._states):
            if over():
                self._evict(name)

    def _evict(self, name: Hashable) -> None:
        if not any(name in each.names for each in self._holds if each.names and each.running.locked()):
            self._forget(name)

    def _forget(self, name: Hashable) -> None:
        self._states.pop(name).slab = None  # so that graphs which use it give their memory back too


def _bytes_of(state: StreamState) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.held())


_caches: weakref.WeakSet[StreamCache] = weakref.WeakSet()


def _after_fork() -> None:
    """The other threads are gone, and with them whoever would release what they hold."""
    for cache in _caches:
        cache._lock = threading.RLock()
        cache._holds = [hold for hold in cache._holds if hold.thread == threading.get_ident()]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

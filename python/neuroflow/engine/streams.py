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
    """Return free heap pages to the system.

    Stream state is allocated among the short-lived tensors of a pass. The holes it leaves would otherwise add up to
    more memory than all streams hold.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # a libc without it
            ctypes.CDLL(None).malloc_trim(0)


class Hold:
    """What one thread holds exclusively in a `StreamCache`, or waits for, until it releases `running`.

    `running` is a lock because its release is a single call, which an interrupt cannot leave half done.
    """

    def __init__(self) -> None:
        self.names: frozenset[Hashable] | None = frozenset()  # None: all streams, and passes without any
        self.thread = threading.get_ident()
        self.running = threading.Lock()
        self.running.acquire()

    def excludes(self, other: "Hold") -> bool:
        return self.names is None or other.names is None or not self.names.isdisjoint(other.names)


class StreamCache:
    """The streams of one patched model, held within limits; safe to use from several threads.

    A stream opens with its first frame. When a limit is reached, the least recently used streams are closed, as by
    `reset_cache(model, stream)`: their memory is freed, and a later frame counts as their first. Streams in the current
    pass are never closed.

    Args:
        max_streams: number of streams to keep, above 0. None sets no limit.
        max_bytes: memory that all streams may hold, in bytes, above 0. Room for a new stream or a larger size is made
            before its frame is encoded, estimated from the size of the others. None sets no limit.
        idle_seconds: seconds after which an unused stream is closed, at the next frame of any stream. None never does.

    Raises:
        ValueError: a limit that is not above 0.

    Example:
        >>> streams = neuroflow.StreamCache(max_streams=2)
        >>> model = neuroflow.enable_cache(model, streams=streams)
        >>> for camera in ("cam-1", "cam-2", "cam-3"):
        ...     output = neuroflow.stream(model, camera)(pixel_values=frame)
        >>> [name for name, _ in streams.items()]
        ['cam-2', 'cam-3']
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
        self._states: dict[Hashable, StreamState] = {}  # least recently used first
        self._holds: list[Hold] = []  # in order of arrival
        self._lock = threading.RLock()  # guards both, briefly
        _caches.add(self)

    def __getitem__(self, name: Hashable) -> StreamState:
        return self._states[name]

    def __contains__(self, name: Hashable) -> bool:
        return name in self._states

    def __len__(self) -> int:
        return len(self._states)

    def items(self) -> list[tuple[Hashable, StreamState]]:
        """(name, state) of each open stream, least recently used first."""
        with self._lock:
            return list(self._states.items())

    @property
    def state_bytes(self) -> int:
        """Memory that all streams hold, in bytes."""
        return sum(state.state_bytes for _, state in self.items())

    @property
    def limit_bytes(self) -> int | None:
        """Upper bound on the memory of all streams: `max_bytes`, or `max_streams` times the largest. None: no bound."""
        if self.max_bytes is not None or self.max_streams is None:
            return self.max_bytes
        return self.max_streams * max((state.state_bytes for _, state in self.items()), default=0)

    def wait(self, hold: Hold, names: Iterable[Hashable] | None) -> None:
        """Hold streams exclusively (None: all), once every thread that asked for one of them earlier is done."""
        with self._lock:
            # Whatever this thread still holds was left behind by an interrupt.
            self._holds = [each for each in self._holds if each.running.locked() and each.thread != hold.thread]
            hold.names = None if names is None else frozenset(names)
            ahead = [each for each in self._holds if hold.excludes(each)]
            self._holds.append(hold)
        for each in ahead:
            with each.running:
                pass

    @contextmanager
    def held(self, names: Iterable[Hashable] | None) -> Iterator[None]:
        """Hold streams exclusively for a block that is not a pass; None: all of them."""
        hold = Hold()
        try:
            self.wait(hold, names)
            yield
        finally:
            hold.running.release()

    def take(self, hold: Hold, patches: Mapping[Hashable, int]) -> dict[Hashable, StreamState]:
        """The states of the streams for one pass, given the number of patches of each; new ones are created.

        Waits while another thread encodes a frame of one of them. `keep` completes what begins here if the pass
        succeeds.

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
        """Store the streams of a pass.

        Raises:
            ValueError: they are too large for `max_bytes`; they are dropped.
        """
        with self._lock:
            opened = any(state.name not in self._states for state in states)
            self._keep(states)
        if opened:
            give_back_memory()

    def put(self, states: list[StreamState]) -> None:
        """Store streams that were encoded elsewhere, replacing those of the same name.

        Raises:
            ValueError: they exceed the limits; nothing is replaced.
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
        """Forget all streams; the caller holds them exclusively."""
        with self._lock:
            for name in list(self._states):
                self._forget(name)
        give_back_memory()

    def close(self, names: Iterable[Hashable]) -> None:
        """Forget streams, each as soon as no thread encodes a frame of it."""
        for name in list(names):
            with self.held([name]), self._lock:
                if name in self._states:
                    self._forget(name)
        give_back_memory()

    def _check_count(self, count: int) -> None:
        if self.max_streams is not None and count > self.max_streams:
            raise ValueError(
                f"max_streams is {self.max_streams}; accepted is at least {count}, the streams of one call"
            )

    def _check_bytes(self, states: Iterable[StreamState]) -> None:
        own = [_bytes_of(state) for state in states]
        if self.max_bytes is not None and sum(own) > self.max_bytes:
            raise ValueError(
                f"max_bytes is {self.max_bytes}; accepted is at least {sum(own)}, the size of the {len(own)} "
                "stream(s) of one call"
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
        self._states.pop(name).slab = None  # so that graphs that use it free their memory too


def _bytes_of(state: StreamState) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.held())


_caches: weakref.WeakSet[StreamCache] = weakref.WeakSet()


def _after_fork() -> None:
    """The other threads do not exist in the child, so nobody would release what they hold."""
    for cache in _caches:
        cache._lock = threading.RLock()
        cache._holds = [hold for hold in cache._holds if hold.thread == threading.get_ident()]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

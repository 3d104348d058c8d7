"""How many threads a call on the CPU runs on: no more than there are free cores.

Torch's threads wait for each other hundreds of times in a frame. If one of them shares its core with another process,
all of them wait at each of these points until the scheduler runs it again, and a frame takes a hundred times as long.
With no more threads than free cores it takes about as long as its work.

Busy cores alone are no reason: a decoder may use them while no frame is encoded. So now and then a call on all threads
is watched for whether they had to wait for a core.
"""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable
from inspect import isbuiltin
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from neuroflow_kernels.cores import ROOT, own_cores, quota

INTERVAL = 0.25  # minimum time between readings, in seconds
AGAIN, LONGEST = 5.0, 60.0  # seconds until all threads are tried again after a wait, doubling up to the second
WAITED = 0.3  # total waiting time of its threads, relative to a call's duration, that counts as contention
BUSY = (0, 1, 2, 5, 6, 7)  # columns of /proc/stat: user, nice, system, irq, softirq and steal, not idle and iowait
Result = TypeVar("Result")


class Cores(NamedTuple):
    """The cores available: those this process may use, its cgroup's quota, and what others use."""

    own: int
    quota: float
    others: float

    @property
    def granted(self) -> int:
        return max(round(min(self.own, self.quota)), 1)

    @property
    def free(self) -> int:
        return max(round(min(self.own - self.others, self.quota)), 1)

    def __str__(self) -> str:
        if self.quota < self.own - self.others:
            return f"its cgroup's quota is {self.quota:g} of {self.own} core(s)"
        if self.others < 0.5:
            return f"it may use {self.own} core(s)"
        return f"other processes use {self.others:.1f} of its {self.own} core(s)"


class Reading(NamedTuple):
    """Seconds that cores were busy with anything, and that this process ran, at a time; `busy` None: unknown."""

    at: float
    cores: frozenset[int]
    busy: float | None
    process: float

    @classmethod
    def now(cls, root: Path) -> "Reading":
        cores = own_cores()
        return cls(time.monotonic(), cores, busy_seconds(cores, root), time.process_time())


def busy_seconds(cores: Iterable[int], root: Path = ROOT) -> float | None:
    """What all processes ran on some cores since boot; None if /proc/stat does not say.

    Args:
        cores: their numbers.
        root: the directory that holds `proc`.
    """
    try:
        lines = (root / "proc/stat").read_text().splitlines()
        columns = {name: values for name, *values in map(str.split, lines) if name.startswith("cpu")}
        ticks = sum(int(columns[f"cpu{core}"][column]) for core in cores for column in BUSY)
    except (OSError, LookupError, ValueError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK")


def waited_seconds(root: Path = ROOT) -> float | None:
    """How long all threads of this process have waited for a core since they started; None if the kernel does not say.

    Args:
        root: the directory that holds `proc`.
    """
    waited = 0
    for path in root.glob("proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError, LookupError, ValueError):  # a thread may end in between
            waited += int(path.read_text().split()[1])  # nanoseconds waited; the first column is nanoseconds run
    return waited / 1e9 or None


class Rivals:
    """Whether other processes keep this one's threads from their cores, as observed in calls on all threads.

    Args:
        root: the directory that holds `proc`.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.forget()

    def forget(self) -> None:
        """No other process uses a core."""
        self.waiting = False
        self._until, self._again = 0.0, AGAIN

    def known(self) -> bool:
        return time.monotonic() < self._until

    def watch(self, work: Callable[[], Result]) -> Result:
        """Call `work`, and record whether its threads had to wait."""
        before, start = waited_seconds(self.root), time.monotonic()
        result = work()
        after, end = waited_seconds(self.root), time.monotonic()
        self.waiting = before is None or after is None or after - before > WAITED * (end - start)
        self._until = end + (self._again if self.waiting else INTERVAL)
        self._again = min(2 * self._again, LONGEST) if self.waiting else AGAIN
        return result


class Meter:
    """Reads, at most every `INTERVAL`, how many cores other processes use; several threads may ask at once.

    A process that starts to compute after a reading is seen at the next one.

    Args:
        root: the directory that holds `proc` and `sys`.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self._last = Reading.now(root)
        self._cores = Cores(len(self._last.cores), quota(root), 0.0)

    def read(self) -> Cores:
        """The result for the last complete interval."""
        last = self._last
        if time.monotonic() - last.at < INTERVAL:
            return self._cores
        now = Reading.now(self.root)
        others = 0.0
        if last.busy is not None and now.busy is not None and last.cores == now.cores:
            used = now.busy - last.busy - max(now.process - last.process, 0)  # negative in a forked process
            others = min(max(used / (now.at - last.at), 0.0), len(now.cores))
        self._cores = Cores(len(now.cores), quota(self.root), others)
        self._last = now
        return self._cores


meter, rivals = Meter(), Rivals()
# Torch's setting is per thread; a new thread starts with what any other has set last.
_seen = threading.local()
_lowered: dict[int, tuple[int, int]] = {}  # by thread in a call on fewer threads: the user's number, and the lower one


def _own_threads() -> int:
    """The number of threads that the user has set for this one, or has left to torch."""
    number = torch.get_num_threads()
    if not hasattr(_seen, "before"):
        _seen.before = True
        return max((own for own, fewer in list(_lowered.values()) if fewer == number), default=number)
    return number


def on_free_cores(
    warn_once: Callable[[str, str], None],
    device: torch.device,
    work: Callable[..., Result],
    /,
    *args: Any,
    **kwargs: Any,
) -> Result:
    """Call `work`, on a CPU with no more torch threads than there are free cores.

    Afterwards torch has as many threads for this Python thread as before, or as `work` has set. A thread whose first
    call comes while others are in theirs, and that has as few threads as they run on, is assumed to have inherited that
    number.

    Args:
        warn_once: takes a message and its subject, and gives one message per subject.
        device: where `work` computes.
        work: called with the remaining arguments.
    """
    if device.type != "cpu":
        return work(*args, **kwargs)
    own, cores = _own_threads(), meter.read()
    granted, chosen = min(own, cores.granted), min(own, cores.free)
    if chosen < own and not isbuiltin(torch.set_num_threads):  # vLLM, for example, has pinned its threads to cores
        return work(*args, **kwargs)
    if chosen == granted:
        rivals.forget()
    elif not rivals.known():
        return rivals.watch(functools.partial(_on, granted, own, work, *args, **kwargs))
    elif not rivals.waiting:
        chosen = granted
    if chosen < own:
        warn_once(
            f"frames run on {chosen} thread(s) instead of torch's {own} while {cores}, since a thread that shares its "
            "core keeps all others waiting; give the process more cores, or set "
            f"OMP_NUM_THREADS={chosen} for its other work too",
            "threads",
        )
    return _on(chosen, own, work, *args, **kwargs)


def _on(chosen: int, own: int, work: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
    """Call `work` on `chosen` threads; `own` is the user's number."""
    if chosen == own == torch.get_num_threads():
        return work(*args, **kwargs)
    now, thread = own, threading.get_ident()
    _lowered[thread] = own, chosen
    try:
        torch.set_num_threads(chosen)
        return work(*args, **kwargs)
    finally:
        try:
            now = torch.get_num_threads()
        finally:  # runs even if an interrupt comes first
            torch.set_num_threads(own if now == chosen else now)
            _lowered.pop(thread, None)

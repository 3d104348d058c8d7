"""How many threads a call on the CPU runs on: no more than there are cores left for it.

The threads of torch wait for each other hundreds of times in a frame. Where one of them shares its core with another
process, all wait at each of these points until the scheduler lets it run again, and a frame takes a hundred times as
long. On as many threads as there are free cores it takes about what its work does.

That others use cores is no reason by itself: a decoder may do so while no frame is encoded. So a call is watched now
and then on all threads, for whether they had to wait for a core.
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

INTERVAL = 0.25  # seconds from one reading to the next, at least
AGAIN, LONGEST = 5.0, 60.0  # seconds until a call that had to wait is repeated, twice as long each time
WAITED = 0.3  # of a call's time, from which on its threads were kept from their cores
BUSY = (0, 1, 2, 5, 6, 7)  # columns of /proc/stat: user, nice, system, irq, softirq and steal, not idle and iowait
Result = TypeVar("Result")


class Cores(NamedTuple):
    """What there is to run on, in cores: those this process may use, its cgroup's quota, and what others use."""

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
    """Seconds, by the clock, that cores were busy with anything, and that this process ran; `busy` None: unknown."""

    at: float
    cores: frozenset[int]
    busy: float | None
    process: float

    @classmethod
    def now(cls, root: Path) -> "Reading":
        cores = own_cores()
        return cls(time.monotonic(), cores, busy_seconds(cores, root), time.process_time())


def busy_seconds(cores: Iterable[int], root: Path = ROOT) -> float | None:
    """What some cores ran of all processes since the machine started; None where /proc/stat does not say.

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
    """What all threads of this process have waited for a core since they started; None where the kernel does not say.

    Args:
        root: the directory that holds `proc`.
    """
    waited = 0
    for path in root.glob("proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError, LookupError, ValueError):  # a thread may end meanwhile
            waited += int(path.read_text().split()[1])  # nanoseconds; before it those that the thread ran
    return waited / 1e9 or None


class Rivals:
    """Whether other processes keep the threads of this one from their cores, as calls on all threads have shown.

    Args:
        root: the directory that holds `proc`.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.forget()

    def forget(self) -> None:
        """Nobody else uses a core."""
        self.waiting = False
        self._until, self._again = 0.0, AGAIN

    def known(self) -> bool:
        return time.monotonic() < self._until

    def watch(self, work: Callable[[], Result]) -> Result:
        """Call `work`, and note whether its threads had to wait."""
        before, start = waited_seconds(self.root), time.monotonic()
        result = work()
        after, end = waited_seconds(self.root), time.monotonic()
        self.waiting = before is None or after is None or after - before > WAITED * (end - start)
        self._until = end + (self._again if self.waiting else INTERVAL)
        self._again = min(2 * self._again, LONGEST) if self.waiting else AGAIN
        return result


class Meter:
    """Reads, at most every `INTERVAL`, what other processes leave of the cores; several threads may ask at once.

    Whoever starts to compute after a reading is known from the next one on.

    Args:
        root: the directory that holds `proc` and `sys`.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self._last = Reading.now(root)
        self._cores = Cores(len(self._last.cores), quota(root), 0.0)

    def read(self) -> Cores:
        """What was found over the last interval that is complete."""
        last = self._last
        if time.monotonic() - last.at < INTERVAL:
            return self._cores
        now = Reading.now(self.root)
        others = 0.0
        if last.busy is not None and now.busy is not None and last.cores == now.cores:
            used = now.busy - last.busy - max(now.process - last.process, 0)  # below 0 in a process that was forked
            others = min(max(used / (now.at - last.at), 0.0), len(now.cores))
        self._cores = Cores(len(now.cores), quota(self.root), others)
        self._last = now
        return self._cores


meter, rivals = Meter(), Rivals()
# The setting of torch belongs to a thread; one that is new begins with what any other has set last.
_seen = threading.local()
_lowered: dict[int, tuple[int, int]] = {}  # by thread that is in a call on fewer: its user's number, and that


def _own_threads() -> int:
    """The number of threads that the user of this one has set for it, or has left to torch."""
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
    """Call `work`, on a CPU with no more of torch's threads than there are free cores.

    Afterwards torch has as many for this Python thread as before, or as `work` has set. A thread whose first call comes
    while others are in theirs, and that has as few threads as they run on, is taken to have them from those.

    Args:
        warn_once: takes a message and what it is about, of which it says one alone.
        device: where `work` computes.
        work: called with the rest.
    """
    if device.type != "cpu":
        return work(*args, **kwargs)
    own, cores = _own_threads(), meter.read()
    granted, chosen = min(own, cores.granted), min(own, cores.free)
    if chosen < own and not isbuiltin(torch.set_num_threads):  # vLLM, say, has tied its threads to cores
        return work(*args, **kwargs)
    if chosen == granted:
        rivals.forget()
    elif not rivals.known():
        return rivals.watch(functools.partial(_on, granted, own, work, *args, **kwargs))
    elif not rivals.waiting:
        chosen = granted
    if chosen < own:
        warn_once(
            f"frames run on {chosen} thread(s) instead of torch's {own} while {cores}, as a thread that shares its "
            "core keeps all others waiting; leave the process more cores for more, or set "
            f"OMP_NUM_THREADS={chosen} for what it runs beside frames too",
            "threads",
        )
    return _on(chosen, own, work, *args, **kwargs)


def _on(chosen: int, own: int, work: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
    """Call `work` on so many threads; `own` are the user's."""
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
        finally:  # a call that no interrupt can come before
            torch.set_num_threads(own if now == chosen else now)
            _lowered.pop(thread, None)

"""Sparse frames on a GPU as CUDA graphs: a frame's launches are recorded once and replayed as one.

A sparse frame has little arithmetic but as many launches as a dense one, and each launch costs the host microseconds.
So the frames of a fixed set of streams become two launches: a gate, from pixels to active patches, and an encoder,
recorded for each rung of the ladder that occurs. In between, the host reads one number: how many patches are active, or
that the frame does not suit a graph because it holds NaN or Inf, shows another scene, or changes so much that dense is
faster. Such a frame continues as without graphs, from the surprise that the gate found.
"""

import functools
import statistics
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import BoundArguments
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from neuroflow_kernels import gather_rows, scatter_rows_

from ..adapters.anatomy import Grid, by_name
from . import crossover, scores
from .gate import Gate, is_recordable
from .passes import Pass, StaticPass, Unrecordable, current_pass, within
from .state import Slab, StreamState, copy_into

GROUPS = 8  # sets of streams with graphs at a time; more would cost memory for little time
REPEATS = 5  # timed runs


@functools.cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """The default stream cannot be recorded, and libraries keep a workspace per stream, so there is only one."""
    return torch.cuda.Stream(device)


class CudaGraph:
    """Work that is recorded instead of done, and done by every `replay`.

    Args:
        pool: of memory, shared by graphs that never run at the same time.
    """

    new_pool = staticmethod(torch.cuda.graph_pool_handle)

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.graph = torch.cuda.CUDAGraph()

    @contextmanager
    def recording(self) -> Iterator[Callable[[], None]]:
        """Record the block from where it calls the function it is given."""
        begun = False

        def begin() -> None:
            nonlocal begun
            begun = True
            # Other threads keep launching and allocating.
            self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")

        torch.cuda.synchronize()
        with torch.cuda.stream(_recording_stream(torch.cuda.current_device())):
            try:
                yield begin
            finally:
                if begun:
                    self.graph.capture_end()
        torch.cuda.synchronize()

    def replay(self) -> None:
        self.graph.replay()

    @staticmethod
    def held_bytes(pool: Any) -> int:
        """Device memory held by the graphs of a pool."""
        segments = torch.cuda.memory_snapshot()
        return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(pool))


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Median duration of `work` over a few runs; waits for the device."""

    def once() -> float:
        if device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    once()
    return statistics.median(once() for _ in range(REPEATS))


class Kept(TorchDispatchMode):
    """Keeps every computed tensor alive as long as itself, since recorded work finds tensors by address."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.tensors += [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result


class Recorded:
    """Work that runs normally the first time, is recorded the second time, and replayed from then on.

    The first run compiles kernels and sets up libraries, which cannot be recorded.
    """

    def __init__(self, pool: Any) -> None:
        self.graph = CudaGraph(pool)
        self.calls = 0
        self.result: Any = None
        self.seconds = 0.0

    def __call__(self, slab: Slab, work: Callable[[Callable[[], None]], Any]) -> Any:
        """What `work` returns, from the second call on in the same memory.

        Args:
            work: always the same; called with a function that it calls where recording is to begin.
        """
        self.calls += 1
        if self.calls == 1:
            return work(lambda: None)
        if self.calls == 2:
            with self.graph.recording() as begin:
                self.result = work(begin)
            with slab.preserved():
                self.seconds = seconds(self.graph.replay, slab.age.device)
        self.graph.replay()
        return self.result


class Gated(NamedTuple):
    """What the gate leaves for the encoders.

    Tokens in front of the first block, patches [S, N, D], their surprise [S, N], the active ones as `compact` returns
    them, and the patches' colours [S, N, 3].
    """

    tokens: torch.Tensor
    patches: torch.Tensor
    surprise: torch.Tensor
    index: torch.Tensor
    cu_seqlens: torch.Tensor
    colours: torch.Tensor | None


class Retained(NamedTuple):
    """The tower's output, and earlier results that recorded work keeps reading."""

    output: Any
    kept: list[torch.Tensor]


class Decided(Exception):
    """Ends a pass after the gate."""

    def __init__(self, gated: Gated) -> None:
        self.gated = gated


class Group:
    """The graphs of one set of streams, for frames of one size.

    Args:
        bound: the arguments of the tower's `forward`, the first of which is the frames.
    """

    def __init__(
        self,
        gate: Gate,
        unpatched: Callable,
        forward: Callable,
        bound: BoundArguments,
        states: list[StreamState],
        grid: Grid,
    ) -> None:
        self.gate = gate
        self.forward = forward
        self.bound = bound
        self.grid = grid
        self.names = [state.name for state in states]
        self.states = [weakref.ref(state) for state in states]
        self.slab = Slab(states)
        self.frames = copy_into(None, bound.args[0])
        bound.arguments[next(iter(bound.arguments))] = self.frames
        device = self.frames.device
        with torch.inference_mode(False):
            self.decision = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.pool = CudaGraph.new_pool()
        self.decider = Recorded(self.pool)
        self.gated: Gated | None = None
        self.encoders: dict[int, Recorded] = {}
        self.held_bytes = 0  # by its graphs
        self.dense_seconds = unpatched(seconds, lambda: forward(*bound.args, **bound.kwargs), device)
        self.patches = self.slab.age.numel()
        self.timed = gate.config.dense_above is None
        self.dense_above = 1.0 if self.timed else gate.config.dense_above

    @property
    def valid(self) -> bool:
        """Whether its streams are still open, with their tensors in place."""
        return all((state := ref()) is not None and state.slab is self.slab for ref in self.states)

    def run(self, frames: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        """The tower's output for frames [S, ...], or None if they need another pass.

        With None comes their surprise [S, N], or None too if that pass is to be dense.
        """
        self.frames.copy_(frames)
        self.gated = self._run(self.decider, self._decide)
        if self.frames.is_cuda:
            torch.cuda.current_stream(self.frames.device).synchronize()
        rung = self.decision.item()
        if rung in (-1, self.patches):
            return None, self.gated.surprise.clone()
        if rung / self.patches > self.dense_above:
            return None, None
        if rung not in self.encoders:
            self.encoders[rung] = Recorded(self.pool)
        encoder = self.encoders[rung]
        retained = self._run(encoder, functools.partial(self._encode, rung))
        output = tree_map_only(torch.Tensor, torch.clone, retained.output)
        if encoder.calls == 2 and self.timed:
            if self.decider.seconds + encoder.seconds >= self.dense_seconds:
                self.dense_above = min(self.dense_above, (rung - 1) / self.patches)
            size = crossover.size_of([self.grid] * len(self.names), self.gated.tokens)
            self.gate.crossovers[size] = self.dense_above
        return output, None

    def _run(self, recorded: Recorded, work: Callable[[Callable[[], None]], Any]) -> Any:
        result = recorded(self.slab, work)
        if recorded.calls == 2:
            self.held_bytes = CudaGraph.held_bytes(self.pool)
        return result

    def _pass(self, choose: Callable[[StaticPass, torch.Tensor], torch.Tensor]) -> tuple[Any, StaticPass]:
        states = [ref() for ref in self.states]
        current = StaticPass(self.gate.plan, states, [self.grid] * len(states), self.slab, choose)
        return within(current_pass, current, self.forward, *self.bound.args, **self.bound.kwargs), current

    def _decide(self, begin: Callable[[], None]) -> Gated:
        """From the frames to their active patches."""

        def choose(current: StaticPass, tokens: torch.Tensor) -> torch.Tensor:
            gate, config, slab = self.gate, self.gate.config, self.slab
            signals = gate.signals(current, tokens)
            patches = signals[0] if len(signals) == 1 else torch.cat(signals)
            surprise = gate.surprise(patches, slab.caches)
            index, cu_seqlens = gate.active(gate.score(surprise, slab.age, slab.attention, self.grid))
            other = scores.is_cut(surprise, cu_seqlens.diff(), config.cut_share, config.cut_surprise)
            other |= ~surprise.amax(1).isfinite()
            colours = None
            if current.colours is not None and "colours" in slab.caches:
                colours = torch.cat(current.colours)
                active = torch.zeros(surprise.numel() + 1, dtype=torch.bool, device=index.device)
                active.index_fill_(0, index.long().masked_fill(index < 0, surprise.numel()), True)
                light = scores.light_change(colours, slab.caches["colours"], active[:-1].view_as(surprise))
                other |= light > config.cut_light
            self.decision.copy_(cu_seqlens[-1:].masked_fill(other.any(), -1), non_blocking=True)
            raise Decided(Gated(tokens, patches, surprise, index, cu_seqlens, colours))

        begin()
        try:
            self._pass(choose)
        except Decided as decided:
            decided.__traceback__ = None  # it would keep the pass alive
            return decided.gated
        raise Unrecordable("its blocks were not reached")

    def _encode(self, rung: int, begin: Callable[[], None]) -> Retained:
        """From `rung` active patches to the tower's output."""
        kept, before = Kept(), ExitStack()

        def take(current: StaticPass, tokens: torch.Tensor) -> torch.Tensor:
            before.close()
            begin()
            index, gated = self.gated.index[:rung], self.gated
            self._account(index, gated)
            current.take(index, gated.cu_seqlens, gated.tokens)
            return gated.tokens

        with before:
            before.enter_context(kept)
            output, current = self._pass(take)
        if current.seen is not None:
            self.slab.attention.copy_(current.seen / current.seen.mean(1, keepdim=True))
        return Retained(output, kept.tensors)

    def _account(self, index: torch.Tensor, gated: Gated) -> None:
        """Like `Gate._refresh` and `StreamState.account`, for all streams, without knowing their counts of patches."""
        slab = self.slab
        slab.active.zero_().view(-1).index_fill_(0, index.long(), True)
        slab.age.add_(1).masked_fill_(slab.active, 0)
        slab.surprise.copy_(gated.surprise)
        slab.skipped += 1 - gated.cu_seqlens.diff()[:, None].double() / slab.age.shape[1]
        if self.gate.config.reference == "refreshed":
            packed = gather_rows(gated.patches, index, gated.cu_seqlens, index.numel())
            scatter_rows_(slab.caches["reference"], packed, index, gated.cu_seqlens)
        if gated.colours is not None:
            active = slab.active[..., None]
            slab.caches["colours"].copy_(torch.where(active, gated.colours, slab.caches["colours"]))


class Graphs:
    """The graphs of a patched tower, for as many sets of streams as keep arriving together.

    Args:
        gate: the tower's.
        unpatched: calls a function while the tower runs unpatched.
        warn: receives messages for the user.
    """

    def __init__(self, gate: Gate, unpatched: Callable, warn: Callable[[str], None]) -> None:
        self.gate = gate
        self.unpatched = unpatched
        self.warn = warn
        self.groups: dict[Hashable, Group] = {}  # the least recently used first
        self.refused: set[Hashable] = set()
        self.lock = threading.RLock()

    def run(
        self, entry: str, forward: Callable, bound: BoundArguments, current: Pass
    ) -> tuple[Any, list[torch.Tensor] | None]:
        """The tower's output; or None if the pass is to run normally, with each entry's surprise if known."""
        frames, states, grids = bound.args[0], current.states, current.grids
        if not is_recordable(frames.device):
            return None, None
        key = None
        try:
            key = self._key(entry, bound, current)
            if key in self.refused:
                return None, None
            with self.lock, torch.cuda.device_of(frames):
                group = self._group(key, forward, bound, states, grids[0])
                if group is None:
                    return None, None
                for state in states:
                    state.key_frame_due = "failed"
                output, surprise = group.run(frames)
        except (Unrecordable, RuntimeError) as error:
            self.groups.pop(key, None)
            self.refused.add(key)
            self.warn(f"frames run without CUDA graphs: {error}")
            return None, None
        if output is None and surprise is None:
            for state in states:
                state.key_frame_due = "dense"
        if output is None:
            return None, None if surprise is None else list(surprise)
        for state in states:
            state.key_frame_due = None
            state.frames += 1
            state.since_key_frame += 1
        return output, None

    def prune(self) -> None:
        """Free graphs whose streams were closed or started over."""
        with self.lock:
            self.groups = {key: group for key, group in self.groups.items() if group.valid}

    @property
    def held_bytes(self) -> int:
        return sum(group.held_bytes for group in list(self.groups.values()))

    def _group(
        self, key: Hashable, forward: Callable, bound: BoundArguments, states: list[StreamState], grid: Grid
    ) -> Group | None:
        """The graphs for a pass, if each of its streams has just had a pass of the same kind."""
        steady = all(self.gate.due(state) is None and state.last_pass == key for state in states)
        for state in states:
            state.last_pass = key
        if not steady:
            return None
        group = self.groups.pop(key, None)
        if group is not None and group.valid:
            self.groups[key] = group
            return group
        self.prune()
        while len(self.groups) >= GROUPS:
            del self.groups[next(iter(self.groups))]
        group = Group(self.gate, self.unpatched, forward, bound, states, grid)
        self.groups[key] = group
        return group

    def _key(self, entry: str, bound: BoundArguments, current: Pass) -> Hashable:
        """What must match for passes to share a recording.

        Raises:
            Unrecordable: it cannot be recorded at all.
        """
        config, anatomy, states = self.gate.config, self.gate.plan.anatomy, current.states
        frames, *rest = [*bound.args, *bound.kwargs.items()]
        if config.dilation:
            raise Unrecordable("dilation adds patches to the ladder's")
        if anatomy.order is not None or len(set(current.grids)) > 1 or len(frames) != len(states):
            raise Unrecordable("its frames are not a batch of one size with tokens in row-major order")
        if anatomy.suffix:
            raise Unrecordable("tokens that are not patches come after them")
        if config.arch == "active" and len(states) > 1:
            raise Unrecordable("arch 'active' pads its output to the longest stream")
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(rest)):
            raise Unrecordable("the tower takes tensors besides the frames")
        # In transformers before 5, a pass that ends after the gate leaves the tower collecting these forever.
        if current.asked:
            raise Unrecordable("hidden states or feature maps are asked for")
        model_config = getattr(anatomy.tower, "config", None)
        if by_name(bound).get("output_attentions") or getattr(model_config, "output_attentions", None):
            raise Unrecordable("output_attentions is asked for")
        kind = frames.device.type
        cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        names = tuple(state.name for state in states)
        return entry, names, frames.shape, frames.dtype, frames.device, tuple(map(repr, rest)), cast

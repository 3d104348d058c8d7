"""The engine: what a patched tower does with a frame, point by point.

A patched tower runs its own forward. The engine steps in at a few points: it reads the patch projection, packs the
active tokens in front of a block [S, T, D] -> [1, M, D], serves attention and MLP from caches, and scatters the encoded
tokens back after the last module that maps each token on its own, and after blocks whose output is wanted for all
patches (as hidden states or feature maps). An architecture is a choice of points:

    mlp       packs in front of each MLP and restores after it
    active    packs in front of the first block and drops the rest
    dual      packs in front of the first block, restores the output
    midlayer  packs in front of a middle block, restores the output
    context   like dual, and attends to each block's cached keys and values of all tokens

When every patch is active nothing is packed: the tower runs as if unpatched, while the caches are filled. On a CPU,
packed tokens go through the fastest of several `kernels`.

A frame's path through this folder: `gate` chooses its patches; its active tokens pass `projection`, `attention`,
`linear` and `pooling`, using the fastest `kernels`; `passes` writes the results to the caches in `state`.
"""

import dataclasses
import functools
import inspect
import itertools
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ..adapters.anatomy import Anatomy, Grid, by_name, is_foldable
from ..config import NeuroFlowConfig
from . import crossover, linear, pooling, projection, threads
from .attention import ATTENTION, attend
from .derived import Derived, Weights
from .gate import Gate
from .graphs import Graphs
from .kernels import Kernels
from .linear import is_linear
from .passes import FrameReport, Pass, Plan, StaticPass, blocks_of_hidden_states, current_pass, within
from .state import StreamState
from .streams import Hold, StreamCache

DEFAULT_STREAM = "default"
SETTLED = 3  # passes after which layers that occur once per block know their fastest kernels


class Deal:
    """Stream names that are dealt to frames in order, starting again after the last.

    Args:
        names: the stream names.
        outer: the deal in force outside the block.
        generator: frame of the generator that contains the block, if any.

    Attributes:
        dealt: number of names given to frames that were encoded.
        open: the block has not ended.
        callers: whether the generator was running when names were dealt: True, False, or both.
    """

    def __init__(
        self, names: tuple[Hashable, ...], outer: "Deal | None" = None, generator: FrameType | None = None
    ) -> None:
        self.names = names
        self.outer = outer
        self.generator = generator
        self.dealt = 0
        self.open = True
        self.callers: set[bool] = set()

    def close(self) -> "Deal | None":
        """Close the deal; returns the one in force after the block."""
        self.open, self.generator = False, None
        outer = self.outer
        while outer is not None and not outer.open:
            outer = outer.outer
        return outer

    def next(self, count: int) -> tuple[Hashable, ...]:
        return tuple(self.names[(self.dealt + number) % len(self.names)] for number in range(count))


class Engine:
    """The streams of one patched tower, and the functions that stand at its points.

    Every `on_*` method takes the original forward of its point first. Outside a pass through the tower (`current_pass`
    is None) it just calls that, so that parts of a patched model behave as before when used on their own.

    Args:
        anatomy: of an unpatched tower.
        config: the configuration to run under.
        streams: holds the streams within its limits.
        distilled: modules of the tower -> their replacements in partial frames.

    Raises:
        TypeError: an attention has its own `forward`, which the engine would replace.
        ValueError: a configuration that the tower does not support.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        config: NeuroFlowConfig,
        streams: StreamCache,
        distilled: Mapping[nn.Module, nn.Module] | None = None,
    ) -> None:
        _refuse_other_methods(anatomy)
        self.anatomy = anatomy
        self.config = config
        self.plan = Plan.of(anatomy, config)
        threads.meter.read()  # a baseline for the first frame
        # Not a bound method: that would form a reference cycle and delay freeing memory.
        self.warn_once = functools.partial(_warn_once, set())
        self.gate = Gate(self.plan, self.warn_once)
        self.gate_of_clips = self._gate_of_clips()
        self.derived = Derived()
        self.kernels = Kernels(config.kernels)
        self._seen: Counter[Hashable] = Counter()  # passes by size, while its crossover is not known
        self.streams = streams
        self.distilled = distilled or {}
        self.weights: Path | None = None  # file that `distilled` came from
        self.signatures = {entry: inspect.signature(getattr(anatomy.tower, entry)) for entry in anatomy.entries}
        self.named: ContextVar[Deal | None] = ContextVar("neuroflow_streams", default=None)
        self.numbered: ContextVar[tuple[int, ...] | None] = ContextVar("neuroflow_frame_ids", default=None)
        self.unpatched: ContextVar[bool] = ContextVar("neuroflow_unpatched", default=False)
        self.run_unpatched = functools.partial(within, self.unpatched, True)
        self.graphs = Graphs(self.gate, self.run_unpatched, self.warn_once) if config.launch == "graph" else None
        self.reported: ContextVar[tuple[FrameReport, ...]] = ContextVar("neuroflow_reports", default=())
        self.removed = False
        self.parameters = tuple(inspect.signature(anatomy.layers[0].forward).parameters)  # of a block
        parts = {module for module, _, _ in self.points() if not is_linear(module)}.union(anatomy.attentions)
        if config.arch == "mlp":
            parts = parts.union(*anatomy.mlps)
        self._places = {name: part for name, part in anatomy.tower.named_modules() if part in parts}
        self._current_weights = self._weights_now()

    def _weights_now(self) -> Weights:
        return Weights(nn.ModuleList([self.anatomy.tower, *self.distilled.values()]))

    def _gate_of_clips(self) -> Gate:
        """The gate for clips without names, in which unrelated frames always cut."""
        if self.config.cut_share is not None or self.config.cut_surprise is not None:
            return self.gate
        usual = NeuroFlowConfig()
        config = dataclasses.replace(self.config, cut_share=usual.cut_share, cut_surprise=usual.cut_surprise)
        gate = Gate(dataclasses.replace(self.plan, config=config), self.warn_once)
        gate.crossovers = self.gate.crossovers
        return gate

    def points(self) -> list[tuple[nn.Module, str, Callable]]:
        """(module, method, replacement that takes the original first) for everything this architecture needs."""
        anatomy, arch = self.anatomy, self.config.arch
        points: list[tuple[nn.Module, str, Callable]] = []
        for entry in anatomy.entries:
            points.append((anatomy.tower, entry, functools.partial(self.on_tower, entry)))
        for module, method, override in anatomy.overrides:  # of blocks too: inside everything that follows
            points.append((module, method, functools.partial(self.on_override, override)))
        if anatomy.run_block is not None:
            run_block = functools.partial(self.on_override, anatomy.run_block)
            points += [(layer, "forward", run_block) for layer in anatomy.layers]
        if anatomy.positions:  # inside the packing
            points += [(layer, "forward", self.on_positions) for layer in anatomy.layers]
        for layer, block in enumerate(anatomy.layers):
            points.append((block, "forward", functools.partial(self.on_layer, layer)))
        if anatomy.projection is not None:
            points.append((anatomy.projection, "forward", self.on_projection))
        for table in anatomy.tables:
            points.append((*table, functools.partial(self.on_table, table)))
        with_linears = [*anatomy.layers]
        if anatomy.pool is not None:
            points.append((*anatomy.pool, self.on_pool))
            heads = [anatomy.pool[0], self.distilled.get(anatomy.pool[0])]
            with_linears += [head for head in heads if head is not None and is_foldable(head)]
        for part in with_linears:
            for module in part.modules():
                if is_linear(module):
                    points.append((module, "forward", functools.partial(self.on_linear, module)))
        for module, other in self.distilled.items():
            if anatomy.pool is None or module is not anatomy.pool[0]:
                call = functools.partial(self.on_linear, other, other.forward) if is_linear(other) else other.forward
                points.append((module, "forward", functools.partial(self.on_distilled, call)))
        if anatomy.attention is not None:
            for module in anatomy.attentions:
                points.append((module, "forward", functools.partial(self.on_attention, module)))
        if arch == "mlp":
            for layer, (first, last) in enumerate(anatomy.mlps):
                points.append((first, "forward", self.on_mlp_input))
                points.append((last, "forward", functools.partial(self.on_mlp_output, layer)))
        elif self.plan.final is None:
            points.append((anatomy.last, "forward", self.on_last))
        return points

    def __deepcopy__(self, memo: dict[int, Any]) -> "Engine":
        return self  # only a part of a tower is copied here; `patch.py` copies towers

    def __reduce__(self) -> Any:
        raise TypeError(
            "a patched model cannot be pickled or saved as a whole; call neuroflow.disable_cache first, or save its "
            "state_dict"
        )

    @torch.compiler.disable(reason="which patches are encoded, and so every shape, is decided frame by frame")
    def on_tower(self, entry: str, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        outer = current_pass.get()
        if outer is not None and outer.plan is self.plan:  # one entry calls another
            if outer.blocks or entry in outer.entered:
                raise RuntimeError(
                    f"{type(self.anatomy.tower).__name__} was called within its own pass, as from a hook; accepted is "
                    "a call after it has ended"
                )
            outer.entered.add(entry)
            return forward(*args, **kwargs)
        if self.unpatched.get():
            return forward(*args, **kwargs)
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "a patched model cannot be exported, as which patches are encoded is decided frame by frame; call "
                "neuroflow.disable_cache first"
            )
        self.reported.set(())
        signature = self.signatures[entry]
        bound = signature.bind(*args, **kwargs)
        arguments = by_name(bound)
        name = next(iter(signature.parameters))
        if not isinstance(arguments.get(name), torch.Tensor):
            given = "None" if arguments.get(name) is None else f"a {type(arguments[name]).__name__}"
            raise ValueError(f"{name} is {given}; accepted is a tensor of frames")
        call = functools.partial(threads.on_free_cores, self.warn_once, arguments[name].device)
        grids, read = self.anatomy.grids(arguments), frozenset(self.anatomy.reads(arguments))
        if self.config.arch == "active" and read:
            self.warn_once("arch 'active' has no feature maps of all patches; calls that ask for them run unpatched")
            return call(self.run_unpatched, forward, *args, **kwargs)
        times = [1] * len(grids) if self.anatomy.times is None else self.anatomy.times(arguments)
        deal = self.named.get()
        if deal is not None and deal.generator is not None:
            deal.callers.add(deal.generator.f_back is not None)  # a suspended generator has no caller
        if deal is None and len(grids) > 1 and self.config.batch == "dense":
            self.warn_once(f"{name} holds {len(grids)} frames without names, and batch is 'dense'; they run unpatched")
            return call(self.run_unpatched, forward, *args, **kwargs)
        order = None if self.anatomy.order is None else self.anatomy.order(arguments)
        hidden = arguments.get("output_hidden_states")
        if hidden is None:
            hidden = getattr(getattr(self.anatomy.tower, "config", None), "output_hidden_states", None)
        asked = read | blocks_of_hidden_states(hidden, len(self.anatomy.layers))
        nameless = deal is None and len(grids) > 1 and self.config.batch == "clip"
        outputs, reports = [], []
        names = self._names(deal, times, grids)
        hold = Hold()
        try:
            held, states = self._states(hold, names, times, grids)
            if self.removed:  # while this call waited
                return call(self.run_unpatched, forward, *args, **kwargs)
            self._check_attention()
            with torch.no_grad():
                gaps = self._gaps(states, times)
                self._note_conditions(states, arguments[name].device.type)
                self._note_asked(states, asked)
                for these in self._passes(arguments, grids):
                    part = args, kwargs
                    if these != slice(0, len(grids)):
                        part = self._part(args, kwargs, signature, these)
                        bound = signature.bind(*part[0], **part[1])
                    own = None if order is None else order[these]
                    current = Pass(
                        self.plan, states[these], grids[these], own, asked, gaps[these], nameless, self.kernels
                    )
                    outputs.append(call(self._encode, entry, forward, *part, bound, current))
                    reports += current.reports
                    self.reported.set(tuple(reports))
            self._current_weights.settle()
            self.streams.keep(held)
        finally:
            hold.running.release()
        if deal is not None:
            deal.dealt += len(times)
        return outputs[0] if len(outputs) == 1 else _joined(outputs)

    def _passes(self, arguments: dict[str, Any], grids: list[Grid]) -> list[slice]:
        """The entries of a call as slices, one for each pass, so that no pass exceeds its limit of patches.

        A call whose arguments cannot be split by frame is one pass.
        """
        count, held = len(grids), 0
        known = () if self.anatomy.part is None else self.anatomy.part[0]
        others = tree_leaves([value for name, value in arguments.items() if name not in known])
        if any(isinstance(each, torch.Tensor) and (known or each.ndim == 0 or len(each) != count) for each in others):
            return [slice(0, count)]
        starts = [0]
        for entry, (rows, columns) in enumerate(grids):
            held += rows * columns
            if held > self.config.pass_patches and entry > starts[-1]:
                starts.append(entry)
                held = rows * columns
        return [slice(*ends) for ends in itertools.pairwise([*starts, count])]

    def _part(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], signature: inspect.Signature, frames: slice
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call for some of its frames."""
        if self.anatomy.part is None:
            return tree_map_only(torch.Tensor, operator.itemgetter(frames), (args, kwargs))
        bound = signature.bind(*args, **kwargs)
        bound.arguments |= self.anatomy.part[1](by_name(bound), frames)
        return bound.args, bound.kwargs

    def _encode(
        self,
        entry: str,
        forward: Callable,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        bound: inspect.BoundArguments,
        current: Pass,
    ) -> Any:
        """The tower's output for one pass."""
        # Recorded work expects weights at fixed addresses.
        if self.graphs is not None and self._current_weights.resident and not any(current.followed):
            output, current.surprises = self.graphs.run(entry, forward, bound, current)
            if output is not None:
                current.reports = [FrameReport.of(state, None) for state in current.states]
                return output
        current.entered.add(entry)
        self.kernels.trying = False
        output = within(current_pass, current, forward, *args, **kwargs)
        if current.blocks == len(self.anatomy.layers):
            current.complete()
        else:
            self.warn_once(
                f"a frame went through only {current.blocks} of {len(self.anatomy.layers)} blocks, so later blocks "
                "have no cache of it; the next frame is a key frame"
            )
        for state, attention in zip(current.states, current.attention, strict=True):
            if attention is not None:
                state.note_attention(attention)
        if current.unmeasured is not None and self._is_settled(current.unmeasured):
            self.gate.crossovers[current.unmeasured] = crossover.measure(current, *current.first_block)
        return output

    def _is_settled(self, size: Hashable) -> bool:
        """Whether a crossover may be measured: the first passes of a size still try kernels."""
        self._seen[size] += 1
        return not self.kernels.trying or self._seen[size] >= SETTLED

    def _names(self, deal: Deal | None, times: list[int], grids: list[Grid]) -> tuple[Hashable, ...] | None:
        """The stream of each input of a call; None: clips that end with the call."""
        if deal is not None:
            return deal.next(len(times))
        if len(grids) == 1:
            return (DEFAULT_STREAM,)
        return tuple(range(len(times))) if self.config.batch == "streams" else None

    def _states(
        self, hold: Hold, names: tuple[Hashable, ...] | None, times: list[int], grids: list[Grid]
    ) -> tuple[list[StreamState], list[StreamState]]:
        """The state of each stream and of each entry; `times` is the number of consecutive entries of each name."""
        if names is None:
            self.streams.take(hold, {})
            return [], _states_of_clips(times, grids)
        owners = [name for name, count in zip(names, times, strict=True) for _ in range(count)]
        patches: dict[Hashable, int] = {}
        for name, (rows, columns) in zip(owners, grids, strict=True):
            patches[name] = max(patches.get(name, 0), rows * columns)
        states = self.streams.take(hold, patches)
        return list(states.values()), [states[name] for name in owners]

    def _gaps(self, states: list[StreamState], times: list[int]) -> list[bool]:
        """For each entry, whether it does not follow its stream's last one, which makes it a key frame."""
        frame_ids = self.numbered.get()
        if frame_ids is None:
            return [False] * len(states)
        if len(frame_ids) != len(times):
            raise ValueError(f"frame_ids holds {len(frame_ids)} numbers for {len(times)} frames; accepted is one each")
        numbers = [first + after for first, count in zip(frame_ids, times, strict=True) for after in range(count)]
        gaps, seen = [], set()
        for state, number in zip(states, numbers, strict=True):
            gaps.append(state.frame_id is not None and number != state.frame_id + 1)
            if gaps[-1] and state.key_frame_due is None:
                self.warn_once(
                    f"stream {state.name!r}: frames are missing or out of order; the next one is a key frame"
                )
            if gaps[-1] and id(state) not in seen:
                state.key_frame_due = state.key_frame_due or "gap"
            seen.add(id(state))
            state.frame_id = number
        return gaps

    def conditions(self, device: str) -> tuple[Weights, torch.dtype | None]:
        """What a stream's caches depend on, besides its frames: the current weights, and the autocast in force.

        Raises:
            RuntimeError: a module that the engine stands in front of is no longer in its place.
        """
        unchanged = not self._current_weights.changed()
        if not unchanged:
            now = dict(self.anatomy.tower.named_modules())
            for name, part in self._places.items():
                if now.get(name) is not part:
                    tower = type(self.anatomy.tower).__name__
                    raise RuntimeError(
                        f"{name} of {tower} was replaced or wrapped while the tower was patched; call "
                        "neuroflow.disable_cache and then enable_cache again"
                    )
            self._current_weights = self._weights_now()
        self.kernels.countable, self.kernels.resident = self._current_weights.countable, self._current_weights.resident
        if not (unchanged and self.kernels.countable):
            self.kernels.forget()
        return self._current_weights, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def _check_attention(self) -> None:
        for module in self.plan.configs:
            name = module.config._attn_implementation
            if name != ATTENTION:
                tower = type(self.anatomy.tower).__name__
                raise RuntimeError(
                    f"the attention of {tower} was switched to {name!r} while the tower was patched; call "
                    "neuroflow.disable_cache and then enable_cache again"
                )

    def _note_conditions(self, states: list[StreamState], device: str) -> None:
        """Make a frame with other weights or autocast than its stream's last one a key frame."""
        conditions = self.conditions(device)
        for state in states:
            if state.conditions not in (None, conditions):
                other = state.conditions[0] is not conditions[0]
                self.warn_once(
                    f"stream {state.name!r}: "
                    + ("the weights of the tower changed" if other else "autocast was switched")
                    + " since its last frame; it starts over with a key frame"
                )
                state.forget("weights" if other else "size")
            state.conditions = conditions

    def _note_asked(self, states: list[StreamState], asked: frozenset[int]) -> None:
        """Make a frame a key frame if other blocks' outputs are wanted than for its stream's last one."""
        kept = self.plan.kept(asked)
        for state in states:
            if state.signature is not None and state.hidden != kept:
                state.key_frame_due = "outputs"
                self.warn_once(
                    f"stream {state.name!r}: other hidden states or feature maps are asked for than for its last "
                    "frame; it starts over with a key frame"
                )

    def on_projection(self, forward: Callable, pixels: torch.Tensor) -> torch.Tensor:
        current = current_pass.get()
        return forward(pixels) if current is None else projection.project(current, self.derived, forward, pixels)

    def on_table(self, table: tuple[nn.Module, str], compute: Callable, *args: Any, **kwargs: Any) -> Any:
        if current_pass.get() is None:
            return compute(*args, **kwargs)
        given = [*args, *kwargs.items()]
        shapes = [(arg.shape, arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in given]
        return self.derived(table[0], (*table, *shapes), lambda: compute(*args, **kwargs))

    def on_override(self, override: Callable, original: Callable, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if current_pass.get() is None else override(original, *args, **kwargs)

    def on_layer(self, layer: int, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        current, plan = current_pass.get(), self.plan
        tokens, *args = args or [kwargs.pop(self.parameters[0])]
        if current is None:
            if layer == 0 and not self.unpatched.get():
                self.warn_once(
                    f"{type(self.anatomy.tower).__name__} is patched, but frames bypassed its patched methods: "
                    f"accepted are calls of its {', '.join(self.anatomy.entries)}; others run unpatched"
                )
            return forward(tokens, *args, **kwargs)
        if layer == 0:
            if isinstance(current, StaticPass):
                tokens = current.gate(current, tokens)
            else:
                current.select(self.choose(current, tokens), tokens)
                if current.unmeasured is not None:
                    current.first_block = tokens, lambda tokens: forward(tokens, *args, **kwargs)
        if layer == plan.first_packed and current.partial:
            current.packed, tokens = True, current.pack(tokens)
        elif current.packed:
            tokens = current.repacked(tokens)
        current.blocks = layer + 1
        result = forward(tokens, *args, **kwargs)
        if layer >= plan.first_packed and layer in (*current.asked, plan.final):
            return self._of_all(current, "output" if layer == plan.final else ("hidden", layer), result)
        return result

    def choose(self, current: Pass, tokens: torch.Tensor) -> list[torch.Tensor | None]:
        """For each entry its active tokens, int32 rows of its own, or None for all, given those in front of block 0."""
        gate = self.gate_of_clips if current.nameless else self.gate
        return gate(current, tokens)

    def on_positions(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        current = current_pass.get()
        if current is None or not current.packed:
            return forward(*args, **kwargs)
        given = list(args)
        for name, pack in self.anatomy.positions:
            if name in kwargs:
                kwargs[name] = current.pack_positions(name, pack, kwargs[name])
            elif name in self.parameters[: len(given)]:
                place = self.parameters.index(name)
                given[place] = current.pack_positions(name, pack, given[place])
        return forward(*given, **kwargs)

    def on_attention(self, module: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        current = current_pass.get()
        if current is None:
            return forward(*args, **kwargs)
        return self.anatomy.attention(
            module, functools.partial(attend, current, module, is_causal=False), *args, **kwargs
        )

    def on_linear(self, module: nn.Linear, forward: Callable, tokens: torch.Tensor) -> torch.Tensor:
        current = current_pass.get()
        if current is None:
            return forward(tokens)
        return linear.multiply(current, self.kernels, module, forward, tokens)

    def on_distilled(self, distilled: Callable, forward: Callable, tokens: torch.Tensor) -> torch.Tensor:
        current = current_pass.get()
        return forward(tokens) if current is None else linear.map_each(current, forward, distilled, tokens)

    def on_mlp_input(self, forward: Callable, tokens: torch.Tensor) -> torch.Tensor:
        current = current_pass.get()
        return forward(current.pack(tokens) if current is not None and current.partial else tokens)

    def on_mlp_output(self, layer: int, forward: Callable, tokens: torch.Tensor) -> torch.Tensor:
        current, increments = current_pass.get(), forward(tokens)
        if current is None:
            return increments
        current.store(("increment", layer), increments)
        return current.restored(("increment", layer)) if current.partial else increments

    def on_last(self, forward: Callable, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        current = current_pass.get()
        if current is None or current.blocks < len(self.anatomy.layers):  # for a feature map
            return forward(tokens, *args, **kwargs)
        if current.packed:
            tokens = current.repacked(tokens)
        return self._of_all(current, "output", forward(tokens, *args, **kwargs))

    def _of_all(self, current: Pass, name: Hashable, result: Any) -> Any:
        """The output of a block or the last norm for all tokens, taken from the cache `name` where not encoded."""
        outputs = result[0] if isinstance(result, tuple) else result
        if self.config.arch != "active":
            current.store(name, outputs, self.config.blend)
        if not current.packed:
            return result
        outputs = current.shown(name, outputs)
        return (outputs, *result[1:]) if isinstance(result, tuple) else outputs

    def on_pool(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        current = current_pass.get()
        if current is None:
            return forward(*args, **kwargs)
        distilled = self.distilled.get(self.anatomy.pool[0])
        return pooling.pool(current, self.derived, distilled, forward, *args, **kwargs)


def _warn_once(warned: set[str], message: str, about: str | None = None) -> None:
    """Warn, unless this message, or one about the same subject, was given before."""
    if (about or message) not in warned:
        warned.add(about or message)
        warnings.warn(f"neuroflow: {message}", RuntimeWarning, stacklevel=2)


def _refuse_other_methods(anatomy: Anatomy) -> None:
    """Raise if something else has replaced a method that the engine replaces and so would never call."""
    replaced = {module for module, method, _ in anatomy.overrides if method == "forward"}
    if anatomy.attention is not None:
        replaced.update(anatomy.attentions)
    for name, module in anatomy.tower.named_modules():
        own = vars(module)
        has_other = "forward" in own
        if "_old_forward" in own:  # accelerate's hook calls that, where the engine stands
            has_other = getattr(own["_old_forward"], "__func__", None) is not type(module).forward
        if module in replaced and has_other:
            raise TypeError(
                f"{name} has its own forward, which would not be called; accepted is that of its class, "
                f"{type(module).__name__}, or one that is set after enable_cache"
            )


def _states_of_clips(times: list[int], grids: list[Grid]) -> list[StreamState]:
    """New states for entries without names: a shared one for consecutive frames of the same size."""
    states: list[StreamState] = []
    for row, count in enumerate(times):
        first = len(states)
        follows = first and count == 1 == times[row - 1] and grids[first] == grids[first - 1]
        states += count * [states[-1] if follows else StreamState("clip")]
    return states


def _joined(outputs: list[Any]) -> Any:
    """Concatenate the outputs of consecutive passes."""
    leaves, spec = zip(*map(tree_flatten, outputs), strict=True)
    parts = zip(*leaves, strict=True)
    return tree_unflatten([_cat(part) if isinstance(part[0], torch.Tensor) else part[0] for part in parts], spec[0])


def _cat(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    if parts[0].ndim != 3:
        return torch.cat(parts)
    longest = max(part.shape[1] for part in parts)  # architecture B pads
    return torch.cat([nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])

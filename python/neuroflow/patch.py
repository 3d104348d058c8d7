"""Patching a model in place: on the instance, never on the class, and undone without a trace."""

import contextlib
import copy
import dataclasses
import functools
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import copy_context
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from .adapters import ENGINE, Anatomy, Grid, describe, towers
from .attributes import Replaced
from .config import NeuroFlowConfig
from .engine.attention import ATTENTION
from .engine.crossover import Size
from .engine.engine import Deal, Engine
from .engine.kernels import Case
from .engine.passes import FrameReport, current_pass
from .engine.state import StreamState
from .engine.streams import StreamCache
from .proof import Disproven, prove
from .releases import warn_of_newer
from .weights import distilled_config, distilled_modules, load_weights

_REPLACED = "_neuroflow_replaced"
Model = TypeVar("Model", bound=nn.Module)
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_patching = threading.RLock()  # one thread at a time puts an engine in, or takes it out


def _after_fork() -> None:
    global _patching
    _patching = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclasses.dataclass(frozen=True)
class StreamSummary:
    """One stream since it was opened or reset.

    Args:
        frames, key_frames: how many, and how many of them encoded every patch because they had to.
        skipped: share of patches that were not encoded, over all frames.
        nonfinite: frames with a NaN or Inf in a patch.
        grid: rows and columns of patches.
        active: bool [rows, columns], which patches the last frame encoded.
        surprise: float32 [rows, columns], 1 - cosine of each patch of the last frame to its reference, inf at patches
            with NaN; NaN throughout after a key frame, which starts with new references.
        state_bytes: what the stream holds.
        frame_id: the number of the last frame, where the caller numbers them.
    """

    frames: int
    key_frames: int
    skipped: float
    nonfinite: int
    grid: Grid
    active: torch.Tensor
    surprise: torch.Tensor
    state_bytes: int
    frame_id: int | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a patched model holds and has saved; `str()` gives a table.

    Args:
        streams: by name, the least recently used first.
        limit_bytes: what all of them together can come to hold, by the limits of the model's `StreamCache`; None where
            it has none.
        crossovers: by size of pass, above which share of active patches a frame of it is encoded whole, as far as that
            was measured; a size is (frames, (rows, columns) of the largest, dtype, device).
        pass_patches: how many patches a pass holds at most; longer clips are encoded in several.
        graph_bytes: what recorded CUDA graphs hold beside the streams.
        kernels: on a CPU, the fastest way through linear layers and attention of partial frames, by case, as far as
            that is known: "rows" (`linear_rows` and `attend_rows`), "torch", "packed" or "products".
        packed_bytes: of weights that were packed for them, beside the model's own.
    """

    arch: str
    streams: dict[Hashable, StreamSummary]
    limit_bytes: int | None
    crossovers: dict[Size, float]
    pass_patches: int
    graph_bytes: int = 0
    kernels: dict[Case, str] = dataclasses.field(default_factory=dict)
    packed_bytes: int = 0

    @property
    def state_bytes(self) -> int:
        return sum(stream.state_bytes for stream in self.streams.values())

    def __str__(self) -> str:
        limit = "" if self.limit_bytes is None else f" of at most {self.limit_bytes / 2**20:.1f}"
        state = f"{self.state_bytes / 2**20:.1f}{limit} MiB of state"
        if self.graph_bytes:
            state += f", {self.graph_bytes / 2**20:.1f} MiB in CUDA graphs"
        lines = [f"NeuroFlow {self.arch}: {len(self.streams)} stream(s), {state}"]
        lines += [
            f"  {name}: {stream.frames} frames ({stream.key_frames} key), grid {stream.grid[0]}x{stream.grid[1]}, "
            f"{stream.skipped:.1%} of patches skipped, {stream.nonfinite} frames with NaN/Inf, "
            f"{stream.state_bytes / 2**20:.1f} MiB"
            for name, stream in self.streams.items()
        ]
        lines += [
            f"  {size}: " + (f"dense above {share:.1%} active" if share < 1 else "never dense")
            for size, share in self.crossovers.items()
        ]
        if self.kernels:
            packed = f", {self.packed_bytes / 2**20:.1f} MiB of packed weights" if self.packed_bytes else ""
            lines.append(f"  fastest kernels{packed}:")
            lines += [f"    {case}: {way}" for case, way in self.kernels.items()]
        return "\n".join(lines)


def _engines(model: nn.Module) -> list[Engine]:
    """The engines behind the patched towers of a model, if there are any.

    Raises:
        TypeError: a model that no adapter knows.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    engines = [engine for module in modules if (engine := vars(module).get(ENGINE)) is not None]
    if not engines:
        towers(model)
    return engines


def engines_of(model: nn.Module) -> list[Engine]:
    """The engines behind a patched model, one for each patched tower.

    Raises:
        RuntimeError: the model is not patched.
        TypeError: a model that no adapter knows.
    """
    engines = _engines(model)
    if not engines:
        raise RuntimeError(f"{type(model).__name__} is not patched; call neuroflow.enable_cache(model) first")
    return engines


def engine_of(model: nn.Module) -> Engine:
    """The engine behind a model of which one tower is patched.

    Raises:
        RuntimeError: the model is not patched.
        TypeError: a model that no adapter knows.
        ValueError: several of its towers are patched.
    """
    engines = engines_of(model)
    if len(engines) > 1:
        names = ", ".join(repr(name) for name, (tower, _) in towers(model).items() if ENGINE in vars(tower))
        raise ValueError(
            f"model is a {type(model).__name__} of which {len(engines)} towers are patched; accepted is one of them: "
            f"model.get_submodule(...) with {names}"
        )
    return engines[0]


def refuse_within_pass(engines: list[Engine], call: str) -> None:
    """Raise where a hook is at work: its own pass would wait for what `call` waits for.

    Raises:
        RuntimeError: this is part of a pass through one of the engines.
    """
    current = current_pass.get()
    if current is not None and any(current.plan is engine.plan for engine in engines):
        raise RuntimeError(
            f"{call} was called within a pass through the model, as by a hook; accepted is between passes"
        )


def is_patched(model: nn.Module) -> bool:
    """Whether `enable_cache` is in force, for one of the model's towers at least.

    Raises:
        TypeError: a model that no adapter knows.
    """
    return bool(_engines(model))


def _one_at_a_time(call: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    @functools.wraps(call)
    def locked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with _patching:
            return call(*args, **kwargs)

    return locked


@_one_at_a_time
def enable_cache(
    model: Model,
    config: NeuroFlowConfig | str | Path | None = None,
    streams: StreamCache | None = None,
    weights: str | Path | None = None,
    tower: str | None = None,
    verify: bool = True,
) -> Model:
    """Patch `model`'s vision tower in place, so that only surprising patches are encoded.

    The model is called as before and returns its own output class. It runs without gradients, and attention weights are
    not returned for partial frames (an "eager" attention implementation becomes "sdpa"). Hidden states and feature maps
    are of all patches: those that a frame does not encode keep what their last encoding gave there. Each block that is
    asked for is a cache more, and a stream that is asked for others than in its last frame begins anew with a key
    frame. So does every stream when weights change; `reset_cache` says which changes go unnoticed. Under "active" (B)
    hidden states are of the active tokens alone, as the output is: [S, most active, D], padded with zeros, which what
    averages them outside of the tower has to leave out.

    Args:
        model: a model with a vision tower of one of `supported_models()`, in evaluation mode.
        config: a configuration or the path of a saved one; by default that of `weights`, or `NeuroFlowConfig()`.
            Calling again with an equal one does nothing.
        streams: keeps the streams within its limits; by default there are none.
        weights: a file that `neuroflow distill` wrote for this model. Partial frames are encoded with these, on the
            device and of the dtype that the model now has; whole frames with the model's own, which stay as they are.
        tower: the name of the tower in the model, where it has several; each is patched by a call of its own, and one
            that is not runs as before. `summary`, `save_state` and `load_state` take one tower then, not the model.
        verify: compare a tower that was found by its structure with the unpatched one first, on a made frame and one
            in which some patches differ, by architecture E; it takes some three passes. Families known by name are not.

    Raises:
        TypeError: a model that no adapter knows; a tower found by its structure that does not do what the unpatched one
            does; or an attention with a `forward` of its own that would not be called.
        AttributeError: its adapter names a method that is not there.
        RuntimeError: the model is patched with another configuration, other limits or other weights.
        ValueError: an architecture or a `mid_layer` that the model cannot have, a file that holds no configuration,
            weights that are not this model's, several towers and no name, or the name of none.
    """
    weights = None if weights is None else Path(weights)
    if config is None:
        config = NeuroFlowConfig() if weights is None else distilled_config(weights)
    elif isinstance(config, str | Path):
        config = NeuroFlowConfig.load(config)
    if not isinstance(config, NeuroFlowConfig):
        accepted = "a neuroflow.NeuroFlowConfig, or the path of a saved one"
        raise TypeError(f"config is a {type(config).__name__}; accepted is {accepted}")
    anatomy = describe(model, tower)
    for library in ("torch", type(anatomy.tower).__module__.partition(".")[0]):
        warn_of_newer(library)
    patched = vars(anatomy.tower).get(ENGINE)
    if patched is not None:
        if (patched.config, patched.weights) == (config, weights) and streams in (None, patched.streams):
            return model
        other = "with another StreamCache" if patched.weights == weights else f"with the weights {patched.weights}"
        other = other if patched.config == config else f"with {patched.config}"
        raise RuntimeError(f"{type(model).__name__} is already patched, {other}; call neuroflow.disable_cache first")
    distilled = {} if weights is None else distilled_modules(model, anatomy, load_weights(model, weights))
    engine = Engine(anatomy, config, StreamCache() if streams is None else streams, distilled)
    engine.weights = weights
    if verify and anatomy.example is not None:
        _verify(anatomy)
    install(engine)
    return model


def _verify(anatomy: Anatomy) -> None:
    """Refuse a tower that, patched by this anatomy, would not do what it should."""
    config = NeuroFlowConfig(
        arch="context",
        threshold=1e-4,
        score="surprise",
        max_age=None,
        cut_share=None,
        cut_surprise=None,
        cut_light=None,
        dense_above=1.0,
        kernels="rows",
    )

    @contextlib.contextmanager
    def patched() -> Iterator[Callable[[], torch.Tensor]]:
        engine = Engine(anatomy, config, StreamCache())
        install(engine)
        try:
            yield lambda: engine.reported.get()[0].active
        finally:
            _take_out(engine)

    try:
        prove(anatomy, patched)
    except Disproven as reason:
        tower = type(anatomy.tower).__name__
        raise TypeError(
            f"{tower} was found by its structure, and is not patched, as it would not compute the same: {reason}. "
            "neuroflow.explain(model) tells what was found, neuroflow.register_adapter takes a corrected anatomy, and "
            "verify=False skips this"
        ) from reason


def install(engine: Engine) -> None:
    """Put an engine in front of the methods that it stands at; `disable_cache` takes it out."""
    anatomy, replaced = engine.anatomy, Replaced()
    points = engine.points()
    for module, method, _ in points:
        getattr(module, method)  # all are there before any is replaced
    setattr(anatomy.tower, _REPLACED, replaced)
    setattr(anatomy.tower, ENGINE, engine)
    try:
        for module, config in engine.plan.configs.items():  # each its own, as towers may share one
            own = copy.copy(config)
            own._attn_implementation = ATTENTION
            replaced.set(module, "config", own)
        entries = {(anatomy.tower, entry) for entry in anatomy.entries}
        # The tower's entries come last: until then, frames of other threads run as they did.
        for module, method, function in sorted(points, key=lambda point: point[:2] in entries):
            replaced.put_in_front(module, method, function)
        replaced.set(anatomy.tower, "__deepcopy__", functools.partial(_copied, anatomy.tower))
    except BaseException:
        _take_out(engine)
        raise


def _take_out(engine: Engine) -> list[tuple[nn.Module, str]]:
    """Undo `install`; the modules and names of what is no longer as that set it."""
    tower = engine.anatomy.tower
    replaced: Replaced = vars(tower)[_REPLACED]
    others = replaced.undo()
    delattr(tower, ENGINE)
    delattr(tower, _REPLACED)
    return others


def _copied(tower: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What `copy.deepcopy` makes of a patched tower: one that is patched likewise, with streams of its own."""
    engine, replaced = vars(tower)[ENGINE], vars(tower)[_REPLACED]
    copied = memo[id(tower)] = type(tower).__new__(type(tower))
    attributes = {name: value for name, value in vars(tower).items() if name not in (ENGINE, _REPLACED)}
    vars(copied).update(copy.deepcopy(attributes, memo))
    others = copy.deepcopy(list(engine.distilled.values()), memo)
    distilled = {memo[id(module)]: other for module, other in zip(engine.distilled, others, strict=True)}
    replaced.undo_in_copies(memo)
    limits = engine.streams
    streams = StreamCache(limits.max_streams, limits.max_bytes, limits.idle_seconds)
    twin = type(engine)(describe(copied), engine.config, streams, distilled)
    twin.weights = engine.weights
    install(twin)
    return copied


def disable_cache(model: nn.Module) -> None:
    """Undo `enable_cache`, for every tower of the model, and drop every stream.

    Does nothing to a model that is not patched. A method that something else has wrapped since stays wrapped, which a
    warning names, and the engine inside is gone.

    Raises:
        TypeError: a model that no adapter knows.
        RuntimeError: it is called within a pass, as by a hook. Passes of other threads are waited for.
    """
    engines = _engines(model)
    refuse_within_pass(engines, "disable_cache")
    for engine in engines:
        with engine.streams.held(None), _patching:
            if vars(engine.anatomy.tower).get(ENGINE) is engine:  # no other thread was faster
                engine.removed = True
                _warn_of_wrapped(model, _take_out(engine))
                engine.streams.clear()
        engine.reported.set(())


def _warn_of_wrapped(model: nn.Module, others: list[tuple[nn.Module, str]]) -> None:
    wrapped = [(module, name) for module, name in others if _is_other(module, name)]
    if wrapped:
        module, name = wrapped[0]
        names = {part: path for path, part in model.named_modules()}
        method = f"{names.get(module) or type(module).__name__}.{name}"
        warnings.warn(
            f"neuroflow: {method} stays wrapped by {_description(vars(module)[name])}"
            + (f", and {len(wrapped) - 1} more by what came after enable_cache" if len(wrapped) > 1 else ""),
            RuntimeWarning,
            stacklevel=3,
        )


def _is_other(module: nn.Module, name: str) -> bool:
    """Whether a module has something else than its class's under a name."""
    value = vars(module).get(name)
    return value is not None and getattr(value, "__func__", value) is not getattr(type(module), name, None)


def _description(value: Any) -> str:
    """Where a function was written, or the class of anything else."""
    function = value.func if isinstance(value, functools.partial) else value
    if not hasattr(function, "__code__"):
        return f"a {type(value).__name__}"
    return f"{function.__globals__['__name__']}.{function.__code__.co_qualname}"  # its own name may be a copy


@contextlib.contextmanager
def cache_context(model: nn.Module, *streams: Hashable) -> Iterator[None]:
    """Name the streams that the frames inside the block belong to.

    The names are dealt to the frames in order, from the first again behind the last, across the calls of a tower: with
    one name they are frames of one stream, in one call or in many; with three, those of three cameras, in one batch or
    in three calls. A name that comes again stands for the stream's next frame. Each patched tower of the model has
    streams of its own, and is dealt the names by itself.

    Without a context one frame belongs to the stream "default"; `NeuroFlowConfig.batch` says what several are. Contexts
    are local to a thread or task. A generator is not: while it waits at a `yield` in such a block, the names are in
    force for whoever called it. `stream` is for use there.

    Raises:
        RuntimeError: the model is not patched; or the block was held over a `yield`, and other frames came in between.
        TypeError: a name that is a tensor, or that cannot be a key of a dict.
        ValueError: no name; or the block ends in the middle of its names.

    Example:
        with neuroflow.cache_context(model, "cam-7"):
            model(pixel_values=clip)  # [T, 3, H, W], the stream's next T frames
    """
    engines = engines_of(model)
    if not streams:
        raise ValueError("streams is (); accepted is at least one name")
    for name in streams:
        _check_name(name)
    deals: list[Deal] = []
    generator, mixed = _generator(sys._getframe(1)), False
    try:
        for engine in engines:
            deals.append(Deal(streams, engine.named.get(), generator))
            engine.named.set(deals[-1])
        yield
    finally:
        for engine, deal in zip(engines, deals, strict=False):
            in_force, outer = engine.named.get() is deal, deal.close()
            mixed |= not in_force or len(deal.callers) > 1
            if in_force:
                engine.named.set(outer)
    if mixed:
        raise RuntimeError(
            f"the block that names {streams!r} was held over a yield, and other frames came in between; some may have "
            "gone to the wrong stream. In a generator, call neuroflow.stream(model, name) in place of the model"
        )
    for deal in deals:
        if deal.dealt % len(streams):
            accepted = f"a multiple of {len(streams)}, so that each name has as many"
            raise ValueError(f"streams is {streams!r}, and {deal.dealt} frames were encoded; accepted is {accepted}")


def _check_name(stream: Hashable) -> None:
    if isinstance(stream, torch.Tensor) or not isinstance(stream, Hashable):
        raise TypeError(f"a stream's name is a {type(stream).__name__}; accepted are strings, integers and the like")


def _generator(frame: FrameType | None) -> FrameType | None:
    """The generator that a block stands in which `frame` opens, unless it makes a context manager of its own."""
    while frame is not None and frame.f_globals.get("__name__") == "contextlib":
        frame = frame.f_back
    if frame is None or not frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
        return None
    caller = frame.f_back
    return None if caller is not None and caller.f_globals.get("__name__") == "contextlib" else frame


def stream(model: nn.Module, name: Hashable) -> Callable[..., Any]:
    """The model as one stream calls it: each call is a `cache_context` of its own.

    It can be handed to what knows nothing of streams, and called anywhere: in generators, and in threads and tasks that
    do not inherit contexts.

    Raises:
        RuntimeError: the model is not patched, now or when it is called.
        TypeError: a name that is a tensor, or that cannot be a key of a dict.

    Example:
        camera = neuroflow.stream(model, "cam-7")
        embeddings = (camera(pixel_values=frame).pooler_output for frame in frames)
    """
    engines_of(model)
    _check_name(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with cache_context(model, name):
            return model(*args, **kwargs)

    return call


def run_unpatched(model: nn.Module, call: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
    """What `call` returns where the patched towers of `model` run as before they were patched.

    Raises:
        RuntimeError: the model is not patched.
    """
    for engine in engines_of(model):
        call = functools.partial(engine.run_unpatched, call)
    return call(*args, **kwargs)


def encode(
    model: nn.Module,
    pixels: torch.Tensor,
    stream_ids: Sequence[Hashable],
    frame_ids: Sequence[int] | None = None,
    **kwargs: Any,
) -> Any:
    """Encode frames of one or several streams in one packed pass.

    Args:
        model: a patched model.
        pixels: [S, 3, H, W], as the model takes `pixel_values`, or a tower its first argument.
        stream_ids: S names; one that comes again is that stream's next frame.
        frame_ids: S numbers, where the frames of each stream are counted. One that does not follow the last is a key
            frame, as frames were lost, or come out of order.
        kwargs: handed to the model.

    Returns:
        the model's own output class, for a batch of S.

    Raises:
        RuntimeError: the model is not patched.
        ValueError: S differs from the number of names or of frame_ids.
    """
    if frame_ids is not None and len(frame_ids) != len(stream_ids):
        raise ValueError(
            f"frame_ids holds {len(frame_ids)} numbers for {len(stream_ids)} streams; accepted is one each"
        )
    engines, context = engines_of(model), copy_context()  # in which nothing has to be put back, whatever interrupts

    def run() -> Any:
        for engine in engines:
            engine.numbered.set(None if frame_ids is None else tuple(frame_ids))
        with cache_context(model, *stream_ids):
            is_tower = ENGINE in vars(model)
            return model(pixels, **kwargs) if is_tower else model(pixel_values=pixels, **kwargs)

    try:
        return context.run(run)
    finally:
        for engine in engines:
            engine.reported.set(context.get(engine.reported, ()))


def reset_cache(model: nn.Module, stream: Hashable | None = None) -> None:
    """Forget one stream, or all of them, and give back their memory: the next frame is a key frame.

    Without `stream`, what was derived from the weights is forgotten too. Both happen by themselves when weights change,
    but not when they are written through `.data`, nor in place where they were made in inference mode: torch does not
    count such changes. Nor can a scale be seen that an adapter keeps outside of the model.

    Raises:
        RuntimeError: the model is not patched, or this is called within a pass, as by a hook.
        KeyError: a stream that was never seen.
    """
    engines = engines_of(model)
    refuse_within_pass(engines, "reset_cache")
    names = dict.fromkeys(name for engine in engines for name, _ in engine.streams.items())
    if stream is not None and stream not in names:
        raise KeyError(f"stream is {stream!r}; known are {list(names)}")
    for engine in engines:
        engine.streams.close(names if stream is None else [stream])
        if stream is None:
            engine.derived.clear()
            engine.kernels.forget()
        if engine.graphs is not None:
            engine.graphs.prune()


def last_pass(model: nn.Module) -> tuple[FrameReport, ...]:
    """What the last pass through a patched tower, in this thread or task, did with each of its frames, in their order.

    Empty where there was none, it raised an error, or it ran unpatched.

    Raises:
        RuntimeError: the model is not patched.
        ValueError: several of its towers are.

    Example:
        model(pixel_values=frame)
        (report,) = neuroflow.last_pass(model)
        print(report.key_frame, f"{report.skipped:.1%} skipped")
    """
    return engine_of(model).reported.get()


def summary(model: nn.Module) -> Summary:
    """What every stream has skipped so far and holds, and from which share on passes run dense.

    Raises:
        RuntimeError: the model is not patched.
        ValueError: several of its towers are.
    """
    engine = engine_of(model)
    return Summary(
        arch=engine.config.arch,
        streams={name: _summarise(copy.copy(state)) for name, state in engine.streams.items()},
        limit_bytes=engine.streams.limit_bytes,
        crossovers=dict(engine.gate.crossovers),
        pass_patches=engine.config.pass_patches,
        graph_bytes=0 if engine.graphs is None else engine.graphs.held_bytes,
        kernels=engine.kernels.fastest(),
        packed_bytes=engine.kernels.packed_bytes,
    )


def _summarise(state: StreamState) -> StreamSummary:
    # A stream is kept once it has had a frame.
    assert state.active is not None and state.surprise is not None and state.skipped is not None
    return StreamSummary(
        frames=state.frames,
        key_frames=state.key_frames,
        skipped=state.skipped.item() / state.frames,
        nonfinite=state.nonfinite,
        grid=state.grid,
        active=state.active.view(state.grid).clone(),
        surprise=state.surprise.view(state.grid).clone(),
        state_bytes=state.state_bytes,
        frame_id=state.frame_id,
    )

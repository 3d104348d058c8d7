"""Patch a model in place: on the instance, never on the class, and undone without a trace."""

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
    """Counters of one stream, and its last frame, since it was opened or reset.

    Args:
        frames: frames encoded.
        key_frames: frames in which every patch had to be encoded.
        skipped: share of patches that were not encoded, over all frames, 0 to 1.
        nonfinite: frames with a NaN or Inf in a patch.
        grid: (rows, columns) of patches.
        active: bool [rows, columns], the patches that the last frame encoded.
        surprise: float32 [rows, columns], 1 - cosine between each patch of the last frame and its reference, 0 to 2.
            inf where a patch holds NaN; NaN everywhere after a key frame, which has no reference to compare with.
        state_bytes: memory that the stream's state takes.
        frame_id: number of the last frame if the caller numbers frames, else None.

    Example:
        >>> model = neuroflow.enable_cache(model)
        >>> output = model(pixel_values=frame)
        >>> stream = neuroflow.summary(model).streams["default"]
        >>> stream.frames, stream.key_frames, stream.grid
        (1, 1, (4, 4))
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
    """What a patched model holds in memory and has skipped so far; `str()` gives a table.

    Args:
        arch: architecture in use, such as "context".
        streams: `StreamSummary` by stream name, least recently used first.
        limit_bytes: upper bound on the state of all streams, from the limits of the model's `StreamCache`; None if it
            has no limits.
        crossovers: measured so far: share of active patches above which a pass runs dense, 0 to 1, by size of pass
            (frames, (rows, columns) of the largest, dtype, device).
        pass_patches: maximum number of patches in a pass; longer clips take several.
        graph_bytes: memory of recorded CUDA graphs, on top of the streams'.
        kernels: on a CPU, the fastest kernel measured so far for linear layers and attention of partial frames, by
            case: "rows" (`linear_rows` and `attend_rows`), "torch", "packed" or "products".
        packed_bytes: memory of the weights packed for these kernels, on top of the model's.

    Example:
        >>> model = neuroflow.enable_cache(model)
        >>> output = model(pixel_values=frame)
        >>> summary = neuroflow.summary(model)
        >>> summary.arch, list(summary.streams)
        ('context', ['default'])
        >>> table = str(summary)
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
        """Memory of the state of all streams, in bytes."""
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
    """The engines of a model's patched towers; empty if none is patched.

    Raises:
        TypeError: no adapter knows the model.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    engines = [engine for module in modules if (engine := vars(module).get(ENGINE)) is not None]
    if not engines:
        towers(model)
    return engines


def engines_of(model: nn.Module) -> list[Engine]:
    """The engines of a patched model, one for each patched tower.

    Raises:
        RuntimeError: the model is not patched.
        TypeError: no adapter knows the model.
    """
    engines = _engines(model)
    if not engines:
        raise RuntimeError(f"{type(model).__name__} is not patched; call neuroflow.enable_cache(model) first")
    return engines


def engine_of(model: nn.Module) -> Engine:
    """The engine of a model with one patched tower.

    Raises:
        RuntimeError: the model is not patched.
        TypeError: no adapter knows the model.
        ValueError: several of its towers are patched.
    """
    engines = engines_of(model)
    if len(engines) > 1:
        names = ", ".join(repr(name) for name, (tower, _) in towers(model).items() if ENGINE in vars(tower))
        raise ValueError(
            f"model is a {type(model).__name__} with {len(engines)} patched towers; accepted is one of them: "
            f"model.get_submodule(...) with {names}"
        )
    return engines[0]


def refuse_within_pass(engines: list[Engine], call: str) -> None:
    """Raise if called from inside a pass, as from a hook, where `call` would wait for that pass forever.

    Raises:
        RuntimeError: a pass through one of the engines is running in this context.
    """
    current = current_pass.get()
    if current is not None and any(current.plan is engine.plan for engine in engines):
        raise RuntimeError(
            f"{call} was called inside a pass through the model, as from a hook; accepted is between passes"
        )


def is_patched(model: nn.Module) -> bool:
    """Whether at least one of the model's vision towers is patched.

    Args:
        model: any model with a vision tower that NeuroFlow knows.

    Returns:
        True between `enable_cache` and `disable_cache`.

    Raises:
        TypeError: no adapter knows the model.

    Example:
        >>> neuroflow.is_patched(model)
        False
        >>> model = neuroflow.enable_cache(model)
        >>> neuroflow.is_patched(model)
        True
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
    """Patch `model`'s vision tower in place, so that it encodes only the patches that changed.

    The model is called as before and returns its own output class. It runs without gradients, and partial frames return
    no attention weights ("eager" attention becomes "sdpa").

    Hidden states and feature maps cover all patches: a patch that was not encoded keeps its last value there. This
    takes one more cache for each block that is asked for, and a stream starts over with a key frame when the set of
    blocks changes. It also starts over when weights change; `reset_cache` lists the changes that go unnoticed. Under
    "active" (B) hidden states, like the output, hold the active tokens only: [S, most active, D], padded with zeros,
    which must be left out of averages taken outside the tower.

    Args:
        model: a model in evaluation mode, with a vision tower of one of `supported_models()`.
        config: a configuration, or the path of a saved one. Defaults to the one stored in `weights`, or
            `NeuroFlowConfig()`. A second call with an equal configuration does nothing.
        streams: holds the streams, within its limits. The default has no limits.
        weights: path of a file that `neuroflow distill` wrote for this model. Partial frames are encoded with these
            weights, on the model's current device and in its dtype; key frames with the model's own, which do not
            change.
        tower: name of the tower in the model, required if it has several. Each tower is patched by its own call; the
            others run unpatched. `summary`, `save_state` and `load_state` then take the tower, not the model.
        verify: check a tower that was found by its structure against the unpatched one, on a synthetic frame and on one
            that differs in some patches, under architecture E, in about three passes. Families known by name are not
            checked.

    Returns:
        `model` itself, patched.

    Raises:
        TypeError: no adapter knows the model; a tower found by its structure would not compute the same when patched;
            or an attention module has its own `forward`, which would not be called.
        AttributeError: the adapter names a method that does not exist.
        RuntimeError: the model is already patched with another configuration, other limits or other weights.
        ValueError: an architecture or `mid_layer` that the model does not support, a file without a valid
            configuration, weights of another model, several towers and no name, or an unknown name.

    Example:
        >>> model = neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(threshold=0.1))
        >>> for frame in frames.split(1):  # [1, 3, H, W] each
        ...     embedding = model(pixel_values=frame).pooler_output  # [1, D]
        >>> neuroflow.summary(model).streams["default"].frames
        8

    Source: Schmitt 2026 for architectures A to D; E is ours.
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
    """Refuse a tower that would not compute the same once patched with this anatomy.

    Raises:
        TypeError: it would not; the message says why.
    """
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
            "neuroflow.explain(model) shows what was found, neuroflow.register_adapter takes a corrected anatomy, and "
            "verify=False skips this"
        ) from reason


def install(engine: Engine) -> None:
    """Put an engine in front of the methods it replaces; `disable_cache` takes it out again."""
    anatomy, replaced = engine.anatomy, Replaced()
    points = engine.points()
    for module, method, _ in points:
        getattr(module, method)  # all must exist before any is replaced
    setattr(anatomy.tower, _REPLACED, replaced)
    setattr(anatomy.tower, ENGINE, engine)
    try:
        for module, config in engine.plan.configs.items():  # one each, since towers may share a configuration
            own = copy.copy(config)
            own._attn_implementation = ATTENTION
            replaced.set(module, "config", own)
        entries = {(anatomy.tower, entry) for entry in anatomy.entries}
        # The tower's entries come last: until then, frames in other threads run unpatched.
        for module, method, function in sorted(points, key=lambda point: point[:2] in entries):
            replaced.put_in_front(module, method, function)
        replaced.set(anatomy.tower, "__deepcopy__", functools.partial(_copied, anatomy.tower))
    except BaseException:
        _take_out(engine)
        raise


def _take_out(engine: Engine) -> list[tuple[nn.Module, str]]:
    """Undo `install`.

    Returns:
        the modules and method names that something else has replaced since.
    """
    tower = engine.anatomy.tower
    replaced: Replaced = vars(tower)[_REPLACED]
    others = replaced.undo()
    delattr(tower, ENGINE)
    delattr(tower, _REPLACED)
    return others


def _copied(tower: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy` of a patched tower: a tower patched the same way, with streams of its own."""
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
    """Undo `enable_cache` for every tower of the model, and drop all streams.

    Does nothing to a model that is not patched. If something else has wrapped a method since, that wrapper stays and a
    warning names it; the engine inside is removed. Waits for passes that run in other threads.

    Args:
        model: a patched or unpatched model.

    Raises:
        TypeError: no adapter knows the model.
        RuntimeError: called from inside a pass, as from a hook.

    Example:
        >>> model = neuroflow.enable_cache(model)
        >>> neuroflow.disable_cache(model)
        >>> neuroflow.is_patched(model)
        False
    """
    engines = _engines(model)
    refuse_within_pass(engines, "disable_cache")
    for engine in engines:
        with engine.streams.held(None), _patching:
            if vars(engine.anatomy.tower).get(ENGINE) is engine:  # unless another thread has removed it
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
    """Whether a module's attribute of that name is something other than its class's method."""
    value = vars(module).get(name)
    return value is not None and getattr(value, "__func__", value) is not getattr(type(module), name, None)


def _description(value: Any) -> str:
    """Where a function was defined, or the class of anything that is not a function."""
    function = value.func if isinstance(value, functools.partial) else value
    if not hasattr(function, "__code__"):
        return f"a {type(value).__name__}"
    return f"{function.__globals__['__name__']}.{function.__code__.co_qualname}"  # functools.wraps copies __qualname__


@contextlib.contextmanager
def cache_context(model: nn.Module, *streams: Hashable) -> Iterator[None]:
    """Name the streams that the frames inside a `with` block belong to.

    Names are dealt to frames in order, across calls, and start again after the last. With one name all frames belong to
    one stream, in one call or in many. With three names they are the frames of three cameras, in one batch or in three
    calls. A repeated name stands for that stream's next frame. Every patched tower has its own streams and deals the
    names by itself.

    Without a context, a single frame belongs to the stream "default"; `NeuroFlowConfig.batch` says how several frames
    are read. Contexts are local to a thread or an asyncio task, but not to a generator: while a generator is suspended
    at a `yield` inside the block, the names stay in force for its caller. Use `stream` there.

    Args:
        model: a patched model.
        streams: one or more names: strings, integers or other hashable values.

    Raises:
        RuntimeError: the model is not patched; or the block was held over a `yield` while other frames came in.
        TypeError: a name is a tensor or not hashable.
        ValueError: no names were given; or the block ends part-way through its names.

    Example:
        >>> model = neuroflow.enable_cache(model)
        >>> with neuroflow.cache_context(model, "cam-7"):
        ...     output = model(pixel_values=frames)  # [T, 3, H, W], the stream's next T frames
        >>> with neuroflow.cache_context(model, "left", "right"):
        ...     output = model(pixel_values=frames[:2])  # one frame of each camera
        >>> list(neuroflow.summary(model).streams)
        ['cam-7', 'left', 'right']
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
    """The generator whose body opens the block, unless it is one that `contextlib` turns into a context manager."""
    while frame is not None and frame.f_globals.get("__name__") == "contextlib":
        frame = frame.f_back
    if frame is None or not frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
        return None
    caller = frame.f_back
    return None if caller is not None and caller.f_globals.get("__name__") == "contextlib" else frame


def stream(model: nn.Module, name: Hashable) -> Callable[..., Any]:
    """Bind a model to one stream: each call of the result is a `cache_context` of its own.

    The result can be passed to code that knows nothing about streams, and called anywhere, including from generators
    and from threads and tasks that do not inherit contexts.

    Args:
        model: a patched model.
        name: the stream's name: a string, an integer or another hashable value.

    Returns:
        a function that takes the model's arguments and returns its output.

    Raises:
        RuntimeError: the model is not patched, now or at the time of a call.
        TypeError: the name is a tensor or not hashable.

    Example:
        >>> camera = neuroflow.stream(neuroflow.enable_cache(model), "cam-7")
        >>> embeddings = [camera(pixel_values=frame).pooler_output for frame in frames.split(1)]
    """
    engines_of(model)
    _check_name(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with cache_context(model, name):
            return model(*args, **kwargs)

    return call


def run_unpatched(model: nn.Module, call: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
    """Call a function while the patched towers of `model` run unpatched.

    Args:
        model: a patched model.
        call: called with the remaining arguments.

    Returns:
        what `call` returns.

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
    """Encode frames of one or more streams in one packed pass.

    Args:
        model: a patched model, or a patched tower.
        pixels: [S, 3, H, W], passed as `pixel_values`, or to a tower as its first argument.
        stream_ids: S names. A repeated name stands for that stream's next frame.
        frame_ids: S integers, counted within each stream. A number that does not follow the stream's last one makes
            that frame a key frame, since frames are missing or out of order.
        kwargs: passed to the model.

    Returns:
        the model's own output class, for a batch of S.

    Raises:
        RuntimeError: the model is not patched.
        TypeError: a name is a tensor or not hashable.
        ValueError: S differs from the number of stream_ids or frame_ids.

    Example:
        >>> model = neuroflow.enable_cache(model)
        >>> output = neuroflow.encode(model, frames[:2], ["cam-1", "cam-2"], frame_ids=[0, 0])
        >>> output.pooler_output.shape
        torch.Size([2, 32])
    """
    if frame_ids is not None and len(frame_ids) != len(stream_ids):
        raise ValueError(
            f"frame_ids holds {len(frame_ids)} numbers for {len(stream_ids)} streams; accepted is one each"
        )
    engines, context = engines_of(model), copy_context()  # an interrupt leaves nothing to restore in it

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
    """Forget one stream, or all of them, and free their memory; the next frame is a key frame.

    Without `stream`, everything derived from the weights is dropped too. Both happen on their own when weights change,
    but torch does not report every change: not writes through `.data`, nor in-place writes to weights created in
    inference mode. A scale that a weight adapter keeps outside the model cannot be seen either. Call this after such a
    change.

    Args:
        model: a patched model.
        stream: name of the stream; None for all.

    Raises:
        RuntimeError: the model is not patched, or this is called from inside a pass, as from a hook.
        KeyError: an unknown stream.

    Example:
        >>> model = neuroflow.enable_cache(model)
        >>> output = model(pixel_values=frame)
        >>> neuroflow.reset_cache(model, "default")
        >>> neuroflow.summary(model).streams
        {}
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
    """Report what the last pass in this thread or task did with each of its frames.

    Args:
        model: a model with one patched tower.

    Returns:
        a `FrameReport` for each frame, in order. Empty if there was no pass, if it raised, or if it ran unpatched.

    Raises:
        RuntimeError: the model is not patched.
        ValueError: several of its towers are patched.

    Example:
        >>> model = neuroflow.enable_cache(model)
        >>> output = model(pixel_values=frame)
        >>> (report,) = neuroflow.last_pass(model)
        >>> print(report.key_frame, f"{report.skipped:.0%} skipped")
        first 0% skipped
    """
    return engine_of(model).reported.get()


def summary(model: nn.Module) -> Summary:
    """Summarise every stream's skip rate and memory, and what was measured on this machine.

    Args:
        model: a model with one patched tower.

    Returns:
        a `Summary`; print it for a table.

    Raises:
        RuntimeError: the model is not patched.
        ValueError: several of its towers are patched.

    Example:
        >>> model = neuroflow.enable_cache(model)
        >>> output = model(pixel_values=frames)  # a clip without a name leaves no stream behind
        >>> neuroflow.summary(model).streams
        {}
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

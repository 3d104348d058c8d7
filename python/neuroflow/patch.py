"""Patching a model in place: on the instance, never on the class, and undone without a trace."""

import contextlib
import functools
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters import describe
from .cache import ATTENTION, Engine
from .config import NeuroFlowConfig
from .state import StreamSummary, Summary
from .streams import StreamCache
from .weights import distilled_config, load_weights, twins

_ENGINE = "_neuroflow_engine"


def engine_of(model: nn.Module) -> Engine:
    """The engine behind a patched model.

    Raises:
        RuntimeError: the model is not patched. TypeError: a model that no adapter knows.
    """
    engine = vars(describe(model).tower).get(_ENGINE)
    if engine is None:
        raise RuntimeError(f"{type(model).__name__} is not patched; call neuroflow.enable_cache(model) first")
    return engine


def is_patched(model: nn.Module) -> bool:
    """Whether `enable_cache` is in force.

    Raises:
        TypeError: a model that no adapter knows.
    """
    return _ENGINE in vars(describe(model).tower)


def enable_cache(
    model: nn.Module,
    config: NeuroFlowConfig | str | Path | None = None,
    streams: StreamCache | None = None,
    weights: str | Path | None = None,
) -> None:
    """Patch `model`'s vision tower in place, so that only surprising patches are encoded.

    The model is called as before and returns its own output class. It runs without gradients, attention weights are not
    returned for partial frames (an "eager" attention implementation becomes "sdpa"), and hidden states of a partial
    frame are those of its active tokens, packed [1, M, D]. Under "active" (B) so is the last one, [S, most active, D],
    padded with zeros: what averages it outside of the tower has to leave those out.

    Args:
        model: a model with a vision tower of one of `supported_models()`, in evaluation mode.
        config: a configuration or the path of a saved one; by default that of `weights`, or `NeuroFlowConfig()`.
            Calling again with an equal one does nothing.
        streams: keeps the streams within its limits; by default there are none.
        weights: a file that `neuroflow distill` wrote for this model. Partial frames are encoded with these, on the
            device and of the dtype that the model now has; whole frames with the model's own, which stay as they are.

    Raises:
        TypeError: a model that no adapter knows. AttributeError: its adapter names a method that is not there.
        RuntimeError: the model is patched with another configuration, other limits or other weights. ValueError: an
            architecture or a `mid_layer` that the model cannot have, a file that holds no configuration, or weights
            that are not this model's.
    """
    weights = None if weights is None else Path(weights)
    if config is None:
        config = NeuroFlowConfig() if weights is None else distilled_config(weights)
    elif isinstance(config, str | Path):
        config = NeuroFlowConfig.load(config)
    if not isinstance(config, NeuroFlowConfig):
        accepted = "a neuroflow.NeuroFlowConfig, or the path of a saved one"
        raise TypeError(f"config is {config!r} ({type(config).__name__}); accepted is {accepted}")
    anatomy = describe(model)
    patched = vars(anatomy.tower).get(_ENGINE)
    if patched is not None:
        if (patched.config, patched.weights) == (config, weights) and streams in (None, patched.streams):
            return
        other = "with another StreamCache" if patched.weights == weights else f"with the weights {patched.weights}"
        other = other if patched.config == config else f"with {patched.config}"
        raise RuntimeError(f"{type(model).__name__} is already patched, {other}; call neuroflow.disable_cache first")
    partial = {} if weights is None else twins(model, anatomy, load_weights(model, weights))
    engine = Engine(anatomy, config, StreamCache() if streams is None else streams, partial)
    engine.weights = weights
    install(engine)


def install(engine: Engine) -> None:
    """Put an engine in place of the methods that it stands at; `disable_cache` takes it out."""
    anatomy = engine.anatomy
    points = engine.points()
    for module, method, _ in points:
        getattr(module, method)  # all are there before any is replaced
    for module, method, replacement in points:
        setattr(module, method, functools.partial(replacement, getattr(module, method)))
    if anatomy.attention is None:
        model_config = anatomy.attentions[0].config
        engine.attention_name = model_config._attn_implementation
        model_config._attn_implementation = ATTENTION
    setattr(anatomy.tower, _ENGINE, engine)


def disable_cache(model: nn.Module) -> None:
    """Undo `enable_cache` and drop every stream; does nothing to a model that is not patched.

    Raises:
        TypeError: a model that no adapter knows.
    """
    engine = vars(describe(model).tower).get(_ENGINE)
    if engine is None:
        return
    for module, method, _ in reversed(engine.points()):
        # A class's own method comes back by removing the instance's.
        original = getattr(module, method).args[0]
        delattr(module, method)
        if getattr(module, method) != original:
            setattr(module, method, original)
    if engine.anatomy.attention is None:
        engine.anatomy.attentions[0].config._attn_implementation = engine.attention_name
    delattr(engine.anatomy.tower, _ENGINE)


@contextlib.contextmanager
def cache_context(model: nn.Module, *streams: Hashable) -> Iterator[None]:
    """Name the stream that the frames inside the block belong to; several names for a batch, one a frame, in order.

    Without a context a batch of one frame belongs to the stream "default". Contexts are local to a thread or task.

    Raises:
        RuntimeError: the model is not patched. ValueError: no name, or one name twice.
    """
    engine = engine_of(model)
    if not streams or len(set(streams)) < len(streams):
        raise ValueError(f"streams is {streams!r}; accepted is at least one name, each only once")
    token = engine.named.set(streams)
    try:
        yield
    finally:
        engine.named.reset(token)


def encode(
    model: nn.Module,
    pixels: torch.Tensor,
    stream_ids: Sequence[Hashable],
    frame_ids: Sequence[int] | None = None,
    **kwargs: Any,
) -> Any:
    """Encode one frame of each of several streams in one packed pass.

    Args:
        model: a patched model.
        pixels: [S, 3, H, W], as the model takes `pixel_values`, or a tower its first argument.
        stream_ids: S names, each only once.
        frame_ids: S numbers, where the frames of each stream are counted. One that does not follow the last is a key
            frame, as frames were lost, or come out of order.
        kwargs: handed to the model.

    Returns:
        the model's own output class, for a batch of S.

    Raises:
        RuntimeError: the model is not patched. ValueError: S differs from the number of names or of frame_ids, or a
            name comes twice.
    """
    if frame_ids is not None and len(frame_ids) != len(stream_ids):
        raise ValueError(
            f"frame_ids holds {len(frame_ids)} numbers for {len(stream_ids)} streams; accepted is one each"
        )
    engine = engine_of(model)
    token = engine.numbered.set(None if frame_ids is None else tuple(frame_ids))
    try:
        with cache_context(model, *stream_ids):
            return model(pixels, **kwargs) if model is engine.anatomy.tower else model(pixel_values=pixels, **kwargs)
    finally:
        engine.numbered.reset(token)


def reset_cache(model: nn.Module, stream: Hashable | None = None) -> None:
    """Forget one stream, or all of them, and give back their memory: the next frame is a key frame.

    Without `stream`, what was derived from the weights is forgotten too. That happens by itself when they change, but
    not when they are written through `.data`, as some adapters are merged: torch does not count such changes.

    Raises:
        RuntimeError: the model is not patched. KeyError: a stream that was never seen.
    """
    engine = engine_of(model)
    if stream is None:
        engine.streams.close(name for name, _ in engine.streams.items())
        engine.kept.clear()
    elif stream in engine.streams:
        engine.streams.close([stream])
    else:
        raise KeyError(f"stream is {stream!r}; known are {[name for name, _ in engine.streams.items()]}")
    if engine.graphs is not None:
        engine.graphs.prune()


def summary(model: nn.Module) -> Summary:
    """What every stream has skipped so far and holds, and from which share on passes run dense.

    Raises:
        RuntimeError: the model is not patched.
    """
    engine = engine_of(model)
    streams = {
        name: StreamSummary(
            frames=state.frames,
            key_frames=state.key_frames,
            skipped=state.skipped.item() / state.frames,
            nonfinite=state.nonfinite,
            grid=state.grid,
            active=state.active.view(state.grid).clone(),
            surprise=state.surprise.view(state.grid).clone(),
            state_bytes=state.state_bytes,
        )
        for name, state in engine.streams.items()
    }
    return Summary(
        arch=engine.config.arch,
        streams=streams,
        limit_bytes=engine.streams.limit_bytes,
        crossovers=dict(engine.crossovers),
        graph_bytes=0 if engine.graphs is None else engine.graphs.held_bytes,
    )

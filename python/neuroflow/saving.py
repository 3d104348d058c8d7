"""Streams to a file and back, so that a restart costs no key frames."""

import dataclasses
import hashlib
import json
from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .config import NeuroFlowConfig
from .engine.engine import Engine
from .engine.state import PATCHES, StreamState
from .patch import engine_of
from .weights import write

COUNTERS = ("frames", "key_frames", "since_key_frame", "nonfinite", "frame_id")


@torch.no_grad()
def save_state(model: nn.Module, path: str | Path, streams: Sequence[Hashable] | None = None) -> None:
    """Write streams of a patched model to a safetensors file; what was at `path` is replaced at once, or not at all.

    Args:
        streams: their names, strings or integers; None means all.

    Raises:
        RuntimeError: the model is not patched.
        KeyError: a stream that is not open.
        ValueError: a name that is neither a string nor an integer.
        OSError: the file cannot be written.
    """
    engine = engine_of(model)
    names = [name for name, _ in engine.streams.items()] if streams is None else list(streams)
    tensors, described = {}, []
    for number, name in enumerate(names):
        if not isinstance(name, str | int):
            raise ValueError(f"stream is {name!r} ({type(name).__name__}); accepted is a string or an integer")
        if name not in engine.streams:
            raise KeyError(f"stream is {name!r}; open are {[name for name, _ in engine.streams.items()]}")
        with engine.streams.used((name,), [engine.streams[name].patches]) as [state]:
            parts = state.tensors | {name: getattr(state, name) for name in (*PATCHES, "skipped")}
            parts = {key: tensor for key, tensor in parts.items() if tensor is not None}
            for key, tensor in parts.items():
                tensors[f"{number}.{_text(key)}"] = tensor.detach().cpu().clone()
            described.append(
                {"name": name, "grid": state.grid, "dim": state.signature[1], "dtype": str(state.signature[2])}
                | {counter: getattr(state, counter) for counter in COUNTERS}
                | {"valid": state.key_frame_due is None}
            )
    metadata = _conditions(engine) | {"streams": json.dumps(described)}
    write(Path(path), tensors, metadata)


@torch.no_grad()
def load_state(model: nn.Module, path: str | Path) -> list[Hashable]:
    """Open the streams that `save_state` wrote, in place of those of the same names; the others stay as they are.

    Returns:
        their names.

    Raises:
        RuntimeError: the model is not patched.
        ValueError: the file cannot be read, or was written for other weights or another configuration.
    """
    engine = engine_of(model)
    device = next(engine.anatomy.tower.parameters()).device
    try:
        # Frames in inference mode or not go on to update what is loaded.
        with torch.inference_mode(False), safe_open(path, "pt", device=str(device)) as file:
            metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        described = json.loads(metadata["streams"])
        metadata["configuration"] = _described(NeuroFlowConfig.from_fields(json.loads(metadata["configuration"])))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"state {path}: cannot be read ({error}); give a file that save_state wrote") from None
    for condition, ours in _conditions(engine).items():
        if metadata.get(condition) != ours:
            raise ValueError(
                f"state {path}: its {condition} is {metadata.get(condition)}, the model's {ours}; accepted is a file "
                "that the same model with the same configuration wrote"
            )
    states = [_state(engine, number, about, tensors, device) for number, about in enumerate(described)]
    engine.streams.put(states)
    return [state.name for state in states]


def _state(
    engine: Engine, number: int, about: dict, tensors: dict[str, torch.Tensor], device: torch.device
) -> StreamState:
    state = StreamState(about["name"])
    state.grid = tuple(about["grid"])
    state.signature = (state.grid, about["dim"], getattr(torch, about["dtype"].removeprefix("torch.")), device)
    for counter in COUNTERS:
        setattr(state, counter, about[counter])
    state.key_frame_due = None if about["valid"] else "failed"
    prefix = f"{number}."
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    for name in (*PATCHES, "skipped"):
        setattr(state, name, own.pop(name, None))
    state.tensors = {_key(text): tensor for text, tensor in own.items()}
    state.hidden = frozenset(key[1] for key in state.tensors if key[0] == "hidden")
    return state


def _conditions(engine: Engine) -> dict[str, str]:
    """What must be the same where a state is loaded."""
    tower = engine.anatomy.tower
    return {
        "weights": engine.derived(tower, "fingerprint", lambda: _fingerprint(tower, *engine.distilled.values())),
        "configuration": _described(engine.config),
    }


def _described(config: NeuroFlowConfig) -> str:
    return json.dumps(dataclasses.asdict(config))


def _fingerprint(*modules: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in (item for module in modules for item in module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _text(key: Hashable) -> str:
    return key if isinstance(key, str) else f"{key[0]}.{key[1]}"


def _key(text: str) -> Hashable:
    name, _, layer = text.partition(".")
    return (name, int(layer)) if layer else name

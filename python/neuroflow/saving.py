"""Save and load streams, so that a restart costs no key frames."""

import dataclasses
import hashlib
import json
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .config import NeuroFlowConfig
from .engine.engine import Engine
from .engine.state import PATCHES, StreamState
from .patch import engine_of, refuse_within_pass
from .weights import write

COUNTERS = ("frames", "key_frames", "since_key_frame", "nonfinite")
DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
# dtypes of the values kept for each patch, and of the total over all frames.
KINDS = dict(
    zip((*PATCHES, "skipped"), (torch.int32, torch.bool, torch.float32, torch.float32, torch.float64), strict=True)
)


@torch.no_grad()
def save_state(model: nn.Module, path: str | Path, streams: Sequence[Hashable] | None = None) -> None:
    """Write streams of a patched model to a safetensors file, replacing an existing file atomically.

    Args:
        model: a model with one patched tower.
        path: the file.
        streams: names of the streams, strings or integers; None for all.

    Raises:
        RuntimeError: the model is not patched, its weights are offloaded, or this is called from inside a pass, as from
            a hook.
        KeyError: a stream that is not open.
        ValueError: a name that is neither a string nor an integer.
        OSError: the file cannot be written.

    Example:
        >>> model = neuroflow.enable_cache(model)
        >>> output = neuroflow.stream(model, "cam-7")(pixel_values=frame)
        >>> neuroflow.save_state(model, "streams.safetensors")
        >>> neuroflow.load_state(model, "streams.safetensors")
        ['cam-7']
    """
    engine = engine_of(model)
    refuse_within_pass([engine], "save_state")
    open_streams = dict(engine.streams.items())
    names = list(open_streams if streams is None else streams)
    for name in names:
        if not isinstance(name, str | int):
            raise ValueError(f"stream is {name!r} ({type(name).__name__}); accepted is a string or an integer")
        if name not in open_streams:
            raise KeyError(f"stream is {name!r}; open are {list(open_streams)}")
    tensors, described = {}, []
    for name in names:
        with engine.streams.held([name]):
            if name not in engine.streams:  # closed while this waited
                continue
            state, number = engine.streams[name], len(described)
            valid = state.key_frame_due is None
            parts = {part: getattr(state, part) for part in KINDS} | (state.tensors if valid else {})
            for key, tensor in parts.items():
                if tensor is not None:
                    tensors[f"{number}.{_text(key)}"] = tensor.detach().cpu().clone()
            described.append(
                {"name": name, "grid": state.grid, "dim": state.signature[1], "dtype": str(state.signature[2])}
                | {counter: getattr(state, counter) for counter in (*COUNTERS, "frame_id")}
                | {"valid": valid}
            )
    metadata = _conditions(engine) | {"streams": json.dumps(described)}
    write(Path(path), tensors, metadata | {"checksum": _checksum(tensors, metadata)})


@torch.no_grad()
def load_state(model: nn.Module, path: str | Path) -> list[Hashable]:
    """Open the streams in a file that `save_state` wrote, replacing those of the same name; others stay open.

    Args:
        model: a model with one patched tower, with the weights and configuration that the file was written with.
        path: the file.

    Returns:
        names of the streams in the file.

    Raises:
        RuntimeError: the model is not patched, its weights are offloaded, or this is called from inside a pass, as from
            a hook.
        ValueError: the file cannot be read, is damaged, was written for other weights, another configuration or by a
            release before checksums, or its streams exceed the limits. No stream is replaced.

    Example:
        >>> model = neuroflow.enable_cache(model)
        >>> output = neuroflow.stream(model, "cam-7")(pixel_values=frame)
        >>> neuroflow.save_state(model, "streams.safetensors", ["cam-7"])
        >>> neuroflow.reset_cache(model)
        >>> names = neuroflow.load_state(model, "streams.safetensors")
        >>> neuroflow.summary(model).streams["cam-7"].frames
        1
    """
    engine = engine_of(model)
    refuse_within_pass([engine], "load_state")
    device = next(engine.anatomy.tower.parameters()).device
    accepted = "accepted is a file that save_state wrote"
    try:
        # Later frames update these tensors, in inference mode or not, and must not depend on the mapped file.
        with torch.inference_mode(False), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        checksum = metadata.pop("checksum", None)
        if checksum is None:
            raise ValueError("it has no checksum, like files of earlier releases")
        if checksum != _checksum(tensors, metadata):
            raise ValueError("it is damaged: its checksum does not match")
        described = json.loads(metadata["streams"])
        configuration = _described(NeuroFlowConfig.from_fields(json.loads(metadata["configuration"])))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"state {path}: cannot be read ({error!s:.500}); {accepted}") from None
    for condition, ours in _conditions(engine).items():
        theirs = configuration if condition == "configuration" else metadata.get(condition)
        if theirs != ours:
            raise ValueError(
                f"state {path}: its {condition} is {theirs!s:.1000}, the model's {ours}; accepted is a file that the "
                "same model with the same configuration wrote"
            )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        parts.setdefault(number, {})[name] = tensor
    try:
        with torch.inference_mode(False):
            states = [_state(engine, about, parts.pop(str(number)), device) for number, about in enumerate(described)]
        if parts:
            raise ValueError(f"it has tensors of {len(parts)} streams that it does not list")
        if len({state.name for state in states}) < len(states):
            raise ValueError("two streams have the same name")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"state {path}: its streams do not fit this model ({error!s:.500}); {accepted}") from None
    engine.streams.put(states)
    return [state.name for state in states]


def _state(engine: Engine, about: dict, tensors: dict[str, torch.Tensor], device: torch.device) -> StreamState:
    """The stream that a file describes by `about` and `tensors`.

    Raises:
        KeyError, ValueError, TypeError, AttributeError: this engine cannot have held it.
    """
    name, grid, dim, dtype = about["name"], tuple(about["grid"]), about["dim"], DTYPES[about["dtype"]]
    frames, key_frames, since_key_frame, nonfinite = counts = [about[counter] for counter in COUNTERS]
    if not isinstance(name, str | int) or not isinstance(about["frame_id"], int | None):
        raise ValueError("a name or frame number has the wrong type")
    if not all(type(count) is int for count in (*counts, *grid, dim)) or not isinstance(about["valid"], bool):
        raise ValueError("a counter is not an integer")
    if len(grid) != 2 or min(*grid, dim) < 1:
        raise ValueError("the grid is invalid")
    if not (0 < key_frames <= frames < 2**63 and 0 <= since_key_frame < frames and 0 <= nonfinite <= frames):
        raise ValueError("the frame counts are inconsistent")
    state = StreamState(name)
    state.signature, state.grid, state.frame_id = (grid, dim, dtype, device), grid, about["frame_id"]
    vars(state).update(zip(COUNTERS, counts, strict=True))
    for part, kind in KINDS.items():
        tensor = tensors.pop(part, None)
        if tensor is not None or part != "attention":
            setattr(state, part, _checked(part, tensor, [1 if part == "skipped" else state.patches], kind))
    in_range = {
        "age": (state.age >= 0) & (state.age <= frames),
        "surprise": ~(state.surprise < 0),
        "skipped": (state.skipped >= 0) & (state.skipped <= frames),
    }
    if state.attention is not None:
        in_range["attention"] = (state.attention >= 0) & state.attention.isfinite()
    for part, within in in_range.items():
        if not within.all():
            raise ValueError(f"{part} is out of range")
    caches = {_key(text): tensor for text, tensor in tensors.items()}
    if about["valid"]:
        _check_caches(engine, state, caches)
    elif caches:
        raise ValueError("it holds caches that are marked invalid")
    finite = all(bool(tensor.isfinite().all()) for tensor in caches.values())
    state.conditions = engine.conditions(device.type)
    state.key_frame_due = None if about["valid"] and finite else "failed"
    for part in KINDS:
        setattr(state, part, None if getattr(state, part) is None else getattr(state, part).to(device))
    state.tensors = {key: tensor.to(device) for key, tensor in caches.items()}
    state.hidden = frozenset(key[1] for key in caches if key[0] == "hidden")
    return state


def _checked(name: Hashable, tensor: torch.Tensor | None, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    if tensor is None or list(tensor.shape) != shape or tensor.dtype != dtype:
        found = None if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"{_text(name)} is {found}; accepted is {shape} {dtype}")
    return tensor


def _check_caches(engine: Engine, state: StreamState, caches: dict[Hashable, torch.Tensor]) -> None:
    """Check that the caches are those the configuration keeps, of the frame's size, and alike within each kind."""
    config, depth = engine.config, len(engine.anatomy.layers)
    _, dim, dtype, _ = state.signature
    expected: set[Hashable] = {"reference"} | ({"fast"} if config.reference == "dual" else set())
    if config.arch == "mlp":
        expected |= {("increment", layer) for layer in range(depth)}
    elif config.arch != "active":
        expected.add("output")
    if config.arch == "context":
        expected |= {(name, layer) for name in ("key", "value") for layer in range(depth)}
    optional = {"colours"} if config.cut_light is not None else set()
    hidden = {("hidden", layer) for layer in engine.plan.kept(frozenset(range(depth)))}
    if not expected <= set(caches) <= expected | hidden | optional:
        raise ValueError(f"it holds {sorted(map(_text, caches))}")
    wide = torch.promote_types(dtype, torch.float32) if 0 < engine.gate.decay < 1 else dtype
    widest = max((caches[key].shape[-1] for key in caches if key[0] == "key"), default=0)
    kinds: dict[Hashable, torch.Tensor] = {}
    for key, tensor in caches.items():
        if key in ("reference", "fast"):
            _checked(key, tensor, [1, state.patches, dim], wide)
            continue
        if key == "colours":
            _checked(key, tensor, [1, state.patches, 3], torch.float32)
            continue
        name = key if isinstance(key, str) else key[0]
        kind = kinds.setdefault(("key", key[1]) if name in ("key", "value") else name, tensor)
        if name == "key" and tensor.numel() and widest % tensor.shape[-1]:
            raise ValueError(f"{_text(key)} is {list(tensor.shape)}; accepted is a width that divides {widest}")
        if tensor.dtype not in DTYPES.values() or not tensor.numel():
            raise ValueError(f"{_text(key)} is {list(tensor.shape)} {tensor.dtype}")
        _checked(
            key, tensor, [1, engine.anatomy.prefix + state.patches + engine.anatomy.suffix, kind.shape[-1]], kind.dtype
        )


def _conditions(engine: Engine) -> dict[str, str]:
    """What must match where a state is loaded."""
    tower = engine.anatomy.tower
    return {
        "weights": engine.derived(tower, "fingerprint", lambda: _fingerprint(tower, *engine.distilled.values())),
        "configuration": _described(engine.config),
    }


def _described(config: NeuroFlowConfig) -> str:
    return json.dumps(dataclasses.asdict(config))


def _fingerprint(*modules: nn.Module) -> str:
    weights = [item for module in modules for item in module.state_dict().items()]
    absent = [name for name, weight in weights if weight.is_meta]
    if absent:
        raise RuntimeError(
            f"{absent[0]} of the model is offloaded, so its weights cannot be compared; accepted is a model whose "
            "weights are all in memory"
        )
    return _digest(weights)


def _checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    return _digest(sorted(tensors.items()), json.dumps(metadata, sort_keys=True))


def _digest(tensors: Iterable[tuple[str, torch.Tensor]], text: str = "") -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        plain = tensor.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)
        digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()


def _text(key: Hashable) -> str:
    return key if isinstance(key, str) else f"{key[0]}.{key[1]}"


def _key(text: str) -> Hashable:
    name, _, layer = text.partition(".")
    return (name, int(layer)) if layer else name

"""Values computed from weights, kept until the weights change."""

import itertools
import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

_pointer, _version = torch._C.TensorBase.data_ptr, operator.attrgetter("_version")
# Modules from other packages may be adapters, whose result depends on which is active, and at what scale.
_FIXED = ("torch", "transformers", "timm", "vllm")
_OF_EVERY_MODULE = vars(nn.Module()).keys()


class Weights:
    """Detects that a module's weights changed or moved, that a part was replaced, or that an adapter was switched.

    Writes through `.data` leave no trace.

    Attributes:
        countable: every change is detected; tensors made in inference mode do not count in-place changes.
        resident: the weights stay in memory between calls.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        # Offloaded weights have another address in each call.
        placed = [part for part in parts if not _is_offloaded(part)]
        held = [tensors for part in placed for tensors in (part._parameters, part._buffers)]
        self._tensors = [tensors for tensors in held if tensors]
        self._parts = [part._modules for part in parts if part._modules]
        self._empty = [tensors for tensors in held if not tensors]
        self._empty += [part._modules for part in parts if not part._modules]
        self._adapters = [part for part in parts if type(part).__module__.partition(".")[0] not in _FIXED]
        self._parts_before, self._before = _all(self._parts), self._now()
        self.countable = None not in self._before[1]
        tensors = [tensor for tensor in _all(self._tensors) if tensor is not None]
        self.resident = len(placed) == len(parts) and not any(tensor.is_meta for tensor in tensors)
        self.settle()

    def settle(self) -> None:
        """Accept what modules have recorded about themselves since, as some do on every call."""
        self._settings_before = [_settings(part) for part in self._adapters]

    def changed(self) -> bool:
        return (
            any(self._empty)
            or _all(self._parts) != self._parts_before
            or self._now() != self._before
            or [_settings(part) for part in self._adapters] != self._settings_before
        )

    def _now(self) -> tuple[list[int], list[int | None]]:
        tensors = [tensor for tensor in _all(self._tensors) if tensor is not None]
        try:
            return list(map(_pointer, tensors)), list(map(_version, tensors))
        except (RuntimeError, NotImplementedError):  # some tensor does not support this
            return [_place(tensor) for tensor in tensors], [_count(tensor) for tensor in tensors]


def _all(dictionaries: list[dict[str, Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(map(dict.values, dictionaries)))


def _is_offloaded(part: nn.Module) -> bool:
    """Whether an accelerate hook loads a module's weights for each call and removes them afterwards."""
    hook = vars(part).get("_hf_hook")
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook]))


def _place(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # it has no memory of its own, like tensors that wrap others
        return id(tensor)


def _count(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _settings(part: nn.Module) -> dict[str, Any]:
    """The plain values among a module's attributes."""
    own = vars(part).items()
    return {name: _copied(value) for name, value in own if name not in _OF_EVERY_MODULE and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list | tuple) else value


class Derived:
    """Values computed from modules' weights, by key."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Weights, Any]] = {}

    def __call__(self, module: nn.Module, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` returns for the weights of `module`, kept until they change.

        It is computed each time if gradients are enabled, or if changes cannot be detected.
        """
        if torch.is_grad_enabled():
            return compute()
        weights, value = self._kept.get(key, (None, None))
        if weights is None or weights.changed():
            weights, value = Weights(module), compute()
            if weights.countable:
                self._kept[key] = weights, value
        return value

    def clear(self) -> None:
        self._kept.clear()

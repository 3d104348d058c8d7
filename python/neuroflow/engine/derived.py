"""What is computed of weights, and kept until they change."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn


class Weights:
    """Notices that the weights of a module changed or moved, or that a part of it was replaced.

    Attributes:
        countable: every change is noticed; in inference mode tensors do not count those in place.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self._tensors = [held for part in parts for held in (part._parameters, part._buffers)]
        self._parts = [(part._modules, dict(part._modules)) for part in parts]
        self._before = self._now()
        self.countable = all(version is not None for _, version in self._before)

    def _now(self) -> list[tuple[int, int | None]]:
        return [
            (tensor.data_ptr(), None if tensor.is_inference() else tensor._version)
            for held in self._tensors
            for tensor in held.values()
            if tensor is not None
        ]

    def changed(self) -> bool:
        return any(now != before for now, before in self._parts) or self._now() != self._before


class Derived:
    """What was computed of modules' weights, by a key for each such thing."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Weights, Any]] = {}

    def __call__(self, module: nn.Module, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` makes of the weights of `module`: kept until they change.

        It is computed anew each time where gradients are to go through it, and where changes cannot be noticed.
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

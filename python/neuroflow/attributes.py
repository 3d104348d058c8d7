"""Attributes of modules that are replaced in place, and put back."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class _InFront:
    """A function in front of a method: called with the original first, until `released`; from then on, the original."""

    def __init__(self, original: Callable, function: Callable) -> None:
        self.original = original
        self.function = function
        self.released = False
        self.__signature__ = inspect.signature(original)  # by which callers choose what they pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs) if self.released else self.function(self.original, *args, **kwargs)


class Replaced:
    """Attributes that were set on instances, in order, and what they were before."""

    def __init__(self) -> None:
        self._undo: list[tuple[nn.Module, str, Any, Any]] = []

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        self._undo.append((module, name, value, vars(module).get(name)))
        setattr(module, name, value)

    def put_in_front(self, module: nn.Module, method: str, function: Callable) -> None:
        """Have calls of a method go to `function`, which takes the method as it was first."""
        self.set(module, method, _InFront(getattr(module, method), function))

    def undo(self) -> None:
        """Put everything back, the last first; a class's own method comes back by removing the instance's.

        What something else has wrapped since stays wrapped, and what was put in front of the method inside is gone.
        """
        for module, name, value, was in reversed(self._undo):
            if isinstance(value, _InFront):
                value.released = True
            if vars(module).get(name) is not value:
                continue
            delattr(module, name)
            if was is not None:
                setattr(module, name, was)
        self._undo.clear()

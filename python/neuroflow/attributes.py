"""Attributes of modules that are replaced in place, and put back."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class _InFront(functools.partial):
    """A function in front of a method, which is the last argument that it holds."""

    def release(self) -> None:
        """Be the method alone from now on, for whoever holds on to this."""
        self.__setstate__((self.args[-1], (), {}, {}))


class Replaced:
    """Attributes that were set on instances, in order, and what they were before."""

    def __init__(self) -> None:
        self._undo: list[tuple[nn.Module, str, Any, Any]] = []

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        self._undo.append((module, name, value, vars(module).get(name)))
        setattr(module, name, value)

    def put_in_front(self, module: nn.Module, method: str, function: Callable) -> None:
        """Have calls of a method go to `function`, which takes the method as it was in front of their arguments."""
        if method == "forward" and "_old_forward" in vars(module):
            method = "_old_forward"  # a hook of accelerate calls it once weights and arguments are where they belong
        original = getattr(module, method)
        in_front = _InFront(function, original)
        in_front.__signature__ = inspect.signature(original)  # by which callers choose what they pass
        self.set(module, method, in_front)

    def undo(self) -> list[tuple[nn.Module, str]]:
        """Put everything back, the last first; a class's own method comes back by removing the instance's.

        What something else has wrapped since stays wrapped, and what was put in front of the method inside is gone.

        Returns:
            the modules and names of what is no longer as it was set: wrapped, replaced or taken away since.
        """
        others = []
        for module, name, value, was in reversed(self._undo):
            if isinstance(value, _InFront):
                value.release()
            if vars(module).get(name) is not value:
                moved = next((other for other, held in vars(module).items() if held is value), None)
                if moved is None:
                    others.append((module, name))
                else:  # as accelerate's hooks do when they come or go
                    setattr(module, moved, value.func if isinstance(value, _InFront) else was)
                continue
            if was is None:
                delattr(module, name)
            else:
                setattr(module, name, was)  # other threads find one or the other
        self._undo.clear()
        return list(dict.fromkeys(others))

    def undo_in_copies(self, memo: dict[int, Any]) -> None:
        """As `undo`, in what `copy.deepcopy` made of the modules, which is by their id in `memo`."""
        were: dict[tuple[int, str], Any] = {}
        for module, name, value, was in reversed(self._undo):
            key = id(module), name
            if key[0] in memo and were.get(key, vars(module).get(name)) is value:
                were[key] = was
        for (module, name), was in were.items():
            del vars(memo[module])[name]
            if was is not None:
                vars(memo[module])[name] = copy.deepcopy(was, memo)

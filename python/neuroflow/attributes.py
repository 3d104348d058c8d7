"""Replace attributes of modules in place, and restore them."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class _InFront(functools.partial):
    """A function in front of a method, which is its last bound argument."""

    def release(self) -> None:
        """Become the plain method, for anyone who still holds this."""
        self.__setstate__((self.args[-1], (), {}, {}))


class Replaced:
    """Attributes set on instances, in order, and their previous values."""

    def __init__(self) -> None:
        self._undo: list[tuple[nn.Module, str, Any, Any]] = []

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        self._undo.append((module, name, value, vars(module).get(name)))
        setattr(module, name, value)

    def put_in_front(self, module: nn.Module, method: str, function: Callable) -> None:
        """Route calls of a method to `function`, which gets the original method before the arguments."""
        if method == "forward" and "_old_forward" in vars(module):
            method = "_old_forward"  # accelerate's hook calls this once weights and arguments are in place
        original = getattr(module, method)
        in_front = _InFront(function, original)
        in_front.__signature__ = inspect.signature(original)  # callers inspect it to choose what to pass
        self.set(module, method, in_front)

    def undo(self) -> list[tuple[nn.Module, str]]:
        """Restore everything, in reverse order; a class's own method returns when the instance's is removed.

        If something else has wrapped an attribute since, that wrapper stays, and the function inside is removed.

        Returns:
            the modules and names that are no longer as they were set: wrapped, replaced or removed since.
        """
        others = []
        for module, name, value, was in reversed(self._undo):
            if isinstance(value, _InFront):
                value.release()
            if vars(module).get(name) is not value:
                moved = next((other for other, held in vars(module).items() if held is value), None)
                if moved is None:
                    others.append((module, name))
                else:  # as accelerate's hooks do when added or removed
                    setattr(module, moved, value.func if isinstance(value, _InFront) else was)
                continue
            if was is None:
                delattr(module, name)
            else:
                setattr(module, name, was)  # atomic for other threads
        self._undo.clear()
        return list(dict.fromkeys(others))

    def undo_in_copies(self, memo: dict[int, Any]) -> None:
        """Like `undo`, in the copies that `copy.deepcopy` made of the modules, found by id in `memo`."""
        were: dict[tuple[int, str], Any] = {}
        for module, name, value, was in reversed(self._undo):
            key = id(module), name
            if key[0] in memo and were.get(key, vars(module).get(name)) is value:
                were[key] = was
        for (module, name), was in were.items():
            del vars(memo[module])[name]
            if was is not None:
                vars(memo[module])[name] = copy.deepcopy(was, memo)

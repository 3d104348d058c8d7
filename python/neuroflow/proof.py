"""Check that a tower found by structure, once patched, computes what architecture E defines.

Nothing is taken on trust. A synthetic frame, and one in which some patches differ, run through the patched tower and
through the unpatched one, whose blocks read and return their old tokens wherever a patch is inactive.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from .adapters import Anatomy, in_evaluation
from .attributes import Replaced

CHANGED = 8  # one in this many patches differs
# Relative to the largest value of an output: the rounding error from summing in another order. A float64 tower may
# have float32 parts, such as softmax and rotary positions.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


class Disproven(Exception):
    """How a patched tower differs from the definition."""


def prove(anatomy: Anatomy, patched: Callable[[], AbstractContextManager[Callable[[], torch.Tensor]]]) -> None:
    """Compare a tower patched for architecture E with its definition.

    Takes about three passes of a frame of `Anatomy.example`; torch's random state is untouched.

    Args:
        anatomy: of an unpatched tower, with an example.
        patched: a context manager that patches the tower so that exactly the changed patches are encoded; it yields a
            function that returns the patches that the last frame encoded, bool [rows, columns].

    Raises:
        Disproven: what differs, and by how much.
    """
    with in_evaluation(anatomy.tower):
        before = _attributes(anatomy.tower)
        still = anatomy.example(())
        patches = sum(rows * columns for rows, columns in anatomy.grids(still))
        shuffled = torch.randperm(patches, generator=torch.Generator().manual_seed(0)).tolist()
        changed = sorted(shuffled[: -(-patches // CHANGED)])
        frames = [still, anatomy.example(changed)]
        ours, active = [], torch.ones(patches, dtype=torch.bool)
        with patched() as last_active:
            for frame, kind in zip(frames, ("a whole frame", "a partial frame"), strict=True):
                try:
                    ours.append(anatomy.tower(**frame))
                except Exception as error:  # the tower's own code may raise anything for fewer tokens
                    raise Disproven(f"{kind} fails: {type(error).__name__}: {error!s:.300}") from error
            active = last_active().flatten()
        if _attributes(anatomy.tower) != before:
            raise Disproven("disable_cache does not restore the tower")
        if active[changed].sum() < max(active.sum() / 2, 1):
            raise Disproven(
                f"patches {changed[:4]} ... of {patches} changed, and {active.nonzero()[:4, 0].tolist()} ... were "
                "encoded; its tokens are in another order"
            )
        with _OldTokens(anatomy) as old:
            for kind, frame, output in zip(("a whole frame", "a partial frame"), frames, ours, strict=True):
                old.active = _in_order(anatomy, frame, active) if frame is not still else None
                _compare(kind, output, anatomy.tower(**frame))


def _in_order(anatomy: Anatomy, frame: dict[str, Any], active: torch.Tensor) -> torch.Tensor:
    """Row-major patches, bool [N], as the tower's tokens, bool [T]."""
    if anatomy.order is not None:
        active = active[anatomy.order(frame)[0].to(active.device)]
    return torch.cat((active.new_ones(anatomy.prefix), active, active.new_ones(anatomy.suffix)))


def _attributes(tower: nn.Module) -> list[Any]:
    """What a tower's modules hold, by identity.

    Tensors are left out, since a normalised weight is computed anew in each pass.
    """
    return [
        {
            name: len(value) if name.endswith("_hooks") else id(value)
            for name, value in vars(module).items()
            if not isinstance(value, torch.Tensor)
        }
        for module in tower.modules()
    ]


def _compare(kind: str, ours: Any, expected: Any) -> None:
    for (path, value), (_, other) in zip(_tensors(ours), _tensors(expected), strict=True):
        name = path or "the output"
        if value.shape != other.shape:
            raise Disproven(f"{kind} differs: {name} is {list(value.shape)}, unpatched {list(other.shape)}")
        if not other.isfinite().all():
            raise Disproven(f"{name} of a synthetic frame holds NaN or Inf, so nothing can be compared")
        largest = other.abs().max().double().item() if other.numel() else 0.0
        off = (value.double() - other.double()).abs().max().item() if other.numel() else 0.0
        if not off <= TOLERANCES.get(other.dtype, 0.0) * largest:
            raise Disproven(f"{kind} differs: {name} by {off / largest if largest else off:.2g} of its largest value")


def _tensors(output: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The floating-point tensors in what a tower returns, with their paths."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield path, output
    elif isinstance(output, Mapping | tuple | list):
        for key, value in output.items() if isinstance(output, Mapping) else enumerate(output):
            yield from _tensors(value, f"{path}.{key}" if path else str(key))


class _OldTokens:
    """Makes each block of an unpatched tower read and return its old tokens where `active` is False.

    Applies only to passes in the context that opened it.

    Attributes:
        active: bool [T]; None for a frame in which all are active.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.active: torch.Tensor | None = None
        self._held: dict[nn.Module | None, torch.Tensor] = {}
        self._replaced = Replaced()
        self._here: ContextVar[bool] = ContextVar("neuroflow_proof", default=False)

    def __enter__(self) -> "_OldTokens":
        for layer in self.anatomy.layers:  # inside whatever captures hidden states
            self._replaced.put_in_front(layer, "forward", functools.partial(self._run, layer))
        self._here.set(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._here.set(False)
        self._replaced.undo()

    def _run(self, layer: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if not self._here.get():
            return forward(*args, **kwargs)
        if layer is self.anatomy.layers[0]:
            tokens, *args = args or [kwargs.pop(next(iter(inspect.signature(forward).parameters)))]
            args = (self._mixed(None, tokens), *args)
        output = forward(*args, **kwargs)
        if isinstance(output, tuple):
            return self._mixed(layer, output[0]), *output[1:]
        return self._mixed(layer, output)

    def _mixed(self, layer: nn.Module | None, tokens: torch.Tensor) -> torch.Tensor:
        if self.active is not None:
            fresh = self.active.to(tokens.device)[:, None]
            tokens = torch.where(fresh, tokens.flatten(0, -2), self._held[layer].flatten(0, -2)).view(tokens.shape)
        self._held[layer] = tokens
        return tokens

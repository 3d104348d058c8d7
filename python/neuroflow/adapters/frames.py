"""The forms in which towers take frames, and synthetic frames in each."""

import inspect
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from .anatomy import Grid

MASKED = "masked"  # part of the names of arguments that leave out patches


def first_argument(tower: nn.Module) -> str:
    return next(iter(inspect.signature(tower.forward).parameters), "")


def without_default(tower: nn.Module) -> dict[str, None]:
    """None for each of a tower's arguments, after the first, without a default."""
    _, *others = inspect.signature(tower.forward).parameters.values()
    return {
        each.name: None
        for each in others
        if each.default is each.empty and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }


def _noise(tower: nn.Module, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random values on the tower's device and in its dtype; torch's own generators are untouched."""
    weights = (each for each in tower.parameters() if each.is_floating_point() and each.device.type != "meta")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight = next(weights, values)
    return values.to(weight.device, weight.dtype)


class Images(NamedTuple):
    """Frames [S, C, H, W].

    Args:
        name: of the tower's argument.
        projection: the convolution that cuts them into patches, or the linear that takes patches; None if no single
            module does.
        patch: height and width of a patch, in pixels.
        padding: pixels around a frame.
        channels: C.
    """

    name: str
    projection: nn.Module | None
    patch: Grid
    padding: Grid = (0, 0)
    channels: int = 3

    def grid(self, size: Grid) -> Grid:
        rows, columns = (
            (length + 2 * around) // side for length, around, side in zip(size, self.padding, self.patch, strict=True)
        )
        return rows, columns

    def make(self, tower: nn.Module, size: Grid, changed: Iterable[int] = ()) -> dict[str, Any]:
        """The tower's arguments for a frame of this size in pixels; row-major patches in `changed` differ."""
        frame, others = (_noise(tower, 1, self.channels, *size, seed=seed) for seed in (0, 1))
        for number in changed:
            places = zip(divmod(number, self.grid(size)[1]), self.patch, self.padding, strict=True)
            (top, bottom), (left, right) = (
                (max(place * side - around, 0), place * side - around + side) for place, side, around in places
            )
            frame[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        return {self.name: frame} | without_default(tower)

    def grids(self, arguments: dict[str, Any]) -> list[Grid]:
        frames = arguments[self.name]
        if frames.ndim != 4 or frames.shape[1] != self.channels:
            accepted = f"[S, {self.channels}, H, W]"
            raise ValueError(f"{self.name} has shape {list(frames.shape)}; accepted is {accepted}")
        for name, value in arguments.items():
            if name != self.name and not _says_nothing(name, value, frames.shape):
                raise ValueError(f"{name} is given; accepted is None, as a sparse frame has no place for it")
        return [self.grid(frames.shape[2:])] * len(frames)


class Rows(NamedTuple):
    """Frames as rows of patches, [S, N, values of a patch], padded to the longest if they have positions.

    Args:
        name: of the tower's argument.
        projection: the linear that takes them; None if no single module does.
        patch: height and width of a patch, in pixels.
        values: number of values in a patch.
        positions: the argument with (column, row) of each patch, int [S, N, 2], -1 for padding. "": the first two
            values of a patch are its row and column, from 1, 0 for padding. None: all frames have the grid `own`.
        own: (rows, columns) of patches.
    """

    name: str
    projection: nn.Module | None
    patch: Grid
    values: int
    positions: str | None = None
    own: Grid = (0, 0)

    def grid(self, size: Grid) -> Grid:
        return size[0] // self.patch[0], size[1] // self.patch[1]

    def make(self, tower: nn.Module, size: Grid, changed: Iterable[int] = ()) -> dict[str, Any]:
        """The tower's arguments for a frame of this size in pixels; row-major patches in `changed` differ."""
        rows, columns = self.grid(size)
        frame, others = (_noise(tower, 1, rows * columns, self.values, seed=seed) for seed in (0, 1))
        for number in changed:
            frame[:, number] = others[:, number]
        arguments = {self.name: frame} | without_default(tower)
        places = torch.tensor(list(itertools.product(range(rows), range(columns))), device=frame.device)
        if self.positions == "":
            arguments[self.name] = torch.cat(((places + 1).to(frame.dtype)[None], frame), 2)
        elif self.positions is not None:
            arguments[self.positions] = places.flip(1)[None]
        return arguments

    def places(self, arguments: dict[str, Any]) -> list[torch.Tensor]:
        """(row, column) of the patches of each frame, int64 [N, 2]."""
        if self.positions == "":
            places = arguments[self.name][:, :, :2].long() - 1
        else:
            places = arguments[self.positions].flip(2)
        return [own[(own >= 0).all(1)] for own in places]

    def grids(self, arguments: dict[str, Any]) -> list[Grid]:
        frames = arguments[self.name]
        if self.positions is None:
            count = self.own[0] * self.own[1]
            if frames.ndim != 3 or frames.shape[1] != count:
                accepted = f"[S, {count}, {self.values}]"
                raise ValueError(f"{self.name} has shape {list(frames.shape)}; accepted is {accepted}")
            return [self.own] * len(frames)
        found = []
        for own in self.places(arguments):
            rows, columns = (own.amax(0) + 1).tolist()
            if rows * columns != len(own):
                raise ValueError(
                    f"{self.positions or self.name} holds {len(own)} patches within {rows} rows and {columns} columns; "
                    "accepted is one at each place"
                )
            found.append((rows, columns))
        return found

    def order(self, arguments: dict[str, Any]) -> list[torch.Tensor]:
        grids = zip(self.places(arguments), self.grids(arguments), strict=True)
        return [own[:, 0] * columns + own[:, 1] for own, (_, columns) in grids]


def _says_nothing(name: str, value: Any, shape: torch.Size) -> bool:
    """Whether an argument adds nothing to frames [S, C, H, W]: a switch, their sizes, or a mask that hides nothing."""
    if isinstance(value, torch.Tensor):
        if MASKED in name:
            return False
        if value.dtype == torch.bool or name.endswith("mask"):
            return bool((value != 0).all())
        value = value.tolist()
    if isinstance(value, list | tuple):
        return all(list(size) == list(shape[2:]) if isinstance(size, list | tuple) else False for size in value)
    return True

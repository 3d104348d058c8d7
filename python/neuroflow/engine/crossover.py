"""The crossover: the share of active patches above which a pass is faster dense, measured on this machine."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..adapters.anatomy import Grid
from .passes import Pass, current_pass, within
from .state import StreamState

SHARES = (1 / 8, 1 / 2, 7 / 8)
RUNS = 3  # minimum number of runs of the block at each share


class Size(NamedTuple):
    """What a crossover is measured for: number of frames in a pass, and the grid of the largest."""

    frames: int
    grid: Grid
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        rows, columns = self.grid
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.frames} frame(s) of {rows}x{columns} patches, {dtype} on {self.device}"


def size_of(grids: Sequence[Grid], tokens: torch.Tensor) -> Size:
    """The key for the crossover of a pass."""
    return Size(len(grids), max(grids, key=math.prod), tokens.dtype, tokens.device)


def is_above(
    current: Pass, tokens: torch.Tensor, chosen: Mapping[int, torch.Tensor | None], known: Mapping[Size, float]
) -> bool:
    """Whether the entries of a pass are faster dense than with the patches `chosen` for each (None for all).

    If the crossover is unknown and may matter, `current.unmeasured` is set to the size to measure it for.

    Args:
        current: the pass.
        tokens: in front of the first block.
        chosen: by entry, int32 rows of its patches.
        known: the crossovers measured so far.
    """
    patches = {entry: current.patches[entry] for entry in chosen}
    active = sum(patches[entry] if index is None else index.numel() for entry, index in chosen.items())
    share = active / sum(patches.values())
    if current.plan.config.dense_above is not None:
        return share > current.plan.config.dense_above
    size = size_of(current.grids, tokens)
    if size not in known and share > SHARES[0]:
        current.unmeasured = size
    return share > known.get(size, 1)


@torch.no_grad()
def measure(current: Pass, tokens: torch.Tensor, block: Callable[[torch.Tensor], Any]) -> float:
    """The crossover of passes like `current`, by timing the tower's first block, dense and at each of SHARES.

    Blocks dominate a pass, so this takes less than two thirds of the time of a dense pass with 12 blocks, or half of
    one with more. If blocks differ, as with windows, the first stands for all. It runs on scratch streams and updates
    their caches as a pass would. Work done once per pass, packing and restoring, is divided by the number of blocks.
    Work that dense and partial frames share, projecting, gating and pooling, does not count.

    Args:
        current: the pass; it and its streams stay unchanged.
        tokens: in front of the first block.
        block: the first block, from all or packed tokens to its result.

    Returns:
        0, if dense is faster even at the lowest share, to 1, if it never is.
    """
    plan, arch = current.plan, current.plan.config.arch
    depth = len(plan.anatomy.layers)
    blocks = depth - plan.first_packed if arch == "midlayer" else depth  # between packing and restoring
    generator = torch.Generator().manual_seed(0)
    leading = torch.arange(plan.anatomy.prefix + plan.anatomy.suffix)

    def spread(share: float) -> list[torch.Tensor]:
        """A random share of each frame's patches."""
        rows = []
        for patches in current.patches:
            chosen = torch.randperm(patches, generator=generator)[: max(round(share * patches), 1)].sort().values
            rows.append(torch.cat((leading, chosen + len(leading))).int().to(tokens.device))
        return rows

    def now() -> float:
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)
        return time.perf_counter()

    def seconds(scratch: Pass, active: list[torch.Tensor | None]) -> float:
        """Time of one block, and its share of the work done once."""
        start = now()
        scratch.select(active, tokens)
        scratch.packed = scratch.partial and arch != "mlp"
        packed = scratch.pack(tokens) if scratch.packed else tokens
        begin = now()
        result = block(packed)
        end = now()
        if arch not in ("mlp", "active"):
            scratch.store("output", result[0] if isinstance(result, tuple) else result)
            if scratch.packed:
                scratch.restored("output")
        return end - begin + (begin - start + now() - end) / blocks

    states = [StreamState(state.name) for state in current.states]
    # Dense comes first, to fill the caches that partial frames update.
    choices = [[None] * len(states), *map(spread, SHARES)]
    passes = [(Pass(plan, states, current.grids, current.order, kernels=current.kernels), active) for active in choices]
    times = []
    current.kernels.exploring = False
    try:
        for _ in range(max(depth // 5, RUNS)):
            for scratch, active in passes:
                times.append(within(current_pass, scratch, seconds, scratch, active))
    finally:
        current.kernels.exploring = True
    # Disturbances only make a run slower, so take the minimum.
    dense, *sparse = (min(times[number :: len(passes)]) for number in range(len(passes)))
    return crossing([each / dense for each in sparse])


def crossing(ratios: Sequence[float]) -> float:
    """Where the ratio of sparse to dense time, given at each of SHARES, reaches 1, by linear interpolation.

    Fewer tokens cannot be slower than more: a ratio above that of a larger share is noise, and is replaced by it.
    """
    least = list(itertools.accumulate(reversed(ratios), min))[::-1]
    if least[-1] < 1:
        return 1.0
    above = next(number for number, ratio in enumerate(least) if ratio >= 1)
    if above == 0:
        return 0.0
    (low, high), (below, beyond) = SHARES[above - 1 : above + 1], least[above - 1 : above + 1]
    return low + (high - low) * (1 - below) / (beyond - below)

"""Towers that take images of any size end to end, together with their grids, and separate them by `cu_seqlens`.

Qwen-VL, GLM-V, Kimi and many others are built like this. They are found by the arguments of their modules, and
described by what reaches their blocks when a synthetic frame runs through a shadow of the tower: a copy that shares its
weights, and whose blocks pass on their input.
"""

import functools
import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .anatomy import Anatomy, Grid, dims_of_rows, pack_rows

GRIDS = ("grid_thw", "grid_thws", "image_grid_thw", "image_grid_hw", "target_sizes", "spatial_shapes")
SEGMENTS = "cu_seqlens"
CPU = torch.device("cpu")
GIVEN_MERGE = 2  # in synthetic frames, if it is an argument
# Grids divisible by blocks of up to 4 x 4 patches; the first reveals windows up to 119 patches wide.
LONG, SQUARE = (12, 120), (24, 24)


class _Layout(NamedTuple):
    """How a tower is built, as far as synthetic frames show.

    Args:
        batched: its rows of patches are [1, N, *], not [N, *].
        row: the shape of a row.
        merge: patches come in blocks of merge x merge, one after another.
        side: side of the windows that tokens come in, one after another, in merged patches; None without windows.
        windowed: indices of the blocks that attend within windows only.
        reads: indices of the blocks whose output is read by something else than the next block.
        steps: each time step of a video attends only to itself.
        alike: time steps with the same content are the same to the blocks.
        dimensions: number of dimensions of the tokens.
        rotary: the blocks' argument with a row for each token, if any, and the dimension of the rows in each of its
            tensors.
        projection: the name of the module that maps rows to tokens.
    """

    batched: bool
    row: tuple[int, ...]
    merge: int
    side: int | None
    windowed: frozenset[int]
    reads: tuple[int, ...]
    steps: bool
    alike: bool
    dimensions: int
    rotary: tuple[str, tuple[int | None, ...]] | None
    projection: str | None


_layouts: weakref.WeakKeyDictionary[nn.Module, _Layout] = weakref.WeakKeyDictionary()


def is_ragged(module: nn.Module) -> bool:
    """Whether `module` is such a tower: it takes patches and grids, and has one list of blocks that need `cu_seqlens`.

    A model around a tower takes `input_ids` first, and an audio tower takes no grid.
    """
    names = list(_parameters(type(module)))[1:]
    if not any(name in GRIDS for name in names) or names[0] in (*GRIDS, "input_ids"):
        return False
    lists = _lists(module)
    return len(lists) == 1 and next(_projections(module, lists[0]), None) is not None


def ragged(tower: nn.Module) -> Anatomy:
    """Describe a tower that `is_ragged`.

    An image is a frame, and so is each time step of a video that attends only to itself. The images of a pass lie end
    to end in the output, which does not say where one ends. The embedding is the mean of all merged tokens, [1, D], and
    so a frame's own only if it is alone in its pass.

    Raises:
        TypeError: a tower whose patches cannot be encoded separately, or that is built in an unknown way.
    """
    (layers,) = _lists(tower)
    names = list(_parameters(type(tower)))[1:]
    rows, grid = names[0], _grid_name(tower)
    if tower not in _layouts:
        _layouts[tower] = _layout(tower, layers)
    layout = _layouts[tower]
    attentions = tuple(_attentions(layer)[0] for layer in layers)
    axis, positions = int(layout.batched), ()
    if layout.rotary is not None:
        name, dims = layout.rotary
        positions = ((name, functools.partial(pack_rows, dims)),)

    def merges(arguments: dict[str, Any]) -> list[int]:
        given = arguments.get("merge_sizes")
        return [layout.merge] * len(arguments[grid]) if given is None else given.tolist()

    def sizes(arguments: dict[str, Any]) -> list[tuple[int, int, int]]:
        if not isinstance(arguments.get(grid), torch.Tensor):
            raise ValueError(f"{grid} is a {type(arguments.get(grid)).__name__}; accepted is a tensor")
        return [(1, *size)[-3:] for size in arguments[grid].tolist()]

    def grids(arguments: dict[str, Any]) -> list[Grid]:
        found: list[Grid] = []
        for (times, height, width), merge in zip(sizes(arguments), merges(arguments), strict=True):
            if height % merge or width % merge:
                accepted = f"accepted are rows and columns that are multiples of {merge}"
                raise ValueError(f"{grid} holds {[times, height, width]}; {accepted}")
            if times > 1 and not layout.steps:
                accepted = "accepted is one step in time, as they attend to each other"
                raise ValueError(f"{grid} holds {[times, height, width]}; {accepted}")
            found += [(height, width)] * times
        return found

    def order(arguments: dict[str, Any]) -> list[torch.Tensor]:
        device, inputs = arguments[rows].device, zip(sizes(arguments), merges(arguments), strict=True)
        return [
            token_order((height, width), merge, layout.side, device)
            for (times, height, width), merge in inputs
            for _ in range(times)
        ]

    def part(arguments: dict[str, Any], frames: slice) -> dict[str, Any]:
        counts = [height * width for height, width in grids(arguments)]
        ends = [0, *itertools.accumulate(counts)]
        times = torch.tensor([times for times, _, _ in sizes(arguments)])
        owners = torch.arange(len(times)).repeat_interleave(times)[frames]
        own, times = (each.to(arguments[grid].device) for each in owners.unique_consecutive(return_counts=True))
        start, end = ends[frames.start], ends[frames.stop]
        of_frames = {rows: arguments[rows].narrow(axis, start, end - start)}
        of_frames[grid] = torch.cat((times[:, None].to(arguments[grid].dtype), arguments[grid][own, -2:]), 1)
        of_frames[grid] = of_frames[grid][:, -arguments[grid].shape[1] :]
        if "merge_sizes" in names:
            of_frames["merge_sizes"] = arguments["merge_sizes"][own]
        return of_frames

    def example(differing: Iterable[int]) -> dict[str, Any]:
        # Merging after the blocks may need larger multiples than the order shows. Make more than one window.
        unit = math.lcm(4 * layout.merge, *_merges(tower))
        size = 1 if layout.side is None else layout.side * layout.merge // unit + 1
        made = (size * unit, (size + 1) * unit)
        generator = torch.Generator().manual_seed(0)
        first, other = torch.randn(2, made[0] * made[1], *layout.row, generator=generator)
        here = torch.isin(token_order(made, layout.merge), torch.tensor(list(differing), dtype=torch.long))
        first[here] = other[here]
        return _arguments(tower, first[None] if layout.batched else first, (1, *made))

    return Anatomy(
        tower=tower,
        projection=None if layout.projection is None else tower.get_submodule(layout.projection),
        layers=tuple(layers),
        attentions=attentions,
        mlps=tuple((mlp, mlp) for mlp in map(_mlp, layers)),
        last=layers[-1],
        prefix=0,
        grids=grids,
        embedding=mean_of_merged,
        needs_every_token=True,
        positions=positions,
        order=order,
        times=lambda arguments: [times for times, _, _ in sizes(arguments)],
        part=({rows, grid, "merge_sizes"}, part) if layout.alike else None,
        run_block=functools.partial(_run_block, layout.dimensions),
        products={
            attention: functools.partial(attend_in_windows, layout.merge, layout.side)
            for number, attention in enumerate(attentions)
            if number in layout.windowed
        },
        reads=lambda arguments: layout.reads,
        example=example,
    )


@functools.lru_cache(maxsize=1024)
def _parameters(kind: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(kind.forward).parameters
    except (TypeError, ValueError):
        return {}


def _grid_name(tower: nn.Module) -> str:
    return next(name for name in _parameters(type(tower)) if name in GRIDS)


def _attentions(block: nn.Module) -> list[nn.Module]:
    return [
        part
        for part in block.modules()
        if part is not block
        and SEGMENTS in _parameters(type(part))
        and _parameters(type(part))[SEGMENTS].default is inspect.Parameter.empty
    ]


def _lists(module: nn.Module) -> list[nn.ModuleList]:
    """The lists of blocks in `module` with attention that needs `cu_seqlens`."""
    lists = (part for part in module.modules() if isinstance(part, nn.ModuleList))
    return [blocks for blocks in lists if any(_attentions(block) for block in blocks)]


def _projections(tower: nn.Module, layers: nn.ModuleList) -> Iterator[nn.Module]:
    """Modules that may map rows of patches to tokens: convolutions and linear layers outside the blocks."""
    inside = set(layers.modules())
    for part in tower.modules():
        if part not in inside and isinstance(part, nn.Conv2d | nn.Conv3d | nn.Linear):
            yield part


def _mlp(block: nn.Module) -> nn.Module:
    """The single part of a block, besides its attention, that holds matrices."""
    (attention,) = _attentions(block)
    others = [part for part in block.children() if attention not in set(part.modules())]
    with_matrices = [part for part in others if any(weight.ndim > 1 for weight in part.parameters())]
    if len(with_matrices) != 1:
        raise AttributeError(f"a block has {len(with_matrices)} parts with matrices besides its attention, not one")
    return with_matrices[0]


def _arguments(tower: nn.Module, rows: torch.Tensor, *sizes: tuple[int, int, int]) -> dict[str, Any]:
    """The tower's arguments by name for synthetic rows; `sizes`: (times, rows, columns) of each input."""
    names = list(_parameters(type(tower)))[1:]
    weight = next(_projections(tower, _lists(tower)[0])).weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    grid = _grid_name(tower)
    made = {names[0]: rows.to(weight.device, dtype)}
    made[grid] = torch.tensor(sizes, device=weight.device)[:, (0 if "thw" in grid else 1) :]
    if "merge_sizes" in names:
        made["merge_sizes"] = torch.tensor([GIVEN_MERGE] * len(sizes), device=weight.device)
    return made


class _Watch(TorchFunctionMode):
    """Records which blocks' outputs are read by anything but a block."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[torch.Tensor] = []
        self.calls: list[tuple[torch.Tensor, dict[str, Any]]] = []
        self.reads: set[int] = set()
        self.in_block = False
        self.around: set[nn.Module] = set()

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.in_block and getattr(func, "__name__", "") not in ("__get__", "size", "dim"):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor):
                    self.reads.update(number for number, output in enumerate(self.outputs) if leaf is output)
        return func(*args, **(kwargs or {}))

    def block(self, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """In place of a block's forward."""
        self.in_block = True
        self.calls.append((tokens, kwargs))
        self.outputs.append(tokens.clone())
        self.in_block = False
        return self.outputs[-1]


def _shadow(module: nn.Module, layers: nn.ModuleList, watch: _Watch, copies: dict[int, nn.Module]) -> nn.Module:
    """A copy of `module` that shares its weights, without hooks, with `watch` in place of its blocks."""
    if id(module) in copies:
        return copies[id(module)]
    shadow = copies[id(module)] = type(module).__new__(type(module))
    vars(shadow).update(vars(module))
    for name, value in vars(module).items():
        if "_hooks" in name and isinstance(value, dict):
            vars(shadow)[name] = type(value)()
    if module in set(layers):
        vars(shadow)["forward"] = watch.block
        watch.around.add(shadow)
        return shadow
    if layers in set(module.modules()):
        watch.around.add(shadow)
        vars(shadow).pop("forward", None)  # something may have bound it to `module`
    vars(shadow)["_modules"] = {
        name: None if part is None else _shadow(part, layers, watch, copies) for name, part in module._modules.items()
    }
    return shadow


def _watched(
    tower: nn.Module, layers: nn.ModuleList, rows: torch.Tensor, *sizes: tuple[int, int, int]
) -> tuple[_Watch, str | None]:
    """What reaches the blocks from synthetic rows of patches, and the name of the module that maps these to tokens.

    Args:
        sizes: (times, rows, columns) of each input.
    """
    watch, projected, copies = _Watch(), [], {}
    shadow = _shadow(tower, layers, watch, copies)
    count = sum(times * height * width for times, height, width in sizes)

    def note(name: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if len(args) == 1 and not kwargs and not watch.calls else None
        if all(isinstance(each, torch.Tensor) and each.ndim == 2 and len(each) == count for each in (given, output)):
            projected.append((name, output.shape[1]))

    without_blocks = set(copies.values()) - watch.around
    for name, part in shadow.named_modules():
        if part in without_blocks:
            part.register_forward_hook(functools.partial(note, name), with_kwargs=True)
    with torch.no_grad(), watch:
        shadow(**_arguments(tower, rows, *sizes))
    width = watch.calls[0][0].shape[-1] if watch.calls else None
    return watch, next((name for name, wide in projected if wide == width), None)


def _layout(tower: nn.Module, layers: nn.ModuleList) -> _Layout:
    """What synthetic frames show of a tower.

    Raises:
        TypeError: it cannot be sparse, with the reason.
    """
    without = [number for number, layer in enumerate(layers) if len(_attentions(layer)) != 1]
    if without:
        raise _refusal(tower, f"blocks {without} have no attention that needs {SEGMENTS}, or several of them")
    batched, row, watch, projection = _blank_run(tower, layers)
    count, depth = LONG[0] * LONG[1], len(layers)
    tokens, arguments = watch.calls[0]
    if len(watch.calls) != depth or any(each.shape != tokens.shape for each, _ in watch.calls):
        raise _refusal(tower, "the number of tokens changes between its blocks")
    if any(SEGMENTS not in given for _, given in watch.calls):
        raise _refusal(tower, f"its blocks do not get {SEGMENTS} by name")
    axes = {name: dims_of_rows(value, {count}) for name, value in arguments.items()}
    with_rows = {name: of for name, of in axes.items() if any(axis is not None for axis in of)}
    if len(with_rows) > 1:
        raise _refusal(tower, f"its blocks get rows for each token in several arguments, {list(with_rows)}")
    rotary = next(iter(with_rows.items()), None)

    def blank(*sizes: tuple[int, int, int]) -> _Watch:
        patches = sum(times * height * width for times, height, width in sizes)
        return _watched(tower, layers, torch.zeros(*[1] * batched, patches, *row), *sizes)[0]

    def signals(watch: _Watch) -> list[torch.Tensor]:
        """What tells the blocks where a token is, as rows of tokens."""
        tokens, arguments = watch.calls[0]
        if rotary is None:
            return [tokens.flatten(0, -2)]
        leaves = zip(tree_leaves(arguments[rotary[0]]), rotary[1], strict=True)
        return [leaf.movedim(axis, 0).flatten(1) for leaf, axis in leaves if axis is not None]

    ends = [tuple(given[SEGMENTS].tolist()) for _, given in watch.calls]
    windowed = frozenset(number for number, of in enumerate(ends) if of != (0, count))
    if len({ends[number] for number in windowed}) > 1:
        raise _refusal(tower, "its blocks attend within several kinds of segments")

    marked = torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.5
    rows = torch.zeros(count, *row)
    rows[marked] = torch.nan
    reached = _watched(tower, layers, rows[None] if batched else rows, (1, *LONG))[0].calls[0][0]
    found = reached.isnan().any(-1).flatten().cpu()
    layouts, places = [], signals(blank((1, *SQUARE)))
    for merge in _merges(tower):
        for side in range(1, max(LONG) // merge + 1) if windowed else (None,):
            if side is not None and tuple(_windows(LONG, merge, side)[1].tolist()) != ends[min(windowed)]:
                continue
            patches = torch.empty_like(marked)
            patches[token_order(LONG, merge)] = marked
            order = token_order(LONG, merge, side)
            if torch.equal(patches[order], found):
                square = token_order(SQUARE, merge, side)
                layouts.append((sum(_variation(each, square, SQUARE) for each in places), merge, side))
    if not layouts:
        raise _refusal(tower, "its patches do not reach the blocks one by one in a known order")
    _, merge, side = min(layouts, key=lambda layout: layout[0])

    def are_apart(*sizes: tuple[int, int, int]) -> _Watch | None:
        """What reaches the blocks, if each half attends only to itself."""
        half = SQUARE[0] * SQUARE[1]
        try:
            watch = blank(*sizes)
        except Exception:  # the tower takes only images
            return None
        return watch if all(half in given[SEGMENTS].tolist() for _, given in watch.calls) else None

    if are_apart((1, *SQUARE), (1, *SQUARE)) is None:
        raise _refusal(tower, "the images of a call are not encoded independently")
    video = are_apart((2, *SQUARE))
    return _Layout(
        batched=batched,
        row=row,
        merge=merge,
        side=side,
        windowed=windowed,
        reads=tuple(sorted(watch.reads - {depth - 1})),
        steps=video is not None,
        alike=video is None or all(torch.equal(*each.chunk(2)) for each in signals(video)),
        dimensions=tokens.ndim,
        rotary=rotary,
        projection=None if windowed else projection,
    )


def _blank_run(tower: nn.Module, layers: nn.ModuleList) -> tuple[bool, tuple[int, ...], _Watch, str | None]:
    """The first form of rows that the tower accepts: whether [1, N, *], and *; and the run of blank ones."""
    count, why = LONG[0] * LONG[1], None
    for projection in _projections(tower, layers):
        weight = projection.weight
        rows = [(weight[0].numel(),), tuple(weight.shape[1:])] if weight.ndim > 2 else [(projection.in_features,)]
        for row, batched in itertools.product(rows, (False, True)):
            try:
                watch, name = _watched(tower, layers, torch.zeros(*[1] * batched, count, *row), (1, *LONG))
            except Exception as error:  # the tower takes other rows
                why = error
                continue
            if watch.calls and watch.calls[0][0].shape[:-1].numel() == count:
                return batched, row, watch, name
    reason = "no synthetic frame reaches its blocks with one token for each patch"
    raise _refusal(tower, reason if why is None else f"{reason}; {type(why).__name__}: {why}") from why


def _merges(tower: nn.Module) -> list[int]:
    """Candidates for the side of the blocks that a processor orders patches in: any declared merge size, or 1."""
    if "merge_sizes" in _parameters(type(tower)):
        return [GIVEN_MERGE]
    said = (value for of in (tower, getattr(tower, "config", None)) if of is not None for value in _said(of))
    return sorted({1, *(side for side in said if type(side) is int and side > 0 and not any(n % side for n in LONG))})


def _said(of: Any) -> Iterator[Any]:
    for name, value in vars(of).items():
        if "merge" in name:
            yield from value if isinstance(value, tuple | list) else (value,)


def _refusal(tower: nn.Module, reason: str) -> TypeError:
    return TypeError(f"{type(tower).__name__} cannot be sparse: {reason}")


def _run_block(dimensions: int, forward: Callable, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A block that calls transformers' attention interface once, with all tokens available."""
    ours = tokens[0] if tokens.ndim > dimensions else tokens
    rows = ours.shape[:-1].numel()
    # On the CPU, so that attention splits by it without a sync.
    kwargs[SEGMENTS] = torch.tensor([0, rows], dtype=torch.int32)
    if kwargs.get("max_seqlen") is not None:
        kwargs["max_seqlen"] = rows
    result = forward(ours, *args, **kwargs)
    if ours is tokens:
        return result
    return (result[0][None], *result[1:]) if isinstance(result, tuple) else result[None]


def attend_in_windows(
    merge: int,
    side: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor | None,
    key_rows: torch.Tensor | None,
    grid: Grid,
    scaling: float | None = None,
    mask: None = None,
) -> torch.Tensor:
    """`product` of `attend`: from every query to the keys in its window."""
    starts = _windows(grid, merge, side, query.device)[1]
    own, others = (
        itertools.pairwise((starts if among is None else torch.searchsorted(among, starts)).tolist())
        for among in (rows, key_rows)
    )
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, first:last],
            value[:, :, first:last],
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        for (start, end), (first, last) in zip(own, others, strict=True)
        if start < end
    ]
    return torch.cat(parts, 2).transpose(1, 2)


def mean_of_merged(output: Any) -> torch.Tensor:
    # Up to transformers 4.57: the merged tokens alone, or in front of the deepstack's.
    if isinstance(output, tuple):
        output = output[0]
    if not isinstance(output, torch.Tensor):
        pooled = output.get("pooler_output")
        output = output.last_hidden_state if pooled is None else pooled
    return output.flatten(0, -2).mean(0, keepdim=True)


def _variation(signal: torch.Tensor, order: torch.Tensor, grid: Grid) -> float:
    """How much rows of tokens [N, D], taken in this order, differ between neighbours."""
    picture = torch.view_as_real(signal) if signal.is_complex() else signal
    picture = picture.flatten(1).float().cpu()[order.argsort()].unflatten(0, grid)
    return sum(picture.diff(dim=axis).abs().mean().item() for axis in (0, 1))


@functools.lru_cache
def token_order(grid: Grid, merge: int, side: int | None = None, device: torch.device = CPU) -> torch.Tensor:
    """The row-major patch at each token: block by block of merge x merge, and window by window of those."""
    rows, columns = grid
    patches = torch.arange(rows * columns, device=device).view(rows // merge, merge, columns // merge, merge)
    patches = patches.transpose(1, 2).reshape(-1, merge * merge)
    return (patches if side is None else patches[_windows(grid, merge, side, device)[0]]).flatten()


@functools.lru_cache
def _windows(grid: Grid, merge: int, side: int, device: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged patches window by window, and the number of patches before each window and after the last, int32.

    Windows are side x side merged patches, smaller at the right and lower edges.
    """
    rows, columns = (torch.arange(length // merge, device=device) // side for length in grid)
    window = (rows[:, None] * len(columns) + columns).flatten()
    sizes = window.unique(return_counts=True)[1] * merge * merge
    return window.argsort(stable=True), F.pad(sizes.cumsum(0), (1, 0)).int()

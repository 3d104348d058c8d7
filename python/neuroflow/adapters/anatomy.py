import dataclasses
import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

Grid = tuple[int, int]


def _none(arguments: dict[str, Any]) -> Iterable[int]:
    return ()


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """The parts of one vision tower, found in a model's structure and never replaced.

    Args:
        tower: the module that takes a batch of frames as the first argument of its `entries`.
        projection: maps pixels to one vector a patch, before the positional embedding: [S, D, rows, columns],
            [S, D, times, rows, columns], [S, N, D], or [N of all frames, D]. None: the gate sees the tokens in front of
            the first block instead.
        layers: the blocks, in order; each maps tokens to tokens as its first argument and result.
        attentions: of each block, the module that calls transformers' attention interface, or that `attention` stands
            in for.
        mlps: of each block, where its MLP begins and ends: the MLP itself twice, or its first and last linear.
        last: the last module through which every token goes by itself: the final norm, or else the last block.
        prefix: how many tokens before the patches are no patches (CLS, registers).
        grids: the tower's arguments by name, defaults too -> (rows, columns) of patches of each frame; raises
            ValueError for arguments that a sparse frame cannot honour.
        embedding: the model's output -> the frame's embedding [S, D].
        pool: module and method that make the pooled output of all tokens [S, T, D]; None where there is no such thing,
            or the first token is it.
        needs_every_token: the tower goes on with a map of all patches, so that architecture B has no meaning.
        entries: methods of the tower that take frames; the outermost one called is the pass.
        tables: modules and methods whose result depends on nothing but weights and the shapes of the arguments, such
            as positions interpolated to a size; it is kept.
        positions: arguments of the blocks that hold something of each token, as rotary positions, and for each a
            function (its value, take) -> the value for packed tokens, where take(tensor [tokens, *], fill) gives the
            rows of packed tokens; `fill` is what a tensor without rows for the prefix has there. take(None, fill) gives
            their numbers instead, int32 [M], for blocks that count where all tokens come.
        attention: (module, attend, the forward's own arguments) -> what the forward of one of `attentions` returns,
            for towers that do not call transformers' attention interface. `attend` is `engine.attention.attend` without
            its first two arguments.
        order: the tower's arguments by name -> of each frame, the row-major patch at each of its tokens, int64 [N];
            None where tokens are in row-major order.
        times: the tower's arguments by name -> of each of its inputs, how many frames that holds, where a video is one
            input; None: one each.
        part: names of the tower's arguments that are tensors of all frames, and a function (arguments by name, some
            of the frames in turn) -> those of these frames; None: tensors with a row for each frame.
        overrides: (module, method, function that takes the original first), in force while the tower runs.
        run_block: (a block's forward, its tokens, its other arguments) -> what that returns, for blocks that cannot be
            called with packed tokens as with all.
        products: of attentions that call transformers' interface, those in which not simply every query meets every
            key -> `product` of `engine.attention.attend`, which takes `scaling` and the attention's `mask` too.
        reads: the tower's arguments by name -> numbers of the blocks whose output the tower needs of all patches, for
            feature maps and the like; hidden states that are asked for by `output_hidden_states` come by themselves.
        example: numbers of row-major patches -> the tower's arguments by name for a made frame, in which those patches
            differ from the frame of no numbers. What has one was found by structure, and is proven when patched.
        suffix: how many tokens after the patches are no patches.
    """

    tower: nn.Module
    projection: nn.Module | None
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    mlps: tuple[tuple[nn.Module, nn.Module], ...]
    last: nn.Module
    prefix: int
    grids: Callable[[dict[str, Any]], list[Grid]]
    embedding: Callable[[Any], torch.Tensor]
    pool: tuple[nn.Module, str] | None = None
    needs_every_token: bool = False
    entries: tuple[str, ...] = ("forward",)
    tables: tuple[tuple[nn.Module, str], ...] = ()
    positions: tuple[tuple[str, Callable[[Any, Callable], Any]], ...] = ()
    attention: Callable | None = None
    order: Callable[[dict[str, Any]], list[torch.Tensor]] | None = None
    times: Callable[[dict[str, Any]], list[int]] | None = None
    part: tuple[set[str], Callable[[dict[str, Any], slice], dict[str, Any]]] | None = None
    overrides: tuple[tuple[nn.Module, str, Callable], ...] = ()
    run_block: Callable | None = None
    products: Mapping[nn.Module, Callable] = dataclasses.field(default_factory=dict)
    reads: Callable[[dict[str, Any]], Iterable[int]] = _none
    example: Callable[[Iterable[int]], dict[str, Any]] | None = None
    suffix: int = 0


def convolution_of(projection: nn.Module) -> nn.Module:
    """The convolution that maps patches: `projection` itself, or what an adapter of its weights has wrapped."""
    convolutions = (part for part in projection.modules() if isinstance(part, nn.Conv2d | nn.Conv3d))
    return next(convolutions, projection)


def is_patch_projection(module: nn.Module) -> bool:
    """Whether `module` is a convolution over windows that tile the image or clip, and so a matrix product of each."""
    return (
        isinstance(module, nn.Conv2d | nn.Conv3d)
        and module.stride == module.kernel_size
        and module.padding in ("valid", (0, 0), (0, 0, 0))
        and set(module.dilation) == {1}
        and module.groups == 1
    )


def is_ordinary(weight: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether a kernel can read `weight` beside `like`: a plain tensor of the same dtype, whose memory is there.

    Those that are offloaded, sharded or quantized are others.
    """
    return (
        type(weight) in (nn.Parameter, torch.Tensor)
        and weight.dtype == like.dtype
        and weight.device == like.device
        and weight.layout == torch.strided
        and weight.data_ptr() != 0
    )


def is_foldable(head: nn.Module) -> bool:
    """Whether `head` pools as SigLIP's does, by one learned probe that attends to all tokens."""
    return hasattr(head, "probe") and isinstance(getattr(head, "attention", None), nn.MultiheadAttention)


def grids_of_images(projection: nn.Module, *refused: str) -> Callable[[dict[str, Any]], list[Grid]]:
    """`Anatomy.grids` of towers whose first argument holds frames [S, C, H, W], which a convolution maps to patches.

    Args:
        refused: other arguments of the tower that a sparse frame has no place for.
    """

    convolution = convolution_of(projection)

    def grids(arguments: dict[str, Any]) -> list[Grid]:
        refuse(arguments, *refused)
        name, pixels = next(iter(arguments.items()))
        if pixels.ndim != 4:
            accepted = f"[S, {convolution.in_channels}, H, W]"
            raise ValueError(f"{name} has shape {list(pixels.shape)}; accepted is {accepted}")
        padding = (0, 0) if convolution.padding == "valid" else convolution.padding
        sides = zip(pixels.shape[2:], padding, convolution.kernel_size, convolution.stride, strict=True)
        rows, columns = ((length + 2 * around - kernel) // stride + 1 for length, around, kernel, stride in sides)
        return [(rows, columns)] * pixels.shape[0]

    return grids


def with_stages(anatomy: Anatomy) -> Anatomy:
    """The same tower; where it is a backbone of transformers, with the blocks whose outputs are its stages.

    What comes after a block, as the norm of each stage, sees all of its tokens.
    """
    tower = anatomy.tower
    if not hasattr(tower, "out_features"):
        return anatomy

    def reads(arguments: dict[str, Any]) -> Iterable[int]:
        return [number - 1 for number, name in enumerate(tower.stage_names) if number and name in tower.out_features]

    def embedding(output: Any) -> torch.Tensor:
        return mean_of_last(output.feature_maps)

    return dataclasses.replace(
        anatomy, last=anatomy.layers[-1], embedding=embedding, needs_every_token=True, reads=reads
    )


def mean_of_last(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of the last of some feature maps, [S, D, rows, columns] or [S, T, D]."""
    return maps[-1].mean((2, 3)) if maps[-1].ndim == 4 else maps[-1].mean(1)


def by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments of a call by name, defaults and those behind ** too."""
    complete = inspect.BoundArguments(bound.signature, bound.arguments.copy())
    complete.apply_defaults()
    rest = next((each for each in bound.signature.parameters.values() if each.kind is each.VAR_KEYWORD), None)
    return complete.arguments | ({} if rest is None else complete.arguments[rest.name])


def interpolation(tower: nn.Module, pixels: torch.Tensor) -> dict[str, bool]:
    """The argument that `tower` needs to take frames [S, 3, H, W] of another size than its own, where it has one."""
    if "interpolate_pos_encoding" not in inspect.signature(type(tower).forward).parameters:
        return {}
    own = tower.config.image_size
    return {"interpolate_pos_encoding": list(pixels.shape[2:]) != ([own, own] if isinstance(own, int) else list(own))}


def refuse(arguments: dict[str, Any], *names: str) -> None:
    """Raise for those of the arguments `names` that are given, as a sparse frame has no place for them."""
    for name in names:
        if arguments.get(name) is not None:
            raise ValueError(f"{name} is given; accepted is None, as a sparse frame has no place for it")


def is_in(name: str, outer: str) -> bool:
    """Whether the module `name` is the module `outer` or a part of it."""
    return f"{name}.".startswith(f"{outer}.") if outer else True


def dims_of_rows(value: Any, lengths: Container[int]) -> tuple[int | None, ...]:
    """Of each leaf of a block's argument, the dimension along which it has rows for tokens, whose length is given."""
    return tuple(
        next((dim for dim, length in enumerate(leaf.shape) if length in lengths), None)
        if isinstance(leaf, torch.Tensor)
        else None
        for leaf in tree_leaves(value)
    )


def pack_rows(dims: tuple[int | None, ...], value: Any, take: Callable) -> Any:
    """`Anatomy.positions` of an argument whose leaves have rows for tokens along `dims`.

    What comes before the tokens in dimension 1 are frames, which packed are one.
    """
    if value is None:  # as some blocks take
        return None
    leaves, spec = tree_flatten(value)
    for number, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
        fill = 1.0 - number  # a cosine, and a sine, of what is not turned
        if dim == 1:
            leaves[number] = take(leaf.flatten(0, 1), fill)[None]
        elif dim is not None:
            leaves[number] = take(leaf.movedim(dim, 0), fill).movedim(0, dim)
    return tree_unflatten(leaves, spec)


def cos_and_sin(value: tuple[torch.Tensor, torch.Tensor], take: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """`Anatomy.positions` of towers that hand (cos, sin) to their blocks: what has no position is not turned."""
    return pack_rows((0, 0), value, take)

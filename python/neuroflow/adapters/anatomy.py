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
    """The parts of one vision tower. They are found in the model and never replaced.

    Needed only for an adapter of your own; see `register_adapter`. "Arguments" are the tower's, by name, defaults
    included. S is the number of frames, T of tokens, N of patches.

    Args:
        tower: module whose `entries` take a batch of frames as their first argument.
        projection: module that maps pixels to one vector per patch, before the positional embedding: [S, D, rows,
            columns], [S, D, times, rows, columns], [S, N, D], or [N of all frames, D]. None: the gate reads the tokens
            in front of the first block.
        layers: the blocks, in order. Tokens are the first argument and the (first) result of each.
        attentions: for each block, the module that calls transformers' attention interface, or that `attention`
            replaces.
        mlps: for each block, the first and the last module of its MLP: its first and last linear, or the MLP itself
            twice.
        last: last module that maps each token on its own: the final norm, or else the last block.
        prefix: number of tokens in front of the patches that are not patches (CLS, registers).
        grids: function (arguments) -> (rows, columns) of patches of each frame. Raises ValueError for arguments that a
            sparse frame does not support.
        embedding: function (the model's output) -> the embedding of each frame, [S, D].
        pool: (module, method) that makes the pooled output from all tokens [S, T, D]. None if there is none, or if it
            is the first token.
        needs_every_token: the tower continues with a map of all patches, so architecture B does not apply.
        entries: methods of the tower that take frames. The outermost one called is the pass.
        tables: (module, method) pairs whose result depends only on weights and argument shapes, such as positions
            interpolated to a size; the result is cached.
        positions: (name, function) for each argument of the blocks with one value per token, such as rotary positions.
            The function (value, take) returns the value for the packed tokens: take(tensor [tokens, *], fill) gives
            their rows, with `fill` for the prefix if the tensor has no rows for it; take(None, fill) gives their
            indices, int32 [M].
        attention: function (module, attend, *the forward's arguments) -> what the forward of one of `attentions`
            returns, for towers that do not call transformers' attention interface. `attend` is
            `engine.attention.attend` with its first two arguments bound.
        order: function (arguments) -> for each frame, the row-major patch index at each token, int64 [N]. None if
            tokens are in row-major order.
        times: function (arguments) -> number of frames in each input, where an input is a video. None: one each.
        part: (names of arguments that are tensors over all frames, function (arguments, slice of frames) -> their
            values for these frames). None: tensors have one row per frame.
        overrides: (module, method, function) in force while the tower runs; the function takes the original first.
        run_block: function (a block's forward, tokens, other arguments) -> its result, for blocks that cannot be called
            with packed tokens directly.
        products: for attentions that call transformers' interface but in which not every query sees every key: module
            -> `product` of `engine.attention.attend`, which also takes `scaling` and the attention's `mask`.
        reads: function (arguments) -> indices of the blocks whose output the tower needs for all patches, as for
            feature maps. Hidden states asked for by `output_hidden_states` need no entry.
        example: function (row-major patch indices) -> arguments for a synthetic frame that differs in these patches
            from the one without indices. A tower that has it was found by its structure, and is verified when patched.
        suffix: number of tokens behind the patches that are not patches.

    Example:
        >>> import dataclasses
        >>> anatomy = neuroflow.describe(model)
        >>> anatomy.pool[1]
        'forward'
        >>> without_pool = dataclasses.replace(anatomy, pool=None)
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
    """The convolution that projects patches: `projection` itself, or the one that a weight adapter wraps."""
    convolutions = (part for part in projection.modules() if isinstance(part, nn.Conv2d | nn.Conv3d))
    return next(convolutions, projection)


def is_patch_projection(module: nn.Module) -> bool:
    """Whether `module` is a convolution whose windows tile the image or clip: a matrix product per patch."""
    return (
        isinstance(module, nn.Conv2d | nn.Conv3d)
        and module.stride == module.kernel_size
        and module.padding in ("valid", (0, 0), (0, 0, 0))
        and set(module.dilation) == {1}
        and module.groups == 1
    )


def is_ordinary(weight: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether a kernel can read `weight` together with `like`: a plain tensor of the same dtype and device, in memory.

    Offloaded, sharded and quantized tensors are not.
    """
    return (
        type(weight) in (nn.Parameter, torch.Tensor)
        and weight.dtype == like.dtype
        and weight.device == like.device
        and weight.layout == torch.strided
        and weight.data_ptr() != 0
    )


def is_foldable(head: nn.Module) -> bool:
    """Whether `head` pools like SigLIP's: one learned probe that attends to all tokens."""
    return hasattr(head, "probe") and isinstance(getattr(head, "attention", None), nn.MultiheadAttention)


def grids_of_images(projection: nn.Module, *refused: str) -> Callable[[dict[str, Any]], list[Grid]]:
    """`Anatomy.grids` for towers whose first argument holds frames [S, C, H, W] that a convolution maps to patches.

    Args:
        refused: other arguments of the tower that a sparse frame does not support.
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
    """For a transformers backbone, the anatomy with the blocks whose outputs are its stages; otherwise unchanged.

    What follows a block, such as the norm of each stage, sees all of its tokens.
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
    """Mean of the last feature map, [S, D, rows, columns] or [S, T, D]."""
    return maps[-1].mean((2, 3)) if maps[-1].ndim == 4 else maps[-1].mean(1)


def by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments of a call by name, including defaults and **kwargs."""
    complete = inspect.BoundArguments(bound.signature, bound.arguments.copy())
    complete.apply_defaults()
    rest = next((each for each in bound.signature.parameters.values() if each.kind is each.VAR_KEYWORD), None)
    return complete.arguments | ({} if rest is None else complete.arguments[rest.name])


def interpolation(tower: nn.Module, pixels: torch.Tensor) -> dict[str, bool]:
    """The argument `tower` needs to take frames [S, 3, H, W] of another size than its own, if it has one."""
    if "interpolate_pos_encoding" not in inspect.signature(type(tower).forward).parameters:
        return {}
    own = tower.config.image_size
    return {"interpolate_pos_encoding": list(pixels.shape[2:]) != ([own, own] if isinstance(own, int) else list(own))}


def refuse(arguments: dict[str, Any], *names: str) -> None:
    """Raise for arguments in `names` that are given, since a sparse frame does not support them."""
    for name in names:
        if arguments.get(name) is not None:
            raise ValueError(f"{name} is given; accepted is None, as a sparse frame has no place for it")


def is_in(name: str, outer: str) -> bool:
    """Whether the module `name` is the module `outer` or a part of it."""
    return f"{name}.".startswith(f"{outer}.") if outer else True


def dims_of_rows(value: Any, lengths: Container[int]) -> tuple[int | None, ...]:
    """For each leaf of a block's argument, the dimension with a row per token, found by its length; None if none."""
    return tuple(
        next((dim for dim, length in enumerate(leaf.shape) if length in lengths), None)
        if isinstance(leaf, torch.Tensor)
        else None
        for leaf in tree_leaves(value)
    )


def pack_rows(dims: tuple[int | None, ...], value: Any, take: Callable) -> Any:
    """`Anatomy.positions` for an argument whose leaves have a row per token along `dims`.

    If tokens are in dimension 1, the dimension in front of them is frames, which are packed into one.
    """
    if value is None:  # which some blocks accept
        return None
    leaves, spec = tree_flatten(value)
    for number, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
        fill = 1.0 - number  # cosine and sine of no rotation
        if dim == 1:
            leaves[number] = take(leaf.flatten(0, 1), fill)[None]
        elif dim is not None:
            leaves[number] = take(leaf.movedim(dim, 0), fill).movedim(0, dim)
    return tree_unflatten(leaves, spec)


def cos_and_sin(value: tuple[torch.Tensor, torch.Tensor], take: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """`Anatomy.positions` for towers that pass (cos, sin) to their blocks; tokens without a position do not rotate."""
    return pack_rows((0, 0), value, take)

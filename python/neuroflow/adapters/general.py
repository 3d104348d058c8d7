"""Any plain ViT, found by its structure: a convolution over patches, and a list of like blocks with attention.

What a class is called is never asked. How the parts work together is seen from one pass of a made frame, and proven
when the tower is patched.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .anatomy import Anatomy, Grid, grids_of_images, is_patch_projection, mean_of_last
from .tracing import PRODUCTS, Call, Trace, Unsuitable, first_tokens, in_evaluation, made_frame, trace

MOST_TOKENS = 1024  # of a made frame, where the tower takes any; more than any window that blocks attend within
MOST_REGISTERS = 16
BLOCKS = (nn.ModuleList, nn.Sequential)


def towers_by_structure(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that look like plain ViTs, by their names in it: the smallest around a list of blocks and
    a projection of patches.
    """
    modules = dict(model.named_modules())
    projections = [name for name, module in modules.items() if is_patch_projection(module) and module.in_channels == 3]
    found = {}
    for name, blocks in modules.items():
        if not _are_blocks(blocks):
            continue
        around = name
        while around:
            around = around.rpartition(".")[0]
            if any(_is_inside(each, around) and not _is_inside(each, name) for each in projections):
                found[around] = modules[around]
                break
    return {
        name: module
        for name, module in found.items()
        if not any(other != name and _is_inside(other, name) for other in found)
    }


def _is_inside(name: str, outer: str) -> bool:
    return f"{name}.".startswith(f"{outer}.") if outer else True


def _are_blocks(module: nn.Module) -> bool:
    """Whether `module` is a list of like modules, each of which has linears enough for attention and an MLP."""
    return (
        isinstance(module, BLOCKS)
        and len(module) > 1
        and len({type(block) for block in module}) == 1
        and sum(isinstance(part, nn.Linear) for part in module[0].modules()) > 2
    )


def general(tower: nn.Module) -> Anatomy:
    """What one pass of a made frame shows of a tower, [S, 3, H, W] -> anything.

    Raises:
        TypeError: it is no plain ViT, or one that does something a sparse frame has no place for.
    """
    try:
        return _anatomy(tower)
    except Unsuitable as reason:
        raise TypeError(
            f"{type(tower).__name__} was found by its structure, and cannot be patched: {reason}. "
            "neuroflow.register_adapter takes an anatomy written by hand"
        ) from None


def _anatomy(tower: nn.Module) -> Anatomy:
    lists = [module for module in tower.modules() if _are_blocks(module)]
    lists = [blocks for blocks in lists if not any(blocks in other.modules() for other in lists if other is not blocks)]
    if len(lists) != 1:
        raise Unsuitable(f"it has {len(lists)} lists of blocks, as those that merge patches between stages")
    (blocks,) = lists
    projections = [
        module for module in tower.modules() if is_patch_projection(module) and module.in_channels == 3
    ]
    if len(projections) != 1:
        raise Unsuitable(f"it has {len(projections)} convolutions over patches")
    (projection,) = projections
    with in_evaluation(tower):
        seen = _seen(tower, blocks, projection)
        prefix = _prefix(tower, blocks, projection, seen)
    calls = seen.attentions
    name = next(iter(inspect.signature(tower.forward).parameters))
    return Anatomy(
        tower=tower,
        projection=projection,
        layers=tuple(blocks),
        attentions=tuple(call.module for call in calls),
        mlps=tuple((mlp, mlp) for mlp in seen.mlps),
        last=blocks[-1],
        prefix=prefix,
        grids=_grids(name, projection),
        embedding=functools.partial(_embedding, prefix),
        needs_every_token=True,
        rotary=_positions(seen, prefix),
        attention=None if calls[0].kind == "interface" else _attention({call.module: call for call in calls}),
        reads=lambda arguments: seen.reads,
        example=lambda changed: {name: _example(seen.frame, projection.kernel_size, changed)},
    )


def _example(frame: torch.Tensor, patch: Grid, changed: Iterable[int]) -> torch.Tensor:
    """`frame` with other pixels in some of its patches."""
    frame, columns = frame.clone(), frame.shape[3] // patch[1]
    generator = torch.Generator().manual_seed(1)
    for number in changed:
        row, column = number // columns * patch[0], number % columns * patch[1]
        window = frame[:, :, row : row + patch[0], column : column + patch[1]]
        window.copy_(torch.randn(window.shape, generator=generator))
    return frame


def _seen(tower: nn.Module, blocks: nn.ModuleList, projection: nn.Module) -> Trace:
    """The pass of a frame of the first size that the tower takes."""
    refused = None
    for size in _sizes(tower, projection.kernel_size):
        frame = made_frame(tower, size)
        try:
            return trace(tower, blocks, frame)
        except Unsuitable:
            raise
        except Exception as error:  # whatever a model raises for another size than its own
            refused = refused or f"it does not take frames [1, 3, {size[0]}, {size[1]}] alone ({error!s:.200})"
    raise Unsuitable(refused)


def _sizes(tower: nn.Module, patch: Grid) -> Iterator[tuple[int, int]]:
    """Heights and widths of frames that the tower may take, the likeliest first."""
    own = _own_sizes(tower)
    small = [size for size in own if size[0] // patch[0] * (size[1] // patch[1]) <= MOST_TOKENS]
    usual = (32 * patch[0], 24 * patch[1])
    counts = {
        length - others
        for tensor in itertools.chain(tower.parameters(), tower.buffers())
        for length in tensor.shape[:-1]
        for others in range(MOST_REGISTERS)
    }
    squares = sorted({math.isqrt(count) for count in counts if count > 3 and math.isqrt(count) ** 2 == count})
    squares = [(side * patch[0], side * patch[1]) for side in reversed(squares) if side * side <= MOST_TOKENS]
    yield from dict.fromkeys([*small, *([] if small else [usual]), *own, *squares, usual])


def _own_sizes(tower: nn.Module) -> list[tuple[int, int]]:
    """Sizes of images that the tower and its parts name as their own."""
    sizes = []
    for module in tower.modules():
        for holder in (getattr(module, "config", None), module):
            for name in ("image_size", "img_size", "input_size", "input_resolution"):
                size = getattr(holder, name, None)
                size = (size, size) if isinstance(size, int) else size
                if isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(each, int) for each in size):
                    sizes.append(tuple(size))
    return list(dict.fromkeys(sizes))


def _prefix(tower: nn.Module, blocks: nn.ModuleList, projection: nn.Module, seen: Trace) -> int:
    """How many tokens come before the patches, which lie in row-major order."""
    rows, columns = (length // side for length, side in zip(seen.frame.shape[2:], projection.kernel_size, strict=True))
    tokens = seen.tokens.flatten(0, -2)
    prefix = len(tokens) - rows * columns
    if prefix < 0:
        raise Unsuitable(f"{rows * columns} patches are {len(tokens)} tokens in front of its blocks")
    for patch in (rows * columns - 1, rows * columns // 2 + 1, 0):
        other = first_tokens(tower, blocks, _example(seen.frame, projection.kernel_size, [patch]))
        moved = (other.flatten(0, -2) != tokens).any(1).nonzero()[:, 0].tolist()
        if moved != [prefix + patch]:
            raise Unsuitable(
                f"patch {patch} of {rows * columns} moves the tokens {moved[:4]} of {len(tokens)} in front of its "
                f"blocks, not {prefix + patch} alone"
            )
    return prefix


def _grids(frames: str, projection: nn.Module) -> Callable[[dict[str, Any]], list[Grid]]:
    of_images = grids_of_images(projection)

    def grids(arguments: dict[str, Any]) -> list[Grid]:
        sizes = of_images(arguments)
        for name, value in arguments.items():
            if name != frames and not _is_harmless(name, value, arguments[frames].shape):
                raise ValueError(f"{name} is given; accepted is None, as a sparse frame has no place for it")
        return sizes

    return grids


def _is_harmless(name: str, value: Any, shape: torch.Size) -> bool:
    """Whether an argument of a tower says nothing beyond its frames [S, 3, H, W]: a switch, a mask of nothing, or the
    frames' sizes.
    """
    if isinstance(value, torch.Tensor):
        if "masked" in name:
            return False
        if value.dtype == torch.bool or name.endswith("mask"):
            return bool((value != 0).all())
        value = value.tolist()
    if isinstance(value, list | tuple):
        return all(list(size) == list(shape[2:]) if isinstance(size, list | tuple) else False for size in value)
    return True


def _embedding(prefix: int, output: Any) -> torch.Tensor:
    if not isinstance(output, torch.Tensor):
        if isinstance(output, tuple | list):
            output = output[0]
        elif "feature_maps" in output:
            return mean_of_last(output.feature_maps)
        else:
            names = ("image_embeds", "pooler_output", "logits", "last_hidden_state")
            output = next(output[name] for name in names if output.get(name) is not None)
    if output.ndim == 4:
        return output.mean((2, 3))
    if output.ndim == 3:
        return output[:, 0] if prefix else output.mean(1)
    return output


def _positions(seen: Trace, prefix: int) -> tuple[str, Callable[[Any, Callable], Any]] | None:
    """`Anatomy.rotary` for the argument of the blocks that holds something of each token."""
    tokens = seen.tokens.shape[1:-1].numel()
    found = {}
    for name, value in seen.arguments.items():
        leaves = tree_flatten(value)[0]
        dims = [_dim_of_tokens(leaf, {tokens, tokens - prefix}) for leaf in leaves]
        if any(dim is not None for dim in dims):
            found[name] = dims, [leaf.shape[dim] for leaf, dim in zip(leaves, dims, strict=True) if dim is not None]
    if not found:
        return None
    if len(found) > 1:
        raise Unsuitable(f"its blocks take something of each token in {', '.join(found)}; one is accepted")
    ((name, (dims, lengths)),) = found.items()
    if prefix and tokens - prefix in lengths and not (isinstance(seen.arguments[name], tuple) and len(dims) == 2):
        raise Unsuitable(f"{name} of its blocks has no rows for the {prefix} tokens before the patches")

    def pack(value: Any, take: Callable) -> Any:
        leaves, spec = tree_flatten(value)
        packed = [
            leaf if dim is None else _packed(leaf, dim, functools.partial(take, fill=1.0 - number))
            for number, (leaf, dim) in enumerate(zip(leaves, dims, strict=True))  # cos and sin of what is not turned
        ]
        return tree_unflatten(packed, spec)

    return name, pack


def _dim_of_tokens(leaf: Any, lengths: set[int]) -> int | None:
    """The dimension of a block's argument along which it has a row for each token; None for masks, and what has none."""
    if not isinstance(leaf, torch.Tensor):
        return None
    dims = [dim for dim, length in enumerate(leaf.shape) if length in lengths]
    if len(dims) > 1 and dims[-1] == leaf.ndim - 1 and dims[-2] == leaf.ndim - 2:
        return None
    return dims[0] if dims else None


def _packed(table: torch.Tensor, dim: int, take: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The rows of `table` along `dim` for packed tokens; a dimension of frames before it becomes 1."""
    if dim == 1:
        return take(table.flatten(0, 1))[None]
    return take(table.movedim(dim, 0)).movedim(0, dim)


def _attention(calls: dict[nn.Module, Call]) -> Callable:
    """`Anatomy.attention` of modules that attend by torch's functions: theirs run, and what they attend by does not."""

    def attention(module: nn.Module, attend: Callable, *args: Any, **kwargs: Any) -> Any:
        if calls[module].kind == "multihead":
            return _multihead(module, attend, *args, **kwargs)
        with _Attends(attend, calls[module]):
            return type(module).forward(module, *args, **kwargs)

    return attention


class _Attends(TorchFunctionMode):
    """Within one attention module, `attend` in the place of torch's attention, or of the products that make it."""

    def __init__(self, attend: Callable, call: Call) -> None:
        super().__init__()
        self.attend, self.call = attend, call
        self.scores: tuple[torch.Tensor, torch.Tensor] | None = None  # queries, and keys by column

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            bound = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            scale = bound.get("scale") or bound["query"].shape[-1] ** -0.5
            return self.attended(bound["query"], bound["key"], bound["value"], scale)
        if self.call.kind == "products" and func in PRODUCTS:
            if self.scores is not None:
                return self.attended(self.scores[0], self.scores[1].mT, args[1], self.call.scale)
            self.scores = query, keys = args
            return query.new_zeros(*query.shape[:-1], keys.shape[-1])  # nobody reads what comes of it
        return func(*args, **kwargs)

    def attended(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Heads as they come, [S, heads, T, head_dim] or [S * heads, T, head_dim]."""
        heads = [each if each.ndim == 4 else each.unflatten(0, (-1, self.call.heads)) for each in (query, key, value)]
        outputs = self.attend(*heads, None, scaling=scale)[0].transpose(1, 2)
        return outputs if query.ndim == 4 else outputs.flatten(0, 1)


def _multihead(
    module: nn.MultiheadAttention,
    attend: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """nn.MultiheadAttention of tokens [S, T, D] to themselves."""
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    heads = [
        F.linear(tokens, weight, bias).unflatten(2, (module.num_heads, -1)).transpose(1, 2)
        for tokens, weight, bias in zip((query, key, value), weights, biases, strict=True)
    ]
    outputs, _ = attend(*heads, None, scaling=module.head_dim**-0.5)
    out_proj = module.out_proj
    return F.linear(outputs.flatten(2), out_proj.weight, out_proj.bias), None

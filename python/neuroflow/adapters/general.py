"""Any plain ViT, found by its structure: a convolution over patches, and a list of similar blocks with attention.

Class names do not matter. How the parts work together is observed in one pass of a synthetic frame, and verified when
the tower is patched.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .anatomy import Anatomy, Grid, dims_of_rows, is_in, pack_rows
from .frames import Images, Rows, first_argument
from .tracing import PRODUCTS, Call, Trace, Unsuitable, first_tokens, in_evaluation, trace

MOST_TOKENS = 1024  # in a synthetic frame of free size; more than any window that blocks attend within
MOST_REGISTERS = 16
USUAL = (36, 24)  # rows and columns of patches
POSITIONS = ("pixel_position_ids", "image_position_ids")


def towers_by_structure(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that look like plain ViTs, by name.

    Each is the smallest module around a list of blocks that cuts frames into patches.
    """
    modules, found = dict(model.named_modules()), {}
    for name, blocks in modules.items():
        around = name if _are_blocks(blocks) else ""
        while around:
            around = around.rpartition(".")[0]
            if _forms(modules[around], blocks):
                found[around] = modules[around]
                break
    return {
        name: module
        for name, module in found.items()
        if not any(other != name and is_in(other, name) for other in found)
    }


def _are_blocks(module: nn.Module) -> bool:
    """Whether `module` is a list of modules of one class, each with enough linears for attention and an MLP."""
    return (
        isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len({type(block) for block in module}) == 1
        and sum(isinstance(part, nn.Linear) for part in module[0].modules()) > 2
    )


def _forms(tower: nn.Module, blocks: nn.Module) -> list[Images | Rows]:
    """How `tower` may take frames: cut by a convolution outside its `blocks`, or in patches of its config's size."""
    name, inside = first_argument(tower), set(blocks.modules())
    for module in tower.modules():
        if isinstance(module, nn.Conv2d) and module not in inside and module.in_channels < 5:
            size, padding = module.kernel_size, module.padding
            if module.stride == size and min(size) > 1 and module.groups == 1 and set(module.dilation) == {1}:
                return [Images(name, module, size, (0, 0) if padding == "valid" else padding, module.in_channels)]
    config = getattr(tower, "config", None)
    linears = {
        module.in_features: module
        for module in tower.modules()
        if isinstance(module, nn.Linear) and module not in inside
    }
    if name == "flattened_patches" and hasattr(config, "patch_embed_hidden_size"):
        values = config.patch_embed_hidden_size
        return [Rows(name, linears.get(values), (1, 1), values, "")]
    size, channels = getattr(config, "patch_size", None), getattr(config, "num_channels", 3)
    size = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(size) != 2 or not isinstance(channels, int):
        return []
    values = channels * math.prod(size)
    if name != "pixel_values":
        return []
    positions = next((each for each in inspect.signature(tower.forward).parameters if each in POSITIONS), None)
    rows = Rows(name, linears.get(values), size, values, positions)
    return [rows] if positions else [Images(name, linears.get(values), size, channels=channels), rows]


def general(tower: nn.Module) -> Anatomy:
    """Describe a tower from one pass of a synthetic frame; it takes frames as images or as rows of patches.

    Args:
        tower: the module that takes frames.

    Returns:
        its anatomy.

    Raises:
        TypeError: it is not a plain ViT, or does something that a sparse frame does not support.
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
        raise Unsuitable(f"it has {len(lists)} lists of blocks, like towers that merge patches between stages")
    (blocks,) = lists
    with in_evaluation(tower):
        form, size, seen = _seen(tower, blocks)
        prefix, suffix = _around(tower, blocks, form, size, seen)
    calls = {call.module: call for call in seen.attentions}
    if len(calls) < len(blocks) or len({call.kind for call in calls.values()}) > 1:
        raise Unsuitable("its blocks do not all attend in the same way, each with its own module")
    return Anatomy(
        tower=tower,
        projection=form.projection,
        layers=tuple(blocks),
        attentions=tuple(calls),
        mlps=tuple((mlp, mlp) for mlp in seen.mlps),
        last=blocks[-1],
        prefix=prefix,
        suffix=suffix,
        grids=form.grids,
        order=form.order if isinstance(form, Rows) and form.positions is not None else None,
        embedding=functools.partial(_embedding, prefix),
        needs_every_token=True,
        positions=_positions(seen, prefix + suffix),
        attention=None if seen.attentions[0].kind == "interface" else functools.partial(_attention, calls),
        products={module: _biased for module, call in calls.items() if call.biased},
        reads=lambda arguments: seen.reads,
        example=functools.partial(form.make, tower, size),
    )


def _seen(tower: nn.Module, blocks: nn.Module) -> tuple[Images | Rows, Grid, Trace]:
    """The first form and size of frames that the tower accepts, and the trace of one."""
    refused = ""
    for form in _forms(tower, blocks):
        for size in _sizes(tower, form):
            if isinstance(form, Rows):
                form = form._replace(own=form.grid(size))
            try:
                return form, size, trace(tower, blocks, form.make(tower, size))
            except Unsuitable:
                raise
            except Exception as error:  # a model may raise anything for another size than its own
                refused = refused or f"it does not take {form.name} of a frame of {size[0]} x {size[1]} pixels alone"
                refused += f" ({error!s:.200})" if not refused.endswith(")") else ""
    raise Unsuitable(refused)


def _sizes(tower: nn.Module, form: Images | Rows) -> Iterator[Grid]:
    """Heights and widths of frames that the tower may accept, likeliest first."""
    own = own_sizes(tower)
    few = [size for size in own if math.prod(form.grid(size)) <= MOST_TOKENS]
    usual = (USUAL[0] * form.patch[0], USUAL[1] * form.patch[1])
    counts = {
        length - others
        for tensor in itertools.chain(tower.parameters(), tower.buffers())
        for length in tensor.shape[:-1]
        for others in range(MOST_REGISTERS)
    }
    sides = sorted({math.isqrt(count) for count in counts if 3 < count <= MOST_TOKENS}, reverse=True)
    squares = [(side * form.patch[0], side * form.patch[1]) for side in sides if side**2 in counts]
    yield from dict.fromkeys([*few, *([] if few else [usual]), *own, *squares, usual])


def own_sizes(tower: nn.Module) -> list[Grid]:
    """Frame sizes named in the tower's config and modules."""
    sizes = []
    for module in tower.modules():
        for holder in (getattr(module, "config", None), module):
            for name in ("image_size", "img_size", "input_size", "input_resolution"):
                size = getattr(holder, name, None)
                size = (size, size) if isinstance(size, int) else size
                if isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(each, int) for each in size):
                    sizes.append(tuple(size))
    return list(dict.fromkeys(sizes))


def _around(tower: nn.Module, blocks: nn.Module, form: Images | Rows, size: Grid, seen: Trace) -> tuple[int, int]:
    """The number of tokens in front of the patches, which must be in row-major order, and after them."""
    count, tokens = math.prod(form.grid(size)), seen.tokens.flatten(0, -2)
    others = prefix = len(tokens) - count
    if others < 0:
        raise Unsuitable(f"{count} patches are {len(tokens)} tokens in front of its blocks")
    for patch in (0, count - 1, count // 2 + 1):
        other = first_tokens(tower, blocks, form.make(tower, size, [patch]))
        moved = (other.flatten(0, -2) != tokens).any(1).nonzero()[:, 0].tolist()
        if patch == 0 and moved:
            prefix = min(prefix, moved[0])
        if moved != [prefix + patch]:
            raise Unsuitable(
                f"patch {patch} of {count} moves the tokens {moved[:4]} of {len(tokens)} in front of its blocks, not "
                f"{prefix + patch} alone"
            )
    return prefix, others - prefix


def _embedding(prefix: int, output: Any) -> torch.Tensor:
    """[S, D]; [1, D] if the frames of a pass lie end to end, since nothing says where one ends."""
    is_tokens = False
    if not isinstance(output, torch.Tensor):
        if isinstance(output, tuple | list):
            output = output[0]
        elif "feature_maps" in output:
            output = output.feature_maps[-1]
        else:
            names = ("image_embeds", "pooler_output", "logits", "last_hidden_state")
            name = next(name for name in names if output.get(name) is not None)
            output, is_tokens = output[name], name == "last_hidden_state"
    if output.ndim == 4:
        return output.mean((2, 3))
    if output.ndim == 3:
        return output[:, 0] if prefix else output.mean(1)
    return output.mean(0, keepdim=True) if is_tokens else output


def _positions(seen: Trace, others: int) -> tuple[tuple[str, Callable[[Any, Callable], Any]], ...]:
    """`Anatomy.positions`: the arguments of the blocks that have a row for each token."""
    tokens, found = seen.tokens.shape[:-1].numel(), []
    for name, value in seen.arguments.items():
        if "mask" in name:  # for whole frames; attention between packed tokens needs none
            continue
        leaves, dims = tree_leaves(value), dims_of_rows(value, {tokens, tokens - others})
        lengths = {leaf.shape[dim] for leaf, dim in zip(leaves, dims, strict=True) if dim is not None}
        if not lengths:
            continue
        if others and tokens not in lengths and not (isinstance(value, tuple) and len(leaves) == 2):
            raise Unsuitable(f"{name} of its blocks has no rows for the {others} tokens that are not patches")
        found.append((name, functools.partial(pack_rows, dims)))
    return tuple(found)


def _attention(calls: dict[nn.Module, Call], module: nn.Module, attend: Callable, *args: Any, **kwargs: Any) -> Any:
    """`Anatomy.attention` of modules that use torch's functions: their forward runs, and its attention is replaced."""
    if calls[module].kind == "multihead":
        return _multihead(module, attend, *args, **kwargs)
    if not calls[module].biased:  # it masks nothing, and is for all tokens
        kwargs |= {name: None for name in kwargs if name.endswith("mask")}
    with _Attends(attend, calls[module]):
        return type(module).forward(module, *args, **kwargs)


def _biased(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor | None,
    key_rows: torch.Tensor | None,
    grid: Grid,
    scaling: float,
    mask: torch.Tensor,
) -> torch.Tensor:
    """`product` of `attend` with what the model adds to its scores, [S or 1, heads, T, T], the same for all frames."""
    bias = mask[:1]
    if len(mask) > 1 and not torch.equal(mask, bias.expand_as(mask)):
        raise ValueError("what is added to attention scores differs from frame to frame; accepted is the same for all")
    if rows is not None:
        bias = bias.index_select(2, rows)
    if key_rows is not None:
        bias = bias.index_select(3, key_rows)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling).transpose(1, 2)


class _Attends(TorchFunctionMode):
    """Inside one attention module, replaces torch's attention, or the products that make it, by `attend`."""

    def __init__(self, attend: Callable, call: Call) -> None:
        super().__init__()
        self.attend, self.call = attend, call
        self.scores: tuple[torch.Tensor, torch.Tensor] | None = None  # queries, and keys by column

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            bound = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            scale = bound.get("scale") or bound["query"].shape[-1] ** -0.5
            mask = bound.get("attn_mask") if self.call.biased else None
            return self.attended(bound["query"], bound["key"], bound["value"], scale, mask)
        if self.call.kind == "products" and func in PRODUCTS:
            if self.scores is not None:
                return self.attended(self.scores[0], self.scores[1].mT, args[1], self.call.scale)
            self.scores = query, keys = args
            return query.new_zeros(*query.shape[:-1], keys.shape[-1])  # nothing reads the result
        return func(*args, **kwargs)

    def attended(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Heads as given, [S, heads, T, head_dim] or [S * heads, T, head_dim]."""
        heads = [each if each.ndim == 4 else each.unflatten(0, (-1, self.call.heads)) for each in (query, key, value)]
        product = None if mask is None else functools.partial(_biased, scaling=scale, mask=mask)
        batch, _, rows, _ = heads[0].shape
        outputs = self.attend(*heads, None, product, scaling=scale)[0]
        outputs = outputs.reshape(batch, rows, *outputs.shape[2:]).transpose(1, 2)
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

"""Observe how an unknown tower works, in one pass of a synthetic frame."""

import contextlib
import dataclasses
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)
CLOSE = 1e-3  # tolerance between a softmax's input and scaled products, relative to the largest score


class Unsuitable(Exception):
    """Why the general adapter cannot describe a tower."""


class Call(NamedTuple):
    """How one block computes its attention.

    Args:
        module: the innermost module around it.
        kind: transformers' "interface", torch's "sdpa", "multihead" for nn.MultiheadAttention, or "products": a matrix
            product, a softmax and another product.
        heads: number of heads.
        scale: of the scores, if made by products.
        biased: something independent of the frame is added to the scores, [1, heads, T, T].
    """

    module: nn.Module
    kind: str
    heads: int = 0
    scale: float | None = None
    biased: bool = False


@dataclasses.dataclass
class Trace:
    """One pass through a tower.

    Args:
        tokens: in front of the first block, [1, T, D].
        arguments: of the blocks by name, without the tokens.
        attentions: one for each block.
        mlps: one for each block; empty if some block's cannot be identified.
        reads: indices of the blocks, other than the last, whose output is read by something else than the next block.
    """

    tokens: torch.Tensor
    arguments: dict[str, Any]
    attentions: tuple[Call, ...]
    mlps: tuple[nn.Module, ...]
    reads: tuple[int, ...]


class _Stopped(Exception):
    """The pass went as far as needed."""


def calls_interface(module: nn.Module) -> bool:
    """Whether `module` attends through transformers' attention interface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    has_config = hasattr(getattr(module, "config", None), "_attn_implementation")
    return has_config and code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


@contextlib.contextmanager
def in_evaluation(tower: nn.Module) -> Iterator[None]:
    """Run the block with the tower in evaluation mode and without gradients."""
    training = [module for module in tower.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def first_tokens(tower: nn.Module, blocks: nn.Module, frame: dict[str, Any]) -> torch.Tensor:
    """The tokens that the first block takes."""
    found: list[torch.Tensor] = []
    here = threading.get_ident()

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == here:
            found.append(_split(module, args, kwargs)[0])
            raise _Stopped

    with blocks[0].register_forward_pre_hook(stop, with_kwargs=True), contextlib.suppress(_Stopped):
        tower(**frame)
    if not found:
        raise Unsuitable("its blocks are not called, or only their forward is")
    return found[0]


def trace(tower: nn.Module, blocks: nn.Module, frame: dict[str, Any]) -> Trace:
    """Run a frame, given as the tower's arguments by name, and record what its blocks do.

    The outputs of their linear layers are random, since only the data flow matters.

    Raises:
        Unsuitable: its blocks do something that a sparse frame does not support.
    """
    watch = _Watch(blocks)
    with contextlib.ExitStack() as stack:
        for module in tower.modules():
            stack.enter_context(module.register_forward_pre_hook(watch.enter, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(watch.leave))
        stack.enter_context(watch)
        output = tower(**frame)
    if watch.tokens is None:
        raise Unsuitable("its blocks are not called, or only their forward is")
    if len(watch.attentions) < len(blocks):
        raise Unsuitable(f"a frame goes through only {len(watch.attentions)} of its {len(blocks)} blocks")
    leaves = {id(leaf) for leaf in tree_leaves(output)}
    reads = watch.reads | {number for key, number in watch.outputs.items() if key in leaves}
    return Trace(
        watch.tokens,
        watch.arguments,
        tuple(watch.attentions),
        tuple(watch.mlps) if len(watch.mlps) == len(blocks) else (),
        tuple(sorted(reads - {len(blocks) - 1})),
    )


def _split(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The tokens that a block is called with, and its other arguments by name."""
    bound = inspect.signature(block.forward).bind(*args, **kwargs)
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    tokens = arguments.pop(next(iter(arguments)), None)
    if not isinstance(tokens, torch.Tensor):
        raise Unsuitable(f"{type(block).__name__} takes a {type(tokens).__name__} first, not tokens")
    return tokens, arguments


class _Watch(TorchFunctionMode):
    """Records modules as they begin and end, and torch functions, while a frame passes in this thread."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.numbers = {block: number for number, block in enumerate(blocks)}
        self.running: list[nn.Module] = []
        self.block: nn.Module | None = None
        self.held: list[Any] = []  # kept alive, so that ids stay unique
        self.tokens: torch.Tensor | None = None
        self.arguments: dict[str, Any] = {}
        self.outputs: dict[int, int] = {}  # by id, of a block's output
        self.reads: set[int] = set()
        self.attentions: list[Call] = []
        self.mlps: list[nn.Module] = []
        self.noise = torch.empty(0)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self.thread:
            return
        self.running.append(module)
        if module not in self.numbers:
            return
        number = self.numbers[module]
        if number != len(self.attentions) or self.block is not None:
            raise Unsuitable(f"block {number} does not simply follow block {len(self.attentions) - 1}")
        tokens, arguments = _split(module, args, kwargs)
        if number == 0:
            if tokens.ndim < 2 or (tokens.ndim > 2 and len(tokens) != 1):
                raise Unsuitable(f"its blocks take {list(tokens.shape)} of one frame, not [1, tokens, D]")
            self.tokens, self.arguments = tokens, arguments
        elif self.outputs.get(id(tokens)) != number - 1:
            raise Unsuitable(f"block {number} does not take the output of block {number - 1}")
        self.block, self.events, self.candidates, self.interfaces = module, [], [], []

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        self.running.pop()
        if self.block is None:
            return
        # Some look up their function in a way that always finds the eager one.
        if calls_interface(module) and ("product" not in self.kinds() or module.config._attn_implementation == "eager"):
            self.interfaces.append(module)
        given = output[0] if isinstance(output, tuple) else output
        if module is not self.block:
            if isinstance(given, torch.Tensor) and given.shape == self.tokens.shape:
                self.candidates.append(module)
            return
        number = self.numbers[module]
        if not isinstance(given, torch.Tensor) or given.shape != self.tokens.shape:
            raise Unsuitable(f"block {number} gives another shape than its input, {list(self.tokens.shape)}")
        self.held.append(given)
        self.outputs[id(given)] = number
        self.attentions.append(self._attention(number))
        self._note_mlp(self.attentions[-1].module)
        self.block = None

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.block is not None and func is F.linear:
            return self.made_up(*args, *kwargs.values())
        result = func(*args, **kwargs)
        if self.block is None:
            if self.outputs and any(isinstance(each, torch.Tensor) for each in tree_leaves(result)):
                given = tree_leaves((args, kwargs))
                self.reads |= {self.outputs[id(each)] for each in given if id(each) in self.outputs}
        elif func is F.scaled_dot_product_attention:
            self.events.append(("sdpa", self.running[-1], args, kwargs))
        elif func is F.multi_head_attention_forward:
            self.events.append(("multihead", self.running[-1], args, kwargs))
        elif func in PRODUCTS:
            self.events.append(("product", self.running[-1], args, result))
        elif getattr(func, "__name__", "") == "softmax":
            self.events.append(("softmax", self.running[-1], args, result))
        return result

    def made_up(self, rows: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
        """Random values of the shape and dtype that a linear layer gives, at no cost."""
        shape = (*rows.shape[:-1], weight.shape[0])
        count = math.prod(shape)
        if len(self.noise) < count:
            self.noise = torch.randn(count, generator=torch.Generator().manual_seed(2))
        return self.noise[:count].to(rows.device, rows.dtype, copy=True).view(shape)

    def kinds(self) -> list[str]:
        return [kind for kind, *_ in self.events]

    def _attention(self, number: int) -> Call:
        """The attention of block `number`, from the recorded events."""
        tokens = self.tokens.shape[:-1].numel()
        kinds = self.kinds()
        if len(self.interfaces) > 1 or kinds.count("sdpa") + kinds.count("multihead") > 1 or kinds.count("softmax") > 1:
            raise Unsuitable(f"block {number} attends more than once")
        if "sdpa" in kinds:
            _, module, args, kwargs = self.events[kinds.index("sdpa")]
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            bound = dict(zip(names, args, strict=False)) | kwargs
            query, key = bound["query"], bound["key"]
            if bound.get("is_causal"):
                raise Unsuitable(f"block {number} attends to earlier tokens only")
            mask = bound.get("attn_mask")
            biased = mask is not None and not (mask if mask.dtype == torch.bool else mask == 0).all()
            if biased and (mask.dtype == torch.bool or mask.shape[-2:] != (tokens, tokens)):
                raise Unsuitable(f"block {number} masks its attention scores")
        elif "multihead" in kinds:
            _, module, _, kwargs = self.events[kinds.index("multihead")]
            if kwargs.get("attn_mask") is not None or kwargs.get("key_padding_mask") is not None:
                raise Unsuitable(f"block {number} masks its attention scores")
            return Call(module, "multihead", module.num_heads)
        elif kinds == ["product", "softmax", "product"]:
            (_, module, (query, keys), scores), (_, _, (weighed, *_), _), (_, other, (left, _), _) = self.events
            key = keys.mT
            if other is not module or left.shape != scores.shape or weighed.shape != scores.shape:
                raise Unsuitable(f"block {number} attends in a way that was not recognised")
            wide = scores.flatten().double()
            scale = (wide @ weighed.flatten().double() / (wide @ wide)).item()
            if (weighed.double() - scale * scores.double()).abs().max() > CLOSE * weighed.double().abs().max():
                raise Unsuitable(f"block {number} adds something to its attention scores, such as relative positions")
        else:
            raise Unsuitable(f"block {number} attends in a way that was not recognised")
        if query.shape[-2] != tokens or key.shape[-2] != tokens:
            raise Unsuitable(f"block {number} does not attend from all tokens to all, as with windows or pooled keys")
        if self.interfaces:
            return Call(self.interfaces[0], "interface", query.shape[-3], biased="sdpa" in kinds and biased)
        if module is self.block:
            raise Unsuitable(f"block {number} attends in its own forward, not in a separate module")
        if "sdpa" in kinds:
            return Call(module, "sdpa", query.shape[-3], biased=biased)
        return Call(module, "products", query.shape[-3], scale)

    def _note_mlp(self, attention: nn.Module) -> None:
        """Record the outermost part of the block that maps tokens with two or more linears, and has no attention."""
        parts = [
            part
            for part in self.candidates
            if attention not in part.modules()
            and part not in attention.modules()
            and sum(isinstance(each, nn.Linear) for each in part.modules()) > 1
        ]
        outer = [part for part in parts if not any(part is not other and part in other.modules() for other in parts)]
        if len(outer) == 1:
            self.mlps.append(outer[0])

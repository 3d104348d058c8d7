"""Pooling heads, on every stream's own tokens; SigLIP's in a cheaper form that is equal up to rounding."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from neuroflow_kernels import linear_rows, row_kernels_serve

from ..adapters.anatomy import is_foldable
from .derived import Derived
from .kernels import is_plain
from .passes import Pass


class FoldedHead(NamedTuple):
    """The weights of `attention_pool`, in float32 or wider.

    Scores are tokens times probe [heads, D]. Weighted sums of tokens go through value_weight [heads, head_dim, D] and
    value_bias [D].
    """

    probe: torch.Tensor
    value_weight: torch.Tensor
    value_bias: torch.Tensor


def fold_head(head: nn.Module) -> FoldedHead:
    """SigLIP's pooling head without projecting every token to a key and a value.

    The single query q is constant, so a score q (W x + b) is (q W) x plus a constant that the softmax drops; and the
    weighted sum of projected values is the projection of the weighted sum of tokens. This leaves two products with a
    [heads, D] matrix per token.
    """
    attention = head.attention
    dim, heads = attention.embed_dim, attention.num_heads
    wide = torch.promote_types(attention.in_proj_weight.dtype, torch.float32)
    query_weight, key_weight, value_weight = attention.in_proj_weight.to(wide).chunk(3)
    query_bias, _, value_bias = attention.in_proj_bias.to(wide).chunk(3)
    query = F.linear(head.probe[0, 0].to(wide), query_weight, query_bias) * (dim // heads) ** -0.5
    probe = torch.einsum("hk,hkd->hd", query.view(heads, -1), key_weight.view(heads, -1, dim))
    return FoldedHead(probe, value_weight.view(heads, -1, dim), value_bias)


def attention_pool(
    head: nn.Module, folded: FoldedHead, tokens: torch.Tensor, lengths: list[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """SigLIP's pooling head, [S, N, D] -> [S, D], with scores and sums in float32 or wider.

    Args:
        folded: from the current weights of `head`.
        lengths: number of tokens of each stream that count, from the left; None for all.

    Returns:
        the pooled tokens, and the attention that each token received, mean over heads, [S, N].
    """
    out_proj = head.attention.out_proj
    tokens = tokens.to(folded.probe.dtype)
    if row_kernels_serve(tokens):
        scores = torch.stack([linear_rows(folded.probe, own) for own in tokens])
    else:
        scores = folded.probe @ tokens.mT  # [S, heads, N]
    if lengths is not None:
        position = torch.arange(tokens.shape[1], device=tokens.device)
        past_end = position >= torch.tensor(lengths, device=tokens.device)[:, None]
        scores = scores.masked_fill(past_end[:, None], -torch.inf)
    weights = scores.softmax(2)
    mixed = weights @ tokens  # [S, heads, D]
    values = torch.einsum("shd,hkd->shk", mixed, folded.value_weight).flatten(1) + folded.value_bias
    pooled = out_proj.forward(values.to(out_proj.weight.dtype))  # nn.MultiheadAttention skips its hooks too
    return pooled + head.mlp(head.layernorm(pooled)), weights.mean(1)


def pool(
    current: Pass,
    derived: Derived,
    distilled: nn.Module | None,
    forward: Callable,
    tokens: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Pooled [S, D] from the tokens [S, T, D] after the last block.

    Args:
        distilled: the pooling head for partial frames, if they have their own.
        forward: the method of the tower's head.
        args, kwargs: its arguments after the tokens.
    """
    if current.plan.config.arch == "active" and current.packed:
        lengths = current.lengths if len(current.lengths) > 1 else None
    else:
        lengths = current.counts if current.padded else None
    head, method = current.plan.anatomy.pool
    if all(current.whole) or (distilled is None and not current.rounded):
        return _pool(current, derived, head, functools.partial(forward, *args, **kwargs), tokens, lengths, 0)
    pooled, first = [], 0
    for whole, streams in itertools.groupby(current.whole):
        these = slice(first, first + len(list(streams)))
        module, call = head, forward
        if not whole and distilled is not None:
            module, call = distilled, getattr(distilled, method)
        call = functools.partial(call, *args, **kwargs)
        with current.only(whole):
            pooled.append(_pool(current, derived, module, call, tokens[these], lengths and lengths[these], first))
        first = these.stop
    return torch.cat(pooled)


def _pool(
    current: Pass,
    derived: Derived,
    head: nn.Module,
    forward: functools.partial,
    tokens: torch.Tensor,
    lengths: list[int] | None,
    first: int,
) -> torch.Tensor:
    """Pooled [S, D] from all tokens [S, T, D] of the streams from `first` on.

    `forward` is the head's, with the arguments after the tokens bound.
    """
    if is_foldable(head) and _is_plain(head, forward.func, tokens):
        folded = derived(head, (head, "folded"), lambda: fold_head(head))
        pooled, attention = attention_pool(head, folded, tokens, lengths)
        if current.plan.config.score == "staleness" and current.plan.config.arch != "active":
            counts = current.counts[first : first + len(attention)]
            current.add_attention([row[:count] for row, count in zip(attention, counts, strict=True)], first)
        return pooled
    if lengths is None:
        return forward(tokens)
    own = [tokens[stream : stream + 1, :length] for stream, length in enumerate(lengths)]
    return torch.cat([forward(each) for each in own])


def _is_plain(head: nn.Module, forward: Callable, tokens: torch.Tensor) -> bool:
    """Whether SigLIP's head, with this forward, computes the same without calling its attention module."""
    attention, out_proj = head.attention, head.attention.out_proj
    # Attention reads the weights of its last linear layer and never calls it, so the engine's method is looked through.
    method = getattr(out_proj.forward, "args", (out_proj.forward,))[-1]
    return (
        getattr(forward, "__func__", None) is type(head).forward
        and is_plain(attention, attention.forward, tokens)
        and is_plain(out_proj, method, tokens)
        and not attention._forward_hooks
        and not attention._forward_pre_hooks
    )

"""Attention from the active queries to what the architecture lets them see."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .passes import Pass, StaticPass, Unrecordable, for_each_query

ATTENTION = "neuroflow"  # its name in transformers


def attend(
    current: Pass,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    product: Callable | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's attention, from the active queries to what this architecture lets them see.

    Args:
        query, key, value: [S, heads, T, head_dim], or [1, heads, rows of all streams, head_dim] if packed or end to
            end.
        product: function (query [1, heads, M, head_dim] of one stream, key and value [1, heads, K, head_dim], rows of
            the queries and rows of the keys among its tokens, int32 or None for all, its grid) -> [1, M, heads,
            head_dim], for attention in which not every query sees every key.
        kwargs: passed to transformers' attention function; `scaling` is the factor on the products.

    Returns:
        [S, T, heads, head_dim], or [1, rows of all streams, heads, head_dim] if packed or from `product`; and attention
        weights or None.
    """
    context, layer = current.plan.config.arch == "context", current.plan.layer_of[module]
    if kwargs.get("scaling") is None:
        kwargs["scaling"] = query.shape[-1] ** -0.5
    kwargs.setdefault("is_causal", False)  # sdpa would assume it unless told; eager attention never does
    rounds = current.packed and current.rounded
    watched = layer in current.plan.watched
    if isinstance(current, StaticPass) and (current.packed or product is not None):
        if product is not None:
            raise Unrecordable("not every query attends to every key")
        heads = (query, key, value) if not rounds else (query.bfloat16(), key.bfloat16(), value.bfloat16())
        if context:
            current.store_all_heads(layer, *heads[1:])
            attended = current.attend_cached(heads[0], layer, watched, kwargs["scaling"])
        else:
            attended, _ = _of_model(current, module)(module, *heads, current.same_stream(), **kwargs)
        return attended.to(query.dtype), None
    if current.packed and current.table is not None and product is None:
        attended = current.attend_versions(layer, query, key, value, kwargs["scaling"])
        for entry, state in enumerate(current.states):
            if watched and not current.followed[entry]:
                keys = _by_head(state.tensors["key", layer], key)
                current.add_cls_attention(query[:, :, current.offsets[entry]], keys, kwargs["scaling"], entry)
        return attended, None
    parts = [current.heads(heads) for heads in (query, key, value)]
    if context and not current.packed:
        for entry, (keys, values) in enumerate(zip(*parts[1:], strict=True)):
            if not current.followed[entry]:
                current.store_heads(layer, entry, keys, values)
    if not current.packed and product is None and query.shape[0] == len(current.states):
        if watched:
            current.add_cls_attention(query[:, :, 0], key, kwargs["scaling"])
        return _of_model(current, module)(module, query, key, value, mask, **kwargs)
    brought = [current.brought(each, 2) for each in (key, value)] if context and current.packed else None
    outputs = []
    for entry, (state, *heads) in enumerate(zip(current.states, *parts, strict=True)):
        partial = current.packed and not current.whole[entry]
        if partial and rounds:
            heads = [each.bfloat16() for each in heads]
        queries, keys, values = heads
        rows = key_rows = current.rows[entry] if partial else None
        if brought is not None:  # in order, so that each entry finds earlier ones
            current.store_heads(layer, entry, *(each[entry] for each in brought))
        if context and partial:
            keys, values = (_by_head(state.tensors[name, layer], key) for name in ("key", "value"))
            key_rows = None
        if watched and not current.followed[entry] and (context or not partial):
            current.add_cls_attention(queries[:, :, 0], keys, kwargs["scaling"], entry)
        # Packed tokens of one entry see only tokens of its stream, none of them padding.
        if product is not None:
            attended = product(queries, keys, values, rows, key_rows, current.grids[entry])
        elif partial and current.measured:
            each_head = (queries, for_each_query(keys, queries, 1), for_each_query(values, queries, 1))
            of_rows = (each[0].transpose(0, 1) for each in each_head)  # [*, heads, head_dim]
            attended = current.kernels.attend(*of_rows, kwargs["scaling"])[None]
        else:
            attended = _of_model(current, module)(module, queries, keys, values, None, **kwargs)[0]
        outputs.append(attended.to(query.dtype))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), None


def _of_model(current: Pass, module: nn.Module) -> Callable:
    """The attention function the model was loaded with."""
    name = getattr(current.plan.configs.get(module), "_attn_implementation", ATTENTION)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa if name == ATTENTION else ALL_ATTENTION_FUNCTIONS.get(name, sdpa)


def _by_head(cache: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """A cache [1, T, heads * head_dim] as [1, heads, T, head_dim], with as many heads as `heads` [*, heads, *, *]."""
    return cache.unflatten(2, (heads.shape[1], -1)).transpose(1, 2)

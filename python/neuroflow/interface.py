"""The attention implementation "neuroflow" for transformers.

Patched towers call it. A model loaded with it, for example by a framework that lets users choose only the attention, is
patched automatically when its tower first calls it.
"""

import functools
import os
import sys
import warnings
import weakref
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .adapters import describe, towers
from .engine.attention import ATTENTION, attend
from .engine.passes import current_pass, within
from .patch import enable_cache, is_patched

_asked: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # once each, so that `disable_cache` is final
_adopting: ContextVar[bool] = ContextVar(
    "neuroflow_adopting", default=False
)  # guards against the synthetic frame of `verify`


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    current = current_pass.get()
    if current is not None and module in current.plan.layer_of:
        product = current.plan.anatomy.products.get(module)
        if product is not None:
            product = functools.partial(product, scaling=kwargs.get("scaling"), mask=attention_mask)
        return attend(current, module, query, key, value, attention_mask, product, **kwargs)
    if module not in _asked and not _adopting.get():
        _asked.add(module)
        within(_adopting, True, _adopt, module)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


@torch.compiler.disable
def _adopt(module: nn.Module) -> None:
    """Patch the tower that called its attention `module`, from its next frame on, if NeuroFlow knows the tower."""
    caller = sys._getframe(1)  # not kept, since a frame that refers to itself is never freed
    while caller is not None:
        owner, caller = caller.f_locals.get("self"), caller.f_back
        if not isinstance(owner, nn.Module):
            continue
        try:
            found = [tower for tower, _ in towers(owner).values() if module in set(tower.modules())]
        except TypeError:
            continue
        if not found or getattr(getattr(found[0], "config", None), "_attn_implementation", None) != ATTENTION:
            return
        try:
            anatomy = describe(found[0])
            if module in anatomy.attentions and not is_patched(owner):
                config = os.environ.get("NEUROFLOW_CONFIG")
                enable_cache(owner, config)
                settings = "the default settings" if config is None else config
                said = (
                    f"{type(owner).__name__} has the attention implementation {ATTENTION!r}, so it is patched from its "
                    f"next frame on, with {settings}"
                )
                warnings.warn(f"neuroflow: {said}", RuntimeWarning, stacklevel=2)
        except TypeError as refusal:
            warnings.warn(f"neuroflow: {type(owner).__name__} runs unpatched: {refusal}", RuntimeWarning, stacklevel=2)
        return


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)

"""Repeat a language model's layer outputs in decode steps that resemble the step before.

This is the similarity-gated attention bypass of the published ablation, extended to MLPs. In every decode step the
cosine between a gate layer's attention output and that of the step before decides, for each row of the batch, whether
other layers repeat their last output. Models are patched in place, on the instance, and called as before:

    enable_bypass(model, BypassConfig(gate_layer=1, cache_layers=(24,), threshold=0.7))
    model.generate(**inputs)
    print(bypass_summary(model))
    disable_bypass(model)
"""

import array
import copy
import dataclasses
import functools
import inspect
import math
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attributes import Replaced
from .config import LARGEST, is_number
from .releases import warn_of_newer

ATTENTION = "neuroflow_bypass"
_BYPASS = "_neuroflow_bypass"

Target = Literal["attention", "mlp"]


class DecoderParts(NamedTuple):
    """Attribute names in the causal models of one family.

    Args:
        decoder: the decoder, in the model.
        layers: the layers, in the decoder.
        attention: the attention, in a layer.
        projection: the output projection, in the attention.
    """

    decoder: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    projection: str = "o_proj"


DECODERS = {
    "Phi3ForCausalLM": DecoderParts(),
    "LlamaForCausalLM": DecoderParts(),
    "Qwen2ForCausalLM": DecoderParts(),
    "Qwen3ForCausalLM": DecoderParts(),
    "GPT2LMHeadModel": DecoderParts("transformer", "h", "attn", "c_proj"),
}


@dataclasses.dataclass(frozen=True)
class BypassConfig:
    """Which layer decides, which layers repeat their output, and when.

    Args:
        gate_layer: index of the layer whose attention output is compared from step to step, counted from 0.
        cache_layers: indices of the layers that repeat their output. One in front of the gate layer uses the decision
            of the step before.
        threshold: cosine from which they repeat, -1 to 1; above 1 they never do.
        target: what is repeated. "attention": the attention's output; keys and values are still projected, rotated and
            appended in every step, so the cache has no gaps, and MLPs always run. "mlp": what the MLP adds to the
            residual stream, while attention always runs.

    Raises:
        ValueError: a field has another type, or is out of its range.

    Example:
        >>> from neuroflow.llm import BypassConfig
        >>> BypassConfig(gate_layer=0, cache_layers=(1, 2), threshold=0.7).target
        'attention'

    Source: Schmitt 2026 for "attention"; "mlp" is the extension it proposes.
    """

    gate_layer: int
    cache_layers: tuple[int, ...]
    threshold: float
    target: Target = "attention"

    def __post_init__(self) -> None:
        _require(_is_layer(self.gate_layer), "gate_layer", self.gate_layer, "the number of a layer, counted from 0")
        listed = isinstance(self.cache_layers, list | tuple)
        distinct = listed and len(set(self.cache_layers)) == len(self.cache_layers) > 0
        numbers = distinct and all(map(_is_layer, self.cache_layers))
        _require(numbers, "cache_layers", self.cache_layers, "numbers of layers, at least one, each only once")
        object.__setattr__(self, "cache_layers", tuple(self.cache_layers))
        _require(self.target in get_args(Target), "target", self.target, "one of 'attention', 'mlp'")
        outside = self.target == "mlp" or self.gate_layer not in self.cache_layers
        _require(outside, "cache_layers", self.cache_layers, f"layers other than the gate's, {self.gate_layer}")
        number = is_number(self.threshold, -LARGEST)
        _require(number, "threshold", self.threshold, "a finite number of float32")


@dataclasses.dataclass(frozen=True)
class BypassSummary:
    """What was repeated since `enable_bypass`.

    Args:
        steps: decode steps, counted for each row of a batch. Passes over prompts do not count.
        rate: share of the cache layers' outputs in these steps that were repeated, 0 to 1.
        p10: 10th percentile of the gate's cosines; NaN before the first step.
        p50: their median.
        p90: their 90th percentile.

    Example:
        >>> from neuroflow.llm import BypassSummary
        >>> print(BypassSummary(steps=100, rate=0.25, p10=0.5, p50=0.7, p90=0.9))
        NeuroFlow bypass: 100 decode steps, 25.0% repeated, similarity P10 0.500, P50 0.700, P90 0.900
    """

    steps: int
    rate: float
    p10: float
    p50: float
    p90: float

    def __str__(self) -> str:
        similarity = f"P10 {self.p10:.3f}, P50 {self.p50:.3f}, P90 {self.p90:.3f}"
        return f"NeuroFlow bypass: {self.steps} decode steps, {self.rate:.1%} repeated, similarity {similarity}"


def enable_bypass(model: PreTrainedModel, config: BypassConfig) -> None:
    """Patch a causal model in place, so that layers repeat their output as `config` says.

    A pass over more than one token, or with an empty cache, is dense and starts over. So is a step with another cache,
    another number of rows, or a cropped cache, as in assisted decoding. Each row of a batch has its own decision. If
    all rows repeat, the layer's MLP, or its attention once keys and values are projected (and queries with them), does
    not run. If some do, it runs for all rows, and the repeated rows are overwritten.

    Batches must be padded on the left, because the first step is compared with the last position of the prompt. Beam
    search is refused in its second step. The state belongs to one generation at a time, so do not share the model
    between threads. A pass without a cache (`use_cache=False`) repeats nothing and warns once.

    Args:
        model: a causal model of one of `DECODERS`.
        config: the layers and the threshold. A second call with an equal configuration does nothing.

    Raises:
        TypeError: a model of another family, or `config` is not a `BypassConfig`.
        ValueError: a layer that the model does not have.
        RuntimeError: the model is already patched with another configuration.

    Example:
        >>> from neuroflow.llm import BypassConfig, bypass_summary, enable_bypass
        >>> enable_bypass(decoder, BypassConfig(gate_layer=0, cache_layers=(1,), threshold=0.7))
        >>> tokens = decoder.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        >>> bypass_summary(decoder).steps
        3

    Source: Schmitt 2026.
    """
    if not isinstance(config, BypassConfig):
        raise TypeError(f"config is {config!r} ({type(config).__name__}); accepted is a neuroflow.llm.BypassConfig")
    _parts(model)
    patched = vars(model).get(_BYPASS)
    if patched is not None:
        if patched.config == config:
            return
        name = type(model).__name__
        raise RuntimeError(f"{name} is already patched, with {patched.config}; call disable_bypass first")
    for library in ("torch", "transformers"):
        warn_of_newer(library)
    bypass = _Bypass(model, config)
    bypass.install()
    setattr(model, _BYPASS, bypass)


def disable_bypass(model: PreTrainedModel) -> None:
    """Undo `enable_bypass`. Does nothing to a model that is not patched.

    The model gets back the identical objects. If something else has wrapped a method since, that wrapper stays, and the
    bypass inside is removed.

    Args:
        model: a causal model of one of `DECODERS`.

    Raises:
        TypeError: a model of another family.

    Example:
        >>> from neuroflow.llm import BypassConfig, disable_bypass, enable_bypass
        >>> enable_bypass(decoder, BypassConfig(gate_layer=0, cache_layers=(1,), threshold=0.7))
        >>> disable_bypass(decoder)
    """
    _parts(model)
    bypass = vars(model).get(_BYPASS)
    if bypass is None:
        return
    bypass.replaced.undo()
    delattr(model, _BYPASS)


def cache_argument(model: nn.Module) -> str:
    """The name of the cache argument in `model`'s forward: "cache" from transformers 5.24 on, else "past_key_values".

    Args:
        model: a decoder or a causal model.

    Returns:
        the name.

    Example:
        >>> from neuroflow.llm import cache_argument
        >>> cache_argument(decoder) in ("cache", "past_key_values")
        True
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def bypass_summary(model: PreTrainedModel) -> BypassSummary:
    """Summarise what a patched model has repeated so far.

    Args:
        model: a causal model that `enable_bypass` has patched.

    Returns:
        a `BypassSummary`; print it for one line.

    Raises:
        RuntimeError: the model is not patched.
        TypeError: a model of another family.

    Example:
        >>> from neuroflow.llm import BypassConfig, bypass_summary, enable_bypass
        >>> enable_bypass(decoder, BypassConfig(gate_layer=0, cache_layers=(1,), threshold=0.7))
        >>> bypass_summary(decoder).steps
        0
    """
    _parts(model)
    bypass = vars(model).get(_BYPASS)
    if bypass is None:
        raise RuntimeError(f"{type(model).__name__} is not patched; call neuroflow.llm.enable_bypass first")
    similarities = np.array(bypass.similarities) if bypass.similarities else np.array([math.nan])
    percentiles = np.percentile(similarities, (10, 50, 90)).tolist()
    return BypassSummary(len(bypass.similarities), bypass.repeated / max(bypass.asked, 1), *percentiles)


class _Bypass:
    """The state of a patched model from step to step."""

    def __init__(self, model: PreTrainedModel, config: BypassConfig) -> None:
        parts = _parts(model)
        self.config = config
        self.decoder = getattr(model, parts.decoder)
        self.signature = inspect.signature(self.decoder.forward)
        self.cache_argument = cache_argument(self.decoder)
        layers = getattr(self.decoder, parts.layers)
        for name, numbers in (("gate_layer", [config.gate_layer]), ("cache_layers", config.cache_layers)):
            known = max(numbers) < len(layers)
            _require(known, name, getattr(config, name), f"layers of the model, 0 to {len(layers) - 1}")
        self.gate = getattr(layers[config.gate_layer], parts.attention)
        self.gate_projection = getattr(self.gate, parts.projection)
        self.cached = [layers[number] for number in config.cache_layers]
        self.attentions = [getattr(layer, parts.attention) for layer in self.cached]
        self.projections = [getattr(attention, parts.projection) for attention in self.attentions]
        self.model_config = self.gate.config
        self.replaced = Replaced()

        self.similarities = array.array("d")
        self.asked = self.repeated = 0
        self.stepping = False  # the current pass is a decode step that follows the last one
        self.rows = 0
        self.length = 0  # of the cache, after the last pass
        self.cache: Callable[[], Cache | None] = lambda: None
        self.keys: Callable[[], torch.Tensor | None] = lambda: None
        self.last_gate: torch.Tensor | None = None  # [B, D]
        self.last: dict[int, torch.Tensor] = {}  # by layer, [B, 1, D]
        self.decided: list[bool] = []  # by row; empty before the first decision
        self.warned = False

    def install(self) -> None:
        replaced = self.replaced
        replaced.put_in_front(self.decoder, "forward", self.run)
        replaced.put_in_front(self.gate_projection, "forward", self.decide)
        attend = self.config.target == "attention"
        repeating = self.projections if attend else [layer.mlp for layer in self.cached]
        for number, module in enumerate(repeating):
            replaced.put_in_front(module, "forward", functools.partial(self.repeat, number))
        if attend:
            # With a configuration of their own, the other layers and the masks keep the model's attention.
            config = copy.copy(self.model_config)
            config._attn_implementation = ATTENTION
            for attention in self.attentions:
                replaced.set(attention, "config", config)
                replaced.set(attention, _BYPASS, self)

    def run(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """The decoder's pass over input_ids [B, N], or inputs_embeds [B, N, D]."""
        arguments = self.signature.bind(*args, **kwargs).arguments
        given = arguments.get("input_ids")
        rows, tokens = (arguments["inputs_embeds"] if given is None else given).shape[:2]
        # A caller may still use the old name, which then ends up in kwargs.
        cache = arguments.get(self.cache_argument, kwargs.get("past_key_values"))
        cache = cache if isinstance(cache, Cache) else None  # continuous batching has no keys of a single sequence
        self.stepping = tokens == 1 and rows == self.rows and self.follows(cache)
        if not self.stepping:
            self.decided = []
        self.rows = rows
        output = forward(*args, **kwargs)
        if cache is None:
            held = output if isinstance(output, tuple) else output.values()
            cache = next((each for each in held if isinstance(each, Cache)), None)
        keys = None if cache is None else self.keys_of(cache)
        if keys is not None:
            self.cache, self.keys = weakref.ref(cache), weakref.ref(keys)
            self.length = int(cache.get_seq_length())
        elif not self.warned:
            self.warned = True
            name = type(self.decoder).__name__
            warnings.warn(
                f"neuroflow: {name} ran without a cache, so nothing is repeated; accepted is use_cache=True",
                RuntimeWarning,
                stacklevel=2,
            )
        return output

    def follows(self, cache: Cache | None) -> bool:
        """Whether the cache is as the last pass left it.

        Raises:
            RuntimeError: its rows were reordered.
        """
        if cache is None or cache is not self.cache() or not 0 < int(cache.get_seq_length()) == self.length:
            return False
        if self.keys_of(cache) is not self.keys() and not getattr(cache, "offloading", False):
            raise RuntimeError(
                "the rows of the cache were changed between two steps, as beam search does; accepted are greedy "
                "decoding and sampling (num_beams=1)"
            )
        return True

    def keys_of(self, cache: Cache) -> torch.Tensor | None:
        """The gate layer's keys; None if the layers were not handed the cache, as under gradient checkpointing."""
        return cache.layers[self.config.gate_layer].keys

    def decide(self, forward: Callable, heads: torch.Tensor) -> torch.Tensor:
        """The gate layer's projection of heads [B, N, H * head_dim]."""
        output = forward(heads)
        wide = torch.promote_types(output.dtype, torch.float32)
        current = output[:, -1].detach().to(wide, copy=True)
        if self.stepping:
            similarity = F.cosine_similarity(current, self.last_gate, dim=1).tolist()
            self.similarities.extend(similarity)
            self.decided = [cosine >= self.config.threshold for cosine in similarity]
        self.last_gate = current
        return output

    def repeat(self, number: int, forward: Callable, given: torch.Tensor) -> torch.Tensor:
        """A cached layer's projection or MLP, of `given` [B, N, values]."""
        if self.stepping:
            self.asked += self.rows
            self.repeated += sum(self.decided)
        if self.bypassing:
            return self.last[number]
        output = forward(given)
        if self.stepping and any(self.decided):
            repeats = torch.tensor(self.decided, device=output.device)[:, None, None]
            output = torch.where(repeats, self.last[number], output)
        self.last[number] = output[:, -1:].detach().clone()
        return output

    @property
    def bypassing(self) -> bool:
        """Whether every row repeats its last output."""
        return self.stepping and bool(self.decided) and all(self.decided)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A cached layer's attention, query [B, H, N, head_dim]; keys and values are already in the cache."""
        if self.bypassing:
            return query.transpose(1, 2), None  # of the right shape; the projection does not read it
        name = self.model_config._attn_implementation
        if name == "eager" and getattr(module, "reorder_and_upcast_attn", False):
            return module._upcast_and_reordered_attn(query, key, value, attention_mask)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        attention = eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        return attention(module, query, key, value, attention_mask, **kwargs)


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return getattr(module, _BYPASS).attend(module, *args, **kwargs)


AttentionInterface.register(ATTENTION, _attend)


def _parts(model: PreTrainedModel) -> DecoderParts:
    for kind in type(model).__mro__:
        if kind.__name__ in DECODERS:
            return DECODERS[kind.__name__]
    raise TypeError(f"{type(model).__name__} is not of a known family; accepted are {', '.join(DECODERS)}")


def _is_layer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; accepted is {accepted}")

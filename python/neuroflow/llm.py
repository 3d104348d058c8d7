"""Language models that repeat a layer's last output in decode steps that resemble the one before.

The similarity-gated attention bypass of the published ablation, and the same for MLPs. In every decode step the cosine
between a gate layer's attention output and that of the step before decides, for each row of the batch, whether other
layers repeat theirs. Models are patched in place, on the instance, and called as before:

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
    """What causal models of one family call the decoder, its layers, their attention and its last projection."""

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
    """Which layer decides, which layers repeat themselves, and when.

    Args:
        gate_layer: the number of the layer whose attention output is compared from step to step, counted from 0.
        cache_layers: the numbers of those that repeat theirs. One that comes before the gate layer goes by the decision
            of the step before.
        threshold: they do where the cosine is at least this; above 1 they never do.
        target: what is repeated. "attention": the attention's output. Keys and values are projected, rotated and
            appended in every step, so that no position is missing from the cache, and MLPs always run. "mlp": what the
            MLP adds to the residual stream, while attention always runs.

    Raises:
        ValueError: a value outside of what is said above.
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
        steps: decode steps, those of each row of a batch counted on their own. The passes over prompts are not among
            them.
        rate: share of what the cache layers had to give in these steps that they repeated, 0 to 1.
        p10, p50, p90: percentiles of the gate's cosines; NaN before the first step.
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
    """Patch `model` in place, so that layers repeat themselves as `config` says.

    A pass over more than one token, or with an empty cache, is dense and starts over; so is a step with another cache,
    another number of rows, or a cache that was cropped, as by assisted decoding. Each row of a batch has its own
    decision. Where all rows repeat, the layer's attention (after keys and values, with which the queries are projected)
    or MLP does not run; where some do, it runs for all and the others' output is taken. Batches are padded on the left,
    as the last position of a prompt is what the first step is compared with. Beam search is refused in its second step.

    The state is that of one generation at a time: not for several threads. A pass that has no cache (`use_cache=False`)
    repeats nothing, and the first one says so.

    Args:
        model: a causal model of one of `DECODERS`. Calling again with an equal configuration does nothing.

    Raises:
        TypeError: a model of another family, or no configuration.
        ValueError: a layer that the model does not have.
        RuntimeError: the model is patched with another configuration.
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
    """Undo `enable_bypass`: the model has the identical objects back. Does nothing to a model that is not patched.

    A method that something else has wrapped since stays wrapped, and the bypass inside is gone.

    Raises:
        TypeError: a model of another family.
    """
    _parts(model)
    bypass = vars(model).get(_BYPASS)
    if bypass is None:
        return
    bypass.replaced.undo()
    delattr(model, _BYPASS)


def cache_argument(model: nn.Module) -> str:
    """What the forward of `model`, a decoder or a causal model, calls its cache: "cache" from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def bypass_summary(model: PreTrainedModel) -> BypassSummary:
    """What a patched model has repeated so far.

    Raises:
        RuntimeError: the model is not patched.
        TypeError: a model of another family.
    """
    _parts(model)
    bypass = vars(model).get(_BYPASS)
    if bypass is None:
        raise RuntimeError(f"{type(model).__name__} is not patched; call neuroflow.llm.enable_bypass first")
    similarities = np.array(bypass.similarities) if bypass.similarities else np.array([math.nan])
    percentiles = np.percentile(similarities, (10, 50, 90)).tolist()
    return BypassSummary(len(bypass.similarities), bypass.repeated / max(bypass.asked, 1), *percentiles)


class _Bypass:
    """What a patched model carries from step to step."""

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
        self.stepping = False  # the pass under way is a decode step that follows the last pass
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
            # A configuration of their own leaves the other layers, and the masks, to the model's attention.
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
        # A caller may still use the old name, which then lies among the rest.
        cache = arguments.get(self.cache_argument, kwargs.get("past_key_values"))
        cache = cache if isinstance(cache, Cache) else None  # that of continuous batching has no keys of one sequence
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
        """None where the layers were not handed the cache, as under gradient checkpointing."""
        return cache.layers[self.config.gate_layer].keys

    def decide(self, forward: Callable, heads: torch.Tensor) -> torch.Tensor:
        """The gate layer's projection of heads [B, N, H * head width]."""
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
        """Every row repeats what it gave last."""
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
        """A cached layer's attention, query [B, H, N, head width]; keys and values are in the cache by now."""
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
    raise TypeError(f"{type(model).__name__} is no model of a known family; accepted are {', '.join(DECODERS)}")


def _is_layer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; accepted is {accepted}")

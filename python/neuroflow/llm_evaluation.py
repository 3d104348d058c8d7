"""The cost and benefit of repeating layer outputs between decode steps of a language model."""

import dataclasses
import functools
import math
import statistics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from .journal import Findings
from .llm import BypassConfig, bypass_summary, cache_argument, disable_bypass, enable_bypass
from .timing import timed
from .weights import copy_sharing_weights

TIMED = 128  # maximum number of timed tokens, from the first text


class Followed(NamedTuple):
    """What a model made of given tokens [W, T], one at a time.

    Attributes:
        loss: mean over all tokens but the first, in nats.
        states: for each step, each layer's output in the residual stream, [layers, W, D].
    """

    loss: float
    states: list[torch.Tensor]


def cut_windows(ids: list[int], tokens: int, count: int) -> torch.Tensor:
    """Windows [W, tokens] of a text's ids, evenly spaced: `count` of them, or as many as fit without overlap.

    Raises:
        ValueError: the text is shorter than one window.
    """
    if len(ids) < tokens:
        raise ValueError(f"ids has {len(ids)} tokens; accepted are {tokens} or more, the size of a window")
    starts = torch.linspace(0, len(ids) - tokens, min(count, len(ids) // tokens)).long()
    return torch.stack([torch.tensor(ids[start : start + tokens]) for start in starts])


def evaluate(
    model: PreTrainedModel,
    windows: dict[str, torch.Tensor],
    configs: list[BypassConfig],
    new_tokens: int,
    findings: Findings,
) -> list[dict[str, Any]]:
    """Evaluate each of `configs`, with progress on stderr.

    Args:
        model: an unpatched causal model.
        windows: ids [W, T] by text name.
        configs: configurations that fit the model.
        new_tokens: number of tokens by which prompts, the first half of each window, are continued.
        findings: holds finished rows, and receives the others.

    Returns:
        a row for each configuration.
    """
    left = [config for config in configs if _name_of(config) not in findings.done]
    timed_ids = next(iter(windows.values()))[:1, :TIMED]
    steps = sum(ids.shape[1] - 1 + new_tokens for ids in windows.values())
    total = (bool(left) + len(left)) * steps + len(left) * timed_ids.shape[1]
    with tqdm(total=total, unit="step", desc="dense", dynamic_ncols=True) as bar:
        patched = copy_sharing_weights(model)
        dense = {
            name: (_follow(model, ids, bar), _continue(model, ids, new_tokens, bar))
            for name, ids in windows.items()
            if left
        }
        for config in left:
            bar.set_description_str(_name_of(config))
            row = dataclasses.asdict(config) | {"texts": {}}
            for name, ids in windows.items():
                enable_bypass(patched, config)
                followed = _follow(patched, ids, bar)
                summary = bypass_summary(patched)
                continued = _continue(patched, ids, new_tokens, bar)
                disable_bypass(patched)
                plain, expected = dense[name]
                row["texts"][name] = {
                    "dense_perplexity": math.exp(plain.loss),
                    "perplexity": math.exp(followed.loss),
                    **dataclasses.asdict(summary),
                    "drift": (continued != expected).float().mean().item(),
                    "divergence": _divergence(plain.states, followed.states),
                }
            enable_bypass(patched, config)
            row["dense_ms"], row["ms"] = time_steps(model, patched, timed_ids, bar)
            row["timed_rate"] = bypass_summary(patched).rate
            disable_bypass(patched)
            findings.append(_name_of(config), row)
    return [findings.done[_name_of(config)] for config in configs]


@torch.inference_mode()
def _follow(model: PreTrainedModel, ids: torch.Tensor, bar: tqdm) -> Followed:
    cache = {cache_argument(model): DynamicCache(config=model.config)}
    losses, states = [], []
    for given, expected in zip(ids[:, :-1].split(1, 1), ids[:, 1:].unbind(1), strict=True):
        output = model(given, **cache, output_hidden_states=True)
        losses.append(F.cross_entropy(output.logits[:, -1].float(), expected))
        states.append(torch.stack(output.hidden_states[1:])[:, :, -1].cpu())
        bar.update()
    return Followed(torch.stack(losses).mean().item(), states)


@torch.inference_mode()
def _continue(model: PreTrainedModel, ids: torch.Tensor, count: int, bar: tqdm) -> torch.Tensor:
    """The `count` tokens [W, count] that greedily continue the first half of windows [W, T]."""
    cache = {cache_argument(model): DynamicCache(config=model.config)}
    given, found = ids[:, : ids.shape[1] // 2], []
    for _ in range(count):
        given = model(given, **cache, logits_to_keep=1).logits.argmax(-1)
        found.append(given)
        bar.update()
    return torch.cat(found, 1)


def _divergence(expected: list[torch.Tensor], found: list[torch.Tensor]) -> list[float]:
    """For each layer, the distance of its output to dense relative to its norm, mean over tokens."""
    each = [
        (other.float() - plain.float()).norm(dim=-1) / plain.float().norm(dim=-1)
        for plain, other in zip(expected, found, strict=True)
    ]
    return torch.stack(each).mean((0, 2)).tolist()


@torch.inference_mode()
def time_steps(dense: PreTrainedModel, patched: PreTrainedModel, ids: torch.Tensor, bar: tqdm) -> tuple[float, float]:
    """Median milliseconds of a decode step of each model, over the given tokens [1, T]."""
    caches = {each: {cache_argument(each): DynamicCache(config=each.config)} for each in (dense, patched)}
    times = {dense: [], patched: []}
    for number, given in enumerate(ids.split(1, 1)):
        # Alternate which comes first, so that neither always runs on a cache left by the other.
        for each in (dense, patched) if number % 2 else (patched, dense):
            times[each].append(timed(functools.partial(each, given, **caches[each]), ids.device)[1])
        bar.update()
    # The first token is a prompt.
    return statistics.median(times[dense][1:]), statistics.median(times[patched][1:])


def pair_of(row: dict[str, Any]) -> str:
    """The gate layer and the layers that repeat, such as `1>4`; with "mlp" if MLPs do."""
    cached = ",".join(map(str, row["cache_layers"]))
    return f"{row['gate_layer']}>{cached}" + " mlp" * (row["target"] == "mlp")


def _name_of(config: BypassConfig) -> str:
    return f"{pair_of(dataclasses.asdict(config))} at {config.threshold:g}"

"""`neuroflow eval llm`: what a language model loses and saves where layers repeat what they gave the step before."""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..llm import FAMILIES, BypassConfig, bypass_summary, cache_argument, disable_bypass, enable_bypass
from ..weights import copy_sharing_weights
from . import CommandError
from .eval import KEPT, Journal
from .run import INTERRUPTED, synchronise, torch_device

TIMED = 128  # tokens of the first text, at most
ACCEPTED = f"a causal model of one of {', '.join(FAMILIES)}"


class Followed(NamedTuple):
    """What a model made of given tokens [W, T], one at a time.

    Attributes:
        loss: mean over all but the first, in nats.
        states: by step, what each layer gave the residual stream, [layers, W, D].
    """

    loss: float
    states: list[torch.Tensor]


def eval_llm(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow eval llm` and return the exit code.

    Raises:
        CommandError: bad input.
    """
    texts = _read(arguments.text)
    journal = Journal(arguments.out, _settings(arguments, texts), resume=arguments.resume)
    model, tokenizer = load_language_model(
        arguments.model, torch_device(arguments.device), getattr(torch, arguments.dtype)
    )
    configs = _configs(arguments, model)
    windows = {
        name: cut(path, tokenizer(text, add_special_tokens=False)["input_ids"], arguments.tokens, arguments.windows)
        for name, (path, text) in texts.items()
    }
    windows = {name: ids.to(model.device) for name, ids in windows.items()}
    try:
        asked = evaluate(model, windows, configs, arguments.new_tokens, journal)
    except KeyboardInterrupt:
        if arguments.out is not None:
            print(KEPT, file=sys.stderr)
        return INTERRUPTED
    finally:
        journal.close()
    journal.finish()
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"model             {type(model).__name__}, {model.config.num_hidden_layers} layers, {dtype}, {model.device}")
    for name, ids in windows.items():
        print(f"{name:<18}{len(ids)} windows of {ids.shape[1]} tokens")
    print(format_rows(asked))
    return 0


def load_language_model(
    name: str, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The causal model of a Hugging Face id or local directory, in evaluation mode, and its tokenizer.

    Raises:
        CommandError: one of them cannot be loaded, the model is of another kind, or lacks weights.
    """
    # What these would say of a failure comes below, in one line.
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise CommandError(f"model {name}: no such directory; give a saved model, or a Hugging Face id")
    try:
        kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
        if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) not in FAMILIES:
            raise CommandError(f"model {name}: its type is {kind}; give {ACCEPTED}")
        model, loading = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except CommandError:
        raise
    # Hub, configuration, weights and tokenizer each fail in their own ways.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CommandError(f"model {name}: cannot be loaded ({reason}); give {ACCEPTED}, with its tokenizer") from None
    missing = loading["missing_keys"]
    if missing:
        message = f"model {name}: {len(missing)} weights are missing, {min(missing)} first; give a whole checkpoint"
        raise CommandError(message)
    return model.eval().to(device), tokenizer


def cut(path: Path, ids: list[int], tokens: int, windows: int) -> torch.Tensor:
    """Windows [W, tokens] of a text's ids, evenly over it: `windows` of them, or as many as do not overlap.

    Raises:
        CommandError: the text is shorter than one.
    """
    if len(ids) < tokens:
        raise CommandError(f"{path}: gives {len(ids)} tokens; give a longer text, or fewer --tokens than {tokens}")
    starts = torch.linspace(0, len(ids) - tokens, min(windows, len(ids) // tokens)).long()
    return torch.stack([torch.tensor(ids[start : start + tokens]) for start in starts])


def evaluate(
    model: PreTrainedModel,
    windows: dict[str, torch.Tensor],
    configs: list[BypassConfig],
    new_tokens: int,
    journal: Journal,
) -> list[dict]:
    """A row for each of `configs`, with progress on stderr.

    Args:
        model: a causal model that is not patched.
        windows: by text, ids [W, T].
        configs: those that fit it.
        new_tokens: how far prompts, the first half of each window, are continued.
        journal: holds the rows that are finished, and gets the others.
    """
    left = [config for config in configs if _name(config) not in journal.done]
    timed = next(iter(windows.values()))[:1, :TIMED]
    steps = sum(ids.shape[1] - 1 + new_tokens for ids in windows.values())
    total = (bool(left) + len(left)) * steps + len(left) * timed.shape[1]
    with tqdm(total=total, unit="step", desc="dense", dynamic_ncols=True) as bar:
        patched = copy_sharing_weights(model)
        dense = {
            name: (_follow(model, ids, bar), _continue(model, ids, new_tokens, bar))
            for name, ids in windows.items()
            if left
        }
        for config in left:
            bar.set_description_str(_name(config))
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
            row["dense_ms"], row["ms"] = time_steps(model, patched, timed, bar)
            row["timed_rate"] = bypass_summary(patched).rate
            disable_bypass(patched)
            journal.append(_name(config), row)
    return [journal.done[_name(config)] for config in configs]


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
    """The `count` tokens [W, count] that follow greedily on the first half of windows [W, T]."""
    cache = {cache_argument(model): DynamicCache(config=model.config)}
    given, found = ids[:, : ids.shape[1] // 2], []
    for _ in range(count):
        given = model(given, **cache, logits_to_keep=1).logits.argmax(-1)
        found.append(given)
        bar.update()
    return torch.cat(found, 1)


def _divergence(expected: list[torch.Tensor], found: list[torch.Tensor]) -> list[float]:
    """By layer, how far off what it gave is, as a share of its length: the mean over tokens."""
    each = [
        (other.float() - plain.float()).norm(dim=-1) / plain.float().norm(dim=-1)
        for plain, other in zip(expected, found, strict=True)
    ]
    return torch.stack(each).mean((0, 2)).tolist()


@torch.inference_mode()
def time_steps(dense: PreTrainedModel, patched: PreTrainedModel, ids: torch.Tensor, bar: tqdm) -> tuple[float, float]:
    """Median milliseconds of a decode step of each, over the given tokens [1, T]."""
    caches = {each: {cache_argument(each): DynamicCache(config=each.config)} for each in (dense, patched)}
    times = {dense: [], patched: []}
    for number, given in enumerate(ids.split(1, 1)):
        # Taking turns, so that neither always finds the processor's cache as the other left it.
        for each in (dense, patched) if number % 2 else (patched, dense):
            synchronise(ids.device)
            start = time.perf_counter()
            each(given, **caches[each])
            synchronise(ids.device)
            times[each].append((time.perf_counter() - start) * 1e3)
        bar.update()
    # The first token is a prompt.
    return statistics.median(times[dense][1:]), statistics.median(times[patched][1:])


def format_rows(rows: list[dict]) -> str:
    """The table of what was measured, a line for each pair, threshold and text, and that of the times."""
    width = max(len("text"), *(len(name) for row in rows for name in row["texts"]))
    wide = max(len("gate>cached"), *(len(pair_of(row)) for row in rows))
    lines = [
        f"{'gate>cached':<{wide}}{'threshold':>11}  {'text':<{width}}{'repeated':>10}{'similarity':>16}"
        f"{'perplexity':>20}{'drift':>12}{'divergence':>12}",
        f"{'':<{wide}}{'':>11}  {'':<{width}}{'':>10}{'P10':>8}{'P50':>8}{'P90':>8}{'dense':>10}{'bypassed':>10}",
    ]
    for row in rows:
        for name, text in row["texts"].items():
            lines.append(
                f"{pair_of(row):<{wide}}{row['threshold']:>11.4g}  {name:<{width}}{text['rate']:>10.1%}"
                f"{text['p10']:>8.3f}{text['p50']:>8.3f}{text['p90']:>8.3f}"
                f"{text['dense_perplexity']:>10.3f}{text['perplexity']:>10.3f}"
                f"{text['drift']:>8.1%}{text['divergence'][-1]:>12.4f}"
            )
    lines += [
        "",
        f"{'gate>cached':<{wide}}{'threshold':>11}{'repeated':>12}{'ms/token':>20}",
        f"{'':<{wide}}{'':>11}{'':>12}{'dense':>10}{'bypassed':>10}",
    ]
    for row in rows:
        speed = row["dense_ms"] / row["ms"]
        lines.append(
            f"{pair_of(row):<{wide}}{row['threshold']:>11.4g}{row['timed_rate']:>12.1%}"
            f"{row['dense_ms']:>10.2f}{row['ms']:>10.2f}  {speed:.3f}x"
        )
    return "\n".join(lines)


def pair_of(row: dict) -> str:
    """The gate layer and those that repeat, as `1>4`; with "mlp" where MLPs do."""
    cached = ",".join(map(str, row["cache_layers"]))
    return f"{row['gate_layer']}>{cached}" + " mlp" * (row["target"] == "mlp")


def _name(config: BypassConfig) -> str:
    return f"{pair_of(dataclasses.asdict(config))} at {config.threshold:g}"


def _read(paths: list[Path]) -> dict[str, tuple[Path, str]]:
    """The texts, by their files' names."""
    texts = {}
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise CommandError(f"{path}: cannot be read ({reason}); give a text file") from None
        if not text.strip():
            raise CommandError(f"{path}: is empty; give a file that holds text")
        if path.stem in texts:
            raise CommandError(f"{path}: {texts[path.stem][0]} has that name too; give each class another file name")
        texts[path.stem] = path, text
    return texts


def _configs(arguments: argparse.Namespace, model: PreTrainedModel) -> list[BypassConfig]:
    """Every pair at every threshold, tried on the model."""
    layers = model.config.num_hidden_layers
    pairs = arguments.pairs or [(1, (3 * layers // 4,)), (1, (layers - 1,))]
    try:
        found = [
            BypassConfig(*pair, threshold, arguments.target) for pair in pairs for threshold in arguments.thresholds
        ]
        for config in found:
            enable_bypass(model, config)
            disable_bypass(model)
    except ValueError as error:
        raise CommandError(f"--pairs, --thresholds: {error}") from None
    return list(dict.fromkeys(found))


def _settings(arguments: argparse.Namespace, texts: dict[str, tuple[Path, str]]) -> dict:
    """What a continued run must have in common with the one that it continues."""
    model = Path(arguments.model)
    return {
        "model": str(model.resolve()) if model.exists() else arguments.model,
        **{f"text {name}": f"{path.resolve()}, {len(text)} characters" for name, (path, text) in texts.items()},
        "tokens": arguments.tokens,
        "windows": arguments.windows,
        "new_tokens": arguments.new_tokens,
        "device": arguments.device,
        "dtype": arguments.dtype,
    }

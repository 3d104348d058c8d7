"""`neuroflow eval llm`: the cost and benefit of repeating layer outputs in a language model."""

import argparse
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..llm import DECODERS, BypassConfig, disable_bypass, enable_bypass
from ..llm_evaluation import cut_windows, evaluate, pair_of
from . import CommandError
from .common import INTERRUPTED, KEPT, open_findings, pinned_model, torch_device
from .model import require_finite
from .options import add_dtype, count

DESCRIPTION = """\
Let layers of a language model repeat their last output in decode steps where a gate layer's attention output hardly
changed, and measure what that costs and saves.

MODEL is a Phi-3, Llama, Qwen2, Qwen3 or GPT-2, with its tokenizer. Each FILE is a class of prompt, named after its
file: code.txt, structured.txt, prose.txt. Windows of its text are read token by token, as in decoding. For every pair
of gate and cached layers and every threshold, the report has: the share of steps in which the cached layers repeat,
percentiles of the gate's cosine, perplexity next to dense, drift (the share of tokens that differ from the unpatched
model's when both continue the first half of each window greedily), divergence of the last hidden state (distance to
dense relative to its norm), and milliseconds per token, measured in turns.
"""

EXAMPLES = """\
examples:
  neuroflow eval llm --model microsoft/Phi-3-mini-4k-instruct --text code.txt structured.txt prose.txt --dtype bfloat16
  neuroflow eval llm --model ./my-llama --text prose.txt --pairs 1:12 3:5 --thresholds 0.7 0.9 --out result.json
  neuroflow eval llm --model ./my-llama --text prose.txt --pairs 1:8,9,10 --target mlp --out result.json --resume
"""

ACCEPTED = f"a causal model of one of {', '.join(DECODERS)}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `neuroflow eval llm`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.set_defaults(function=eval_llm)
    parser.add_argument("--model", required=True, metavar="MODEL", help="Hugging Face id or local directory")
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help="one text for each class of prompt, UTF-8"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    add_dtype(parser)
    bypass = parser.add_argument_group("what repeats, and when", "every pair at every threshold")
    bypass.add_argument(
        "--pairs",
        type=_layers,
        nargs="+",
        metavar="G:C",
        help="gate layer and cached layers, such as 1:24 or 1:24,31, counted from 0; a C before G uses the "
        "previous step's decision (default: 1 with the layer at three quarters of the depth, and 1 with the last)",
    )
    bypass.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        default=[0.65, 0.7, 0.8, 0.9],
        metavar="T",
        help="repeat if the cosine is at least T (default: 0.65 0.7 0.8 0.9)",
    )
    bypass.add_argument(
        "--target", default="attention", choices=("attention", "mlp"), help="what repeats (default: attention)"
    )
    length = parser.add_argument_group("amount of text")
    length.add_argument(
        "--tokens", type=_window, default=256, metavar="N", help="tokens in a window of text (default: 256)"
    )
    length.add_argument("--windows", type=count, default=4, metavar="N", help="windows from each text (default: 4)")
    length.add_argument(
        "--new-tokens", type=count, default=64, metavar="N", help="tokens to continue each prompt by (default: 64)"
    )
    output = parser.add_argument_group("what is written")
    output.add_argument(
        "--out", type=Path, metavar="FILE", help="a .json file of all results, with divergence by layer"
    )
    output.add_argument("--resume", action="store_true", help="continue the --out of the same command")


def _layers(text: str) -> tuple[int, tuple[int, ...]]:
    """A gate layer and the layers that repeat."""
    gate, colon, cached = text.partition(":")
    numbers = [gate, *cached.split(",")]
    if not colon or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a pair of layers; give 1:24 or 1:24,31")
    return int(gate), tuple(map(int, numbers[1:]))


def _window(text: str) -> int:
    tokens = count(text)
    if tokens < 4:
        raise argparse.ArgumentTypeError(f"{text} is not 4 or more")
    return tokens


def eval_llm(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow eval llm` and return the exit code.

    Raises:
        CommandError: bad options, or a text that is too short.
        JournalError: the unfinished run was made with other settings, or cannot be read.
    """
    texts = _read_texts(arguments.text)
    findings = open_findings(arguments, _settings(arguments, texts), lambda row: format_rows([row]))
    model, tokenizer = load_language_model(
        arguments.model, torch_device(arguments.device), getattr(torch, arguments.dtype)
    )
    configs = _configs(arguments, model)
    windows = {}
    for name, (path, text) in texts.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) < arguments.tokens:
            message = f"gives {len(ids)} tokens; give a longer text, or fewer --tokens than {arguments.tokens}"
            raise CommandError(f"{path}: {message}")
        windows[name] = cut_windows(ids, arguments.tokens, arguments.windows).to(model.device)
    try:
        asked = evaluate(model, windows, configs, arguments.new_tokens, findings)
    except KeyboardInterrupt:
        if arguments.out is not None:
            print(KEPT, file=sys.stderr)
        return INTERRUPTED
    finally:
        findings.close()
    findings.finish()
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
    # A failure is reported below, in one line.
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise CommandError(f"model {name}: no such directory; give a saved model, or a Hugging Face id")
    try:
        kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
        if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) not in DECODERS:
            raise CommandError(f"model {name}: its type is {kind}; give {ACCEPTED}")
        model, loading = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except CommandError:
        raise
    # Hub, configuration, weights and tokenizer each raise their own errors.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CommandError(f"model {name}: cannot be loaded ({reason}); give {ACCEPTED}, with its tokenizer") from None
    missing = loading["missing_keys"]
    if missing:
        message = f"model {name}: {len(missing)} weights are missing, {min(missing)} first; give a whole checkpoint"
        raise CommandError(message)
    require_finite(name, model)
    return model.eval().to(device), tokenizer


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The table of results, one line for each pair, threshold and text, and the table of times."""
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


def _read_texts(paths: list[Path]) -> dict[str, tuple[Path, str]]:
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


def _settings(arguments: argparse.Namespace, texts: dict[str, tuple[Path, str]]) -> dict[str, Any]:
    """What a continued run must share with the run it continues."""
    return {
        "model": pinned_model(arguments),
        **{f"text {name}": f"{path.resolve()}, {len(text)} characters" for name, (path, text) in texts.items()},
        "tokens": arguments.tokens,
        "windows": arguments.windows,
        "new_tokens": arguments.new_tokens,
        "device": arguments.device,
        "dtype": arguments.dtype,
    }

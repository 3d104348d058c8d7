"""How well a language model copes with the bypass: `python -m bench.studies.llm`, on the model of `train_llm.py`.

For each gate layer, cached layer and threshold, on held-out code, tables and prose: how often layers repeat, perplexity
token by token, drift of greedy continuations, divergence by layer, and milliseconds per token beside dense. Then the
most that repeating can save: a model with random weights, large enough that reading its weights dominates a token's
time, in which every step repeats. A run that was stopped resumes.
"""

import argparse
from pathlib import Path

import torch
from neuroflow.journal import Findings
from neuroflow.llm import BypassConfig, disable_bypass, enable_bypass
from neuroflow.llm_evaluation import cut_windows, evaluate, pair_of, time_steps
from neuroflow.weights import copy_sharing_weights
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, Phi3ForCausalLM

from bench.studies.train_llm import DIRECTORY, MODEL, SHARES
from bench.tables import begin, share, table, write

PAIRS = ((1, (4,)), (1, (7,)), (3, (5,)), (6, (7,)), (1, (0,)))
MLP_PAIRS, MLP_THRESHOLDS = ((1, (4,)), (1, (4, 5, 6, 7))), (0.65, 0.9)
THRESHOLDS = (0.65, 0.8, 0.9)
TOKENS, WINDOWS, NEW_TOKENS = 256, 8, 48
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16}
EVERY_STEP = -2.0  # below every cosine


def most_saved():
    """Rows of a large model in which all layers but the first two repeat in every step."""
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**MODEL | LARGE | {"num_key_value_heads": 16})).eval()
    patched, rows = copy_sharing_weights(model), []
    ids = torch.randint(3, 259, (1, 128))
    with tqdm(total=2 * ids.shape[1], unit="step", desc="large") as bar:
        for target in ("attention", "mlp"):
            config = BypassConfig(1, tuple(range(2, LARGE["num_hidden_layers"])), EVERY_STEP, target)
            enable_bypass(patched, config)
            dense_ms, ms = time_steps(model, patched, ids, bar)
            disable_bypass(patched)
            rows.append({"target": target, "dense_ms": dense_ms, "ms": ms})
    return rows


def by_layer(values):
    return " ".join(f"{value:.3f}" for value in values)


def text(rows, large):
    parts = ["# Language models whose layers repeat", __doc__.split("\n\n", 1)[1].strip()]
    parts.append(
        "P10, P50 and P90 are percentiles of the cosine between the gate layer's attention outputs in consecutive "
        f"steps. Drift is the share of {NEW_TOKENS} greedy tokens after the first half of a window that differ from "
        "the plain model's. Divergence is the distance of the last hidden state from dense, as a share of its length. "
        "The pair 1>0 uses the decision of the step before."
    )
    names = ["gate>cached", "threshold", "text", "repeated", "P10", "P50", "P90", "dense", "bypassed", "drift"]
    for target, title in (("attention", "Attention that repeats"), ("mlp", "MLPs that repeat")):
        of_target = [row for row in rows if row["target"] == target]
        lines = []
        for row in of_target:
            for name, found in row["texts"].items():
                figures = [f"{found[key]:.3f}" for key in ("p10", "p50", "p90", "dense_perplexity", "perplexity")]
                pair = pair_of(row).removesuffix(" mlp")
                last = f"{found['divergence'][-1]:.3f}"
                drift = share(found["drift"])
                lines.append([pair, f"{row['threshold']:g}", name, share(found["rate"]), *figures, drift, last])
        parts += [f"## {title}", table([*names, "divergence"], lines)]
    lines = [
        [pair_of(row), name, by_layer(found["divergence"])]
        for row in rows
        if row["threshold"] == THRESHOLDS[0]
        for name, found in row["texts"].items()
    ]
    parts += [
        f"## Divergence by layer, threshold {THRESHOLDS[0]}",
        table(["gate>cached", "text", "layers 0 to 7"], lines),
    ]
    lines = [
        [
            pair_of(row),
            f"{row['threshold']:g}",
            share(row["timed_rate"]),
            f"{row['dense_ms']:.2f}",
            f"{row['ms']:.2f}",
            f"{row['dense_ms'] / row['ms']:.3f}x",
        ]
        for row in rows
    ]
    names = ["gate>cached", "threshold", "repeated", "dense, ms/token", "bypassed, ms/token", "speed"]
    parts += ["## Milliseconds per token, one row of code, in turns", table(names, lines)]
    lines = [
        [row["target"], f"{row['dense_ms']:.1f}", f"{row['ms']:.1f}", f"{row['dense_ms'] / row['ms']:.2f}x"]
        for row in large
    ]
    size = ", ".join(f"{name} {value}" for name, value in LARGE.items())
    parts += [
        f"## The most that repeating can save\n\nRandom weights, {size}, float32; layers 2 to 11 repeat in every step.",
        table(["what repeats", *names[3:]], lines),
    ]
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DIRECTORY, help="what bench.studies.train_llm wrote")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = begin("studies/llm")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = {}
    for name in SHARES:
        text_ids = tokenizer((arguments.model / f"{name}.txt").read_text())["input_ids"]
        windows[name] = cut_windows(text_ids, TOKENS, WINDOWS)
    configs = [BypassConfig(*pair, threshold) for pair in PAIRS for threshold in THRESHOLDS]
    configs += [BypassConfig(*pair, threshold, "mlp") for pair in MLP_PAIRS for threshold in MLP_THRESHOLDS]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = {"tokens": TOKENS, "windows": WINDOWS, "new_tokens": NEW_TOKENS, "parameters": parameters}
    kept = arguments.model / "tables.json"
    findings = Findings(
        kept, settings | {"weights": (arguments.model / "model.safetensors").stat().st_mtime}, resume=True
    )
    rows = evaluate(model, windows, configs, NEW_TOKENS, findings)
    findings.finish()
    large = most_saved()
    write("studies/llm", machine, settings | {"large": LARGE}, {"small": rows, "large": large}, text(rows, large))


if __name__ == "__main__":
    main()

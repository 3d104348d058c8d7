"""Train a small language model on Python's standard library: `OMP_NUM_THREADS=1 python -m bench.studies.train_llm`.

A Phi-3 of 2.6 million parameters over bytes, for `python -m bench.studies.llm`. It reads the library of the running
interpreter: its source, its docstrings and its literals, with every 16th module held out. A run that was stopped
resumes from its last checkpoint, on the batches that it would have seen.
"""

import argparse
import ast
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from tqdm import tqdm
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

from bench.studies.training import load_checkpoint, optimizer_of, save_checkpoint, set_rate

LIBRARY = Path(os.__file__).parent
DIRECTORY = Path(".benchmarks") / "llm"
LENGTH, BATCH = 256, 4
SHARES = {"code": 0.5, "structured": 0.15, "prose": 0.35}
OTHERS = {"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__"}
SHORTEST = 200  # characters of a literal or documentation string that is taken
SPECIAL = ["<pad>", "<end>", "<unknown>"]
FIRST_BYTE = len(SPECIAL)
MODEL = {
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "vocab_size": FIRST_BYTE + 256,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def texts(held_out=False):
    """The library's text by class: "code" is source as it stands, "structured" literals of numbers and strings, and
    "prose" documentation strings and the interpreter's help topics.
    """
    found = {name: [] for name in SHARES}
    paths = [path for path in sorted(LIBRARY.rglob("*.py")) if not OTHERS & set(path.relative_to(LIBRARY).parts)]
    for number, path in enumerate(paths):
        if (number % 16 == 7) != held_out:
            continue
        source = path.read_text(encoding="utf-8", errors="ignore")
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
        tables = [segment for node in tree.body if (segment := literal(source, node))]
        if path.parent.name == "pydoc_data":
            found["prose"] += ast.literal_eval(tree.body[-1].value).values() if tables else []
            continue
        found["structured"] += tables
        # A module that is mostly tables would not be code.
        if sum(map(len, tables)) < len(source) / 4:
            found["code"].append(source)
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = (ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented))
        found["prose"] += [string for string in strings if len(string) >= SHORTEST]
    return {name: "\n\n".join(parts) + "\n" for name, parts in found.items()}


def literal(source, node):
    """The source of a literal list, tuple, set or dictionary that a statement of a module assigns, or None."""
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return None
    if not isinstance(node.value, ast.List | ast.Tuple | ast.Set | ast.Dict):
        return None
    try:
        ast.literal_eval(node.value)
    except (ValueError, TypeError):
        return None
    segment = ast.get_source_segment(source, node.value)
    return segment if len(segment) >= SHORTEST else None


def byte_tokenizer():
    """Of which every byte is a token, in their order, after `SPECIAL`."""
    # The byte-level alphabet writes bytes that do not print as the characters from 256 on.
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in prints]
    characters = {byte: chr(byte) for byte in prints} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    vocabulary = {name: number for number, name in enumerate(SPECIAL)}
    vocabulary |= {characters[byte]: byte + FIRST_BYTE for byte in range(256)}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def batch(streams, step):
    """Ids [BATCH, LENGTH + 1] of windows of the `streams`, uint8 by class, drawn by their shares."""
    random = np.random.default_rng([0, step])
    rows = []
    for name in random.choice(list(SHARES), BATCH, p=list(SHARES.values())):
        start = random.integers(len(streams[name]) - LENGTH)
        rows.append(streams[name][start : start + LENGTH + 1])
    return torch.from_numpy(np.stack(rows)).long() + FIRST_BYTE


def train(arguments):
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**MODEL)).train()
    optimizer = optimizer_of(model)
    checkpoint = arguments.out / "checkpoint.safetensors"
    start = load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else 0
    streams = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts().items()}
    bar = tqdm(range(start, arguments.steps), initial=start, total=arguments.steps, unit="batch", mininterval=10)
    running = None
    for step in bar:
        set_rate(optimizer, step, arguments.steps, arguments.rate, warmup=0.03)
        ids = batch(streams, step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix_str(f"perplexity {math.exp(running):.3f}", refresh=False)
        if (step + 1) % 100 == 0:
            save_checkpoint(checkpoint, model, optimizer, step + 1)
    return model.eval()


@torch.inference_mode()
def perplexity(model, text, windows=64):
    """Of a byte, over windows that lie evenly over the text."""
    stream = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() + FIRST_BYTE
    starts = torch.linspace(0, len(stream) - LENGTH - 1, windows).long()
    ids = torch.stack([stream[start : start + LENGTH + 1] for start in starts])
    logits = model(ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200, help="batches of 1024 bytes in all")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="the directory to write")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = train(arguments)
    model.save_pretrained(arguments.out)
    byte_tokenizer().save_pretrained(arguments.out)
    for name, text in texts(held_out=True).items():
        (arguments.out / f"{name}.txt").write_text(text)
        print(f"{name}: held-out perplexity {perplexity(model, text):.3f} a byte, of {len(text)} bytes")


if __name__ == "__main__":
    main()

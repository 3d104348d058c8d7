"""Where the time of a sparse frame goes, and how little it could take: `python -m bench.roofline`.

SigLIP base under architecture E, between key frames. A part's time excludes the parts within it, so the parts add up to
the frame. Its bound follows from the machine's measured ceilings: its bytes, each read or written once, at the rate of
memory, or its FLOPs at the rate of a large matrix product, whichever takes longer. Activations of few rows stay in the
processor's cache and can be faster than that; weights cannot, since together they do not fit. The ceiling of FLOPs is
that of torch's own product, which other kernels beat where a share is above 100 %. A part above 60 % of its bound is
done.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import statistics
import sys
import time
from unittest import mock

import neuroflow
import torch
from neuroflow.engine.passes import Pass
from neuroflow.patch import engine_of

import neuroflow_kernels
from bench import cases
from bench.run import DTYPES, ceilings_line, measure_ceilings, passes
from bench.tables import begin, share, table, write

SIZES, SKIPS = (224, 896), (0.97, 0.84)
SYSTEMS = {"float32": ("E", "rounded-E"), "bfloat16": ("E",)}
DONE = 0.6
REST = "rest outside the blocks"
WHOLE = ("patch projection", "gate", "pooling head")  # in the model's own dtype, whatever the precision
BLOCK = {
    "": "residual, rest of the blocks",
    "layer_norm1": "norms",
    "layer_norm2": "norms",
    "self_attn": "attention",
    "self_attn.q_proj": "query, key, value",
    "self_attn.k_proj": "query, key, value",
    "self_attn.v_proj": "query, key, value",
    "self_attn.out_proj": "attention's output",
    "mlp.fc1": "fc1",
    "mlp.activation_fn": "GELU",
    "mlp.fc2": "fc2",
}


class Clock:
    """Seconds of each part of what runs, without those of the parts within it.

    Attributes:
        spent: by part.
    """

    def __init__(self):
        self.spent = collections.Counter()
        self.parts, self.since = [], 0.0

    def within(self, part, function):
        @functools.wraps(function)  # with its signature, by which callers choose what they pass
        def timed(*args, **kwargs):
            self.switch()
            self.parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.parts.pop()

        return timed

    def switch(self):
        now = time.perf_counter()
        if self.parts:
            self.spent[self.parts[-1]] += now - self.since
        self.since = now


def under(clock, model):
    """A patched model as a system whose frames are under the clock: pixels [1, 3, size, size] -> embedding [1, D]."""
    anatomy = neuroflow.adapters.describe(model)
    for layer in anatomy.layers:
        for name, part in BLOCK.items():
            module = layer.get_submodule(name)
            # In place of a hook, which the engine might see and make way for.
            module.forward = clock.within(part, module.forward)
    pool, method = anatomy.pool
    anatomy.projection.forward = clock.within("patch projection", anatomy.projection.forward)
    setattr(pool, method, clock.within("pooling head", getattr(pool, method)))
    engine = engine_of(model)
    engine.choose = clock.within("gate", engine.choose)
    encode, scatter = clock.within(REST, cases.dense(model)), neuroflow_kernels.scatter_kv_

    def system(pixels):
        with contextlib.ExitStack() as stack:
            for method in ("select", "pack"):
                timed = clock.within("gate", getattr(Pass, method))
                stack.enter_context(mock.patch.object(Pass, method, timed))
            for name, module in list(sys.modules.items()):
                if name.startswith("neuroflow.") and vars(module).get("scatter_kv_") is scatter:
                    timed = clock.within("key/value scatter", scatter)
                    stack.enter_context(mock.patch.object(module, "scatter_kv_", timed))
            return encode(pixels)

    return system


def costs(model, name, active):
    """By part, the bytes and FLOPs of a frame of which `active` patches are encoded; None where nobody has counted."""
    config, patches = model.config, cases.patches_of(model)
    width, inner, blocks = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    window = config.num_channels * config.patch_size**2
    held = model.dtype.itemsize
    factor = cases.dtype_of(name, model.dtype).itemsize  # of weights, keys and values

    def linear(taken, given):
        size = factor * (taken + 1) * given + held * active * (taken + given)
        return blocks * size, blocks * 2 * active * taken * given

    def each(values, count, flops):
        """Of elements [active, values] in every block: how many tensors of them, and FLOPs of each."""
        return blocks * held * active * values * count, blocks * active * values * flops

    head = config.num_attention_heads * width + 2 * width**2 + 2 * width * inner
    return {
        "patch projection": (held * (2 * patches * window + (window + active) * width), 2 * active * window * width),
        # The reference is in float32.
        "gate": (patches * width * (held + 8) + 2 * held * active * width, 6 * patches * width),
        "norms": each(width, 2 * 2, 2 * 8),
        "query, key, value": linear(width, 3 * width),
        "key/value scatter": (blocks * 2 * active * width * (held + factor), 0),
        "attention": (
            blocks * width * (2 * held * active + 2 * factor * patches),
            blocks * 4 * active * patches * width,
        ),
        "attention's output": linear(width, width),
        "fc1": linear(width, inner),
        "GELU": each(inner, 2, 8),
        "fc2": linear(inner, width),
        BLOCK[""]: each(width, 2 * 3, 2),
        # Folded, its keys and values of all patches are products with one row for each head.
        "pooling head": (
            held * (patches * width + head),
            4 * patches * width * config.num_attention_heads + 4 * width**2 + 4 * width * inner,
        ),
        REST: None,
    }


@torch.inference_mode()
def measure(model, name, skip, ceilings, seconds, frames=5):
    """The rows of a frame, one a part, or none where the system is wrong.

    seconds, frames: of measuring, at least; a frame under the clock takes turns with one that is not.
    """
    active = cases.active_of(model, skip)
    pixels = list(itertools.islice(cases.frames(model, cases.patches_of(model)), 2))
    if not passes(model, name, cases.error_of(model, name, pixels, cases.dense(model)(pixels[1]))):
        return []
    settings = {"budget": active, "floor": 0, "precision": cases.precision_of(name)}
    plain, watched = (cases.patched(model, name[-1], **settings) for _ in range(2))
    clock = Clock()
    systems = cases.dense(plain), under(clock, watched)
    clip, times, spent, start = cases.frames(model, active), [], [], time.perf_counter()
    for number, shown in enumerate(clip):
        if number > frames and time.perf_counter() - start >= seconds:
            break
        began = time.perf_counter()
        systems[0](shown)
        times.append(1e3 * (time.perf_counter() - began))
        clock.spent.clear()
        systems[1](shown)
        spent.append({part: 1e3 * taken for part, taken in clock.spent.items()})
    encoded = int(neuroflow.last_pass(watched)[0].active.sum())
    if encoded != active:
        raise RuntimeError(f"{encoded} of {cases.patches_of(model)} patches were encoded, not {active}")
    times, spent = times[1:], spent[1:]  # without the key frame
    frame = {"size": model.config.image_size, "dtype": cases.name_of(model.dtype), "system": name, "skip": skip}
    frame |= {"frames": len(times), "frame_ms": statistics.median(times)}
    frame |= {"frame_under_clock_ms": statistics.median(sum(each.values()) for each in spent)}
    rows = []
    for part, cost in costs(model, name, active).items():
        taken = statistics.median(each.get(part, 0.0) for each in spent)
        row = frame | {"part": part, "median_ms": taken}
        if cost is not None:
            factors = model.dtype if part in WHOLE else cases.dtype_of(name, model.dtype)
            row |= bound(*cost, ceilings, cases.name_of(factors), taken)
        rows.append(row)
    return rows


def bound(size, flops, ceilings, dtype, taken):
    """The least milliseconds that the ceilings allow, by which of them, and its share of those taken."""
    by = {"memory": 1e3 * size / ceilings["memory"], "FLOPs": 1e3 * flops / ceilings[dtype]}
    limit = max(by, key=by.get)
    reached = by[limit] / taken if taken else None
    found = {"bytes": size, "flops": flops, "least_ms": by[limit], "limit": limit, "share": reached}
    return found | {"done": reached is not None and reached > DONE}


def format_row(row):
    cells = [row["part"], f"{row['median_ms']:.3f}", share(row["median_ms"] / row["frame_under_clock_ms"])]
    if "bytes" not in row:
        return [*cells, *"-----", ""]
    work = [f"{row['bytes'] / 1e6:.2f}", f"{row['flops'] / 1e9:.3f}", f"{row['least_ms']:.3f}", row["limit"]]
    return [*cells, *work, share(row["share"]), "done" if row["done"] else ""]


def text_of(rows):
    """The table of one frame's rows, under what it is of."""
    first = rows[0]
    precision = ', `precision="bfloat16"`' if first["system"].startswith("rounded") else ""
    head = f"{first['size']} px, {first['dtype']}{precision}, {first['skip']:.0%} skipped"
    about = f"A frame takes {first['frame_ms']:.2f} ms, and {first['frame_under_clock_ms']:.2f} under the clock; "
    about += f"medians of {first['frames']} frames."
    names = ["part", "ms", "of the frame", "MB", "GFLOP", "least ms", "by", "of the bound", ""]
    return f"## {head}\n\n{about}\n\n{table(names, map(format_row, rows))}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=SIZES)
    parser.add_argument("--skip", type=float, nargs="+", default=SKIPS)
    parser.add_argument("--seconds", type=float, default=15, help="to measure a kind of frame, at least")
    parser.add_argument("--out", default="roofline", help="the stem of the files in bench/results, or a path's")
    arguments = parser.parse_args()
    machine, ceilings = begin(arguments.out), measure_ceilings("cpu")
    rows, texts = [], []
    for size, dtype in itertools.product(arguments.size, SYSTEMS):
        model = cases.tower(size, DTYPES[dtype])
        for name, skip in itertools.product(SYSTEMS[dtype], arguments.skip):
            found = measure(model, name, skip, ceilings, arguments.seconds)
            if found:
                rows += found
                texts.append(text_of(found))
                print(texts[-1], end="\n\n", flush=True)
    about = f"{__doc__.partition(chr(10) * 2)[2].strip()}\n\nCeilings: {ceilings_line(ceilings)}."
    text = "\n\n".join(["# Where the time of a frame goes", about, *texts])
    write(arguments.out, machine, {"ceilings": ceilings, "seconds": arguments.seconds}, rows, text)


if __name__ == "__main__":
    main()

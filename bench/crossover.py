"""Above which share of active patches a dense pass is faster: `python -m bench.crossover`.

Models with random weights, on random frames in which a given share of the patches is new from frame to frame: the
median of a pass's time over the unpatched model's in the same turn, the crossover that follows from it, and the one
that a patched model measures on its first block.
"""

import argparse
import itertools
import statistics

import neuroflow
import torch
from neuroflow.engine.crossover import SHARES, crossing

from bench import cases
from bench.run import timed
from bench.streams import MODELS
from bench.tables import begin, share, table, write


@torch.inference_mode()
def measure(name, size, dtype, arch, turns, device="cpu"):
    model = MODELS[name](size).to(device, dtype)
    active = [round(each * cases.patches_of(model)) for each in SHARES]
    clips = [cases.frames(model, count) for count in active]
    rule = {"floor": 0, "max_age": None, "cut_share": None, "cut_surprise": None, "launch": "eager"}
    sparse = [cases.patched(model, arch, budget=count, dense_above=1.0, **rule) for count in active]
    asked = cases.patched(model, arch, **rule)
    asked(next(clips[0]))
    (found,) = neuroflow.summary(asked).crossovers.values()
    dense, ratios = [], []
    for step in range(turns + 2):
        taken = []
        for each, pixels in zip((model, *sparse), (next(clips[0]), *map(next, clips)), strict=True):
            taken.append(timed(lambda each=each, pixels=pixels: each(pixels), device)[1])
        if step >= 2:  # the first steps fill what later ones find
            dense.append(taken[0])
            ratios.append([own / taken[0] for own in taken[1:]])
    ratios = [statistics.median(ratio) for ratio in zip(*ratios, strict=True)]
    return {
        "model": f"{name}, {size} px",
        "dtype": cases.name_of(dtype),
        "arch": arch,
        "dense": statistics.median(dense),
        "ratios": ratios,
        "crossover": crossing(ratios),
        "measured": found,
    }


def format_row(row):
    ratios = [f"{ratio:.2f}" for ratio in row["ratios"]]
    found = ["never" if row[name] == 1 else share(row[name]) for name in ("crossover", "measured")]
    return [row["model"], row["dtype"], row["arch"], f"{row['dense']:.0f} ms", *ratios, *found]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--size", type=int, nargs="+", default=[224, 448])
    parser.add_argument("--arch", nargs="+", default=["C", "E"])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    machine, rows = begin("crossover"), []
    dtypes = (torch.float32, torch.bfloat16)
    for name, size, dtype, arch in itertools.product(arguments.model, arguments.size, dtypes, arguments.arch):
        rows.append(measure(name, size, dtype, arch, arguments.turns, arguments.device))
        print(*format_row(rows[-1]), sep="  ", flush=True)
    names = ["model", "dtype", "arch", "dense", *map(share, SHARES), "crossover", "by the first block"]
    text = f"""# The crossover

{__doc__.partition(chr(10) * 2)[2].strip()}

{table(names, [format_row(row) for row in rows])}"""
    write("crossover", machine, {"turns": arguments.turns}, rows, text)


if __name__ == "__main__":
    main()

"""What the pooling head costs a sparse frame, whole and folded: `python -m bench.head`.

SigLIP's head projects every token to a key and a value, although a sparse frame changes few tokens. Folded, its single
query moves into the keys' weights and the values' weights move behind the sum, so that nothing has to be projected or
cached. Both are C with the same weights and frames at 97 % skipped, and take turns; a speed-up is the median of ratios
within a turn. Both have to give the same embedding in the same run, up to rounding.
"""

import argparse
import itertools
import statistics

import torch
from torch import nn

from bench import cases
from bench.run import DTYPES, timed
from bench.tables import begin, table, write

SKIP = 0.97


class Whole(nn.Module):
    """A pooling head that NeuroFlow does not know, and so leaves as it is."""

    def __init__(self, head):
        super().__init__()
        self.whole = head

    def forward(self, tokens):
        return self.whole(tokens)


@torch.inference_mode()
def measure(size, dtype, turns):
    model = cases.tower(size, dtype)
    active = cases.active_of(model, SKIP)
    settings = {"budget": active, "floor": 0, "score": "surprise"}
    folded = cases.patched(model, "C", **settings)
    model.head = Whole(model.head)
    ways = {"folded": cases.dense(folded), "whole": cases.dense(cases.patched(model, "C", **settings))}
    times = {name: [] for name in ways}
    for step, pixels in enumerate(itertools.islice(cases.frames(model, active), turns + 2)):
        found = {}
        for name, encode in sorted(ways.items(), reverse=bool(step % 2)):
            found[name], taken = timed(lambda encode=encode, pixels=pixels: encode(pixels), "cpu")
            if step >= 2:  # a key frame, and the first after it
                times[name].append(taken)
        error = cases.distance(found["folded"].float(), found["whole"].float())
        if error > cases.TOLERANCE[dtype]:
            raise SystemExit(f"{size} px, {cases.name_of(dtype)}: the two heads differ by {error:.1e}")
    ratios = [whole / folded for whole, folded in zip(times["whole"], times["folded"], strict=True)]
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {"size": size, "dtype": cases.name_of(dtype), **medians, "ratio": statistics.median(ratios)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=cases.SIZES)
    parser.add_argument("--turns", type=int, default=20)
    arguments = parser.parse_args()
    machine, rows, lines = begin("head"), [], []
    for size, dtype in itertools.product(arguments.size, DTYPES.values()):
        rows.append(measure(size, dtype, arguments.turns))
        milliseconds = [f"{rows[-1][name]:.1f} ms" for name in ("whole", "folded")]
        lines.append([f"{size} px", rows[-1]["dtype"], *milliseconds, f"{rows[-1]['ratio']:.2f}x"])
        print(*lines[-1], sep="  ", flush=True)
    names = ["frames", "dtype", "C, whole head", "C, folded head", "speed-up"]
    about = __doc__.partition("\n\n")[2].strip()
    text = f"# The pooling head of a sparse frame\n\n{about}\n\n{table(names, lines)}"
    write("head", machine, {"turns": arguments.turns}, rows, text)


if __name__ == "__main__":
    main()

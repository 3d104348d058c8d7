"""Serving a skipped patch by its nearest version instead of its last: `python -m bench.studies.reuse`.

In a clip without a name, a patch that is not encoded has a version before it and often one after it. An ImageNet ViT-Ti
at 224 px encodes the same patches both ways, on 32 frames of each clip at several frame rates. Cosines are those of CLS
and of the patches' tokens to the unpatched model's. The time is that of "nearest" over that of "last", the median of
ratios within a turn.
"""

import functools
import itertools
import operator
import statistics

import neuroflow
import torch
from neuroflow import NeuroFlowConfig
from neuroflow.weights import copy_sharing_weights

from bench.run import timed
from bench.studies.protocol import find_threshold, large_clips, load_classifier, read_clip
from bench.tables import begin, cosine, share, table, write


@torch.inference_mode()
def measure(skips=(0.84, 0.7), length=32, turns=5):
    """Of each clip, rate and share skipped: mean cosines to dense and relative time, by what serves a skipped patch."""
    model, unpatched = load_classifier()
    towers, rows = {"last": model.vit, "nearest": copy_sharing_weights(model).vit}, []

    def skipped_at(threshold, frames):
        neuroflow.enable_cache(towers["last"], NeuroFlowConfig(threshold=threshold, reuse="last", dense_above=1.0))
        towers["last"](frames)
        reports = neuroflow.last_pass(towers["last"])[1:]
        neuroflow.disable_cache(towers["last"])
        return statistics.mean(report.skipped for report in reports)

    for rate, (name, path) in itertools.product((1, 2, 4, None), large_clips().items()):
        frames = read_clip(path, 224, length, rate)
        if len(frames) < length // 2:
            continue
        expected = unpatched.vit(frames).last_hidden_state
        for skip in skips:
            threshold = find_threshold(functools.partial(skipped_at, frames=frames), skip, 0.1, tolerance=0.01)
            row = {"clip": name, "rate": rate, "frames": len(frames), "skipped": skipped_at(threshold, frames)}
            times = {kind: [] for kind in towers}
            for kind, tower in towers.items():
                neuroflow.enable_cache(tower, NeuroFlowConfig(threshold=threshold, reuse=kind, dense_above=1.0))
                found = tower(frames).last_hidden_state
                cosines = torch.nn.functional.cosine_similarity(found[1:], expected[1:], dim=-1)
                row |= {f"cls_{kind}": cosines[:, 0].mean().item(), f"tokens_{kind}": cosines[:, 1:].mean().item()}
            for turn in range(turns):
                for kind, tower in sorted(towers.items(), reverse=bool(turn % 2)):
                    times[kind].append(timed(functools.partial(tower, frames), "cpu")[1])
            for tower in towers.values():
                neuroflow.disable_cache(tower)
            row["time"] = statistics.median(map(operator.truediv, times["nearest"], times["last"]))
            rows.append(row)
            print(*format_row(row), sep="  ", flush=True)
    return rows


def format_row(row):
    rate = "full" if row["rate"] is None else f"{row['rate']}/s"
    figures = (row[f"{of}_{kind}"] for of in ("cls", "tokens") for kind in ("last", "nearest"))
    return [row["clip"], rate, str(row["frames"]), share(row["skipped"]), *map(cosine, figures), f"{row['time']:.2f}"]


def main():
    machine = begin("studies/reuse")
    rows = measure()
    about = __doc__.partition("\n\n")[2].strip()
    names = ["clip", "rate", "frames", "skipped", "CLS, last", "nearest", "tokens, last", "nearest", "time"]
    text = f"# The last version of a patch, or its nearest\n\n{about}\n\n{table(names, map(format_row, rows))}"
    write("studies/reuse", machine, {}, rows, text)


if __name__ == "__main__":
    main()

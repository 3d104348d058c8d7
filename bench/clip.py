"""A clip in one call beside dense in batches of as many frames: `python -m bench.clip`.

Models with random weights, architecture E, on random frames of whose patches a share is new from frame to frame. Both
ways take turns, a step being T frames; a speed-up is the median of ratios within a turn. "going on": the stream is
known from the call before. "with its key frame": the clip has no name, and begins with a frame that is encoded whole.
Dense is the unpatched model in batches of the same T; beside the speed-up over that stands the one over dense at its
own best T. What a clip gives must be what its frames give one by one, in the same run, up to rounding.

`--fidelity` measures instead what clips lose where that is not so: an ImageNet ViT-Ti at 224 px on real clips, at the
default settings, whose score reads the attention that the pooled output paid the patches, of which a pass knows no more
than its stream did before it. The threshold is the one that skips 84 % frame by frame.

`--reuse` measures what clips without a name gain by serving a patch that is not encoded by the nearest of its versions,
before or after, over the last: the same ViT-Ti on 32 frames of each clip at several rates, the same patches encoded
both ways, cosines of CLS and of the patches' tokens. The time is that of "nearest" over that of "last", the median
of ratios within a turn.
"""

import argparse
import functools
import itertools
import operator
import statistics

import neuroflow
import torch
from neuroflow import NeuroFlowConfig
from neuroflow.weights import copy_sharing_weights

from bench import cases
from bench.run import DTYPES, timed
from bench.streams import MODELS, embedding
from bench.studies.fidelity import large_clips, load_classifier
from bench.tables import begin, cosine, embeddings, find_threshold, gate_of, read_clip, run_at_skip, share, table, write

LENGTHS = (1, 4, 16, 32)
SKIPS = (0.97, 0.84)


@torch.inference_mode()
def measure(name, size, dtype, length, skip, turns, device="cpu"):
    model = MODELS[name](size).to(device, dtype)
    active = cases.active_of(model, skip)
    endless = cases.frames(model, active)
    shown = (torch.cat([*itertools.islice(endless, length)]) for _ in itertools.count())
    rule = {"budget": active, "floor": 0, "score": "surprise", "cut_share": 1.0, "cut_surprise": None, "max_age": None}
    patched = cases.patched(model, "E", **rule)
    alone = cases.patched(model, "E", **rule)

    def going_on(frames):
        with neuroflow.cache_context(patched, "clip"):
            return embedding(patched, patched(frames))

    def one_by_one(frames):
        with neuroflow.cache_context(alone, "clip"):
            return torch.cat([embedding(alone, alone(frame)) for frame in frames.split(1)])

    ways = {"dense": lambda frames: model(frames), "going_on": going_on}
    if length > 1:
        ways["with_key_frame"] = lambda frames: embedding(patched, patched(frames))
    first = next(shown)
    error = cases.distance(going_on(first).float(), one_by_one(first).float())
    if error > cases.TOLERANCE[dtype]:
        raise SystemExit(f"{name}, {dtype}, T = {length}: a clip and its frames differ by {error:.1e}")
    times = {way: [] for way in ways}
    for step, frames in enumerate(itertools.islice(shown, turns + 1)):
        for way, encode in sorted(ways.items(), reverse=bool(step % 2)):
            taken = timed(lambda encode=encode, frames=frames: encode(frames), device)[1]
            if step:
                times[way].append(taken)
    row = {"model": f"{name}, {size} px", "dtype": cases.name_of(dtype), "skipped": skip, "frames": length}
    for way, taken in times.items():
        row[way] = statistics.median(taken) / length
        ratios = [dense / own for dense, own in zip(times["dense"], taken, strict=True)]
        row[f"{way}_speedup"] = statistics.median(ratios)
    return row


@torch.inference_mode()
def fidelity(lengths):
    """Of each clip, mean cosine to dense and share skipped, frame by frame and in clips of each of `lengths` frames."""
    model, unpatched = load_classifier()
    gate, rows = gate_of(model), []
    for name, path in large_clips().items():
        frames = read_clip(path, 224, 120)
        dense = torch.cat([embeddings(unpatched, part) for part in frames.split(30)])
        config = NeuroFlowConfig(dense_above=1.0)
        chosen, (alone,) = run_at_skip(model, gate, [frames], config, 0.84, 0.1)
        rows.append({"clip": name, "frames": 1} | _figures(alone.embeddings, alone.skipped.tolist(), dense))
        for length in lengths:
            neuroflow.enable_cache(model, chosen)
            found, skipped = [], []
            with neuroflow.cache_context(model, name):
                for part in frames.split(length):
                    found.append(embeddings(model, part))
                    skipped += [report.skipped for report in neuroflow.last_pass(model)]
            neuroflow.disable_cache(model)
            rows.append({"clip": name, "frames": length} | _figures(torch.cat(found), skipped, dense))
    return rows


@torch.inference_mode()
def reuse(skips=(0.84, 0.7), length=32, turns=5):
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
            print(*format_reuse(row), sep="  ", flush=True)
    return rows


def format_reuse(row):
    rate = "full" if row["rate"] is None else f"{row['rate']}/s"
    figures = (row[f"{of}_{kind}"] for of in ("cls", "tokens") for kind in ("last", "nearest"))
    return [row["clip"], rate, str(row["frames"]), share(row["skipped"]), *map(cosine, figures), f"{row['time']:.2f}"]


def _figures(found, skipped, dense):
    cosines = torch.nn.functional.cosine_similarity(found, dense)[1:]
    return {"skipped": statistics.mean(skipped[1:]), "cosine": cosines.mean().item()}


def format_row(row, best):
    def way(name):
        if name not in row:
            return ["-", "-", "-"]
        return [f"{row[name]:.1f} ms", f"{row[f'{name}_speedup']:.1f}x", f"{best / row[name]:.1f}x"]

    kind = [row["model"], row["dtype"], f"{row['skipped']:.0%}", str(row["frames"]), f"{row['dense']:.1f} ms"]
    return [*kind, *way("going_on"), *way("with_key_frame")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--size", type=int, nargs="+", default=[224, 448])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--length", type=int, nargs="+", default=LENGTHS, help="T, frames of a call")
    parser.add_argument("--skip", type=float, nargs="+", default=SKIPS)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fidelity", action="store_true", help="what clips lose, on real ones")
    parser.add_argument("--out", default="clip", help="the stem of the files in bench/results, or a path's")
    parser.add_argument("--reuse", action="store_true", help="what clips without a name gain by their next versions")
    arguments = parser.parse_args()
    if arguments.reuse:
        machine = begin("studies/reuse")
        rows = reuse()
        names = ["clip", "rate", "T", "skipped", "CLS, last", "nearest", "tokens, last", "nearest", "time"]
        text = f"# The last version of a patch, or its nearest\n\n{table(names, map(format_reuse, rows))}"
        write("studies/reuse", machine, {}, rows, text)
        print(text)
        return
    if arguments.fidelity:
        machine = begin(f"studies/{arguments.out}-fidelity")
        rows = fidelity([length for length in arguments.length if length > 1])
        lines = [[row["clip"], str(row["frames"]), share(row["skipped"]), cosine(row["cosine"])] for row in rows]
        text = f"# What clips lose\n\n{table(['clip', 'T', 'skipped', 'cosine to dense'], lines)}"
        write(f"studies/{arguments.out}-fidelity", machine, {}, rows, text)
        print(text)
        return
    machine, rows, lines = begin(arguments.out), [], []
    of = itertools.product(arguments.model, arguments.size, arguments.dtype, arguments.skip)
    for name, size, dtype, skip in of:
        measured = [
            measure(name, size, DTYPES[dtype], length, skip, arguments.turns, arguments.device)
            for length in arguments.length
        ]
        best = min(row["dense"] for row in measured)
        for row in measured:
            lines.append(format_row(row, best))
            print(*lines[-1], sep="  ", flush=True)
        rows += measured
    names = ["model", "dtype", "skipped", "T", "dense, a frame", "going on, a frame", "speed-up", "over dense's best T"]
    names += ["with its key frame, a frame", "speed-up", "over dense's best T"]
    text = f"""# A clip in one call

{__doc__.partition(chr(10) * 2)[2].strip()}

{table(names, lines)}"""
    write(arguments.out, machine, {"turns": arguments.turns}, rows, text)


if __name__ == "__main__":
    main()

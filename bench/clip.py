"""A clip in one call beside dense batches of as many frames: `python -m bench.clip`.

Models with random weights, architecture E, on random frames in which a given share of the patches is new from frame to
frame. Both sides take turns, one step being T frames, and a speed-up is the median of ratios within a turn. "Going on"
is a stream that earlier calls have opened. "With its key frame" is a clip without a name, whose first frame is encoded
whole. Dense is the unpatched model in batches of the same T; the last column compares with dense at its own best T. A
clip has to give what its frames give one by one, in the same run, up to rounding.
"""

import argparse
import itertools
import statistics

import neuroflow
import torch

from bench import cases
from bench.run import DTYPES, timed
from bench.streams import MODELS, embedding
from bench.tables import begin, table, write

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
    parser.add_argument("--out", default="clip", help="the stem of the files in bench/results, or a path's")
    arguments = parser.parse_args()
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

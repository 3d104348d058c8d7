"""Many streams in one pass beside as many passes: `python -m bench.streams`.

Models with random weights, on random frames of each stream in which a given share of the patches is new from frame to
frame. Both ways take turns, one step being one frame of every stream; a speed-up is the median of ratios within a turn.
Both have to give every stream the same embedding in the same run, up to rounding.
"""

import argparse
import itertools
import statistics

import neuroflow
import torch
from transformers import ViTConfig, ViTModel

from bench import cases
from bench.run import DTYPES, timed
from bench.tables import begin, table, write

STREAMS = 8
SKIPS = (0.97, 0.84)
SIZE = 224


def vit_tiny(size):
    """The shape of ViT-Ti/16."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    return ViTModel(ViTConfig(**sizes, image_size=size, patch_size=16), add_pooling_layer=False).eval()


MODELS = {"ViT-Ti": vit_tiny, "SigLIP base": lambda size: cases.tower(size, torch.float32)}


def clips(model, streams, skip):
    """Endless frames [S, 3, H, W] of so many streams, each of which shows something else."""
    active = cases.active_of(model, skip)
    own = [cases.frames(model, active, seed=stream) for stream in range(streams)]
    return (torch.cat(frames) for frames in zip(*own, strict=True))


def together(model, names):
    return lambda frames: embedding(model, neuroflow.encode(model, frames, names))


def apart(model, names):
    def encode(frames):
        rows = [neuroflow.encode(model, frame, [name]) for frame, name in zip(frames.split(1), names, strict=True)]
        return torch.cat([embedding(model, row) for row in rows])

    return encode


def embedding(model, output):
    return neuroflow.adapters.describe(model).embedding(output)


@torch.inference_mode()
def measure(name, dtype, arch, streams, skip, turns, size=SIZE, device="cpu"):
    model = MODELS[name](size).to(device, dtype)
    names = list(range(streams))
    frames = clips(model, streams, skip)
    first = next(frames)
    config = {"score": "surprise", "threshold": 1e-3, "cut_share": None, "cut_surprise": None, "max_age": None}
    ways = {}
    for way in (together, apart):
        copied = cases.patched(model, arch, **config)
        ways[way] = way(copied, names)
        ways[way](first)
    times = {way: [] for way in ways}
    for step, shown in enumerate(itertools.islice(frames, turns + cases.RECORDED)):
        found = {}
        for way, encode in sorted(ways.items(), key=lambda _: step % 2, reverse=bool(step % 2)):
            found[way], taken = timed(lambda encode=encode, shown=shown: encode(shown), device)
            if step >= cases.RECORDED:
                times[way].append(taken)
        error = cases.distance(found[together].float(), found[apart].float())
        if error > cases.TOLERANCE[dtype]:
            raise SystemExit(f"{name}, {dtype}, {arch}: the two ways differ by {error:.1e}")
    ratios = [separate / packed for packed, separate in zip(times[together], times[apart], strict=True)]
    summary = neuroflow.summary(copied)
    return {
        "model": f"{name}, {size} px",
        "dtype": cases.name_of(dtype),
        "arch": arch,
        "streams": streams,
        "skipped": 1 - statistics.mean(float(stream.active.float().mean()) for stream in summary.streams.values()),
        "apart": statistics.median(times[apart]) / streams,
        "together": statistics.median(times[together]) / streams,
        "ratio": statistics.median(ratios),
    }


def format_row(row):
    return [
        row["model"],
        row["dtype"],
        row["arch"],
        str(row["streams"]),
        f"{row['skipped']:.0%}",
        f"{row['apart']:.1f} ms",
        f"{row['together']:.1f} ms",
        f"{row['ratio']:.2f}x",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--arch", nargs="+", default=["C", "E"])
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--skip", type=float, nargs="+", default=SKIPS)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="streams", help="the stem of the files in bench/results, or a path's")
    arguments = parser.parse_args()
    machine, rows = begin(arguments.out), []
    where = {"size": arguments.size, "device": arguments.device}
    of = itertools.product(arguments.model, arguments.dtype, arguments.skip, arguments.arch)
    for name, dtype, skip, arch in of:
        rows.append(measure(name, DTYPES[dtype], arch, arguments.streams, skip, arguments.turns, **where))
        print(*format_row(rows[-1]), sep="  ", flush=True)
    names = ["model", "dtype", "arch", "streams", "skipped", "apart, a frame", "together, a frame", "speed-up"]
    text = f"""# Many streams in one pass

{__doc__.partition(chr(10) * 2)[2].strip()}

{table(names, [format_row(row) for row in rows])}"""
    write(arguments.out, machine, {"turns": arguments.turns}, rows, text)


if __name__ == "__main__":
    main()

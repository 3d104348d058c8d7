"""Frames on a machine that is busy with something else: `python -m bench.busy`.

The median and the 95th percentile of a frame on a quiet machine, and next to as many endless processes as there are
cores. Torch and NeuroFlow have their default settings: a patched model runs on as many threads as there are free cores,
an unpatched one on all that torch has. Models have random weights, and in their random frames a given share of the
patches is new from frame to frame; a key frame encodes all of them. Measuring starts once the processes have run for a
while. Unpatched frames next to them are few, since one may take more than a second.
"""

import argparse
import contextlib
import itertools
import subprocess
import sys
import time

import neuroflow
import numpy as np
import torch

from bench import cases
from bench.run import timed
from bench.streams import MODELS
from bench.tables import begin, share, table, write
from neuroflow_kernels.cores import own_cores

SIZE = 224
SKIPS = (0.97, 0.84)
ARCH = "E"
FIRST, LEAST = 2, 5  # frames that settle and that are measured
SETTLED = 1.0  # seconds
CONFIG = {"score": "surprise", "threshold": 1e-3, "cut_share": None, "cut_surprise": None, "max_age": None}


@contextlib.contextmanager
def spinning(count):
    """A block beside so many processes that compute without end."""
    processes = []
    try:
        for _ in range(count):
            processes.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def systems(model):
    """Of each way to encode a frame, its name, how it does, and the share of patches that do not change."""
    for skip in SKIPS:
        patched = cases.patched(model, ARCH, **CONFIG)
        yield f"{ARCH}, {share(skip)} skipped", lambda frame, patched=patched: patched(pixel_values=frame), skip
    keyed = cases.patched(model, ARCH, **CONFIG)

    def key_frame(frame):
        neuroflow.reset_cache(keyed)
        return keyed(pixel_values=frame)

    yield f"{ARCH}, key frame", key_frame, SKIPS[0]
    yield "unpatched", lambda frame: model(pixel_values=frame), SKIPS[0]


def figures(encode, frames, seconds):
    """The milliseconds of frames for so many seconds, LEAST at least, once some were encoded for SETTLED."""

    def times_of(least, seconds):
        times, start = [], time.perf_counter()
        while len(times) < least or time.perf_counter() - start < seconds:
            frame = next(frames)
            times.append(timed(lambda frame=frame: encode(frame), "cpu")[1])
        return times

    times_of(FIRST, SETTLED)
    times = times_of(LEAST, seconds)
    return {"median": float(np.median(times)), "p95": float(np.quantile(times, 0.95)), "frames": len(times)}


@torch.inference_mode()
def measure(name, seconds):
    """A row for each way to encode frames."""
    model = MODELS[name](SIZE)
    for way, encode, skip in systems(model):
        frames = cases.frames(model, cases.active_of(model, skip))
        quiet = figures(encode, frames, seconds)
        with spinning(len(own_cores())):
            busy = figures(encode, frames, seconds)
        ratio = busy["median"] / quiet["median"]
        yield {"model": f"{name}, {SIZE} px", "system": way, "quiet": quiet, "busy": busy, "ratio": ratio}


def format_row(row):
    times = (f"{row[when][figure]:.1f} ms" for when in ("quiet", "busy") for figure in ("median", "p95"))
    return [row["model"], row["system"], *times, f"{row['ratio']:.2f}x"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=3, help="to measure each way, quiet and busy")
    parser.add_argument("--out", default="busy", help="the stem of the files in bench/results, or a path's")
    arguments = parser.parse_args()
    machine, rows = begin(arguments.out), []
    for row in itertools.chain.from_iterable(measure(name, arguments.seconds) for name in arguments.model):
        rows.append(row)
        print(*format_row(row), sep="  ", flush=True)
    names = ["model, float32", "system", "quiet, median", "p95", "busy, median", "p95", "busy / quiet"]
    settings = {"processes": len(own_cores()), "seconds": arguments.seconds, "least": LEAST}
    text = f"""# Frames on a busy machine

{__doc__.partition(chr(10) * 2)[2].strip()}

{table(names, [format_row(row) for row in rows])}"""
    write(arguments.out, machine, settings, rows, text)


if __name__ == "__main__":
    main()

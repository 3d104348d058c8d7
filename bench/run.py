"""Measure the registry: `python -m bench.run`, and `bench.compare` and `bench.plot` for what it writes.

All systems of a case take turns, and a speed-up is the median of ratios within a turn, so that a machine that changes
its pace changes both sides. A row is written only if its check passed in the same run. Time is that between two events
on a GPU, and wall-clock time on a CPU.

Ops read their inputs from so many copies that they come from memory, not from a cache. Frames of models are those
between key frames.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from pathlib import Path

import neuroflow
import numpy as np
import torch

from bench import cases
from bench.baselines import Published
from bench.tables import begin
from neuroflow_kernels import BackendUnavailable, unavailable, use_backend
from neuroflow_kernels.dispatch import BACKENDS

OUT = Path(".benchmarks", "run.json")
SYSTEMS = ("published-B", "published-C", "A", "B", "C", "D", "E", "rounded-C", "rounded-E")
GROUP = 4  # frames of a system in a turn, at most
SETTLED = 4  # frames after which a patched model knows the fastest kernels
DTYPES = {cases.name_of(dtype): dtype for dtype in cases.DTYPES}
OUTSIDE_CACHE = 2**27  # bytes, more than a last-level cache holds
COPIES = 256  # at most: inputs of a few kilobytes are never far


def mark(device):
    """A point in time, on the device's clock."""
    if torch.device(device).type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start, stop):
    if isinstance(start, float):
        return 1e3 * (stop - start)
    stop.synchronize()
    return start.elapsed_time(stop)


def timed(function, device):
    """What `function` returns, and the milliseconds that it took."""
    start = mark(device)
    result = function()
    return result, milliseconds(start, mark(device))


def figures(times, baseline):
    """Of times in milliseconds and, for each of them, the baseline's in the same turn."""
    p20, p80 = np.quantile(times, [0.2, 0.8]).tolist()
    speedup = statistics.median(one / other for one, other in zip(baseline, times, strict=True))
    found = {"median_ms": statistics.median(times), "p20_ms": p20, "p80_ms": p80, "rounds": len(times)}
    return found | {"speedup": speedup}


def measure_ceilings(device):
    """The machine's own best, of bytes read and written in a second and of each dtype's FLOPs in a matrix product.

    "memory" is the better of a copy and an addition in place: a CPU reads what a copy is about to overwrite.
    """
    source = torch.ones(OUTSIDE_CACHE // 4, device=device)
    target = torch.zeros_like(source)
    copies = [timed(lambda: target.copy_(source), device)[1] / 2 for _ in range(10)]
    additions = [timed(lambda: target.add_(source), device)[1] / 3 for _ in range(10)]
    ceilings = {"memory": 1e3 * source.nbytes / min(copies + additions)}
    side = 2048 if torch.device(device).type == "cpu" else 8192
    for name, dtype in DTYPES.items():
        matrix = torch.ones(side, side, dtype=dtype, device=device)
        products = [timed(lambda matrix=matrix: matrix @ matrix, device)[1] for _ in range(5)]
        ceilings[name] = 1e3 * 2 * side**3 / min(products)
    return ceilings


def share_of(ceilings, row):
    """The least time that the ceilings allow over the time that it took."""
    dtype = cases.dtype_of(row["system"], DTYPES[row["dtype"]])
    seconds = max(row.get("bytes", 0) / ceilings["memory"], row["flops"] / ceilings[cases.name_of(dtype)])
    return 1e3 * seconds / row["median_ms"]


def measure_op(case, ceilings, device="cpu", rounds=20):
    """The rows of an op: each backend that serves the device, and the baselines."""
    pristine = case.build(device)
    with use_backend("reference"):
        expected = case.op.call(*cases.copied(pristine))
    backends = [backend for backend in BACKENDS if unavailable(backend, device) is None]
    ways = [(name, name, case.op.call) for name in backends]
    ways += [(name, "auto", call) for name, call in case.op.baselines.items()]
    taken = cases.size_of(*(value for value in pristine if isinstance(value, torch.Tensor)))
    copies = min(-(-OUTSIDE_CACHE // taken), COPIES)
    calls = {}
    for name, backend, call in ways:
        try:
            with use_backend(backend):
                cases.check(case.op, call(*cases.copied(pristine)), expected)
        except AssertionError as error:
            print(f"{case} {name}: not measured, it differs from the reference: {str(error).splitlines()[0]}")
            continue
        except BackendUnavailable as error:
            print(f"{case} {name}: not measured, {error}")
            continue
        calls[name] = backend, [functools.partial(call, *cases.copied(pristine)) for _ in range(copies)], []
    ahead = torch.zeros(OUTSIDE_CACHE // 4, device=device) if device != "cpu" else None
    for number in range(rounds):
        for backend, prepared, times in calls.values():
            if ahead is not None:
                ahead.add_(1)  # keeps the GPU busy until the host has launched what is timed
            with use_backend(backend):
                times.append(timed(prepared[number % copies], device)[1])
    size, work = case.op.cost(*pristine)
    named = {"kind": "op", "case": case.op.name, "shape": list(case.shape), "dtype": cases.name_of(case.dtype)}
    named |= {"skip": None, "noise": None, "bytes": size, "flops": work}
    reference = calls["reference"][2]
    rows = [named | {"system": name} | figures(times, reference) for name, (_, _, times) in calls.items()]
    return [row | {"share_of_ceiling": share_of(ceilings, row)} for row in rows]


class BlockTimer:
    """Milliseconds from the first block's first norm, after the gate and the packing, to the end of the last block."""

    def __init__(self, model):
        self.device = model.device
        self.began = self.ended = None
        layers = neuroflow.adapters.describe(model).layers
        layers[0].layer_norm1.register_forward_pre_hook(self.start)
        layers[-1].register_forward_hook(self.stop)

    def start(self, *_):
        self.began = mark(self.device)

    def stop(self, *_):
        self.ended = mark(self.device)

    def read(self):
        return milliseconds(self.began, self.ended)


class System:
    """A way to encode frames, on a clip of its own of which `active` patches change from frame to frame.

    skip: the share that stands still, under noise or not; None for a system that skips nothing, `encode`.
    """

    def __init__(self, model, name, skip, noise, encode=None):
        self.name, self.skip, self.noise, self.encode = name, skip, noise, encode
        self.patches = cases.patches_of(model)
        self.active = self.patches if skip is None else cases.active_of(model, skip)
        self.flops = cases.flops(model, name, self.active)
        self.clip = cases.frames(model, self.active, noise)
        self.times, self.dense, self.blocks, self.model, self.timer = [], [], [], None, None
        if name.startswith("published"):
            self.encode = Published(model, cases.SHARP, name[-1])
        elif encode is None:
            precision = cases.precision_of(name)
            self.model = cases.patched(model, name[-1], budget=self.active, floor=0, precision=precision)
            self.encode = cases.dense(self.model)
            # What runs as a CUDA graph calls no hooks.
            self.timer = BlockTimer(self.model) if self.model.device.type == "cpu" else None
        settled = cases.RECORDED if model.device.type != "cpu" else SETTLED if skip else 1
        for pixels in itertools.islice(self.clip, settled):
            self.encode(pixels)

    def measure(self, frames, dense):
        """dense: milliseconds of the unpatched model's frame in this turn."""
        for pixels in itertools.islice(self.clip, frames):
            self.times.append(timed(lambda pixels=pixels: self.encode(pixels), pixels.device)[1])
            self.dense.append(dense)
            if self.timer is not None:
                self.blocks.append(self.timer.read())

    def skips_as_asked(self):
        """Whether as many patches are encoded as change; says so where not."""
        if self.skip is None:
            return True
        if self.model is None:
            before = self.encode.flops
            self.encode(next(self.clip))
            projection = 2 * self.encode.anatomy.projection.weight.numel()
            right = self.encode.flops - before == self.flops + projection * self.patches
        else:
            encoded = int(neuroflow.last_pass(self.model)[0].active.sum())
            right = encoded == rung_of(self.model, self.active)
        if not right:
            print(f"{self.name}, {self.skip:.0%} skipped: not measured, it skips another share")
        return right

    def row(self):
        row = {"skip": self.skip, "noise": self.noise, "system": self.name, "flops": self.flops}
        row |= figures(self.times, self.dense)
        if self.model is not None:
            row["state_bytes"] = neuroflow.summary(self.model).state_bytes
        if self.timer is not None:
            row["outside_blocks"] = 1 - statistics.median(b / t for b, t in zip(self.blocks, self.times, strict=True))
        return row


def rung_of(model, active):
    """How many patches are encoded where `active` change: on a GPU, as many as the next number of the ladder."""
    if model.device.type == "cpu":
        return active
    return next(rung for rung in (*cases.LADDER, cases.patches_of(model)) if rung >= active)


def passes(model, name, error):
    """Whether a system is right and may be measured; says so where it is not."""
    right = error <= cases.TOLERANCE[cases.dtype_of(name, model.dtype)]
    if not right:
        size, dtype = model.config.image_size, cases.name_of(model.dtype)
        print(f"{name} {size} px {dtype}: not measured, it is wrong by {error:.1e} where the right output is known")
    return right


def compile_dense(model, pixels, expected):
    """The unpatched model compiled, or None where that fails; says why, or how long it took."""
    system, start = cases.compiled(model), time.perf_counter()
    try:
        error = cases.distance(system(pixels), expected)
    except Exception as failure:  # whatever a compiler may raise
        print(f"compiled: not measured, {type(failure).__name__}: {str(failure).strip().splitlines()[0]}")
        return None
    print(f"compiled in {time.perf_counter() - start:.0f} s")
    return system if passes(model, "compiled", error) else None


@torch.inference_mode()
def measure_model(model, names, clips, ceilings, compiled=False, seconds=15, groups=3):
    """The rows of dense, of the systems `names` on every clip, and of dense compiled if asked.

    clips: (share skipped, whether under noise).
    seconds, groups: of measuring, at least. A group is a turn for each clip: a frame of dense, some of each system.
    """
    first, second = itertools.islice(cases.frames(model, cases.patches_of(model)), 2)
    dense = cases.dense(model)
    expected = dense(second)
    names = [name for name in names if model.dtype == torch.float32 or cases.precision_of(name) == "model"]
    names = [name for name in names if passes(model, name, cases.error_of(model, name, (first, second), expected))]
    turns = [[System(model, name, *clip) for name in names] for clip in clips]
    system = compile_dense(model, second, expected) if compiled else None
    if system is not None:
        turns.insert(0, [System(model, "compiled", None, None, system)])
    times, start = [], time.perf_counter()
    while len(times) < groups * len(turns) or time.perf_counter() - start < seconds:
        for systems in turns:
            times.append(timed(lambda: dense(second), model.device)[1])
            for system in systems:
                system.measure(max(round(GROUP * (system.skip or 0)), 1), times[-1])
    rows = [{"skip": None, "noise": None, "system": "dense", **figures(times, times)}]
    rows[0]["flops"] = cases.flops(model, "dense", cases.patches_of(model))
    rows += [system.row() for systems in turns for system in systems if system.skips_as_asked()]
    side = model.config.image_size
    named = {"kind": "model", "case": "SigLIP base", "shape": [side, side], "dtype": cases.name_of(model.dtype)}
    return [named | row | {"share_of_ceiling": share_of(ceilings, named | row)} for row in rows]


def sustained(row):
    """NeuroFlow's speed-up over dense at its default settings, the key frame of every `max_age` frames counted in."""
    age = neuroflow.NeuroFlowConfig().max_age
    return age / (1 + (age - 1) / row["speedup"])


def label(row):
    """What a row is of, but for its system."""
    shape = "x".join(map(str, row["shape"]))
    skip = "" if row["skip"] is None else f" {row['skip']:.0%} skipped{', noisy' if row['noise'] else ''}"
    return f"{row['case']} {shape} {row['dtype']}{skip}"


def line(row):
    text = f"{label(row):50} {row['system']:12} {row['median_ms']:9.3f} ms (p20 {row['p20_ms']:.3f}, p80 "
    text += f"{row['p80_ms']:.3f})  {row['speedup']:5.1f}x  {row['share_of_ceiling']:4.0%} of the ceiling"
    if "outside_blocks" in row:
        text += f"  outside the blocks {row['outside_blocks']:.0%}"
    if "state_bytes" in row:
        text += f"  state {row['state_bytes'] / 2**20:.1f} MiB"
    return text


def show(rows):
    for row in rows:
        print(line(row), flush=True)
    return rows


def ceilings_line(ceilings):
    units = {"memory": "GB/s"}
    return ", ".join(f"{name} {value / 1e9:.1f} {units.get(name, 'GFLOP/s')}" for name, value in ceilings.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["ops", "models"], help="both where neither is named")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--size", type=int, nargs="+", default=cases.SIZES)
    parser.add_argument("--skip", type=float, nargs="+", default=cases.SKIPS, help="the largest under noise too")
    parser.add_argument("--system", nargs="+", choices=SYSTEMS, default=cases.SYSTEMS)
    parser.add_argument("--compiled", action="store_true", help="the unpatched model under torch.compile too")
    parser.add_argument("--seconds", type=float, default=15, help="to measure a size and dtype of a model, at least")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    start = time.perf_counter()
    facts, ceilings = begin(arguments.out.absolute()), measure_ceilings(arguments.device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(ceilings_line(ceilings))
    for backend in BACKENDS:
        reason = unavailable(backend, arguments.device)
        if reason is not None:
            print(f"{backend}: not measured, {reason}")
    clips = [(max(arguments.skip), True), *((skip, False) for skip in arguments.skip)]
    rows = []
    if arguments.what != "models":
        for case in cases.OP_CASES:
            if cases.name_of(case.dtype) in arguments.dtype:
                rows += show(measure_op(case, ceilings, arguments.device))
    if arguments.what != "ops":
        for size, dtype in itertools.product(arguments.size, arguments.dtype):
            model = cases.tower(size, DTYPES[dtype], arguments.device)
            options = {"compiled": arguments.compiled, "seconds": arguments.seconds}
            rows += show(measure_model(model, arguments.system, clips, ceilings, **options))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "device": arguments.device, "ceilings": ceilings, "rows": rows}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{arguments.out}, after {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()

"""Random streams for as long as you like: `python -m bench.soak --minutes 10`.

Threads share one patched tower with random weights and give it frames of their own streams: one at a time, several in a
pass, clips with and without names, cuts, other sizes, NaN, resets, and files that are saved and loaded again, while a
limit closes the streams that were used least recently. Every so often the frames of a stream since it opened are
encoded once more, alone and one by one, and the last output has to be the same. Memory, open handles and threads are
counted throughout and have to stay what they were a fifth of the way in.
"""

import argparse
import collections
import os
import random
import tempfile
import threading
import time
import warnings
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import neuroflow
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from bench.tables import begin, table, write

SIZES = [(48, 48), (32, 64)]
WORKERS, STREAMS, OPEN = 3, 12, 30  # threads, streams of each, streams that are kept
LONGEST = 60  # frames of a stream, after which it is reset
SAMPLES = 20  # of what the process holds
TOLERANCE = 1e-4
GROWTH = 1.05  # of the memory, which allocators give back in pages


def tower():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=48, patch_size=8)).eval()


def patched(streams=None):
    config = neuroflow.NeuroFlowConfig(score="surprise", threshold=1e-3, max_age=32).reproducible()
    return neuroflow.enable_cache(tower(), config, streams)


def scenes(size, count=2, frames=6):
    """Random pictures [count, frames, 3, H, W], in each of which a few patches change from frame to frame."""
    generator = torch.Generator().manual_seed(size[0])
    pictures = torch.rand(count, 1, 3, *size, generator=generator).repeat(1, frames, 1, 1, 1) * 2 - 1
    for frame in range(1, frames):
        row, column = (8 * torch.randint(side // 8, (1,), generator=generator).item() for side in size)
        pictures[:, frame:, :, row : row + 8, column : column + 8] *= -0.9
    return pictures


PICTURES = [scenes(size) for size in SIZES]


def picture(shown):
    """The frame [3, H, W] that (size, scene, number, whether it holds NaN) stands for."""
    size, scene, number, broken = shown
    frame = PICTURES[size][scene, number]
    if broken:
        frame = frame.clone()
        frame[:, 3, 5] = torch.nan
    return frame


def encode(model, frames, names):
    pixels = torch.stack([picture(shown) for shown in frames])
    output = neuroflow.encode(model, pixels, names, interpolate_pos_encoding=True).pooler_output
    return list(zip(names, output, neuroflow.last_pass(model), strict=True))


class Worker:
    """One thread's streams.

    Attributes:
        shown: by name of a stream, its frames since it opened.
        last: by name, the last output.
        counts: what it did so far.
    """

    def __init__(self, number, model, folder):
        self.model, self.alone = model, patched()
        self.path = Path(folder, f"{number}.safetensors")
        self.chance = random.Random(number)
        self.names = [f"{number}-{stream}" for stream in range(STREAMS)]
        self.size, self.scene = dict.fromkeys(self.names, 0), dict.fromkeys(self.names, 0)
        self.shown, self.last = {}, {}
        self.counts = collections.Counter()

    @torch.inference_mode()
    def run(self, stop):
        torch.set_num_threads(1)
        events = {self.frames: 20, self.clip: 5, self.nameless: 2, self.reset: 1, self.save: 1, self.replay: 2}
        while not stop.is_set():
            self.chance.choices(list(events), list(events.values()))[0]()

    def next_frame(self, name):
        event = self.chance.choices(["", "cut", "size", "nan"], [90, 4, 3, 3])[0]
        if event == "cut":
            self.scene[name] = 1 - self.scene[name]
        if event == "size":
            self.size[name] = 1 - self.size[name]
        return self.size[name], self.scene[name], self.chance.randrange(6), event == "nan"

    def show(self, frames, names):
        for shown, (name, output, report) in zip(frames, encode(self.model, frames, names), strict=True):
            if report.key_frame == "first":
                self.shown[name] = []
            self.shown[name].append(shown)
            self.last[name] = output
        self.counts["frames"] += len(frames)

    def frames(self):
        """One frame of each of some streams."""
        by_size = collections.defaultdict(list)
        for name in self.chance.sample(self.names, self.chance.choice([1, 1, 1, 4])):
            shown = self.next_frame(name)
            by_size[shown[0]].append((shown, name))
        for batch in by_size.values():
            self.show(*map(list, zip(*batch, strict=True)))

    def clip(self):
        name = self.chance.choice(self.names)
        frames = [self.next_frame(name) for _ in range(self.chance.randint(2, 6))]
        frames = [(frames[0][0], *rest) for _, *rest in frames]
        self.size[name] = frames[0][0]
        self.show(frames, [name] * len(frames))
        self.counts["clips"] += 1

    def nameless(self):
        frames = torch.stack([picture((0, 0, number, False)) for number in range(4)])
        self.model(pixel_values=frames)
        self.counts["frames"] += len(frames)

    def reset(self):
        longest = [name for name in self.shown if len(self.shown[name]) > LONGEST]
        for name in longest or self.chance.sample(sorted(self.shown), min(1, len(self.shown))):
            self.close(name)

    def close(self, name):
        try:
            neuroflow.reset_cache(self.model, name)
        except KeyError:  # closed already, by the limit
            self.counts["closed by the limit"] += 1
        self.shown.pop(name)
        self.counts["resets"] += 1

    def save(self):
        """Some of the streams, which then go on, and go on once more from where they were saved."""
        chosen = self.chance.sample(sorted(self.shown), min(3, len(self.shown)))
        try:
            neuroflow.save_state(self.model, self.path, chosen)
        except KeyError:
            return
        before = {name: (list(self.shown[name]), self.last[name]) for name in chosen}
        self.frames()
        for name in neuroflow.load_state(self.model, self.path):
            self.shown[name], self.last[name] = before[name]
            self.counts["loaded"] += 1

    def replay(self):
        for name in self.chance.sample(sorted(self.shown), min(1, len(self.shown))):
            for shown in self.shown[name]:
                [(_, output, _)] = encode(self.alone, [shown], [name])
            neuroflow.reset_cache(self.alone)
            if not torch.allclose(output, self.last[name], rtol=0, atol=TOLERANCE, equal_nan=True):
                error = (output - self.last[name]).abs().max().item()
                raise RuntimeError(f"stream {name}: off by {error:.1e} from a fresh run of {self.shown[name]}")
            self.counts["replayed"] += 1
            self.counts["frames replayed"] += len(self.shown[name])


def held():
    """Memory in MiB, open handles and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tasks = len(os.listdir("/proc/self/task"))
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return {"memory": memory, "handles": len(os.listdir("/proc/self/fd")), "threads": tasks}


def soak(minutes):
    """Samples of what the process held and of what it had done by then."""
    model, rows, stop = patched(neuroflow.StreamCache(max_streams=OPEN)), [], threading.Event()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        workers = [Worker(number, model, folder) for number in range(WORKERS)]
        running = [pool.submit(worker.run, stop) for worker in workers]
        try:
            for sample in range(1, SAMPLES + 1):
                due = start + 60 * minutes * sample / SAMPLES
                failed, _ = wait(running, max(due - time.monotonic(), 0), FIRST_COMPLETED)
                if failed:
                    break
                counts = sum((worker.counts for worker in workers), collections.Counter())
                taken = (time.monotonic() - start) / 60
                rows.append({"minutes": taken, "open": len(neuroflow.summary(model).streams)} | held() | counts)
                print(*line_of(rows[-1]), sep="  ", flush=True)
        finally:
            stop.set()
        for each in running:
            each.result()
    return rows


COUNTED = ["handles", "threads", "open", "frames", "clips", "resets", "loaded", "replayed", "frames replayed"]


def line_of(row):
    return [f"{row['minutes']:.1f}", f"{row['memory']:.1f} MiB", *(f"{row.get(name, 0):,}" for name in COUNTED)]


def faults(rows):
    """What is not as it should be."""
    first, last = rows[len(rows) // 5], rows[-1]
    if last["memory"] > GROWTH * first["memory"]:
        yield f"memory grew from {first['memory']:.1f} to {last['memory']:.1f} MiB"
    if not last.get("replayed"):
        yield "nothing was replayed"
    for name in ("handles", "threads"):
        if last[name] > first[name]:
            yield f"{name} grew from {first[name]} to {last[name]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", default="soak", help="the stem of the files in bench/results, or a path's")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "neuroflow")
    torch.set_num_threads(1)
    machine = begin(arguments.out)
    rows = soak(arguments.minutes)
    found = list(faults(rows))
    print(*(found or ["all flat"]), sep="\n")
    if found:
        raise SystemExit(1)
    about, names = __doc__.partition("\n\n")[2].strip(), ["minutes", "memory", *COUNTED]
    text = f"# Soak\n\n{about}\n\n{table(names, map(line_of, rows))}"
    write(arguments.out, machine, {"minutes": arguments.minutes, "workers": WORKERS, "open": OPEN}, rows, text)


if __name__ == "__main__":
    main()

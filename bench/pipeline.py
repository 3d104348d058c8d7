"""Where the time of `neuroflow run` goes on a 1080p clip: `python -m bench.pipeline`.

Three passes over the same frames take turns: the encoder alone, with its inputs already in memory; decoding,
preprocessing and encoding one after the other; and decoding and preprocessing in a thread that runs ahead, as in
`neuroflow run`. "Added" is the median of a frame's wait plus encoding over the median of the encoder alone. "Added,
processor" is the same in processor time of the loop's own thread, which does not depend on what else the machine does:
it shows what would be left if the other thread had a core to itself. With one thread for the model, it covers all of
the encoder. The model encodes 3 % of the patches of every frame, where each millisecond counts most. The SigLIP of base
size has random weights, since only time is measured.
"""

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import neuroflow
import numpy as np
import torch
from neuroflow.street import load_street
from neuroflow.street.scene import RATE, Scene, Stage
from neuroflow.video.ahead import ReadAhead, prepare
from neuroflow.video.encode import VideoWriter
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Source
from neuroflow.video.stream import encode_stream
from transformers import SiglipVisionConfig, SiglipVisionModel

from bench.tables import begin, share, table, write

WIDTH, HEIGHT, TOP = 1920, 1080, 560
CROSSING = 120  # frames
SIGLIP_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BASE_SIZE = 448
CONFIG = neuroflow.NeuroFlowConfig(budget=0.03)
PASSES = "alone", "in turn", "ahead"
TIMES = "decode", "preprocess", "wait", "encode", "both", "processor"


def write_clip(path, frames):
    """A car that crosses a drawn street, from when it is in the middle; HEIGHT rows from TOP on are taken."""
    stage = Stage(Scene("car", "traversal", "static", seed=1), CROSSING, WIDTH)
    with VideoWriter(path, RATE) as writer:
        for number in range(CROSSING // 2, CROSSING // 2 + frames):
            image, _ = stage.draw(number)
            writer.write(np.ascontiguousarray(image[TOP : TOP + HEIGHT]))


def models():
    """Name, model and size of what is measured, one at a time."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        config = SiglipVisionConfig(**SIGLIP_BASE, image_size=BASE_SIZE, patch_size=16)
        name = f"SigLIP base, {str(dtype).removeprefix('torch.')}"
        yield name, SiglipVisionModel(config).eval().to(dtype), BASE_SIZE
    tower, _ = load_street()
    yield "embedded tower, float32", tower, tower.config.image_size


def encode(model, clip, frames, size, way):
    """The TIMES in milliseconds of every frame but the first, and the share skipped; `both`: wait and encode."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(contextlib.closing(Source(str(clip))))
        inputs = prepare(itertools.islice(source, frames), Preprocessor(size, size))
        if way == "alone":
            inputs = list(inputs)
        elif way == "ahead":
            inputs = stack.enter_context(ReadAhead(inputs))
        found, start = [], time.thread_time()
        for encoded in encode_stream(inputs, model):
            end = time.thread_time()
            encode_ms = encoded.record.neuroflow_ms
            found.append(
                {
                    "decode": encoded.prepared.decode_ms,
                    "preprocess": encoded.prepared.preprocess_ms,
                    "wait": encoded.wait_ms,
                    "encode": encode_ms,
                    "both": encoded.wait_ms + encode_ms,
                    "processor": (end - start) * 1e3,
                    "skipped": encoded.record.skipped,
                }
            )
            start = end
    return found[1:]


def measure(name, model, size, clip, frames, rounds):
    """A row for each way, of medians over all frames and rounds."""
    neuroflow.enable_cache(model, CONFIG)
    # One stream throughout, so that no pass but this begins with every patch.
    encode(model, clip, 2, size, "alone")
    found = {way: [] for way in PASSES}
    # Many short passes, as machines change their pace.
    for _ in range(rounds):
        for way in PASSES:
            found[way] += encode(model, clip, frames, size, way)
    rows = [
        {"model": f"{name}, {size} px", "threads": torch.get_num_threads(), "pass": way}
        | {name: statistics.median(one[name] for one in found[way]) for name in (*TIMES, "skipped")}
        for way in PASSES
    ]
    for row in rows:
        row["added"] = row["both"] / rows[0]["both"] - 1
        row["added_processor"] = row["processor"] / rows[0]["processor"] - 1
    return rows


def format_row(row):
    alone = row["pass"] == "alone"
    return [
        row["model"],
        str(row["threads"]),
        row["pass"],
        share(row["skipped"]),
        *(f"{row[name]:.1f}" for name in TIMES),
        "-" if alone else share(row["added"]),
        "-" if alone else share(row["added_processor"]),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", type=Path, help="a video instead of the drawn street")
    parser.add_argument("--frames", type=int, default=16, help="of a pass, 60 at most of the street")
    parser.add_argument("--rounds", type=int, default=4, help="of the three passes")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="of the model")
    arguments = parser.parse_args()
    machine, rows = begin("pipeline"), []
    with tempfile.TemporaryDirectory() as directory:
        clip = arguments.clip
        if clip is None:
            clip = Path(directory, "street.mp4")
            write_clip(clip, arguments.frames)
        for name, model, size in models():
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                measured = measure(name, model, size, clip, arguments.frames, arguments.rounds)
                rows += measured
                for row in measured:
                    print(*format_row(row), sep="  ", flush=True)
    settings = {"clip": "the drawn street, 1920x1080" if arguments.clip is None else arguments.clip.name}
    settings |= {"frames": arguments.frames, "rounds": arguments.rounds}
    names = ["model", "threads", "pass", "skipped", "decode", "preprocess", "wait", "encode", "wait + encode"]
    names += ["processor time", "added", "added, processor"]
    text = f"""# Decoding and preprocessing beside the encoder

{__doc__.partition(chr(10) * 2)[2].strip()}

Clip: {settings["clip"]}. Medians over {arguments.rounds} passes of {arguments.frames} frames, in milliseconds; the
first frame of a pass is not counted.

{table(names, [format_row(row) for row in rows])}"""
    write("pipeline", machine, settings, rows, text)


if __name__ == "__main__":
    main()

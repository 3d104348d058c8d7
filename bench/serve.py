"""How fast cameras are answered: `python -m bench.serve`.

`neuroflow serve` runs in a process of its own, with random weights. Its clients run here, on the same machine, and take
CPU time from it. Each camera sends a real clip as JPEGs, sampled at the highest of the rates, back and forth from a
start of its own; the cameras' frames are spread evenly over a period. Every answer must arrive in order and equal what
`neuroflow.encode` gives for that stream alone.

"latency" runs from the moment a frame was due to its answer: it includes decoding and queueing, and grows without end
where more is asked than the machine can do. "pass" is the model's time for all frames that shared it. "alone" is one
frame in a pass of its own, in this process, with nothing beside it.

"hostile" repeats a load while damaged files, decompression bombs, false headers and requests that are not HTTP arrive,
and while idle connections stay open.

The last table has cameras that send each frame as soon as the one before is answered: the machine's capacity. "CPU ms a
frame" is what the server's process took; its clients' share is not in it.
"""

import argparse
import contextlib
import io
import itertools
import json
import socket
import statistics
import tempfile
import threading
import time
import warnings
from http.client import HTTPConnection
from pathlib import Path

import neuroflow
import numpy as np
import torch
from neuroflow.serve.bodies import picture
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Source
from PIL import Image

from bench.clients import REFUSED, Camera, cpu_seconds, get, hostile, memory, sent, serving
from bench.streams import MODELS, embedding
from bench.tables import begin, find, share, table, write

CLIPS = ("bottle-detection", "one-by-one-person-detection")
CLIPS = (*(f"intel_{name}.mp4" for name in CLIPS), "sam2_05_default_juggle.mp4", "degirum_Traffic.mp4")
SIZE, QUALITY, LONGEST = 224, 90, 200  # pixels, of the JPEGs, frames of a clip
TOLERANCE = 1e-5
IDLE = 50  # connections that send nothing
CONFIG = neuroflow.NeuroFlowConfig().reproducible()


def jpegs(path, rate):
    """A clip's frames, so many a second, each as a JPEG."""
    with contextlib.closing(Source(str(path))) as source:
        step = max(round(source.rate / rate), 1)
        for frame in itertools.islice(source, 0, LONGEST * step, step):
            file = io.BytesIO()
            Image.fromarray(frame.rgb(*frame.size)).save(file, "JPEG", quality=QUALITY)
            yield file.getvalue()


def footage(clips, camera):
    """What a camera sends, without end."""
    clip = clips[camera % len(clips)]
    there_and_back = [*clip, *clip[-2:0:-1]]
    begin = 17 * camera % len(there_and_back)
    return itertools.islice(itertools.cycle(there_and_back), begin, None)


def percentile(values, share):
    return float(np.percentile(values, 100 * share))


@torch.inference_mode()
def alone(model, bodies):
    """The embeddings of JPEGs in one stream, and the milliseconds of each."""
    preprocess, found, times = Preprocessor(SIZE, SIZE), [], []
    for body in bodies:
        pixels = picture(body, preprocess, 2**25)
        begun = time.perf_counter()
        found.append(embedding(model, neuroflow.encode(model, pixels, ["camera"]))[0].numpy())
        times.append((time.perf_counter() - begun) * 1e3)
    neuroflow.reset_cache(model)
    return np.stack(found), times


def attack(address, count, seconds, stopped):
    """So many hostile requests, spread over so many seconds; the kinds that were not refused."""
    kinds, begun, taken = list(hostile()), time.perf_counter(), []
    for number in range(count):
        if stopped.wait(max(begun + seconds * number / count - time.perf_counter(), 0)):
            break
        name, content = kinds[number % len(kinds)]
        status = sent(address, content)
        if status is not None and status not in REFUSED:
            taken.append((name, status))
    return number + 1, taken


def watch(cameras):
    """Run cameras to their end; the seconds it took."""
    begun = time.perf_counter()
    for camera in cameras:
        camera.start()
    for camera in cameras:
        camera.end()
    return time.perf_counter() - begun


def load(process, address, arguments, rate, sends, expected, requests):
    """A row of cameras that send these JPEGs at a rate, beside so many hostile requests; `expected` is of `alone`."""
    name = "hostile" if requests else "cameras"
    frames = len(sends[0])
    cameras = [
        Camera(address, f"{name}-{rate:g}-{number}", bodies, rate, number / len(sends))
        for number, bodies in enumerate(sends)
    ]
    idle = [socket.create_connection(address) for _ in range(IDLE if requests else 0)]
    before, stopped, attacked = memory(process), threading.Event(), []
    attacker = threading.Thread(
        target=lambda: attacked.append(attack(address, requests, arguments.seconds, stopped)), daemon=True
    )
    if requests:
        attacker.start()
    seconds = watch(cameras)
    if requests:
        attacker.join()
        made, taken = attacked[0]
        if taken:
            raise SystemExit(f"hostile requests that were taken: {taken}")
    for client in idle:
        client.close()
    after = memory(process)
    answers = [answer for camera in cameras for answer in camera.answers]
    if len(answers) != frames * arguments.cameras or sent(address, get("/readyz")) != 200:
        raise SystemExit(f"{len(answers)} answers to {frames * arguments.cameras} frames")
    error, single = 0.0, []
    for camera, (embeddings, times) in zip(cameras, expected, strict=True):
        single += times
        error = max(error, float(np.abs(np.stack([answer.embedding for answer in camera.answers]) - embeddings).max()))
    if not error <= TOLERANCE:
        raise SystemExit(f"embeddings differ by {error:.1e} from those of a stream alone")
    return {
        **measures(answers, seconds),
        "clients": name,
        "cameras": arguments.cameras,
        "rate": rate,
        "hostile requests": made if requests else 0,
        "retries": sum(camera.retries for camera in cameras),
        "alone": [percentile(single, at) for at in (0.5, 0.95)],
        "error": error,
        "memory": [before / 2**20, after / 2**20],
    }


def measures(answers, seconds):
    latencies = [1e3 * answer.seconds for answer in answers]
    return {
        "frames": len(answers),
        "frames/s": len(answers) / seconds,
        "latency": [percentile(latencies, at) for at in (0.5, 0.95)],
        "pass": [percentile([answer.ms for answer in answers], at) for at in (0.5, 0.95)],
        "together": len(answers) / sum(1 / answer.together for answer in answers),
        "skipped": statistics.fmean(answer.skipped for answer in answers),
    }


def scale(process, address, clips, streams, seconds):
    """A row of so many cameras that send as fast as they are answered."""
    cameras = [Camera(address, f"scale-{streams}-{number}", footage(clips, number)) for number in range(streams)]
    timer = threading.Timer(seconds, lambda: [camera.stopped.set() for camera in cameras])
    before = cpu_seconds(process)
    timer.start()
    taken = watch(cameras)
    cpu = cpu_seconds(process) - before
    listed = {each["stream"]: each for each in told(address, "/v1/streams")["streams"]}
    held = [listed[camera.stream]["state_bytes"] for camera in cameras]
    for camera in cameras:
        sent(address, get(f"/v1/streams/{camera.stream}", method="DELETE"))
    answers = [answer for camera in cameras for answer in camera.answers]
    measured = measures(answers, taken)
    return {"streams": streams, "state": statistics.fmean(held) / 2**20, "cpu": 1e3 * cpu / len(answers), **measured}


def told(address, path):
    """What a route answers, as JSON."""
    with contextlib.closing(HTTPConnection(*address, timeout=60)) as connection:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())


def pair(values):
    return " / ".join(f"{value:,.0f}" for value in values)


def line_of_load(row):
    """A row as texts."""
    return [
        row["model"],
        row["clients"],
        f"{row['cameras']} x {row['rate']:g}",
        f"{row['frames']:,}",
        f"{row['frames/s']:.1f}",
        pair(row["latency"]),
        pair(row["pass"]),
        pair(row["alone"]),
        f"{row['together']:.1f}",
        share(row["skipped"]),
        f"{row['error']:.0e}",
        f"{row['hostile requests']:,}",
        f"{row['retries']:,}",
        pair(row["memory"]),
    ]


LOAD = [
    "model",
    "clients",
    "asked, frames/s",
    "frames",
    "frames/s",
    "latency, ms",
    "pass, ms",
    "alone, ms",
    "frames in a pass",
    "skipped",
]
LOAD += ["error", "hostile requests", "retries", "MiB before / after"]
SCALE = [
    "model",
    "streams",
    "frames/s",
    "CPU ms a frame",
    "frames in a pass",
    "latency, ms",
    "pass, ms",
    "skipped",
    "state, MiB a stream",
]


def line_of_scale(row):
    """A row as texts."""
    return [
        row["model"],
        str(row["streams"]),
        f"{row['frames/s']:.1f}",
        f"{row['cpu']:.0f}",
        f"{row['together']:.1f}",
        pair(row["latency"]),
        pair(row["pass"]),
        share(row["skipped"]),
        f"{row['state']:.1f}",
    ]


def measure(name, clips, arguments):
    """Rows of load, and of scale, of one model."""
    with tempfile.TemporaryDirectory() as directory:
        model = MODELS[name](SIZE)
        model.save_pretrained(directory)
        CONFIG.save(Path(directory, "gate.json"))
        neuroflow.enable_cache(model, CONFIG)
        most = max(arguments.cameras, *arguments.streams)
        options = ["--model", directory, "--config", Path(directory, "gate.json")]
        limits = ["--max-streams", 5 * most, "--queue", 4 * most]
        with serving(*options, *limits, threads=torch.get_num_threads()) as (process, address):
            loads = []
            for rate in arguments.rates:
                frames, cameras = round(rate * arguments.seconds), range(arguments.cameras)
                sends = [list(itertools.islice(footage(clips, camera), frames)) for camera in cameras]
                expected = [alone(model, bodies) for bodies in sends]
                for requests in (0, arguments.hostile):
                    found = load(process, address, arguments, rate, sends, expected, requests)
                    loads.append({"model": name, **found})
                    print(*line_of_load(loads[-1]), sep="  ", flush=True)
            scales = []
            for streams in arguments.streams:
                scales.append({"model": name, **scale(process, address, clips, streams, arguments.scale_seconds)})
                print(*line_of_scale(scales[-1]), sep="  ", flush=True)
    return loads, scales


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["ViT-Ti"])
    parser.add_argument("--cameras", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", default=[2, 5], help="frames a second of each, in turn")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--hostile", type=int, default=1000, help="requests, over as many seconds")
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="of each step of scale"
    )
    parser.add_argument("--scale-seconds", type=float, default=10, help="of each")
    parser.add_argument("--out", default="serve", help="the stem of the files in bench/results, or a path's")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "neuroflow")
    machine = begin(arguments.out)
    clips = [list(jpegs(find(f"videos/{name}"), max(arguments.rates))) for name in CLIPS]
    loads, scales = [], []
    for name in arguments.models:
        for rows, found in zip((loads, scales), measure(name, clips, arguments), strict=True):
            rows += found
    about = __doc__.partition("\n\n")[2].strip()
    times = "Times are p50 / p95."
    cameras = f"{arguments.cameras} cameras for {arguments.seconds:g} s"
    text = f"# Serving\n\n{about}\n\n{times}\n\n## {cameras}\n\n{table(LOAD, map(line_of_load, loads))}"
    text += f"\n\n## As fast as they are answered\n\n{table(SCALE, map(line_of_scale, scales))}"
    write(arguments.out, machine, vars(arguments), {"load": loads, "scale": scales}, text)


if __name__ == "__main__":
    main()

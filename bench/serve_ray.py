"""Cameras on Ray Serve while one of two replicas is killed: `python -m bench.serve_ray`.

Every camera sends its frames to the service over HTTP, numbered, and sends one again until it is answered. Half-way the
replica that holds most of them is killed. Afterwards each camera's frames are encoded alone, in one process, with a
reset before each frame at which the service says that it knew nothing of the stream: decisions have to be equal, and
embeddings within 1e-5. A stream whose replica died has moved; some others move when the replica that is started in its
place takes its share.
"""

import argparse
import contextlib
import io
import os
import re
import socket
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import neuroflow
import numpy as np
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from bench.tables import begin, table, write

SIDE, PATCH = 64, 8
TOLERANCE = 1e-5
SLOW = 5.0  # seconds after which a camera sends a frame again that is not answered
PATIENCE = 120.0  # seconds in which a frame has to be answered, and the cluster to be as it was
NPY = "application/x-npy"


class Sent(NamedTuple):
    """What came of one frame: the answer, when it came (`time.monotonic`), and how often it was sent before."""

    answer: dict
    at: float
    retries: int


def tower():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH)).eval()


def gate():
    return neuroflow.NeuroFlowConfig(score="surprise", threshold=0.01, max_age=16).reproducible()


def clip(seed, frames):
    """Frames [T, 3, SIDE, SIDE] of a still scene, of which a few patches change from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(1, 3, SIDE, SIDE, generator=generator).repeat(frames, 1, 1, 1)
    for frame in range(1, frames):
        row, column = (PATCH * torch.randint(SIDE // PATCH, (2,), generator=generator)).tolist()
        change = torch.randn(3, PATCH, PATCH, generator=generator)
        pictures[frame:, :, row : row + PATCH, column : column + PATCH] = change
    return pictures


@contextlib.contextmanager
def cluster(replicas, **settings):
    """Ray Serve with so many replicas of the tower, in this process's place: its address."""
    # Nobody is to hear of it.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from neuroflow.serve.ray_app import Settings, app
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        model, config = Path(folder, "tower"), Path(folder, "gate.json")
        tower().save_pretrained(model)
        gate().save(config)
        ray.init(
            "local",
            num_cpus=replicas,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            limits = {"min_replicas": replicas, "max_replicas": replicas}
            serve.run(app(Settings(model=str(model), config=config, **limits, **settings)), name="neuroflow")
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


def wait_for(condition):
    limit = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"not within {PATIENCE:g} seconds")
        time.sleep(0.05)


def replicas_of(client):
    """The names of all that answer."""
    return set(re.findall('neuroflow_streams{replica="(.*)"}', client.get("/metrics").raise_for_status().text))


def kill(replica):
    """End a replica's process, as a crash would."""
    import ray

    names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    [name] = [name for name in names if name.endswith(f"#{replica}")]
    ray.kill(ray.get_actor(name, namespace="serve"))


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def send(client, stream, frame, pixels, headers=None):
    """Send a frame until it is answered."""
    body, limit = npy(pixels.numpy()), time.monotonic() + PATIENCE
    for retries in range(10**6):
        reason = None
        try:
            response = client.post(
                f"/v1/streams/{stream}/frames?frame={frame}",
                content=body,
                headers={"Content-Type": NPY, **(headers or {})},
                timeout=SLOW,
            )
            if response.status_code == 200:
                return Sent(response.json(), time.monotonic(), retries)
            reason = f"{response.status_code}: {response.text:.200}"
            if response.status_code < 500:
                break
        except httpx.TransportError as error:
            reason = repr(error)
        if time.monotonic() > limit:
            break
        time.sleep(0.1)
    raise RuntimeError(f"stream {stream}, frame {frame} was not answered: {reason}")


def open_streams(client):
    """By name, the replica that has a stream."""
    found = client.get("/v1/streams").raise_for_status().json()["streams"]
    return {each["stream"]: each["replica"] for each in found}


class Outcome(NamedTuple):
    """What came of `play`: by name of a stream, its frames; the streams that the killed replica had; when it was
    killed, and when there were as many replicas as before.
    """

    sent: dict
    lost: set
    killed: float
    replaced: float


def play(address, clips, rate, headers=None):
    """Send each stream's frames at so many a second, and kill the replica that has most streams half-way."""
    counted = threading.Semaphore(0)
    half = sum(map(len, clips.values())) // 2

    def camera(stream):
        with httpx.Client(base_url=address, headers=headers, timeout=PATIENCE) as client:
            sent, due = [], time.monotonic()
            for frame, pixels in enumerate(clips[stream]):
                time.sleep(max(due - time.monotonic(), 0))
                sent.append(send(client, stream, frame, pixels))
                counted.release()
                due += 1 / rate
        return sent

    with (
        httpx.Client(base_url=address, headers=headers, timeout=PATIENCE) as client,
        ThreadPoolExecutor(len(clips)) as pool,
    ):
        before = replicas_of(client)
        cameras = {stream: pool.submit(camera, stream) for stream in clips}
        for _ in range(half):
            if not counted.acquire(timeout=PATIENCE):
                break
        replica_of = {stream: replica for stream, replica in open_streams(client).items() if stream in clips}
        victim = statistics.mode(replica_of.values())
        killed = time.monotonic()
        kill(victim)
        wait_for(lambda: victim not in (now := replicas_of(client)) and len(now) == len(before))
        replaced = time.monotonic()
        sent = {stream: each.result() for stream, each in cameras.items()}
    return Outcome(sent, {stream for stream, replica in replica_of.items() if replica == victim}, killed, replaced)


@torch.inference_mode()
def differences(pixels, sent):
    """How far a stream's answers are from those of a run alone, which knows nothing of it wherever the service did not.

    Raises:
        RuntimeError: other frames are key frames, or other numbers of patches are encoded.
    """
    model, worst = neuroflow.enable_cache(tower(), gate()), 0.0
    for number, (frame, (answer, *_)) in enumerate(zip(pixels, sent, strict=True)):
        if number and answer["key_frame"] == "first":
            neuroflow.reset_cache(model, "alone")
        embedding = neuroflow.encode(model, frame[None], ["alone"], [number]).pooler_output[0]
        [report] = neuroflow.last_pass(model)
        expected = {"frame": number, "key_frame": report.key_frame, "active": int(report.active.sum())}
        found = {name: answer[name] for name in expected}
        if found != expected:
            raise RuntimeError(f"stream {answer['stream']}: {found}, and alone {expected}")
        worst = max(worst, (embedding - torch.tensor(answer["embedding"])).abs().max().item())
    return worst


def moves(sent):
    """How often a stream came to a replica that knew nothing of it, after its first frame."""
    return sum(answer["key_frame"] == "first" for answer, *_ in sent[1:])


def summary(clips, outcome):
    """One row of what happened."""
    sent = outcome.sent
    healed = max(min(each.at for each in sent[stream] if each.at > outcome.killed) for stream in outcome.lost)
    return {
        "streams": len(sent),
        "frames": sum(map(len, clips.values())),
        "answered": sum(map(len, sent.values())),
        "sent again": sum(each.retries for frames in sent.values() for each in frames),
        "streams of the killed replica": len(outcome.lost),
        "streams that moved": sum(moves(frames) > 0 for frames in sent.values()),
        "key frames more, one a move": sum(moves(frames) for frames in sent.values()),
        "most moves of one stream": max(moves(frames) for frames in sent.values()),
        "largest difference": max(differences(clips[stream], frames) for stream, frames in sent.items()),
        "seconds until all were answered again": healed - outcome.killed,
        "seconds until it was replaced": outcome.replaced - outcome.killed,
    }


def faults(row):
    """What is not as it should be."""
    if row["answered"] != row["frames"]:
        yield f"{row['frames'] - row['answered']} frames were not answered"
    if row["largest difference"] > TOLERANCE:
        yield f"an embedding is off by {row['largest difference']:.1e} from a run alone"
    if row["streams that moved"] < row["streams of the killed replica"]:
        yield "a stream of the killed replica went on as if it had not moved"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--frames", type=int, default=50)
    parser.add_argument("--rate", type=float, default=5.0, help="frames a second of each stream")
    parser.add_argument("--out", default="serve-ray", help="the stem of the files in bench/results, or a path's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = begin(arguments.out)
    clips = {f"camera-{number}": clip(number, arguments.frames) for number in range(arguments.streams)}
    with cluster(2) as address:
        outcome = play(address, clips, arguments.rate)
    row = summary(clips, outcome)
    lines = [[name, f"{value:.2g}" if isinstance(value, float) else f"{value:,}"] for name, value in row.items()]
    print(*map(": ".join, lines), sep="\n")
    if found := list(faults(row)):
        raise SystemExit("; ".join(found))
    about = __doc__.partition("\n\n")[2].strip()
    text = f"# A replica of Ray Serve killed\n\n{about}\n\n{table(['what', 'how many'], lines)}"
    settings = {"streams": arguments.streams, "frames": arguments.frames, "rate": arguments.rate, "replicas": 2}
    write(arguments.out, machine, settings, [row], text)


if __name__ == "__main__":
    main()

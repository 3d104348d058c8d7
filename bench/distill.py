"""Architecture B before and after distillation: `OMP_NUM_THREADS=1 python -m bench.distill`.

Draws scenes under a camera that stands still, teaches the package's tower on them with `neuroflow distill`, and
measures it on scenes that it has not seen: the cosine of B's embedding to the unpatched teacher's at several shares of
patches skipped, and how often it names the subject. Pictures under the other cameras are outside of what it is taught
on. A run that was stopped goes on from the last epoch.
"""

import argparse
import dataclasses
import json
import tempfile
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from neuroflow.cli.main import main as neuroflow
from neuroflow.distillation import distilled_config, load_weights
from neuroflow.models import load_street
from neuroflow.video.encode import VideoWriter
from neuroflow.video.scene import CAMERAS, CLASSES, TRAJECTORIES, Stage, scenes
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

from bench.street import FRAMES, SCORED, draw
from bench.tables import RESULTS, cosine, embeddings, run, share, table, write

INSIDE = ("static", "noise")  # cameras; the others are outside
EVERY, SIZE = 6, 224  # frames of a scene that are written, and their side
PICTURE = 60  # the frame of an outside scene
SKIPS = (0.8, 0.9, 0.95)
SETTINGS = [
    "--strides",
    "1",
    "--frames",
    "10",
    "--thresholds",
    "0.03",
    "0.6",
    "--skip",
    "0.9",
    "--forgetting",
    "1",
]  # the whole curve
SEEDS = {"videos": 7, "pictures": 3, "test": 0}


def under(cameras, count, seed, held_out):
    """`count` scenes under some of the cameras."""
    every = scenes(count * len(CAMERAS) // len(cameras) + len(CAMERAS), seed, held_out=held_out)
    return [scene for scene in every if scene.camera in cameras][:count]


def draw_videos(directory, count):
    for number, scene in enumerate(tqdm(under(INSIDE, count, SEEDS["videos"], False), desc="videos", unit="scene")):
        path = directory / f"{number:03d}-{scene.subject}-{scene.trajectory}-{scene.camera}.mp4"
        if path.exists():
            continue
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.mp4")
        with VideoWriter(partial, Fraction(30, EVERY)) as writer:
            stage = Stage(scene, FRAMES, SIZE)
            for frame in range(0, FRAMES, EVERY):
                writer.write(stage.draw(frame)[0])
        partial.replace(path)


def draw_pictures(directory, count):
    outside = tuple(camera for camera in CAMERAS if camera not in INSIDE)
    for number, scene in enumerate(tqdm(under(outside, count, SEEDS["pictures"], True), desc="pictures", unit="scene")):
        image, label = Stage(scene, FRAMES, SIZE).draw(PICTURE)
        if label >= 0:
            folder = directory / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:03d}.png")


@torch.inference_mode()
def measure(systems, classes, gate, count):
    """A row for every system {name: model}, dense and B at every share: cosine to the teacher, the first, and top-1.

    On scenes under the cameras inside, at the full rate of frames, and on whole pictures of scenes outside.
    """
    teacher = next(iter(systems.values()))
    kept, scored = list(SCORED), {}
    with tempfile.TemporaryDirectory() as scratch:
        for scene in tqdm(under(INSIDE, count, SEEDS["test"], True), desc="test", unit="scene"):
            clip, labels = draw(scene, SIZE, scratch)
            truth = torch.tensor([labels[number] for number in kept])
            expected = embeddings(teacher, clip[kept])
            for name, model in systems.items():
                for skip in (0.0, *SKIPS):
                    if skip:
                        config = dataclasses.replace(gate, budget=1 - skip)
                        ((found, skipped, *_),) = run(model, [clip], config)
                        found, skipped = found[kept], skipped[1:].mean().item()
                    else:
                        found, skipped = embeddings(model, clip[kept]), 0.0
                    values = F.cosine_similarity(found, expected).tolist()
                    hits = (classes.scores(found).argmax(1) == truth)[truth >= 0].tolist()
                    scored.setdefault((name, skip), []).append((scene, skipped, values, hits))
    rows = []
    for (name, skip), own in scored.items():
        for trajectory in ("all", *TRAJECTORIES):
            chosen = [each for each in own if trajectory in ("all", each[0].trajectory)]
            if chosen:
                values = torch.tensor([value for each in chosen for value in each[2]])
                hits = torch.tensor([hit for each in chosen for hit in each[3]], dtype=torch.float64)
                row = {"system": name, "asked": skip, "trajectory": trajectory, "frames": len(values)}
                row |= {"skipped": sum(each[1] for each in chosen) / len(chosen), "top1": hits.mean().item()}
                row |= {"cosine_mean": values.mean().item(), "cosine_p5": values.quantile(0.05).item()}
                rows.append(row)
    return rows


def text_of(rows, history, arguments):
    epochs = [
        [str(epoch["number"]), cosine(epoch["fidelity"]), cosine(epoch["fidelity_p5"]), share(epoch["outside"])]
        for epoch in history
    ]
    done = len(history) - 1
    chosen = max(history, key=lambda epoch: epoch["fidelity"])["number"]
    ended = f"Of {arguments.epochs} epochs {done} were done, and epoch {chosen} has the weights of the highest cosine:"
    lines = [
        [row["system"], share(row["skipped"]), cosine(row["cosine_mean"]), cosine(row["cosine_p5"]), share(row["top1"])]
        for row in rows
        if row["trajectory"] == "all"
    ]
    of_trajectories = [
        [row["trajectory"], row["system"], cosine(row["cosine_mean"]), cosine(row["cosine_p5"]), share(row["top1"])]
        for row in rows
        if row["trajectory"] != "all" and row["asked"] == 0.9
    ]
    return "\n\n".join(
        [
            "# Architecture B before and after distillation",
            f"`OMP_NUM_THREADS=1 python -m bench.distill --videos {arguments.videos} --epochs {arguments.epochs}`: the "
            f"package's tower, taught on {arguments.videos} drawn videos (one in five of them held out) of "
            f"{FRAMES // EVERY} frames, under the cameras {' and '.join(INSIDE)}. By epoch, B on the held-out videos "
            "at 90 % skipped, and the share of labelled pictures under the other cameras that the student names when "
            f"it is given them whole; epoch 0 is before training. {ended}",
            table(["epoch", "cosine", "5th percentile", "top-1 outside"], epochs),
            f"On {arguments.test} other scenes, which neither training nor the choice of the epoch has seen, at 30 "
            "frames a second; cosine is to the teacher on the whole frame, 0 % skipped is the model unpatched:",
            table(["system", "skipped", "cosine", "5th percentile", "top-1"], lines),
            "At 90 % skipped, by trajectory:",
            table(["trajectory", "system", "cosine", "5th percentile", "top-1"], of_trajectories),
        ]
    )


def plot(rows, history):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    numbers = [epoch["number"] for epoch in history]
    left.plot(numbers, [epoch["fidelity"] for epoch in history], "o-", label="cosine of B, 90 % skipped, held out")
    left.plot(numbers, [epoch["outside"] for epoch in history], "s-", label="top-1 outside, whole pictures")
    left.axhline(0.97, color="grey", linewidth=1, linestyle="--")
    left.set(xlabel="epoch", ylabel="cosine, top-1")
    for number, system in enumerate(dict.fromkeys(row["system"] for row in rows)):
        own = [row for row in rows if row["system"] == system and row["trajectory"] == "all" and row["asked"]]
        skipped = [100 * row["skipped"] for row in own]
        right.plot(skipped, [row["cosine_mean"] for row in own], "os"[number] + "-", label=f"{system}: cosine")
        right.plot(skipped, [row["top1"] for row in own], "os"[number] + ":", label=f"{system}: top-1")
    right.axhline(0.97, color="grey", linewidth=1, linestyle="--")
    right.set(xlabel="patches skipped, %", ylabel="unseen scenes")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle("architecture B before and after distillation, the package's tower", fontsize=10)
    figure.savefig(RESULTS / "distill.png", dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=60, help="to draw; one in five is held out")
    parser.add_argument("--pictures", type=int, default=120, help="outside scenes to draw, a picture of each")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--test", type=int, default=8, help="unseen scenes to measure on at the end")
    parser.add_argument("--dir", type=Path, default=Path("build/distill"), help="for videos, pictures and weights")
    arguments = parser.parse_args()
    videos, pictures, out = (arguments.dir / name for name in ("videos", "pictures", "street-b.safetensors"))
    draw_videos(videos, arguments.videos)
    draw_pictures(pictures, arguments.pictures)
    if not out.exists():
        command = ["distill", videos, "--outside", pictures, "--out", out, *SETTINGS]
        command += ["--epochs", arguments.epochs, "--rate", arguments.rate]
        command += ["--resume"] if out.with_name(f"{out.name}.checkpoint").exists() else []
        if code := neuroflow([str(part) for part in command]):
            raise SystemExit(code)
    systems, classes = {}, None
    for name in ("untrained", "distilled"):
        systems[name], classes = load_street()
    load_weights(systems["distilled"], out)
    with safe_open(out, "pt") as file:
        history = json.loads(file.metadata()["history"])
    rows = measure(systems, classes, distilled_config(out), arguments.test)
    text = text_of(rows, history, arguments)
    settings = {name: value for name, value in vars(arguments).items() if name != "dir"}
    write("distill", settings | {"seeds": SEEDS, "history": history, "options": SETTINGS}, rows, text)
    plot(rows, history)
    print(text)


if __name__ == "__main__":
    main()

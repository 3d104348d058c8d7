"""An architecture before and after distillation: `python -m bench.distill --arch C`.

Draws scenes under a camera that stands still, teaches the package's tower on them with `neuroflow distill`, and
measures it on scenes that it has not seen: the cosine of its embedding to the unpatched teacher's at several shares of
patches skipped, how often it names the subject, and what the cosine depends on. Pictures under the other cameras are
outside of what it is taught on. A run that was stopped goes on from the last epoch.
"""

import argparse
import dataclasses
import json
import random
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from neuroflow.cli.main import main as neuroflow
from neuroflow.config import ARCHITECTURES
from neuroflow.distillation import DistillationConfig, distilled_config, load_weights
from neuroflow.models import load_street
from neuroflow.video.encode import VideoWriter
from neuroflow.video.scene import CAMERAS, CLASSES, TRAJECTORIES, Stage, scenes
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

from bench.street import FRAMES
from bench.tables import RESULTS, cosine, embeddings, read_clip, run, share, table, write

INSIDE = ("static", "noise")  # cameras; the others are outside
EVERY, SIZE = 6, 224  # frames of a scene that are written, and their side
PICTURE = 60  # the frame of an outside scene
SKIPS = (0.8, 0.9, 0.95)
OUTSIDE = 1600  # scenes outside, at the end
TENTH = 0.1  # of the picture, which is what is encoded of it at 90 % skipped
SETTINGS = ["--strides", "1", "--patience", "9", "--dtype", "bfloat16"]
THRESHOLDS = {"surprise": (0.05, 0.3), "staleness": (0.5, 1.5)}  # by what the gate reads
COLUMNS = ("skipped", "cosine", "answer", "dense", "label", "mean")  # of a frame
SEEDS = {"videos": 7, "pictures": 3, "test": 0, "test pictures": 5}


def under(cameras, count, seed, held_out):
    """`count` scenes under some of the cameras."""
    every = scenes(count * len(CAMERAS) // len(cameras) + len(CAMERAS), seed, held_out=held_out)
    return [scene for scene in every if scene.camera in cameras][:count]


def covered(stage):
    """The largest share of the picture that the box about a scene's subject takes."""
    shares = []
    for frame in range(0, FRAMES, EVERY):
        left, top, right, bottom = (min(max(edge, 0), SIZE) for edge in stage.box(frame))
        shares.append((right - left) * (bottom - top) / SIZE**2)
    return max(shares)


def write_video(path, stage):
    """Every sixth frame of a scene; their labels."""
    labels = []
    with VideoWriter(path, Fraction(30, EVERY)) as writer:
        for frame in range(0, FRAMES, EVERY):
            image, label = stage.draw(frame)
            writer.write(image)
            labels.append(label)
    return labels


def draw_videos(directory, count):
    directory.mkdir(parents=True, exist_ok=True)
    drawn = under(INSIDE, count, SEEDS["videos"], False)
    # Kinds of scenes come in turn, and one in five of the names is held out.
    random.Random(SEEDS["videos"]).shuffle(drawn)
    for number, scene in enumerate(tqdm(drawn, desc="videos", unit="scene")):
        path = directory / f"{number:03d}-{scene.subject}-{scene.trajectory}-{scene.camera}.mp4"
        if not path.exists():
            write_video(path, Stage(scene, FRAMES, SIZE))


def pictures_outside(count, seed):
    """A picture [SIZE, SIZE, 3] uint8 of each of `count` scenes under the other cameras, and its label."""
    outside = [camera for camera in CAMERAS if camera not in INSIDE]
    for scene in under(outside, count, seed, True):
        image, label = Stage(scene, FRAMES, SIZE).draw(PICTURE)
        if label >= 0:
            yield image, label


def draw_pictures(directory, count):
    for number, (image, label) in enumerate(pictures_outside(count, SEEDS["pictures"])):
        folder = directory / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:04d}.png")


@torch.inference_mode()
def measure(systems, classes, gate, count):
    """A dictionary for every frame of unseen scenes but the first of each, which is encoded whole, and every system
    {name: model}, dense and sparse at every share: its cosine to the first system on the whole frame, and what it
    names.
    """
    teacher, frames = next(iter(systems.values())), []
    for scene in tqdm(under(INSIDE, count, SEEDS["test"], True), desc="test", unit="scene"):
        stage = Stage(scene, FRAMES, SIZE)
        with tempfile.TemporaryDirectory() as scratch:
            labels = write_video(Path(scratch, "scene.mp4"), stage)
            clip = read_clip(Path(scratch, "scene.mp4"), SIZE, len(labels))
        expected = embeddings(teacher, clip[1:])
        mean = F.cosine_similarity(expected, F.normalize(expected, dim=1).mean(0, keepdim=True)).tolist()
        dense = classes.scores(expected).argmax(1).tolist()
        facts = {"scene": scene, "large": covered(stage) > TENTH}
        for name, model in systems.items():
            for skip in (0.0, *SKIPS):
                if skip:
                    ((found, skipped, *_),) = run(model, [clip], dataclasses.replace(gate, budget=1 - skip))
                    found, skipped = found[1:], skipped[1:].tolist()
                else:
                    found, skipped = embeddings(model, clip[1:]), [0.0] * len(expected)
                values = F.cosine_similarity(found, expected).tolist()
                answers = classes.scores(found).argmax(1).tolist()
                columns = zip(skipped, values, answers, dense, labels[1:], mean, strict=True)
                frames += [
                    facts | {"system": name, "asked": skip} | dict(zip(COLUMNS, values, strict=True))
                    for values in columns
                ]
    return frames


def rows_of(frames):
    """Figures of every system and share, over all frames and over those that have something in common."""
    groups = {
        "all": lambda frame: True,
        "subject up to a tenth of the picture": lambda frame: not frame["large"],
        "larger subject": lambda frame: frame["large"],
        "the student names what dense names": lambda frame: frame["answer"] == frame["dense"],
        "it names another": lambda frame: frame["answer"] != frame["dense"],
    }
    groups |= {name: lambda frame, name=name: frame["scene"].trajectory == name for name in TRAJECTORIES}
    rows = []
    for system, asked in dict.fromkeys((frame["system"], frame["asked"]) for frame in frames):
        for group, belongs in groups.items():
            own = [frame for frame in frames if (frame["system"], frame["asked"]) == (system, asked)]
            own = [frame for frame in own if belongs(frame)]
            if not own:
                continue
            values = torch.tensor([frame["cosine"] for frame in own], dtype=torch.float64)
            hits = [frame["answer"] == frame["label"] for frame in own if frame["label"] >= 0]
            row = {"system": system, "asked": asked, "group": group, "frames": len(own)}
            row |= {"skipped": sum(frame["skipped"] for frame in own) / len(own), "cosine_mean": values.mean().item()}
            row |= {"cosine_p5": values.quantile(0.05).item(), "cosine_median": values.median().item()}
            row |= {"cosine_of_mean": sum(frame["mean"] for frame in own) / len(own)}
            rows.append(row | {"top1": sum(hits) / len(hits) if hits else None})
    return rows


@torch.inference_mode()
def measure_outside(systems, classes, count):
    """{name: how many of other pictures outside each system names rightly, given them whole}, and of how many."""
    right, pictures = dict.fromkeys(systems, 0), list(pictures_outside(count, SEEDS["test pictures"]))
    for start in tqdm(range(0, len(pictures), 16), desc="outside", unit="batch"):
        images, labels = zip(*pictures[start : start + 16], strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
        for name, model in systems.items():
            answers = classes.scores(embeddings(model, pixels)).argmax(1)
            right[name] += (answers == torch.tensor(labels)).sum().item()
    return right, len(pictures)


def text_of(rows, outside, history, arguments):
    right, pictures = outside
    epochs = [
        [named(epoch), cosine(epoch["fidelity"]), cosine(epoch["fidelity_p5"]), share(epoch["outside"])]
        for epoch in history
    ]

    def figures(row):
        keys = ("cosine_mean", "cosine_median", "cosine_p5")
        return [share(row["skipped"]), *(cosine(row[key]) for key in keys), share(row["top1"])]

    head = ["skipped", "cosine", "median", "5th percentile", "top-1"]
    by_share = [[row["system"], *figures(row)] for row in rows if row["group"] == "all"]
    by_group = [
        [row["group"], row["system"], str(row["frames"]), *figures(row), cosine(row["cosine_of_mean"])]
        for row in sorted(rows, key=lambda row: row["system"], reverse=True)
        if row["asked"] == 0.9
    ]
    return "\n\n".join(
        [
            f"# Architecture {arguments.arch} before and after distillation",
            f"`python -m bench.distill --arch {arguments.arch} --videos {arguments.videos} --epochs "
            f"{arguments.epochs} --rate {arguments.rate:g}`: the package's tower, taught on {arguments.videos} drawn "
            f"videos (one in five of them held out) of {FRAMES // EVERY} frames, under the cameras "
            f"{' and '.join(INSIDE)}. By epoch, its cosine on the held-out videos at 90 % skipped, and the share of "
            "labelled pictures under the other cameras that it names when it is given them whole. Epoch 0 is before "
            "training, "
            f"0.5*{arguments.epochs} the weights half of the way from there to epoch {arguments.epochs}. "
            f"{named(chosen(history))} is kept, of the highest cosine among those that lose less than a point outside:",
            table(["epoch", "cosine", "5th percentile", "top-1 outside"], epochs),
            f"On {arguments.test} other scenes, which neither training nor the choice of the epoch has seen; cosine is "
            "to the teacher on the whole frame, 0 % skipped is the model unpatched:",
            table(["system", *head], by_share),
            f"Of {pictures} other pictures outside, given whole, "
            + ", ".join(f"{name} names {share(count / pictures)}" for name, count in right.items())
            + ".",
            "What the cosine at 90 % skipped depends on; the last column is that of the mean of the clip's own dense "
            "embeddings, a constant that knows the answer:",
            table(["frames where", "system", "frames", *head, "own mean"], by_group),
        ]
    )


def named(epoch):
    return str(epoch["number"]) if epoch["share"] == 1 else f"{epoch['share']:g}*{epoch['number']}"


def chosen(history):
    """The evaluation whose weights were written."""
    kept = [epoch for epoch in history if epoch["outside"] >= history[0]["outside"] - 0.01]
    return max(kept, key=lambda epoch: epoch["fidelity"])


def plot(rows, history, arch):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    numbers = range(len(history))
    left.plot(numbers, [epoch["fidelity"] for epoch in history], "o-", label="cosine at 90 % skipped, held out")
    left.plot(numbers, [epoch["outside"] for epoch in history], "s-", label="top-1 outside, whole pictures")
    left.axhline(0.97, color="grey", linewidth=1, linestyle="--")
    left.set_xticks(numbers, [named(epoch) for epoch in history])
    left.set(xlabel="epoch", ylabel="cosine, top-1")
    for number, system in enumerate(dict.fromkeys(row["system"] for row in rows)):
        own = [row for row in rows if row["system"] == system and row["group"] == "all" and row["asked"]]
        skipped = [100 * row["skipped"] for row in own]
        right.plot(skipped, [row["cosine_mean"] for row in own], "os"[number] + "-", label=f"{system}: cosine")
        right.plot(skipped, [row["top1"] for row in own], "os"[number] + ":", label=f"{system}: top-1")
    right.axhline(0.97, color="grey", linewidth=1, linestyle="--")
    right.set(xlabel="patches skipped, %", ylabel="unseen scenes")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"architecture {arch} before and after distillation, the package's tower", fontsize=10)
    figure.savefig(RESULTS / f"distill-{arch}.png", dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHITECTURES, default="C", help="default: C")
    parser.add_argument("--videos", type=int, default=600, help="to draw; one in five is held out")
    parser.add_argument("--pictures", type=int, default=600, help="outside scenes to draw, a picture of each")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--test", type=int, default=20, help="unseen scenes to measure on at the end")
    parser.add_argument("--dir", type=Path, default=Path("build/distill"), help="for videos, pictures and weights")
    arguments = parser.parse_args()
    videos, pictures, out = (
        arguments.dir / name for name in ("videos", "pictures", f"street-{arguments.arch}.safetensors")
    )
    thresholds = THRESHOLDS[DistillationConfig(arguments.arch).gate().score]
    draw_videos(videos, arguments.videos)
    draw_pictures(pictures, arguments.pictures)
    if not out.exists():
        command = ["distill", videos, "--outside", pictures, "--out", out, *SETTINGS, "--arch", arguments.arch]
        command += ["--thresholds", *thresholds, "--epochs", arguments.epochs, "--rate", arguments.rate]
        command += ["--resume"] if out.with_name(f"{out.name}.checkpoint").exists() else []
        if code := neuroflow([str(part) for part in command]):
            raise SystemExit(code)
    systems, classes = {}, None
    for name in ("untrained", "distilled"):
        systems[name], classes = load_street()
    load_weights(systems["distilled"], out)
    with safe_open(out, "pt") as file:
        history = json.loads(file.metadata()["history"])
    outside = measure_outside(systems, classes, OUTSIDE)
    rows = rows_of(measure(systems, classes, distilled_config(out), arguments.test))
    text = text_of(rows, outside, history, arguments)
    settings = {name: value for name, value in vars(arguments).items() if name != "dir"}
    settings |= {"seeds": SEEDS, "history": history, "options": SETTINGS, "thresholds": thresholds}
    write(
        f"distill-{arguments.arch}",
        settings | {"outside": dict(zip(("right", "pictures"), outside, strict=True))},
        rows,
        text,
    )
    plot(rows, history, arguments.arch)
    print(text)


if __name__ == "__main__":
    main()

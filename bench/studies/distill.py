"""An architecture before and after distillation: `python -m bench.studies.distill --arch C`.

Draws scenes under a fixed camera, trains the package's tower on them with `neuroflow distill`, and measures it on
scenes that it has not seen: its embedding's cosine to the unpatched teacher's at several shares of patches skipped, how
often it names the subject, and what the cosine depends on. Scenes under moving cameras, which training does not show,
tell what it forgets. A run that was stopped resumes from its last epoch.
"""

import argparse
import dataclasses
import json
import random
import tempfile
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from neuroflow.config import ARCHITECTURES
from neuroflow.distillation import DistillationConfig
from neuroflow.street import load_street
from neuroflow.street.scene import CAMERAS, CLASSES, TRAJECTORIES, Stage, scenes
from neuroflow.video.encode import VideoWriter
from neuroflow.weights import distilled_config
from neuroflow_cli import main as neuroflow
from safetensors import safe_open
from tqdm import tqdm

from bench.studies.protocol import embeddings, read_clip, run
from bench.studies.street import FRAMES
from bench.tables import RESULTS, begin, cosine, share, table, write

INSIDE = ("static", "noise")  # cameras; the others are outside
EVERY, SIZE = 6, 224  # frames of a scene that are written, and their side
LAST, ENOUGH = 60, 6  # the frame of an outside scene that is to be known, and how many of it are drawn up to there
SKIPS = (0.8, 0.9, 0.95)
TENTH = 0.1  # of the picture, which is what is encoded of it at 90 % skipped
SETTINGS = ["--strides", "1", "--patience", "9", "--dtype", "bfloat16"]
THRESHOLDS = {"surprise": (0.05, 0.3), "staleness": (0.5, 1.5)}  # by what the gate reads
COLUMNS = ("skipped", "cosine", "answer", "dense", "label", "mean")  # of a frame
SEEDS = {"videos": 7, "others": 3, "test": 0, "test others": 5}


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


def write_video(path, stage, frames=range(0, FRAMES, EVERY)):
    """Frames of a scene; their labels."""
    labels = []
    with VideoWriter(path, Fraction(30, EVERY)) as writer:
        for frame in frames:
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


def outside(directory, count, seed):
    """Draw the last few frames before one of `count` scenes under the other cameras that show their subject there,
    in folders of their classes; the videos' paths.
    """
    others = [camera for camera in CAMERAS if camera not in INSIDE]
    paths = []
    for number, scene in enumerate(tqdm(under(others, count, seed, True), desc=directory.name, unit="scene")):
        stage = Stage(scene, FRAMES, SIZE)
        label = stage.draw(LAST)[1]
        if label >= 0:
            paths.append(directory / CLASSES[label] / f"{number:04d}.mp4")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            if not paths[-1].exists():
                write_video(paths[-1], stage, range(LAST - EVERY * (ENOUGH - 1), LAST + 1, EVERY))
    return paths


@torch.inference_mode()
def measure(model, classes, systems, gate, count):
    """A dictionary for every frame of unseen scenes but the first of each, which is encoded whole, dense and by every
    system {name: weights for partial frames, or None} at every share: its cosine to dense, and what it names.
    """
    frames = []
    for scene in tqdm(under(INSIDE, count, SEEDS["test"], True), desc="test", unit="scene"):
        stage = Stage(scene, FRAMES, SIZE)
        with tempfile.TemporaryDirectory() as scratch:
            labels = write_video(Path(scratch, "scene.mp4"), stage)
            clip = read_clip(Path(scratch, "scene.mp4"), SIZE, len(labels))
        expected = embeddings(model, clip[1:])
        mean = F.cosine_similarity(expected, F.normalize(expected, dim=1).mean(0, keepdim=True)).tolist()
        dense = classes.scores(expected).argmax(1).tolist()
        facts = {"scene": scene, "large": covered(stage) > TENTH}
        found = {("dense", 0.0): (expected, [0.0] * len(expected))}
        for name, weights in systems.items():
            for skip in SKIPS:
                ((own, skipped, *_),) = run(model, [clip], dataclasses.replace(gate, budget=1 - skip), weights=weights)
                found[name, skip] = own[1:], skipped[1:].tolist()
        for (name, skip), (own, skipped) in found.items():
            values = F.cosine_similarity(own, expected).tolist()
            answers = classes.scores(own).argmax(1).tolist()
            columns = zip(skipped, values, answers, dense, labels[1:], mean, strict=True)
            frames += [
                facts | {"system": name, "asked": skip} | dict(zip(COLUMNS, values, strict=True)) for values in columns
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
def measure_outside(model, classes, systems, gate, paths):
    """{name: (how many of the videos' last frames dense and each system name rightly, mean cosine to dense)}."""
    found = {name: [] for name in ("dense", *systems)}
    for start in tqdm(range(0, len(paths), 16), desc="outside", unit="batch"):
        clips = [read_clip(path, SIZE, ENOUGH) for path in paths[start : start + 16]]
        found["dense"].append(embeddings(model, torch.stack([clip[-1] for clip in clips])))
        for name, weights in systems.items():
            found[name] += [one.embeddings[-1:] for one in run(model, clips, gate, weights=weights)]
    labels = torch.tensor([CLASSES.index(path.parent.name) for path in paths])
    expected = torch.cat(found["dense"])
    return {
        name: (
            (classes.scores(torch.cat(own)).argmax(1) == labels).sum().item(),
            F.cosine_similarity(torch.cat(own), expected).mean().item(),
        )
        for name, own in found.items()
    }


def text_of(rows, others, count, history, arguments):
    epochs = [
        [str(epoch["number"]), cosine(epoch["fidelity"]), cosine(epoch["fidelity_p5"]), share(epoch["outside"])]
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
            f"`python -m bench.studies.distill --arch {arguments.arch} --videos {arguments.videos} --epochs "
            f"{arguments.epochs} --rate {arguments.rate:g}`: the package's tower, trained on {arguments.videos} drawn "
            f"videos of {FRAMES // EVERY} frames, one in five of them held out, under the cameras "
            f"{' and '.join(INSIDE)}. The table has its cosine on the held-out videos by epoch, and the share of "
            f"scenes under the other cameras whose subject it names in the last of {ENOUGH} frames, both at 90 % "
            f"skipped. Epoch 0 is before training. Epoch {chosen(history)['number']} is kept: it has the highest "
            "cosine of those that lose less than a point outside.",
            table(["epoch", "cosine", "5th percentile", "top-1 outside"], epochs),
            f"On {arguments.test} other scenes, which neither training nor the choice of the epoch has seen. Only the "
            "weights for partial frames are distilled: the first frame of each scene is whole, is encoded with the "
            "model's own weights, and is not counted.",
            table(["system", *head], by_share),
            f"On {count} scenes under the other cameras, which training did not show, the last of {ENOUGH} frames, at "
            "90 % skipped:",
            table(
                ["system", "cosine", "top-1"],
                [[name, cosine(value), share(right / count)] for name, (right, value) in others.items()],
            ),
            "What the cosine at 90 % skipped depends on. The last column is the cosine of a constant, the mean of the "
            "clip's own dense embeddings.",
            table(["frames where", "system", "frames", *head, "own mean"], by_group),
        ]
    )


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
    left.plot(numbers, [epoch["outside"] for epoch in history], "s-", label="top-1 outside at 90 % skipped")
    left.axhline(0.97, color="grey", linewidth=1, linestyle="--")
    left.set_xticks(numbers)
    left.set(xlabel="epoch", ylabel="cosine, top-1")
    for number, system in enumerate(dict.fromkeys(row["system"] for row in rows if row["asked"])):
        own = [row for row in rows if row["system"] == system and row["group"] == "all"]
        skipped = [100 * row["skipped"] for row in own]
        right.plot(skipped, [row["cosine_mean"] for row in own], "os"[number] + "-", label=f"{system}: cosine")
        right.plot(skipped, [row["top1"] for row in own], "os"[number] + ":", label=f"{system}: top-1")
    right.axhline(0.97, color="grey", linewidth=1, linestyle="--")
    right.set(xlabel="patches skipped, %", ylabel="unseen scenes")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"architecture {arch} before and after distillation, the package's tower", fontsize=10)
    figure.savefig(RESULTS / f"studies/distill-{arch}.png", dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHITECTURES, default="C", help="default: C")
    parser.add_argument("--videos", type=int, default=600, help="to draw; one in five is held out")
    parser.add_argument("--others", type=int, default=150, help="outside scenes to draw")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--test", type=int, default=20, help="unseen scenes to measure on at the end")
    parser.add_argument("--test-others", type=int, default=600, help="unseen scenes outside")
    parser.add_argument("--dir", type=Path, default=Path("build/distill"), help="for videos and weights")
    arguments = parser.parse_args()
    machine = begin(f"studies/distill-{arguments.arch}")
    videos, others, out = (
        arguments.dir / name for name in ("videos", "others", f"street-{arguments.arch}.safetensors")
    )
    thresholds = THRESHOLDS[DistillationConfig(arguments.arch).gate().score]
    draw_videos(videos, arguments.videos)
    outside(others, arguments.others, SEEDS["others"])
    if not out.exists():
        command = ["distill", videos, "--outside", others, "--out", out, *SETTINGS, "--arch", arguments.arch]
        command += ["--thresholds", *thresholds, "--epochs", arguments.epochs, "--rate", arguments.rate]
        command += ["--resume"] if out.with_name(f"{out.name}.checkpoint").exists() else []
        if code := neuroflow([str(part) for part in command]):
            raise SystemExit(code)
    (model, classes), gate = load_street(), distilled_config(out)
    systems = {"untrained": None, "distilled": out}
    with safe_open(out, "pt") as file:
        history = json.loads(file.metadata()["history"])
    paths = outside(arguments.dir / "test", arguments.test_others, SEEDS["test others"])
    found = measure_outside(model, classes, systems, gate, paths)
    rows = rows_of(measure(model, classes, systems, gate, arguments.test))
    text = text_of(rows, found, len(paths), history, arguments)
    settings = {name: value for name, value in vars(arguments).items() if name != "dir"}
    settings |= {"seeds": SEEDS, "history": history, "options": SETTINGS, "thresholds": thresholds}
    settings |= {"outside": found, "outside scenes": len(paths)}
    write(f"studies/distill-{arguments.arch}", machine, settings, rows, text)
    plot(rows, history, arguments.arch)
    print(text)


if __name__ == "__main__":
    main()

"""How often the package's tower names the subject of held-out drawn scenes, dense and patched.

`python -m bench.studies.street` compares the default with the published C, each at its default threshold and where it
skips 84 %, by trajectory, camera and class.
"""

import argparse
import tempfile
from pathlib import Path

import neuroflow
import torch
import torch.nn.functional as F
from neuroflow.street import load_street
from neuroflow.street.scene import CAMERAS, CLASSES, TRAJECTORIES, scenes, write_scene
from tqdm import tqdm

from bench.studies.protocol import embeddings, gate_of, read_clip, run, run_at_skip
from bench.tables import begin, cosine, plot_bars, share, table, write

VARIANTS = {"E (default)": neuroflow.NeuroFlowConfig(), "C, published": neuroflow.NeuroFlowConfig.published()}
FIELDS = {"trajectory": TRAJECTORIES, "camera": CAMERAS, "subject": CLASSES}
SKIP = 0.84
RETAINED = 0.99  # of what dense names; a class that retains less is a failure
FRAMES, SCORED = 120, range(10, 120, 10)  # every frame is encoded
TOGETHER = 10  # scenes in one pass
CALIBRATED_ON = 30  # scenes of the training split


def draw(scene, size, scratch):
    """The frames [T, 3, size, size] of a scene after H.264, and their labels."""
    path = Path(scratch, "scene.mp4")
    labels = write_scene(path, scene, FRAMES, size)
    return read_clip(path, size, FRAMES), labels


def choose_settings(model, scratch):
    """(variant, "default threshold" or the skip asked for) -> configuration."""
    settings = {}
    size = model.config.image_size
    clips = [draw(scene, size, scratch)[0] for scene in scenes(CALIBRATED_ON)]
    for variant, config in VARIANTS.items():
        settings[variant, "default threshold"] = config
        chosen, _ = run_at_skip(model, gate_of(model), clips, config, SKIP, config.threshold)
        settings[variant, f"{SKIP:.0%}"] = chosen
    return settings


def measure(model, classes, group, settings, scratch):
    """(variant, knob) -> a list of every scored frame whose subject is in the picture: the scene, whether dense and
    the patched model named it, their cosine, and the share skipped of the scene. `group` are scenes of one pass.
    """
    kept = list(SCORED)
    clips, labels = zip(*(draw(scene, model.config.image_size, scratch) for scene in group), strict=True)
    dense = [embeddings(model, clip[kept]) for clip in clips]
    scored = {}
    for key, config in settings.items():
        scored[key] = []
        for scene, truth, expected, one in zip(group, labels, dense, run(model, clips, config), strict=True):
            found = one.embeddings[kept]
            cosines = F.cosine_similarity(found, expected).tolist()
            answers = zip(classes.scores(expected).argmax(1), classes.scores(found).argmax(1), strict=True)
            skipped = one.skipped[1:].mean().item()
            for number, (dense_answer, answer), value in zip(kept, answers, cosines, strict=True):
                if truth[number] >= 0:
                    hits = float(dense_answer == truth[number]), float(answer == truth[number])
                    scored[key].append((scene, *hits, value, skipped))
    return scored


def rows_of(scored, settings):
    """A row for every setting and every value of every field, and for all."""
    rows = []
    for (variant, knob), frames in scored.items():
        for field, names in (*FIELDS.items(), ("all", ("all",))):
            for name in names:
                group = [values for scene, *values in frames if field == "all" or getattr(scene, field) == name]
                if not group:
                    continue
                values = torch.tensor(group)
                dense, top1, mean, skipped = values.mean(0).tolist()
                retained = values[values[:, 0] == 1, 1].mean().item() if dense else None
                row = {"variant": variant, "knob": knob, "threshold": settings[variant, knob].threshold}
                row |= {"field": field, "name": name, "frames": len(group), "dense_top1": dense, "top1": top1}
                rows.append(row | {"retained": retained, "cosine_mean": mean, "skipped": skipped})
    return rows


def text_of(rows, settings, count, seed):
    parts = [
        "# The drawn street, by trajectory, camera and class",
        f"`python -m bench.studies.street --scenes {count} --seed {seed}`: {count} held-out scenes of {FRAMES} "
        f"frames, all encoded. {len(SCORED)} frames of each scene are scored, where the subject is in the picture. "
        "Retained is the share of the subjects named correctly by dense that are still named correctly. The threshold "
        f"for {SKIP:.0%} was found on {CALIBRATED_ON} training scenes.",
    ]
    names = [f"{variant}, {knob}" for variant, knob in settings]
    head = ["", "frames", "dense top-1", *(f"{name}: top-1, retained, skipped, cosine" for name in names)]
    for field in (*FIELDS, "all"):
        own = [row for row in rows if row["field"] == field]
        lines = []
        for name in dict.fromkeys(row["name"] for row in own):
            group = [row for row in own if row["name"] == name]
            figures = ("top1", "retained", "skipped")
            cells = [", ".join([*(share(row[key]) for key in figures), cosine(row["cosine_mean"])]) for row in group]
            lines.append([name, str(group[0]["frames"]), share(group[0]["dense_top1"]), *cells])
        parts.append(table([field if field != "all" else "", *head[1:]], lines))
    parts.append(f"Failures, where less than {RETAINED:.0%} is retained:")
    failures = []
    for (variant, knob), name in zip(settings, names, strict=True):
        own = [row for row in rows if (row["variant"], row["knob"]) == (variant, knob) and row["field"] != "all"]
        worst = sorted((row["retained"], row["name"]) for row in own if row["retained"] is not None)
        failed = ", ".join(f"{what} {share(value)}" for value, what in worst if value < RETAINED)
        failures.append(f"- {name}: {failed or 'none'}")
    return "\n\n".join([*parts, "\n".join(failures)])


def report(machine, rows, settings, count, seed):
    text = text_of(rows, settings, count, seed)
    write("studies/street", machine, {"scenes": count, "seed": seed, "asked": SKIP}, rows, text)
    # Classes have too few frames each to be told apart in a plot.
    shown = [row for row in rows if row["field"] in ("trajectory", "camera") and row["retained"] is not None]
    groups = list(dict.fromkeys(row["name"] for row in shown))
    series = {
        f"{variant}, {knob}": [row["retained"] for row in shown if (row["variant"], row["knob"]) == (variant, knob)]
        for variant, knob in settings
    }
    plot_bars("studies/street", f"{count} drawn scenes", "share of dense's right answers kept", groups, series)
    return text


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=150, help="of 120 frames each")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of scenes")
    arguments = parser.parse_args()
    machine = begin("studies/street")
    model, classes = load_street()
    chosen = scenes(arguments.scenes, arguments.seed, held_out=True)
    with tempfile.TemporaryDirectory() as scratch:
        settings = choose_settings(model, scratch)
        scored = {key: [] for key in settings}
        # Written after every pass, so that a run that is stopped leaves what it measured.
        for start in tqdm(range(0, len(chosen), TOGETHER), unit="pass"):
            group = chosen[start : start + TOGETHER]
            for key, frames in measure(model, classes, group, settings, scratch).items():
                scored[key] += frames
            text = report(machine, rows_of(scored, settings), settings, start + len(group), arguments.seed)
    print(text)


if __name__ == "__main__":
    main()

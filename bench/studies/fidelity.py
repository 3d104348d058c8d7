"""What skipping costs in fidelity: `python -m bench.studies.fidelity clips`, or `photographs` against true labels.

An ImageNet ViT-Ti, unpatched and under many NeuroFlow settings, compared at equal skip. `protocol.py` describes the
protocol, and `NEUROFLOW_DATA` names the directory of clips, weights and photographs.
"""

import argparse

import numpy as np
import torch
from neuroflow import NeuroFlowConfig
from PIL import Image
from tqdm import tqdm

from bench.studies.protocol import (
    LEAD,
    TOLERANCE,
    embeddings,
    gate_of,
    large_clips,
    load_classifier,
    mean_of,
    read_clip,
    run,
    run_at_skip,
    score,
)
from bench.tables import begin, cosine, find, plot_bars, plot_points, share, table, write

VARIANTS = {
    "E (default)": NeuroFlowConfig(),
    "E, surprise": NeuroFlowConfig(score="surprise"),
    "C, published": NeuroFlowConfig.published(),
    "E, published gate": NeuroFlowConfig.published("E"),
    "A, published gate": NeuroFlowConfig.published("A"),
    "B, published gate": NeuroFlowConfig.published("B"),
    "D, published gate": NeuroFlowConfig.published("D"),
    "signal embedding": NeuroFlowConfig(signal="embedding"),
    "signal pixel": NeuroFlowConfig(signal="pixel"),
    "reference previous": NeuroFlowConfig(reference="previous"),
    "reference dual": NeuroFlowConfig(reference="dual"),
    "blend 0.7": NeuroFlowConfig(blend=0.7),
    "max_age None": NeuroFlowConfig(max_age=None),
    "no cuts": NeuroFlowConfig(cut_share=None, cut_surprise=None),
    "normalise_motion": NeuroFlowConfig(normalise_motion=True),
    "dilation 1": NeuroFlowConfig(dilation=1),
    "budget": NeuroFlowConfig(),
}
MAIN = ("E (default)", "E, surprise", "C, published")
SKIP, MORE = 0.84, 0.95
MOVING = 0.5  # share of key frames under the default from which a clip is one of key frames only
KINDS = ("noise", "pan", "occluder")
SIDE, FRAMES = 224, 12
CALIBRATED_ON = 30
FIGURES = ("skipped", "cosine_mean", "cosine_p5", "top1", "top1_led")


def measure_clip(model, dense, name, clip, variants, skips, starts):
    """The rows of one clip: the default at its threshold, then each of `variants` at each skip of `skips(variant)`.

    starts: from a gate and a skip to its threshold over the default's, which differs little between clips and tells
    where a search starts; kept up to date.
    """
    gate, default = gate_of(model), NeuroFlowConfig()

    def row(variant, asked, config, one):
        figures = score([expected], [one], dense.classifier)
        reached = asked is None or abs(figures["skipped"] - asked) <= TOLERANCE
        knobs = {"threshold": config.threshold, "budget": config.budget, "asked": asked, "reached": reached}
        return {"clip": name, "variant": variant} | knobs | figures | {"speed": one.speed}

    (expected,), (first,) = run(model, [clip], default, dense=dense)
    rows = [row("E (default)", None, default, first)]
    found = {}  # the default's threshold at each skip
    moving = first.key_frames >= MOVING * (len(clip) - 1)
    for variant, config in variants.items():
        cuts = config.cut_share is not None or config.cut_surprise is not None
        if moving and cuts:
            continue
        for skip in skips(variant):
            if variant == "budget":
                config = NeuroFlowConfig(budget=1 - skip)
                (one,) = run(model, [clip], config)
            else:
                gate_settings = config.signal, config.reference, config.score, config.normalise_motion, config.dilation
                key = (skip, *gate_settings)
                unit = found.get(skip, default.threshold)
                config, (one,) = run_at_skip(model, gate, [clip], config, skip, unit * starts.get(key, 1))
            rows.append(row(variant, skip, config, one))
            if config.threshold is not None and rows[-1]["reached"]:
                if variant == "E (default)":
                    unit = found[skip] = config.threshold
                starts[key] = config.threshold / unit
    return rows


def clips(arguments):
    stem = f"studies/clips-{arguments.size}"
    machine = begin(stem)
    large = arguments.size > SIDE
    variants = {name: VARIANTS[name] for name in MAIN} if large else VARIANTS
    paths = large_clips().values() if large else sorted(find("videos").iterdir())
    model, dense = load_classifier()

    def skips(variant):
        return (SKIP,) if large or variant not in MAIN else (SKIP, MORE)

    rows, starts = [], {}
    settings = {"size": arguments.size, "frames": arguments.frames, "lead": LEAD, "tolerance": TOLERANCE}
    for path in tqdm(paths, unit="clip"):
        clip = read_clip(path, arguments.size, arguments.frames)
        rows += measure_clip(model, dense, path.stem, clip, variants, skips, starts)
        write(stem, machine, settings, rows, clips_text(rows, arguments))
    series = {name: means for name, *means in mean_rows(rows)}
    panels = [
        ("cosine_mean", "1 - mean cosine to dense"),
        ("cosine_p5", "1 - p5 of the cosine"),
        ("top1", "top-1 agreement"),
    ]
    count = len(matched_clips(rows, SKIP))
    plot_points(stem, f"ViT-Ti, {arguments.size} px: means of {count} clips", panels, series)


def matched_clips(rows, skip):
    """The clips on which every variant that was asked to skip `skip` did."""
    asked = [row for row in rows if row["asked"] == skip]
    variants = {row["variant"] for row in asked}
    met = {(row["clip"], row["variant"]) for row in asked if row["reached"]}
    return [clip for clip in dict.fromkeys(row["clip"] for row in rows) if all((clip, v) in met for v in variants)]


def mean_rows(rows):
    """(variant, a mean row for its default threshold, and one for each skip) over the clips that all variants match."""
    chosen = matched_clips(rows, SKIP)
    for variant in dict.fromkeys(row["variant"] for row in rows):
        means = []
        for asked in (None, SKIP, MORE):
            own = chosen if asked != MORE else [clip for clip in chosen if clip in matched_clips(rows, MORE)]
            group = [r for r in rows if (r["variant"], r["asked"]) == (variant, asked) and r["clip"] in own]
            if group:
                means.append(mean_of(group, FIGURES) | {"asked": asked, "clips": len(group)})
        if means:
            yield variant, *means


def clips_text(rows, arguments):
    """The Markdown of the clips' results."""
    head = [
        "variant",
        "asked",
        "clips",
        "skipped",
        "cosine mean",
        "p5",
        "top-1 agreement",
        f"where dense leads by {LEAD}",
    ]

    def figures(row):
        tops = (share(row["top1"]), share(row["top1_led"]))
        return [share(row["skipped"]), cosine(row["cosine_mean"]), cosine(row["cosine_p5"]), *tops]

    def asked(row):
        return "default threshold" if row["asked"] is None else f"{row['asked']:.0%}"

    means = [
        [variant, asked(mean), str(mean["clips"]), *figures(mean)] for variant, *all in mean_rows(rows) for mean in all
    ]
    single = [
        [r["clip"], r["variant"], asked(r) + ("" if r["reached"] else ", not reached"), *figures(r)]
        for r in rows
        if r["asked"] is not None
    ]
    default = [
        [r["clip"], f"{r['key_frames']} of {r['frames']}", *figures(r), f"{r['speed']:.2f}x"]
        for r in rows
        if r["asked"] is None
    ]
    return "\n\n".join(
        [
            f"# Fidelity on clips, {arguments.size} px, the first {arguments.frames} frames of each",
            f"`python -m bench.studies.fidelity clips --size {arguments.size} --frames {arguments.frames}`. An "
            "ImageNet ViT-Ti, nothing trained, compared with the unpatched model on the same frames. Dense leads where "
            f"its answer is {LEAD} more probable than the runner-up.",
            f"Means over the clips on which every variant reaches {SKIP:.0%} (and {MORE:.0%}, where that is asked):",
            table(head, means),
            "The default at its default threshold. Speed is the median time of a dense frame over that of a patched "
            "one, in turns. On clips that are all key frames, variants that turn cuts into key frames have no row "
            "below.",
            table(["clip", "key frames", *head[3:], "speed"], default),
            "Every clip at matched skip:",
            table(["clip", *head[:2], *head[3:]], single),
        ]
    )


def photograph_clip(path, kind, frames=FRAMES, side=SIDE):
    """A clip [T, 3, side, side] whose first frame is the middle of a photograph; the same arguments give the same.

    kind: "noise", a sensor's; "pan", one pixel a frame; "occluder", a grey square that crosses the picture.
    """
    picture = np.asarray(Image.open(path).convert("RGB"))
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    random = np.random.default_rng(int(path.name[:4]))
    down, across = random.choice([(0, 1), (0, -1), (1, 0), (-1, 0)])
    height, edge = int(random.integers(side // 4, side // 2)), side // 5
    shots = []
    for number in range(frames):
        moved = number if kind == "pan" else 0
        shot = picture[top + moved * down :, left + moved * across :][:side, :side].astype(np.float32)
        if kind == "noise" and number:
            shot += random.normal(0, 4, shot.shape)
        if kind == "occluder":
            ahead = number * side // frames
            shot[height : height + edge, max(ahead - edge, 0) : ahead] = 128
        shots.append(shot.clip(0, 255).round())
    return torch.from_numpy(np.stack(shots)).permute(0, 3, 1, 2).float() / 127.5 - 1


def photographs(arguments):
    machine = begin("studies/photographs")
    paths = sorted(find("imagenet256").glob("*.jpg"))
    # Spread over all, as neighbours in this order are of one kind: fish, birds, dogs.
    count = min(arguments.count, len(paths))
    paths = [paths[number * len(paths) // count] for number in np.random.default_rng(0).permutation(count)]
    model, dense = load_classifier()
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    labels = [int(path.name[:4]) for path in paths]
    clips = [photograph_clip(path, kind) for path, kind in zip(paths, kinds, strict=True)]
    expected = [embeddings(dense, clip) for clip in tqdm(clips, unit="photograph", desc="dense")]

    def correct(found, kind):
        answers = [dense.classifier(one[1:]).argmax(1) for one in found]
        hits = zip(answers, labels, kinds, strict=True)
        return torch.cat([answer == label for answer, label, own in hits if kind in (own, "all")]).float().mean().item()

    rows = []
    with torch.inference_mode():
        rows += [{"variant": "dense", "kind": kind, "label_top1": correct(expected, kind)} for kind in (*KINDS, "all")]
        for variant in MAIN:
            config, seen = VARIANTS[variant], clips[:CALIBRATED_ON]
            config, _ = run_at_skip(model, gate_of(model), seen, config, SKIP, config.threshold)
            runs = []
            for start in tqdm(range(0, count, 10), desc=variant):
                runs += run(model, clips[start : start + 10], config)
            for kind in (*KINDS, "all"):
                own = [number for number in range(count) if kind in (kinds[number], "all")]
                figures = score([expected[n] for n in own], [runs[n] for n in own], dense.classifier)
                top = {"label_top1": correct([one.embeddings for one in runs], kind)}
                rows.append({"variant": variant, "kind": kind, "threshold": config.threshold} | top | figures)
    settings = {"photographs": count, "frames": FRAMES, "side": SIDE, "calibrated_on": CALIBRATED_ON, "asked": SKIP}
    write("studies/photographs", machine, settings, rows, photographs_text(rows, settings))
    series = {
        row["variant"]: [each["label_top1"] for each in rows if each["variant"] == row["variant"]] for row in rows
    }
    title = f"ViT-Ti on clips of {count} photographs, {SKIP:.0%} skipped overall"
    plot_bars("studies/photographs", title, "top-1 against the label", [*KINDS, "all"], series)


def photographs_text(rows, settings):
    head = ["variant", "clips", "top-1 (label)", "skipped", "cosine mean", "p5", "top-1 agreement"]
    dash = ["-"] * 4
    cells = [
        [r["variant"], r["kind"], share(r["label_top1"])]
        + (
            [share(r["skipped"]), cosine(r["cosine_mean"]), cosine(r["cosine_p5"]), share(r["top1"])]
            if "skipped" in r
            else dash
        )
        for r in rows
    ]
    return "\n\n".join(
        [
            f"# Photographs as clips of {settings['frames']} frames",
            f"`python -m bench.studies.fidelity photographs --count {settings['photographs']}`. "
            f"{settings['photographs']} ImageNet photographs: a third are panned, a third get noise and a third are "
            "crossed by an occluder. The first frame is dense and is not scored. Each variant has one threshold for "
            f"all clips, chosen to skip {SKIP:.0%} of the first {settings['calibrated_on']}. The ViT-Ti was probably "
            "trained on these photographs, so only the differences between rows mean anything.",
            table(head, cells),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("clips")
    command.add_argument("--size", type=int, default=SIDE, help="over 224: the main variants on four clips")
    command.add_argument("--frames", type=int, default=120, help="of each clip")
    command.set_defaults(function=clips)
    command = commands.add_parser("photographs")
    command.add_argument("--count", type=int, default=500)
    command.set_defaults(function=photographs)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()

"""What the fidelity tables share: runs of a model over clips, thresholds for a skip rate, and how results are written.

The protocol: frames resized to a square by area averaging; the first frame of a clip is dense and is not scored;
embeddings are compared by cosine with the unpatched model's, answers with its answer.
"""

import dataclasses
import itertools
import json
import os
import re
import statistics
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import neuroflow
import torch
import torch.nn.functional as F
from neuroflow.adapters import describe as anatomy_of
from neuroflow.embedding import frame_embeddings
from neuroflow.weights import copy_sharing_weights
from torch import nn

from neuroflow_kernels.env import describe

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("NEUROFLOW_DATA", ROOT.parent / "shared" / "data"))
RESULTS = ROOT / "bench" / "results"
FACTS = ("processor", "instruction sets", "threads", "cuda:0", "python", "torch", "triton", "transformers", "numpy")
PROCESSORS = ("epyc", "xeon", "ryzen", "core")
LEAD = 0.1  # in probability, by which dense is sure of its answer
TOLERANCE = 0.01  # of a skip rate that is asked for
STRIDE, TRIALS = 5.0, 7


class Run(NamedTuple):
    """What a patched model gave on a clip of T frames: embeddings [T, D], share skipped [T], key frames after the
    first, and the median milliseconds of a dense frame over those of a patched one where both were run.
    """

    embeddings: torch.Tensor
    skipped: torch.Tensor
    key_frames: int
    speed: float | None = None


def find(name):
    """The path of a file or directory that the project does not carry."""
    path = DATA / name
    if not path.exists():
        raise SystemExit(f"{name} is not in {DATA}; set NEUROFLOW_DATA to the directory that holds it")
    return path


def read_clip(path, size, count, rate=None):
    """The first `count` frames, all or so many a second, [T, 3, size, size] float32."""
    # Here, since a benchmark that writes a table may run where there is no PyAV.
    from neuroflow.video.preprocess import Preprocessor
    from neuroflow.video.source import Source

    preprocess = Preprocessor(size, size)
    with closing(Source(str(path))) as source:
        step = 1 if rate is None else max(round(source.rate / rate), 1)
        return torch.cat([preprocess(frame) for frame in itertools.islice(source, 0, step * count, step)])


@torch.inference_mode()
def embeddings(model, pixels):
    """The tower's embeddings [S, D] of pixels [S, 3, H, W]."""
    return frame_embeddings(model, pixels)


def run(model, clips, config, *, dense=None, weights=None):
    """A `Run` for each of `clips`, which are streams of one pass where they are of one length.

    With `dense`, the unpatched model is run in turns with the patched one, clip by clip; returns its embeddings too.
    `weights` is a file of those for partial frames.
    What is encoded does not depend on how fast the machine is.
    """
    neuroflow.enable_cache(model, config.reproducible(), weights=weights)
    try:
        if dense is not None:
            return list(zip(*(_run_in_turns(model, clip, dense) for clip in clips), strict=True))
        if len({len(clip) for clip in clips}) == 1:
            return _run_together(model, clips)
        return [result for clip in clips for result in _run_together(model, [clip])]
    finally:
        neuroflow.disable_cache(model)


def _run_together(model, clips):
    neuroflow.reset_cache(model)
    found, reports = [], []  # of each frame, those of all clips
    with neuroflow.cache_context(model, *range(len(clips))):
        for pixels in zip(*clips, strict=True):
            found.append(embeddings(model, torch.stack(pixels)))
            reports.append(neuroflow.last_pass(model))
    return [_run_of(*one) for one in zip(zip(*found, strict=True), zip(*reports, strict=True), strict=True)]


def _run_of(found, reports, speed=None):
    """A `Run` of the embeddings [D] and the reports of a clip's frames."""
    skipped = torch.tensor([report.skipped for report in reports])
    key_frames = sum(report.key_frame is not None for report in reports[1:])
    return Run(torch.stack(found), skipped, key_frames, speed)


def _run_in_turns(model, clip, dense):
    neuroflow.reset_cache(model)
    found, expected, reports, times = [], [], [], {model: [], dense: []}
    for number, pixels in enumerate(clip.split(1)):
        # Taking turns, so that neither always finds the processor's cache as the other left it.
        for each in (model, dense) if number % 2 else (dense, model):
            start = time.perf_counter()
            (found if each is model else expected).append(embeddings(each, pixels))
            times[each].append(time.perf_counter() - start)
        reports += neuroflow.last_pass(model)
    speed = statistics.median(times[dense][1:]) / statistics.median(times[model][1:])
    return torch.cat(expected), _run_of([embedding for (embedding,) in found], reports, speed)


def mean_skip(runs):
    return torch.cat([one.skipped[1:] for one in runs]).mean().item()


def find_threshold(skipped_at, skip, start, trials=TRIALS, tolerance=TOLERANCE):
    """The threshold of those tried at which `skipped_at(threshold)` is nearest to `skip`.

    Steps of a factor until two thresholds have `skip` between them, then to where a line between the two meets it.
    """
    tried = {}
    threshold = start
    for _ in range(trials):
        tried[threshold] = skipped_at(threshold)
        if abs(tried[threshold] - skip) <= tolerance:
            break
        below = max((at for at, skipped in tried.items() if skipped < skip), default=None)
        above = min((at for at, skipped in tried.items() if skipped > skip), default=None)
        if below is None:
            threshold = above / STRIDE
        elif above is None:
            threshold = below * STRIDE
        else:
            share = (skip - tried[below]) / (tried[above] - tried[below])
            threshold = below * (above / below) ** min(max(share, 0.15), 0.85)
    return min(tried, key=lambda at: abs(tried[at] - skip))


def gate_of(model):
    """A copy of `model` with its first block alone: what is skipped by surprise does not depend on the others."""
    gate = copy_sharing_weights(model)
    first = anatomy_of(gate).layers[0]
    for module in list(gate.modules()):
        if isinstance(module, nn.ModuleList) and module[0] is first:
            del module[1:]
    return gate


def run_at_skip(model, gate, clips, config, skip, start, tolerance=TOLERANCE):
    """The configuration whose threshold skips `skip` of the patches of `clips`, and its runs."""
    runs = {}
    shallow = config.score == "surprise"

    def skipped_at(threshold):
        tried = dataclasses.replace(config, threshold=threshold)
        if shallow:
            return mean_skip(run(gate, clips, dataclasses.replace(tried, arch="dual")))
        runs[threshold] = run(model, clips, tried)
        return mean_skip(runs[threshold])

    # A gate alone is cheap to ask.
    threshold = find_threshold(skipped_at, skip, start, 3 * TRIALS if shallow else TRIALS, tolerance)
    chosen = dataclasses.replace(config, threshold=threshold)
    return chosen, run(model, clips, chosen) if shallow else runs[threshold]


def score(expected, runs, head):
    """The figures of runs against dense embeddings [T, D] of each, over all frames but the first of each clip.

    head: embeddings [T, D] -> logits [T, classes].
    """
    dense = torch.cat([one[1:] for one in expected])
    found = torch.cat([one.embeddings[1:] for one in runs])
    with torch.inference_mode():
        best, answers = head(dense).softmax(1).topk(2), head(found).argmax(1)
    same = (answers == best.indices[:, 0]).float()
    led = best.values[:, 0] - best.values[:, 1] >= LEAD
    cosine = F.cosine_similarity(found, dense)
    return {
        "skipped": mean_skip(runs),
        "cosine_mean": cosine.mean().item(),
        "cosine_p5": cosine.quantile(0.05).item(),
        "top1": same.mean().item(),
        "top1_led": same[led].mean().item() if led.any() else None,
        "led": led.float().mean().item(),
        "key_frames": sum(one.key_frames for one in runs),
        "frames": len(dense),
    }


def mean_of(rows, keys):
    """The mean of each of `keys` over the rows that have it."""
    found = {key: [row[key] for row in rows if row[key] is not None] for key in keys}
    return {key: statistics.mean(values) if values else None for key, values in found.items()}


def share(value):
    return "-" if value is None else f"{100 * value:.1f} %"


def cosine(value):
    return "-" if value is None else f"{value:.4f}"


def table(names, rows):
    """A Markdown table of `rows`, each a list of texts."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def git(*arguments):
    """What git prints of this project; nothing where it is no checkout."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.rstrip()


def changed():
    """The tracked files, results aside, that are not as the last commit has them."""
    status = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return [line[3:] for line in status.splitlines()]


def machine():
    """What every result says of where it comes from: the machine, the versions and the commit."""
    facts = describe()
    commit = git("describe", "--always")
    found = {name: facts[name] for name in FACTS if name in facts}
    return found | {"commit": f"{commit}-dirty" if changed() else commit or "unknown"}


def begin(stem):
    """The machine that `write` is to name; called before anything is measured.

    stem: of a file in bench/results ("studies/street" is one in bench/results/studies), or a path's.

    Raises:
        SystemExit: the file is to lie in bench/results, and no commit has the code as it is here.
    """
    if Path(RESULTS, stem).resolve().is_relative_to(RESULTS):
        if not git("describe", "--always"):
            raise SystemExit(f"{stem} is to name the commit that was measured; {ROOT} is no checkout of git")
        if files := changed():
            raise SystemExit(
                f"{stem} is to name the commit that was measured, and these differ from it: {', '.join(files)}; commit "
                "or stash them first"
            )
    return machine()


def short_name(device):
    """What files call a processor or GPU of a name such as "AMD EPYC 9654, AVX512": its family if known, else all."""
    words = re.findall("[a-z0-9]+", device.partition(",")[0].lower())
    return next((word for word in words if word in PROCESSORS), "-".join(words))


def write(stem, machine, settings, rows, text):
    """bench/results/STEM.json with the `machine` of `begin`, the settings and every row; STEM.md."""
    Path(RESULTS, stem).parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "settings": settings, "rows": rows}
    Path(RESULTS, f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    line = ", ".join(f"{name} {value}" for name, value in machine.items())
    Path(RESULTS, f"{stem}.md").write_text(f"{text}\n\n{line}.\n")


def plot_points(stem, title, panels, series):
    """bench/results/STEM.png: for every panel (key, label) the rows of `series` {name: rows} over their skip.

    Cosines are shown as distances from 1, on a log scale, as most lie close to it.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), layout="constrained")
    for axis, (key, label) in zip(axes, panels, strict=True):
        distance = key.startswith("cosine")
        for number, (name, rows) in enumerate(series.items()):
            points = sorted((100 * row["skipped"], 1 - row[key] if distance else row[key]) for row in rows)
            marker = "os^vD*<>PXph8"[number % 13]
            axis.plot(*zip(*points, strict=True), marker=marker, linewidth=1, label=name)
        axis.set(xlabel="patches skipped, %", ylabel=label, yscale="log" if distance else "linear")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    figure.suptitle(title, fontsize=10)
    figure.savefig(RESULTS / f"{stem}.png", dpi=110)
    plt.close(figure)


def plot_bars(stem, title, label, groups, series):
    """bench/results/STEM.png: the values of `series` {name: values, one for each of `groups`} side by side."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(max(1.1 * len(groups), 6), 4.5), layout="constrained")
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        axis.bar(places, values, width, label=name)
    axis.set_xticks(range(len(groups)), groups, fontsize=8)
    lowest = min(min(values) for values in series.values())
    axis.set(ylabel=label, ylim=(max(lowest - 0.1, 0), 1.02))
    axis.grid(axis="y", alpha=0.3)
    figure.legend(fontsize=7, loc="outside lower center", ncols=len(series))
    axis.set_title(title, fontsize=10)
    figure.savefig(RESULTS / f"{stem}.png", dpi=110)
    plt.close(figure)

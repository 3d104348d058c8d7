"""The protocol of the fidelity studies: a model run over clips, a threshold for a given skip, and the scores.

Frames are resized to a square by area averaging. The first frame of a clip is dense and is not scored. Embeddings are
compared with the unpatched model's by cosine, and answers with its answers.
"""

import dataclasses
import itertools
import statistics
import tempfile
import time
from contextlib import closing
from typing import NamedTuple

import neuroflow
import torch
import torch.nn.functional as F
from neuroflow.adapters import describe as anatomy_of
from neuroflow.embedding import frame_embeddings
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Source
from neuroflow.weights import copy_sharing_weights
from torch import nn

from bench.studies.vit_tiny import vit_tiny
from bench.tables import find

LARGE_CLIPS = ("bottle", "one-by-one", "juggle", "Traffic.")
LEAD = 0.1  # in probability, by which dense is sure of its answer
TOLERANCE = 0.01  # of a skip rate that is asked for
STRIDE, TRIALS = 5.0, 7


class Run(NamedTuple):
    """A patched model on a clip of T frames: embeddings [T, D], share skipped [T], key frames after the first, and the
    median time of a dense frame over that of a patched one where both were run.
    """

    embeddings: torch.Tensor
    skipped: torch.Tensor
    key_frames: int
    speed: float | None = None


def large_clips():
    """The paths of the clips that are measured at more than one size, by name."""
    paths = sorted(find("videos").iterdir())
    return {part.strip("."): path for path in paths for part in LARGE_CLIPS if part in path.name}


def load_classifier():
    """The patched model's classifier and an unpatched one that shares its weights."""
    with tempfile.TemporaryDirectory() as scratch:
        model = vit_tiny(find("weights/vit_tiny_patch16_224.safetensors"), scratch)
    return model, copy_sharing_weights(model)


def read_clip(path, size, count, rate=None):
    """The first `count` frames, all of them or `rate` per second, [T, 3, size, size] float32."""
    preprocess = Preprocessor(size, size)
    with closing(Source(str(path))) as source:
        step = 1 if rate is None else max(round(source.rate / rate), 1)
        return torch.cat([preprocess(frame) for frame in itertools.islice(source, 0, step * count, step)])


@torch.inference_mode()
def embeddings(model, pixels):
    """The tower's embeddings [S, D] of pixels [S, 3, H, W]."""
    return frame_embeddings(model, pixels)


def run(model, clips, config, *, dense=None, weights=None):
    """A `Run` for each of `clips`, encoded as streams of one pass if they have the same length.

    With `dense`, the unpatched model, both models take turns clip by clip, and its embeddings are returned too.
    `weights` is a file of weights for partial frames. What is encoded does not depend on the machine's speed.
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
        # In turns, so that neither model always finds the processor's cache as the other left it.
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
    """The threshold, among those tried, at which `skipped_at(threshold)` is nearest to `skip`.

    Multiplies or divides by `STRIDE` until two thresholds bracket `skip`, then interpolates between them.
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
    """A copy of `model` with its first block only: what surprise skips does not depend on the other blocks."""
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

    # Running the gate alone is cheap.
    threshold = find_threshold(skipped_at, skip, start, 3 * TRIALS if shallow else TRIALS, tolerance)
    chosen = dataclasses.replace(config, threshold=threshold)
    return chosen, run(model, clips, chosen) if shallow else runs[threshold]


def score(expected, runs, head):
    """The scores of runs against the dense embeddings [T, D] of each, over all frames but the first of each clip.

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

"""Zero-shot classification of short clips by a model and patched copies of it, and how often each is right."""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .classes import ClassHead
from .embedding import CLIP, frame_embeddings, in_clips
from .patch import cache_context, last_pass, reset_cache

DENSE = "dense"
STREAM = "clip"
Z = 1.959963984540054  # of a normal distribution's central 95 %


@dataclass(frozen=True)
class Answer:
    """What one system made of one clip.

    Attributes:
        top: the three best classes, or all of fewer, the best first.
        skipped: share of the patches that each frame did not encode; None of the unpatched model.
        cosine: to the unpatched model's embeddings, the mean of all frames but the first, which is dense; None of the
            unpatched model, and of a clip of one frame.
    """

    top: list[str]
    skipped: list[float] | None = None
    cosine: float | None = None


class Row(NamedTuple):
    """The figures of one system over all clips.

    Attributes:
        system: its name.
        clips: how many there are.
        top1: share of the clips whose class is its best answer.
        top1_interval: its Wilson 95 % interval.
        top3: share of the clips whose class is among its three best.
        top3_interval: its Wilson 95 % interval.
        skipped: mean share of patches skipped, of all frames but the first of each clip; None of the unpatched model.
        cosine: mean of the clips' cosines to the unpatched model's embeddings.
    """

    system: str
    clips: int
    top1: float
    top1_interval: tuple[float, float]
    top3: float
    top3_interval: tuple[float, float]
    skipped: float | None
    cosine: float | None


def spoken(label: str) -> str:
    """A class folder's name as a prompt has it: ApplyEyeMakeup and apply_eye_makeup are "apply eye makeup"."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", label)
    return " ".join(words.replace("_", " ").lower().split())


@torch.inference_mode()
def clip_embeddings(model: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """A clip through a patched model from nothing, 16 frames in one call behind the first.

    Args:
        model: patched.
        pixels: [T, 3, H, W].

    Returns:
        the frames' embeddings [T, D] float32, and the share of the patches that each skipped.
    """
    embeddings, skipped = [], []
    try:
        with cache_context(model, STREAM):
            for clip in in_clips(pixels.split(1)):
                embeddings.append(frame_embeddings(model, clip))
                skipped += [report.skipped for report in last_pass(model)]
    finally:
        # A first frame that failed has left no stream.
        with contextlib.suppress(KeyError):
            reset_cache(model, STREAM)
    return torch.cat(embeddings), skipped


@torch.inference_mode()
def classify(
    pixels: torch.Tensor,
    dense: nn.Module,
    patched: Mapping[str, nn.Module],
    classes: ClassHead,
    project: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, Answer]:
    """What the unpatched model and patched ones name a clip, all from the same decoded frames.

    A clip's scores are those of the mean of its frames' embeddings.

    Args:
        pixels: [T, 3, H, W].
        dense: unpatched.
        patched: by the name of their system; each may share its weights with the others.
        classes: what the embeddings are compared with.
        project: embeddings [1, D] -> into the space of `classes`; None where they are in it.

    Returns:
        the answers by system, "dense" first.

    Raises:
        ValueError: the classes are of another size than the embeddings.
    """

    def top(embeddings: torch.Tensor) -> list[str]:
        mean = embeddings.mean(0, keepdim=True)
        if project is not None:
            mean = project(mean)
        if mean.shape[1] != classes.embeddings.shape[1]:
            count, size = classes.embeddings.shape
            raise ValueError(f"classes is [{count}, {size}]; accepted is [C, {mean.shape[1]}], the model's embeddings")
        best = classes.scores(mean)[0].argsort(descending=True, stable=True)[:3]
        return [classes.names[index] for index in best.tolist()]

    expected = torch.cat([frame_embeddings(dense, batch) for batch in pixels.split(CLIP)])
    answers = {DENSE: Answer(top(expected))}
    for system, model in patched.items():
        found, skipped = clip_embeddings(model, pixels)
        cosine = F.cosine_similarity(found, expected)[1:].mean().item() if len(found) > 1 else None
        answers[system] = Answer(top(found), skipped, cosine)
    return answers


def wilson(correct: int, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `correct` of `count`, at least 1.

    Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    share, weight = correct / count, Z**2 / count
    centre = (share + weight / 2) / (1 + weight)
    half = Z * math.sqrt(share * (1 - share) / count + weight / count / 4) / (1 + weight)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def tabulate(answers: Iterable[tuple[str, Mapping[str, Answer]]]) -> list[Row]:
    """(label, answers by system) of each clip, at least one -> a row for every system."""
    clips = list(answers)
    rows = []
    for system in clips[0][1]:
        ours = [(label, by_system[system]) for label, by_system in clips]
        first = sum(answer.top[0] == label for label, answer in ours)
        among = sum(label in answer.top for label, answer in ours)
        skipped = [share for _, answer in ours for share in (answer.skipped or ())[1:]]
        cosines = [answer.cosine for _, answer in ours if answer.cosine is not None]
        rows.append(
            Row(
                system,
                len(ours),
                first / len(ours),
                wilson(first, len(ours)),
                among / len(ours),
                wilson(among, len(ours)),
                float(np.mean(skipped)) if skipped else None,
                float(np.mean(cosines)) if cosines else None,
            )
        )
    return rows

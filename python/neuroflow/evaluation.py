"""Zero-shot classification of short clips by a model and patched copies of it, and the accuracy of each."""

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

    Args:
        top: the three best classes, or all if there are fewer, best first.
        skipped: for each frame, the share of patches that were not encoded; None for the unpatched model.
        cosine: mean cosine to the unpatched model's embeddings over all frames but the first, which is dense; None for
            the unpatched model and for a clip of one frame.
    """

    top: list[str]
    skipped: list[float] | None = None
    cosine: float | None = None


class Row(NamedTuple):
    """The figures of one system over all clips.

    Args:
        system: its name.
        clips: number of clips.
        top1: share of clips whose best answer is right.
        top1_interval: its Wilson 95 % interval.
        top3: share of clips whose class is among the three best answers.
        top3_interval: its Wilson 95 % interval.
        skipped: mean share of patches skipped, over all frames but the first of each clip; None for the unpatched
            model.
        cosine: mean over clips of the cosine to the unpatched model's embeddings; None for the unpatched model.
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
    """A class folder's name as it reads in a prompt.

    Args:
        label: the name, in camel case or with underscores.

    Returns:
        lower-case words.

    Example:
        >>> from neuroflow.evaluation import spoken
        >>> spoken("ApplyEyeMakeup"), spoken("apply_eye_makeup")
        ('apply eye makeup', 'apply eye makeup')
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", label)
    return " ".join(words.replace("_", " ").lower().split())


@torch.inference_mode()
def clip_embeddings(model: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Run a clip through a patched model from a clean start: the first frame, then 16 frames in each call.

    Args:
        model: a patched model.
        pixels: [T, 3, H, W].

    Returns:
        the frames' embeddings [T, D] float32, and for each frame the share of patches that were skipped.

    Raises:
        RuntimeError: the model is not patched.

    Example:
        >>> from neuroflow.evaluation import clip_embeddings
        >>> embeddings, skipped = clip_embeddings(neuroflow.enable_cache(model), frames)
        >>> embeddings.shape, skipped[0]
        (torch.Size([8, 32]), 0.0)
    """
    embeddings, skipped = [], []
    try:
        with cache_context(model, STREAM):
            for clip in in_clips(pixels.split(1)):
                embeddings.append(frame_embeddings(model, clip))
                skipped += [report.skipped for report in last_pass(model)]
    finally:
        # If the first frame failed, there is no stream.
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
    """Classify one clip with the unpatched model and with patched ones, from the same decoded frames.

    The scores of a clip are those of the mean of its frames' embeddings.

    Args:
        pixels: [T, 3, H, W].
        dense: the unpatched model.
        patched: patched models by system name; they may share weights.
        classes: the class embeddings to compare with.
        project: function that maps embeddings [1, D] into the space of `classes`; None if they are in it already.

    Returns:
        the answers by system, "dense" first.

    Raises:
        ValueError: the class embeddings have another size than the model's.

    Example:
        >>> from neuroflow.classes import ClassHead
        >>> from neuroflow.evaluation import classify
        >>> classes = ClassHead(("car", "dog"), torch.eye(2, 32))
        >>> list(classify(frames, model, {}, classes))
        ['dense']
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
    """The Wilson 95 % interval of a share.

    Args:
        correct: number of successes.
        count: number of trials, at least 1.

    Returns:
        lower and upper bound, 0 to 1.

    Example:
        >>> from neuroflow.evaluation import wilson
        >>> [round(bound, 3) for bound in wilson(8, 10)]
        [0.49, 0.943]

    Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    share, weight = correct / count, Z**2 / count
    centre = (share + weight / 2) / (1 + weight)
    half = Z * math.sqrt(share * (1 - share) / count + weight / count / 4) / (1 + weight)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def tabulate(answers: Iterable[tuple[str, Mapping[str, Answer]]]) -> list[Row]:
    """Aggregate the answers on all clips.

    Args:
        answers: (label, answers by system) of each clip, at least one.

    Returns:
        a row for each system.

    Example:
        >>> from neuroflow.evaluation import Answer, tabulate
        >>> (row,) = tabulate([("car", {"dense": Answer(["car", "dog"])}), ("dog", {"dense": Answer(["car", "dog"])})])
        >>> row.top1, row.top3
        (0.5, 1.0)
    """
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

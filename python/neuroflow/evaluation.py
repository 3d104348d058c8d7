"""Zero-shot classification of short clips in class folders: which clips, how they are read, and what they are named."""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from .adapters import describe
from .adapters.anatomy import interpolation
from .models import ClassHead
from .patch import cache_context, reset_cache, summary
from .video.preprocess import Preprocessor
from .video.source import IMAGE_SUFFIXES, MAX_PIXELS, Source, SourceError

PUBLISHED = {
    "signal": "embedding",
    "reference": "ema",
    "ema_decay": 0.01,
    "score": "surprise",
    "max_age": None,
    "cut_share": None,
    "cut_surprise": None,
    "dense_above": 1.0,
}
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
DENSE = "dense"
STREAM = "clip"
BATCH = 16  # frames of one pass through the unpatched model
Z = 1.959963984540054  # of a normal distribution's central 95 %


class Clip(NamedTuple):
    """A labelled clip: `name` is its path below the folder, with slashes; `label` the name of its class folder."""

    path: Path
    name: str
    label: str


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

    Args:
        top1, top3: share of the clips whose class is its best answer, or among its three best.
        top1_interval, top3_interval: their Wilson 95 % intervals.
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


def find_clips(folder: Path, testlist: Path | None = None) -> tuple[list[str], list[Clip]]:
    """The classes and clips of a folder in UCF-101's layout: a folder for each class, which holds its clips.

    A clip is a video file, or a directory of images.

    Args:
        folder: holds the class folders.
        testlist: names the clips that count, one a line, as `ClassName/clip.avi`; a number after it is passed over.
            Every class folder is a class all the same.

    Returns:
        the names of all class folders, and the clips, in name order or that of the list.

    Raises:
        ValueError: no class folder or no clip; a list that cannot be read, or names what is not there.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such directory; give one that holds a folder of clips for each class")
    labels = sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not labels:
        raise ValueError(f"{folder}: holds no class folder; give a directory with a folder of clips for each class")
    if testlist is None:
        paths = [path for label in labels for path in sorted((folder / label).iterdir()) if _is_clip(path)]
        if not paths:
            accepted = f"files in {', '.join(VIDEO_SUFFIXES)}, or directories of images"
            raise ValueError(f"{folder}: no clip in its {len(labels)} class folders; accepted are {accepted}")
        names = [path.relative_to(folder).as_posix() for path in paths]
    else:
        names = _listed(testlist)
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            message = f"{len(absent)} of the {len(names)} clips that it names are not in {folder}, {absent[0]} first"
            raise ValueError(f"testlist {testlist}: {message}")
    return labels, [Clip(folder / name, name, name.partition("/")[0]) for name in names]


def _is_clip(path: Path) -> bool:
    if path.is_dir():
        return any(image.suffix.lower() in IMAGE_SUFFIXES for image in path.iterdir())
    return path.suffix.lower() in VIDEO_SUFFIXES


def _listed(testlist: Path) -> list[str]:
    try:
        lines = testlist.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"testlist {testlist}: cannot be read ({error}); give a file of ClassName/clip.avi") from None
    names = []
    for number, line in enumerate(lines, 1):
        name = re.sub(r"\s+\d+$", "", line.strip())
        if name and "/" not in name:
            raise ValueError(f"testlist {testlist}, line {number}: {name!r} has no class; give ClassName/clip.avi")
        if name:
            names.append(name)
    if not names:
        raise ValueError(f"testlist {testlist}: names no clip; give lines as ClassName/clip.avi")
    return list(dict.fromkeys(names))


def spoken(label: str) -> str:
    """A class folder's name as a prompt has it: ApplyEyeMakeup and apply_eye_makeup are "apply eye makeup"."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", label)
    return " ".join(words.replace("_", " ").lower().split())


def read_classes(path: Path) -> ClassHead:
    """Class embeddings from a file: `embeddings` [C, D] of any float dtype, C `names`, `temperature` if there is one.

    Of an .npz all are arrays; in .safetensors the names are JSON in the metadata, as in the package's own.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    accepted = "embeddings [C, D] and C different names, in .npz or .safetensors"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                names = json.loads((file.metadata() or {})["names"])
        else:
            with np.load(path) as file:
                tensors = {name: torch.from_numpy(file[name]) for name in file.files if name != "names"}
                names = [str(name) for name in file["names"]]
        embeddings = tensors["embeddings"].float()
    except KeyError as error:
        raise ValueError(f"classes {path}: holds no {error.args[0]}; accepted are {accepted}") from None
    # Another kind of file under such a name: each library has errors of its own for that.
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"classes {path}: cannot be read ({error}); accepted are {accepted}") from None
    fits = embeddings.ndim == 2 and len(embeddings) == len(names) == len(set(names)) > 0
    if not fits or not embeddings.isfinite().all():
        found = f"embeddings {list(embeddings.shape)} and {len(set(names))} names"
        raise ValueError(f"classes {path}: holds {found}; accepted are {accepted}, all finite")
    temperature = tensors["temperature"].item() if "temperature" in tensors else 1.0
    return ClassHead(tuple(names), embeddings, temperature)


def read_clip(
    path: Path, preprocess: Preprocessor, frames: int = 16, stride: int = 1, max_pixels: int = MAX_PIXELS
) -> torch.Tensor:
    """A clip's frames 0, stride, 2 stride, ..., `frames` of them or what there is: [T, 3, height, width] float32.

    They are consecutive, not spread over the clip, as a gate compares each with the one before.

    Raises:
        SourceError: the clip cannot be decoded that far.
    """
    with closing(Source(str(path), max_pixels=max_pixels)) as source:
        chosen = itertools.islice(source, 0, (frames - 1) * stride + 1, stride)
        pixels = [preprocess(frame) for frame in chosen]
    if source.stopped and len(pixels) < frames:
        raise SourceError(f"{path}: {source.stopped}")
    return torch.cat(pixels)


def clip_embeddings(model: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """A clip through a patched model, frame by frame, from nothing.

    Args:
        model: patched.
        pixels: [T, 3, H, W].

    Returns:
        the frames' embeddings [T, D] float32, and the share of the patches that each skipped.
    """
    embeddings, skipped = [], []
    try:
        with cache_context(model, STREAM):
            for frame in pixels.split(1):
                embeddings.append(frame_embeddings(model, frame))
                skipped.append(1 - summary(model).streams[STREAM].active.float().mean().item())
    finally:
        if STREAM in summary(model).streams:
            reset_cache(model, STREAM)
    return torch.cat(embeddings), skipped


@torch.inference_mode()
def frame_embeddings(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Frames [S, 3, H, W] -> the model's embeddings of them [S, D] float32."""
    anatomy = describe(model)
    weight = next(anatomy.tower.parameters())
    pixels = pixels.to(weight.device, weight.dtype)
    return anatomy.embedding(anatomy.tower(pixels, **interpolation(anatomy.tower, pixels))).float()


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
        with torch.inference_mode():
            best = classes.scores(mean)[0].argsort(descending=True, stable=True)[:3]
        return [classes.names[index] for index in best.tolist()]

    expected = torch.cat([frame_embeddings(dense, batch) for batch in pixels.split(BATCH)])
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

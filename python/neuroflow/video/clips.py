"""Labelled clips in class folders, and their frames as a model takes them."""

import contextlib
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import torch

from .preprocess import Preprocessor
from .source import MAX_PIXELS, Source, SourceError, images_in, is_hidden, natural_order

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


class Clip(NamedTuple):
    """A labelled clip: `name` is its path below the folder, with slashes; `label` is the name of its class folder."""

    path: Path
    name: str
    label: str


def find_clips(folder: Path, testlist: Path | None = None) -> tuple[list[str], list[Clip]]:
    """The classes and clips of a folder in UCF-101's layout: one folder for each class, with its clips.

    A clip is a video file or a directory of images; hidden ones are ignored.

    Args:
        folder: holds the class folders.
        testlist: lists the clips to use, one per line, as `ClassName/clip.avi`; a number after it is ignored. The
            classes are still all class folders.

    Returns:
        the names of all class folders, and the clips, in natural order or in the order of the list.

    Raises:
        ValueError: no class folder or no clip; a list that cannot be read, or names a missing clip.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such directory; give one that holds a folder of clips for each class")
    labels = sorted(child.name for child in folder.iterdir() if child.is_dir() and not is_hidden(child))
    if not labels:
        raise ValueError(f"{folder}: holds no class folder; give a directory with a folder of clips for each class")
    if testlist is None:
        paths = [
            path for label in labels for path in sorted((folder / label).iterdir(), key=natural_order) if _is_clip(path)
        ]
        if not paths:
            accepted = f"files in {', '.join(VIDEO_SUFFIXES)}, or directories of images"
            raise ValueError(f"{folder}: no clip in its {len(labels)} class folders; accepted are {accepted}")
        names = [path.relative_to(folder).as_posix() for path in paths]
    else:
        names = _read_testlist(testlist)
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            message = f"{len(absent)} of the {len(names)} clips it lists are not in {folder}, {absent[0]} first"
            raise ValueError(f"testlist {testlist}: {message}")
    return labels, [Clip(folder / name, name, name.partition("/")[0]) for name in names]


def _is_clip(path: Path) -> bool:
    if is_hidden(path):
        return False
    if path.is_dir():
        return bool(images_in(path))
    return path.suffix.lower() in VIDEO_SUFFIXES


def _read_testlist(testlist: Path) -> list[str]:
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
        raise ValueError(f"testlist {testlist}: lists no clip; give lines such as ClassName/clip.avi")
    return list(dict.fromkeys(names))


def read_clip(
    path: Path, preprocess: Preprocessor, frames: int = 16, stride: int = 1, max_pixels: int = MAX_PIXELS
) -> torch.Tensor:
    """Frames 0, stride, 2 stride, ... of a clip, up to `frames` of them: [T, 3, height, width] float32.

    They are not spread over the clip, because a gate compares each frame with earlier ones.

    Raises:
        SourceError: the clip cannot be decoded that far. A shorter clip is not an error.
    """
    with contextlib.closing(Source(str(path), max_pixels=max_pixels)) as source:
        chosen = itertools.islice(source, 0, (frames - 1) * stride + 1, stride)
        pixels = [preprocess(frame) for frame in chosen]
    if source.stopped and len(pixels) < frames:
        raise SourceError(f"{path}: {source.stopped}")
    return torch.cat(pixels)

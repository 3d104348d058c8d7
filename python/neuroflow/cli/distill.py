"""`neuroflow distill`: a tower taught to do with the active patches alone, on the user's own footage."""

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..distillation import Distillation, DistillationConfig, Epoch, Pictures
from ..evaluation import VIDEO_SUFFIXES
from ..models import STREET, load_classes
from ..video.preprocess import Preprocessor
from ..video.source import Source
from . import CommandError
from .run import every, load_model

HELD_OUT = 5  # one video in so many
HEADING = f"""{"":>6}{"":>12}{"patches":>12}{"cosine to dense":>22}{"known":>12}
{"epoch":>6}{"loss":>12}{"skipped":>12}{"mean":>12}{"p5":>10}{"outside":>12}"""


class _Frames:
    """The frames of one source or several as the model takes them, decoded anew whenever they are gone through."""

    def __init__(
        self, sources: Sequence[Path], preprocess: Preprocessor, stride: int, most: int | None, max_pixels: int
    ) -> None:
        self._sources, self._preprocess = sources, preprocess
        self._stride, self._most, self._max_pixels = stride, most, max_pixels
        self.bar: tqdm | None = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        for path in self._sources:
            with contextlib.closing(Source(str(path), max_pixels=self._max_pixels)) as source:
                for frame in itertools.islice(every(source, self._stride), self._most):
                    yield self._preprocess(frame)
        if self.bar is not None:
            self.bar.update()


def distill(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow distill` and return the exit code.

    Raises:
        CommandError, SourceError: bad input.
    """
    out, checkpoint = arguments.out, arguments.out.with_name(f"{arguments.out.name}.checkpoint")
    if out.is_dir() or not out.parent.is_dir() or out.suffix != ".safetensors":
        raise CommandError(f"--out {out}: cannot be written; give a .safetensors file in a directory that exists")
    if arguments.resume and not checkpoint.exists():
        raise CommandError(f"--resume: there is no unfinished {out}; run without it")
    paths = _videos(arguments.videos)
    model, preprocess = load_model(argparse.Namespace(**vars(arguments) | {"dtype": "float32"}))
    reading = preprocess, arguments.stride, arguments.max_frames, arguments.max_pixels
    held_out = [_Frames([path], *reading) for path in paths[::HELD_OUT]]
    videos = [_Frames([path], *reading) for number, path in enumerate(paths) if number % HELD_OUT]
    outside = None if arguments.outside is None else _outside(arguments, preprocess)
    dtype = arguments.dtype or ("bfloat16" if model.device.type == "cuda" else "float32")
    names = [field.name for field in dataclasses.fields(DistillationConfig)]
    given = {name: value for name in names if (value := vars(arguments).get(name)) is not None}
    if "thresholds" in given:
        given["thresholds"] = tuple(given["thresholds"])
    try:
        distillation = Distillation(model, DistillationConfig(**given), getattr(torch, dtype))
        if arguments.resume:
            distillation.resume(checkpoint)
    except ValueError as error:
        raise CommandError(str(error)) from None
    weights = sum(parameter.numel() for parameter in distillation.weights.values())
    print(f"videos            {len(videos)} to learn from, {len(held_out)} held out; {weights:,} weights to train")
    print(HEADING)
    for epoch in distillation.history:
        print(format_epoch(epoch))
    try:
        _go_on(distillation, videos, held_out, outside, checkpoint)
        distillation.save(out)
    except ValueError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"--out {out}: cannot be written ({error.strerror}); give another") from None
    except KeyboardInterrupt:
        if checkpoint.exists():
            print("finished epochs are kept: the same command with --resume continues", file=sys.stderr)
        raise
    checkpoint.unlink(missing_ok=True)
    if len(distillation.epochs) <= distillation.config.epochs:
        print(
            f"ended early       more than {distillation.config.forgetting:.1%} of the pictures outside were forgotten"
        )
    print(f"written           {out}, epoch {_name(distillation.chosen)}, for neuroflow run --weights")
    return 0


def _go_on(
    distillation: Distillation,
    videos: list[_Frames],
    held_out: list[_Frames],
    outside: Pictures | None,
    checkpoint: Path,
) -> None:
    """Train and evaluate until it is finished, with a row for every epoch."""
    shown = [] if outside is None else [outside.frames]
    while not distillation.finished:
        loss, number = None, len(distillation.epochs)
        if number and not distillation.trained:
            with _progress(videos, f"epoch {number}"):
                loss = distillation.train(videos)
        with _progress([*held_out, *shown], f"evaluation {number}"):
            epoch = distillation.evaluate(held_out, outside, loss)
        distillation.checkpoint(checkpoint)
        print(format_epoch(epoch), flush=True)


def format_epoch(epoch: Epoch) -> str:
    """A row under HEADING."""
    loss = "" if epoch.loss is None else f"{epoch.loss:.4f}"
    outside = "" if epoch.outside is None else f"{epoch.outside:.1%}"
    figures = f"{epoch.skipped:>12.1%}{epoch.fidelity:>12.4f}{epoch.fidelity_p5:>10.4f}"
    return f"{_name(epoch):>6}{loss:>12}{figures}{outside:>12}"


def _name(epoch: Epoch) -> str:
    """Its number, times the share of the way from the teacher's weights where that is not all of it."""
    return str(epoch.number) if epoch.share == 1 else f"{epoch.share:g}*{epoch.number}"


@contextlib.contextmanager
def _progress(parts: list[_Frames], name: str) -> Iterator[None]:
    with tqdm(total=len(parts), desc=name, unit="source", leave=False, dynamic_ncols=True) as bar:
        for part in parts:
            part.bar = bar
        yield


def _videos(directory: Path) -> list[Path]:
    """The videos in a directory and those below it, in name order."""
    if not directory.is_dir():
        raise CommandError(f"{directory}: no such directory; give one that holds videos")
    paths = sorted(path for path in directory.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if len(paths) < 2:
        suffixes = ", ".join(VIDEO_SUFFIXES)
        raise CommandError(
            f"{directory}: holds {len(paths)} video(s); give 2 or more of {suffixes}, as one in {HELD_OUT} is held out"
        )
    return paths


def _outside(arguments: argparse.Namespace, preprocess: Preprocessor) -> Pictures:
    """The pictures of --outside, with their classes where the folders name some that the model knows."""
    directory, own = arguments.outside, STREET if arguments.model is None else Path(arguments.model)
    if not directory.is_dir():
        raise CommandError(f"--outside {directory}: no such directory; give one that holds pictures, or class folders")
    folders = sorted(path for path in directory.iterdir() if path.is_dir())
    frames = _Frames(folders or [directory], preprocess, 1, None, arguments.max_pixels)
    if not folders or not (own / "classes.safetensors").exists():
        return Pictures(frames)
    classes = load_classes(own)
    labels = []
    for folder in folders:
        if folder.name not in classes.names:
            known = ", ".join(classes.names)
            raise CommandError(f"--outside {directory}: has a folder {folder.name!r}; the model's classes are {known}")
        with contextlib.closing(Source(str(folder), max_pixels=arguments.max_pixels)) as source:
            labels += [classes.names.index(folder.name)] * source.frame_count
    return Pictures(frames, labels, classes)

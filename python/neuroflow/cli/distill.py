"""`neuroflow distill`: train a tower to work from the active patches alone, on the user's footage."""

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from ..distillation import Distillation, DistillationConfig, Epoch, Outside
from ..files import lock, writing
from ..street import STREET, load_classes
from ..video.clips import VIDEO_SUFFIXES
from ..video.preprocess import Preprocessor
from ..video.source import Source, every, is_hidden, natural_order
from . import CommandError
from .common import load_model, require_writable
from .options import add_frames, add_loading, count, share

DESCRIPTION = """\
Train a tower to give, from the active patches of a frame, what it gives for the whole frame. The student can have any
architecture: B, which keeps little of the output without training; C, which reaches more at the same number of patches,
as its cache holds the others; or E.

Only weights for partial frames are trained. Key frames are encoded with the model's own weights, so nothing is lost
there. What comes before the first block is never trained, because the gate reads it.

VIDEOS is a directory. One video in five, by name, is held out; after every epoch the mean cosine between the student
and the unpatched teacher is measured there. On other footage a student may do worse than untrained: --outside is a
directory of such videos, and epochs that recognise too few of them are not chosen. Their last frames count. If the
folders are named after the model's classes (a classes.safetensors next to its weights), a video is recognised if it is
classified correctly; otherwise, if the student's embedding is nearest to the teacher's embedding of the same video.
The best weights are written, with the settings of the gate; `neuroflow run --weights FILE` reads both.
"""

EXAMPLES = """\
examples:
  neuroflow distill videos/ --arch C --outside others/ --out street-c.safetensors
  neuroflow distill videos/ --arch C --outside others/ --out street-c.safetensors --resume
  neuroflow distill videos/ --model ./my-vit --train last-4 --rate 5e-6 --epochs 3 --device cuda --out b.safetensors
  neuroflow run clip.mp4 --weights street-c.safetensors --compare
"""

HELD_OUT = 5  # one video in this many
HEADING = f"""{"":>6}{"":>12}{"patches":>12}{"cosine to dense":>22}{"known":>12}
{"epoch":>6}{"loss":>12}{"skipped":>12}{"mean":>12}{"p5":>10}{"outside":>12}"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `neuroflow distill`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.set_defaults(function=distill)
    parser.add_argument("videos", type=Path, metavar="VIDEOS", help="directory of videos to train on")
    parser.add_argument(
        "--outside", type=Path, metavar="DIR", help="directory of videos of other things, with or without class folders"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--resume", action="store_true", help="continue the unfinished --out of the same command")
    add_loading(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of matrix products in training; weights are float32 (default: bfloat16 on a GPU, else float32)",
    )
    training = parser.add_argument_group("training", "the defaults are those of DistillationConfig")
    training.add_argument("--arch", help="active (B), dual (C), context (E), midlayer (D) or mlp (A) (default: active)")
    training.add_argument("--train", metavar="WHAT", help="head, last-K (blocks, and the head) or all (default: all)")
    training.add_argument("--epochs", type=count, metavar="N", help="passes over all videos (default: 12)")
    training.add_argument("--rate", type=float, metavar="R", help="learning rate (default: 1e-4)")
    training.add_argument("--batch", type=count, metavar="N", help="frames in a step (default: 128)")
    training.add_argument("--clips", type=count, metavar="N", help="videos that a step takes frames from (default: 32)")
    training.add_argument(
        "--strides", type=count, metavar="N", help="read videos at random strides from 1 to N (default: 4)"
    )
    training.add_argument(
        "--thresholds",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="range that a video's threshold is drawn from (default: 0.02 0.5)",
    )
    training.add_argument(
        "--skip",
        type=share,
        metavar="S",
        help="share of patches skipped in evaluation, and with the result (default: 0.9)",
    )
    training.add_argument(
        "--forgetting", type=float, metavar="F", help="share of --outside that may be forgotten (default: 0.01)"
    )
    training.add_argument(
        "--patience", type=count, metavar="N", help="stop after N epochs in a row that forget more (default: 3)"
    )
    training.add_argument("--seed", type=int, metavar="N", help="random seed (default: 0)")
    add_frames(parser, 300, "at most N frames of each video (default: 300)")


class _Frames:
    """The frames of one video, preprocessed; decoded again each time they are read."""

    def __init__(self, path: Path, preprocess: Preprocessor, stride: int, most: int | None, max_pixels: int) -> None:
        self._path, self._preprocess = path, preprocess
        self._stride, self._most, self._max_pixels = stride, most, max_pixels
        self.bar: tqdm | None = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        with contextlib.closing(Source(str(self._path), max_pixels=self._max_pixels)) as source:
            for frame in itertools.islice(every(source, self._stride), self._most):
                yield self._preprocess(frame)
        if self.bar is not None:
            self.bar.update()


def distill(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow distill` and return the exit code.

    Raises:
        CommandError: bad options.
        OutputError: --out cannot be written, or another run is writing it.
        SourceError: a video gives no frames.
    """
    out, checkpoint = arguments.out, arguments.out.with_name(f"{arguments.out.name}.checkpoint")
    require_writable("--out", out, ".safetensors")
    held = out.with_name(f"{out.name}.lock")
    with writing(out), contextlib.ExitStack() as stack:
        stack.enter_context(lock(held))
        stack.callback(held.unlink, missing_ok=True)
        return _distill(arguments, out, checkpoint)


def _distill(arguments: argparse.Namespace, out: Path, checkpoint: Path) -> int:
    if arguments.resume and not checkpoint.exists():
        raise CommandError(f"--resume: there is no unfinished {out}; run without it")
    paths = _videos(arguments.videos)
    if len(paths) < 2:
        raise CommandError(f"{arguments.videos}: holds one video; give 2 or more, as one in {HELD_OUT} is held out")
    elsewhere = [] if arguments.outside is None else _videos(arguments.outside, "--outside ")
    model, preprocess = load_model(argparse.Namespace(**vars(arguments) | {"dtype": "float32"}))
    reading = preprocess, arguments.stride, arguments.max_frames, arguments.max_pixels
    held_out = [_Frames(path, *reading) for path in paths[::HELD_OUT]]
    videos = [_Frames(path, *reading) for number, path in enumerate(paths) if number % HELD_OUT]
    outside = _outside(arguments, elsewhere, [_Frames(path, *reading) for path in elsewhere]) if elsewhere else None
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
    print(f"videos            {len(videos)} for training, {len(held_out)} held out; {weights:,} weights to train")
    print(HEADING)
    for epoch in distillation.history:
        print(format_epoch(epoch))
    try:
        _train(distillation, videos, held_out, outside, checkpoint)
        distillation.save(out)
    except ValueError as error:
        raise CommandError(str(error)) from None
    except KeyboardInterrupt:
        if checkpoint.exists():
            print("finished epochs are kept: the same command with --resume continues", file=sys.stderr)
        raise
    checkpoint.unlink(missing_ok=True)
    if len(distillation.history) <= distillation.config.epochs:
        print(f"ended early       more than {distillation.config.forgetting:.1%} of the outside videos were forgotten")
    print(f"written           {out}, epoch {distillation.chosen.number}, for neuroflow run --weights")
    return 0


def _train(
    distillation: Distillation,
    videos: list[_Frames],
    held_out: list[_Frames],
    outside: Outside | None,
    checkpoint: Path,
) -> None:
    """Train and evaluate until finished, printing a row for every epoch."""
    shown = [] if outside is None else outside.videos
    while not distillation.finished:
        loss, number = None, len(distillation.history)
        if number:
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
    return f"{epoch.number:>6}{loss:>12}{figures}{outside:>12}"


@contextlib.contextmanager
def _progress(parts: list[_Frames], name: str) -> Iterator[None]:
    with tqdm(total=len(parts), desc=name, unit="source", leave=False, dynamic_ncols=True) as bar:
        for part in parts:
            part.bar = bar
        yield


def _videos(directory: Path, option: str = "") -> list[Path]:
    """The videos in a directory tree, in natural order, without hidden files."""
    if not directory.is_dir():
        raise CommandError(f"{option}{directory}: no such directory; give one that holds videos")
    found = (path for path in directory.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and not is_hidden(path))
    paths = sorted(found, key=natural_order)
    if not paths:
        raise CommandError(f"{option}{directory}: holds no video; accepted are files in {', '.join(VIDEO_SUFFIXES)}")
    return paths


def _outside(arguments: argparse.Namespace, paths: list[Path], videos: list[_Frames]) -> Outside:
    """The videos of --outside, with classes if its folders are named after the model's."""
    directory, own = arguments.outside, STREET if arguments.model is None else Path(arguments.model)
    folders = [path.relative_to(directory).parts[0] for path in paths if path.parent != directory]
    if len(folders) < len(paths) or not (own / "classes.safetensors").exists():
        return Outside(videos)
    classes = load_classes(own)
    if unknown := set(folders).difference(classes.names):
        known = ", ".join(classes.names)
        raise CommandError(f"--outside {directory}: has a folder {min(unknown)!r}; the model's classes are {known}")
    return Outside(videos, [classes.names.index(folder) for folder in folders], classes)

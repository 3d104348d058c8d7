"""`neuroflow calibrate`: fit the threshold to the user's footage, and write the configuration."""

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import neuroflow

from ..calibration import Of
from ..report.advice import Advice, Setup
from ..report.pages import shown_address, write_calibration
from ..video.preprocess import Preprocessor
from ..video.source import Source, every
from . import CommandError
from .common import format_gate, gate_config, load_model, pinned_model, report_file, require_writable
from .options import add_frames, add_gate, add_model, add_report, share
from .report import machine

DESCRIPTION = """\
Find the threshold that gives a target fidelity, or a target skip rate, on your own footage, and write a configuration
for `neuroflow run --config`.

The frames are kept in memory, 0.6 MB each at 224 px, and go through the model at most 14 times.
SOURCE is a video file or a directory of images, MODEL as for `neuroflow run`.
"""

EXAMPLES = """\
examples:
  neuroflow calibrate clip.mp4 --target-fidelity 0.99 --out config.json --report calibration.html
  neuroflow calibrate clip.mp4 --model ./my-vit --target-skip 0.84 --max-age 60 --out config.json
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `neuroflow calibrate`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.set_defaults(function=calibrate)
    add_model(parser)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--target-fidelity", type=share, metavar="F", help="mean cosine to the unpatched model's, below 1"
    )
    target.add_argument("--target-skip", type=share, metavar="S", help="instead: mean share of patches skipped")
    parser.add_argument(
        "--target-of",
        choices=get_args(Of),
        default="embedding",
        help="compare embeddings of frames, or tokens of patches, which language models read (default: embedding)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the configuration to write, JSON")
    add_report(parser)
    add_gate(parser)
    add_frames(parser, 120, "at most N frames (default: 120)")


class _Frames:
    """Frames that show a progress bar each time they are read."""

    def __init__(self, frames: list[torch.Tensor]) -> None:
        self._frames = frames
        self._count = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        name = f"trial {self._count}" if self._count else "dense"
        self._count += 1
        return iter(tqdm(self._frames, desc=name, unit="frame", leave=False, dynamic_ncols=True))


def calibrate(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow calibrate` and return the exit code.

    Raises:
        CommandError: bad options, or a target out of reach.
        OutputError: --out or --report cannot be written.
        SourceError: the source gives no frames.
    """
    require_writable("--out", arguments.out, None)
    with report_file(arguments.report) as page:
        return _calibrate(arguments, page)


def _calibrate(arguments: argparse.Namespace, page: Path | None) -> int:
    """Find the threshold, and write the report to `page`."""
    config, out = gate_config(arguments), arguments.out
    with contextlib.closing(Source(arguments.source, max_pixels=arguments.max_pixels)) as source:
        if source.live:
            raise CommandError(
                f"{source.address}: a live source gives each frame only once; record a clip, and give the file"
            )
        model, preprocess = load_model(arguments)
        chosen = itertools.islice(every(source, arguments.stride), arguments.max_frames)
        frames = [preprocess(frame) for frame in tqdm(chosen, desc="reading", unit="frame", dynamic_ncols=True)]
    if len(frames) < 2:
        raise CommandError(f"{source.address}: gives {len(frames)} frame(s), and the first is not scored; give more")
    if source.stopped:
        print(f"warning: {source.address}: {source.stopped}; the frames before are used", file=sys.stderr)
    try:
        found = neuroflow.calibrate(
            model,
            _Frames(frames),
            config,
            fidelity=arguments.target_fidelity,
            skip=arguments.target_skip,
            of=arguments.target_of,
        )
    except neuroflow.CalibrationError as error:
        nearer = (
            "a lower --target-fidelity"
            if arguments.target_skip is None
            else "a --target-skip closer to that, a smaller --floor"
        )
        raise CommandError(f"{error}; give {nearer}, or other footage") from None
    except ValueError as error:
        raise CommandError(str(error)) from None
    print(format_calibration(found, len(frames)))
    found.config.save(out)
    if page is not None:
        _write_page(page, found, arguments, model, preprocess, len(frames))
    print(f"written           {out}, for neuroflow run --config")
    return 0


def _write_page(
    page: Path,
    found: neuroflow.Calibration,
    arguments: argparse.Namespace,
    model: PreTrainedModel,
    preprocess: Preprocessor,
    frames: int,
) -> None:
    source = shown_address(arguments.source)
    by_skip = arguments.target_fidelity is None
    next_run = Setup(source, arguments.model, found.config).command("run", "--config", str(arguments.out), "--compare")
    write_calibration(
        page,
        found,
        "skip" if by_skip else "fidelity",
        arguments.target_skip if by_skip else arguments.target_fidelity,
        source=source,
        frames=frames,
        advice=Advice("Check the choice on footage that it was not found on.", "Here, it is on the same:", next_run),
        facts={
            "model": f"{type(model).__name__}, {preprocess.width}x{preprocess.height}",
            "gate": format_gate(found.config),
            "machine": machine(model.device),
        },
        settings={
            "source": source,
            "model": pinned_model(arguments),
            "frames": frames,
            "stride": arguments.stride,
            "compared": arguments.target_of,
            "device": arguments.device,
            "dtype": arguments.dtype,
            **dataclasses.asdict(found.config),
        },
    )


def format_calibration(found: neuroflow.Calibration, frames: int) -> str:
    """The table of trials, by threshold, and the setting chosen."""
    lines = [
        f"frames            {frames}, {frames - 1} of them scored (not the first, which is dense)",
        f"{'threshold':>10}{'patches':>12}{'cosine to dense':>22}",
        f"{'':>10}{'skipped':>12}{'mean':>12}{'p5':>10}",
    ]
    lines += [
        f"{trial.threshold:>10.4g}{trial.skipped:>12.1%}{trial.fidelity:>12.4f}{trial.fidelity_p5:>10.4f}"
        + "  chosen" * (trial.threshold == found.config.threshold)
        for trial in sorted(found.trials)
    ]
    return "\n".join([*lines, f"NeuroFlow         {format_gate(found.config)}"])

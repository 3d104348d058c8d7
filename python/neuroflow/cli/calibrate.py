"""`neuroflow calibrate`: a threshold from the user's own footage, and the configuration file that holds it."""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator

import torch
from tqdm import tqdm

import neuroflow

from ..video.source import Source
from . import CommandError
from .run import every, format_gate, gate_config, load_model


class _Passes:
    """Frames that show a progress bar whenever they are gone through."""

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
        CommandError, SourceError: bad input, or a target out of reach.
    """
    config = gate_config(arguments)
    out = arguments.out
    if out.is_dir() or not out.parent.is_dir():
        raise CommandError(f"--out {out}: cannot be written; give a file in a directory that exists")
    with contextlib.closing(Source(arguments.source, max_pixels=arguments.max_pixels)) as source:
        if source.live:
            raise CommandError(f"{source.address}: a live source gives each frame once; record some, and give the file")
        model, preprocess = load_model(arguments)
        chosen = itertools.islice(every(source, arguments.stride), arguments.max_frames)
        frames = [preprocess(frame) for frame in tqdm(chosen, desc="reading", unit="frame", dynamic_ncols=True)]
    if len(frames) < 2:
        raise CommandError(f"{source.address}: gives {len(frames)} frame(s), and the first is not scored; give more")
    if source.stopped:
        print(f"warning: {source.address}: {source.stopped}; the frames before are used", file=sys.stderr)
    try:
        found = neuroflow.calibrate(
            model, _Passes(frames), config, fidelity=arguments.target_fidelity, skip=arguments.target_skip
        )
    except neuroflow.CalibrationError as error:
        nearer = (
            "a lower --target-fidelity"
            if arguments.target_skip is None
            else "a --target-skip nearer to that, a smaller --floor"
        )
        raise CommandError(f"{error}; give {nearer}, or other footage") from None
    except ValueError as error:
        raise CommandError(str(error)) from None
    print(format_calibration(found, len(frames)))
    try:
        found.config.save(out)
    except OSError as error:
        raise CommandError(f"--out {out}: cannot be written ({error.strerror}); give another") from None
    print(f"written           {out}, for neuroflow run --config")
    return 0


def format_calibration(found: neuroflow.Calibration, frames: int) -> str:
    """The table of the trials, by threshold, and the setting chosen from them."""
    lines = [
        f"frames            {frames}, {frames - 1} of them scored (the first is dense, and is not)",
        f"{'threshold':>10}{'patches':>12}{'cosine to dense':>22}",
        f"{'':>10}{'skipped':>12}{'mean':>12}{'p5':>10}",
    ]
    lines += [
        f"{trial.threshold:>10.4g}{trial.skipped:>12.1%}{trial.fidelity:>12.4f}{trial.fidelity_p5:>10.4f}"
        + "  chosen" * (trial.threshold == found.config.threshold)
        for trial in sorted(found.trials)
    ]
    return "\n".join([*lines, f"NeuroFlow         {format_gate(found.config)}"])

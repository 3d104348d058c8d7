"""What several commands share: model, input size and gate from the options, and the files they write."""

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import neuroflow

from ..files import replacing
from ..journal import Findings
from ..street import STREET
from ..video.preprocess import Preprocessor
from ..weights import distilled_config
from . import CommandError
from .model import TOWERS, load_tower

INTERRUPTED = 130  # exit code after Ctrl-C
KEPT = "finished work is kept: the same command with --resume continues it"
EMBEDDED = (
    "no --model given: using the small SigLIP that comes with the package, which needs no download but knows only the "
    "drawn scenes of `neuroflow demo`; give --model for your own"
)
GATE_OPTIONS = (  # each sets the field of NeuroFlowConfig of the same name
    "arch",
    "threshold",
    "budget",
    "floor",
    "max_age",
    "refresh",
    "score",
    "signal",
    "reference",
    "ema_decay",
    "dilation",
    "normalise_motion",
    "precision",
    "kernels",
)


def load_model(arguments: argparse.Namespace) -> tuple[PreTrainedModel, Preprocessor]:
    """Load the model that the options ask for, and its preprocessor.

    Raises:
        CommandError: it cannot be loaded, the device cannot be used, or the size does not fit.
    """
    name = str(STREET) if arguments.model is None else arguments.model
    model = load_tower(name, torch_device(arguments.device), getattr(torch, arguments.dtype))
    mean, std = TOWERS[model.config.model_type].normalisation
    usual = Preprocessor(*pair(model.config.image_size), mean=mean, std=std)
    try:
        preprocess = Preprocessor.from_pretrained(name, usual)
    except ValueError as error:
        raise CommandError(str(error)) from None
    height, width = input_size(model, preprocess, arguments.size)
    if (height, width) != (preprocess.height, preprocess.width):
        if preprocess.crop:
            cut = f"the {preprocess.width}x{preprocess.height} that {name} cuts from their middle"
            warnings.warn(f"frames are resized whole to {width}x{height}, in place of {cut}", stacklevel=2)
        preprocess = preprocess.resized(height, width)
    if arguments.model is None:
        print(EMBEDDED, file=sys.stderr)
    return model, preprocess


def torch_device(name: str) -> torch.device:
    """The device named by --device.

    Raises:
        CommandError: it cannot be used.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails on the meta device
    # torch raises several classes for a device that is misspelt, not built in or absent.
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device {name}: cannot be used ({reason}); cpu always can") from None
    return device


def input_size(model: PreTrainedModel, preprocess: Preprocessor, asked: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the model's input.

    Args:
        model: a tower listed in TOWERS.
        preprocess: the checkpoint's.
        asked: width and height; None for the checkpoint's.

    Raises:
        CommandError: a size that the model does not take.
    """
    if TOWERS[model.config.model_type].fixed(model.config):
        height, width = pair(model.config.image_size)
        if asked not in (None, (width, height)):
            raise CommandError(
                f"--size {asked[0]}x{asked[1]}: the model takes {width}x{height} only; give that or none"
            )
        return height, width
    patch_height, patch_width = pair(model.config.patch_size)
    if asked is None:
        if preprocess.height < patch_height or preprocess.width < patch_width:
            size = f"{preprocess.width}x{preprocess.height}"
            raise CommandError(f"its preprocessor_config.json asks for {size}, less than a patch; give --size")
        return preprocess.height, preprocess.width
    width, height = asked
    if width % patch_width or height % patch_height:
        raise CommandError(f"--size {width}x{height}: give multiples of the patch size, {patch_width}x{patch_height}")
    return height, width


def pair(size: int | Iterable[int]) -> tuple[int, int]:
    """Height and width, from a configuration value that may be one number for both."""
    return (size, size) if isinstance(size, int) else tuple(size)


def gate_config(arguments: argparse.Namespace) -> neuroflow.NeuroFlowConfig:
    """The settings of --preset, --config or --weights, or the defaults, overridden by individual options.

    Raises:
        CommandError: a file or a value that NeuroFlowConfig does not accept, or a file together with a preset.
    """
    options = vars(arguments)
    given = {name: value for name in GATE_OPTIONS if (value := options.get(name)) is not None}
    # Either option replaces the other one's value in the file.
    if "threshold" in given:
        given.setdefault("budget", None)
    elif "budget" in given or "score" in given:
        given["threshold"] = None
    try:
        config = _base_config(arguments.preset, arguments.config, options.get("weights"))
        if "ema_decay" in given and config.reference != "dual":
            given.setdefault("reference", "ema")
        return dataclasses.replace(config, **given)
    except ValueError as error:
        raise CommandError(str(error)) from None


def _base_config(preset: str | None, config: Path | None, weights: Path | None) -> neuroflow.NeuroFlowConfig:
    if preset is not None:
        for option, path in (("--config", config), ("--weights", weights)):
            if path is not None:
                raise CommandError(f"{option} {path}: has settings of its own; give it without --preset {preset}")
        return neuroflow.NeuroFlowConfig.published()
    if config is not None:
        return neuroflow.NeuroFlowConfig.load(config)
    return neuroflow.NeuroFlowConfig() if weights is None else distilled_config(weights)


def format_gate(config: neuroflow.NeuroFlowConfig) -> str:
    """The settings in one line: the main ones, and any others that differ from the defaults."""
    rule = f"threshold {config.threshold}" if config.budget is None else f"budget {config.budget:g}"
    reference = f"ema {config.ema_decay}" if config.reference == "ema" else config.reference
    age = f", at most {config.max_age} frames old" if config.max_age else ""
    main = f"{config.arch}, {rule}, floor {config.floor}, signal {config.signal}, reference {reference}{age}"
    shown = ("arch", "threshold", "budget", "floor", "signal", "reference", "ema_decay", "max_age")
    return ", ".join([main, *changed_settings(config, shown)])


def changed_settings(config: neuroflow.NeuroFlowConfig, without: Iterable[str]) -> list[str]:
    """ "name value" for each field that differs from its default, except those in `without`."""
    default = dataclasses.asdict(neuroflow.NeuroFlowConfig())
    values = dataclasses.asdict(config).items()
    return [f"{name} {value}" for name, value in values if name not in without and value != default[name]]


def pinned_model(arguments: argparse.Namespace) -> str:
    """The model, as recorded to check that a continued run uses the same one."""
    model = STREET if arguments.model is None else Path(arguments.model)
    return str(model.resolve()) if model.exists() else arguments.model


def open_findings(arguments: argparse.Namespace, settings: dict[str, Any], read: Callable[[Any], object]) -> Findings:
    """Open the findings that go to --out, or nowhere without it.

    Args:
        arguments: with `out` and `resume`.
        settings: what a continued run must share with this one.
        read: as in `Findings`: reads from a finding what is read later.

    Raises:
        CommandError: --out cannot be written, or --resume is given without it.
        JournalError: the run to continue was made with other settings, or cannot be read.
        OutputError: --out cannot be written, or another run is writing it.
    """
    out = arguments.out
    if out is None and arguments.resume:
        raise CommandError("--resume: there is nothing to continue without --out; give the unfinished run's")
    if out is not None:
        require_writable("--out", out, ".json")
    return Findings(out, settings, resume=arguments.resume, read=read)


@contextlib.contextmanager
def report_file(path: Path | None) -> Iterator[Path | None]:
    """An empty file that takes the place of --report when the block ends; None without --report.

    Raises:
        CommandError: it cannot be written, or a library that pages need is missing.
        OutputError: it cannot be written, or another run is writing it.
    """
    if path is None:
        yield None
        return
    require_writable("--report", path, ".html")
    for library in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(library) is None:
            raise CommandError(f"--report: {library} is missing; install the report extra: neuroflow[report]")
    with replacing(path) as partial:
        yield partial


def require_writable(option: str, path: Path, suffix: str | None) -> None:
    """Refuse a path that is not a file with this suffix (if any) in a writable directory.

    Raises:
        CommandError: it is not.
    """
    if suffix not in (None, path.suffix) or path.is_dir() or not path.parent.is_dir():
        kind = "file" if suffix is None else f"{suffix} file"
        raise CommandError(f"{option} {path}: cannot be written; give a {kind} in a directory that exists")
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"{option} {path}: cannot be written; give a directory that can be written to")

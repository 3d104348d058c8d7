"""The systems that `neuroflow eval video` and `eval laws` compare with the unpatched model, and their output."""

import argparse
import dataclasses
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import neuroflow

from ..config import ARCHITECTURES
from . import CommandError
from .common import changed_settings, pinned_model
from .options import add_report

LETTERS = {arch: letter for letter, arch in ARCHITECTURES.items()}


def add_systems(parser: argparse.ArgumentParser) -> None:
    """The options of `system_configs`."""
    systems = parser.add_argument_group("systems to compare with dense", "every architecture at every threshold")
    base = systems.add_mutually_exclusive_group()
    base.add_argument(
        "--preset",
        choices=("published",),
        help="the published gate with C at 0.05, 0.1 and 0.2, unless options override it",
    )
    base.add_argument(
        "--config", type=Path, metavar="FILE", help="settings written by `calibrate` or NeuroFlowConfig.save"
    )
    systems.add_argument(
        "--arch", nargs="+", help="context (E), dual (C), active (B), mlp (A), midlayer (D) (default: C E)"
    )
    systems.add_argument(
        "--threshold", type=float, nargs="+", metavar="T", help="encode patches that score above T; 0 encodes all"
    )


def add_findings(parser: argparse.ArgumentParser) -> None:
    """The options for outputs."""
    output = parser.add_argument_group("what is written")
    output.add_argument("--out", type=Path, metavar="FILE", help="a .json file of all results")
    output.add_argument("--resume", action="store_true", help="continue the --out of the same command")
    output.add_argument(
        "--plots", type=Path, metavar="DIR", help="directory for plots; needs matplotlib (the report extra)"
    )
    add_report(output)


def system_configs(arguments: argparse.Namespace) -> dict[str, neuroflow.NeuroFlowConfig]:
    """Every architecture at every threshold, by its name in tables.

    Raises:
        CommandError: a file or a value that NeuroFlowConfig does not accept.
    """
    archs, thresholds = ["C", "E"], None
    try:
        if arguments.preset == "published":
            base, archs, thresholds = neuroflow.NeuroFlowConfig.published(), ["C"], [0.05, 0.1, 0.2]
        elif arguments.config is not None:
            base = neuroflow.NeuroFlowConfig.load(arguments.config)
            archs = [base.arch]
        else:
            base = neuroflow.NeuroFlowConfig()
        base = base.reproducible()
        configs = {}
        for arch, threshold in itertools.product(
            arguments.arch or archs, arguments.threshold or thresholds or [base.threshold]
        ):
            budget = base.budget if threshold is None else None
            config = dataclasses.replace(base, arch=arch, threshold=threshold, budget=budget)
            rule = f"{threshold:g}" if budget is None else f"budget {budget:g}"
            configs[f"{LETTERS[config.arch]} {rule}"] = config
    except ValueError as error:
        raise CommandError(str(error)) from None
    return configs


def format_common(configs: dict[str, neuroflow.NeuroFlowConfig]) -> str:
    """The settings shared by all systems that differ from the defaults, in one line."""
    config = next(iter(configs.values()))
    return ", ".join(changed_settings(config, ("arch", "threshold", "budget"))) or "the default settings"


def common_settings(arguments: argparse.Namespace, configs: dict[str, neuroflow.NeuroFlowConfig]) -> dict[str, Any]:
    """What a continued run must share with the run it continues."""
    return {
        "source": str(Path(arguments.source).resolve()),
        "model": pinned_model(arguments),
        "size": arguments.size,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "stride": arguments.stride,
        "max_frames": arguments.max_frames,
        "systems": list(configs),
        "gate": format_common(configs),
    }


def markdown(names: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    lines = [names, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def plot_directory(path: Path | None) -> Path | None:
    """Create the directory for plots.

    Raises:
        CommandError: matplotlib is missing, or the directory cannot be made.
    """
    if path is None:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--plots: matplotlib is missing; install the bench extra: neuroflow[bench]")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--plots {path}: cannot be made ({error.strerror}); give another") from None
    return path


def plot(path: Path, xlabel: str, ylabel: str, lines: dict[str, list[tuple[float, float]]]) -> None:
    """Plot named lines, each through its points from left to right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, points in lines.items():
        if points:
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, linewidth=1, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)

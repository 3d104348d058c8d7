"""`neuroflow eval laws`: measure on one clip what reuse does to a model."""

import argparse
import contextlib
import itertools
import sys
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from tqdm import tqdm

from .. import laws
from ..report.pages import Section, lines_chart, shown_address, write_evaluation
from ..video.preprocess import Preprocessor
from ..video.source import Source, every
from . import CommandError
from .common import INTERRUPTED, KEPT, input_size, load_model, open_findings, report_file
from .model import TOWERS
from .options import add_frames, add_model, size
from .report import machine
from .systems import (
    LETTERS,
    add_findings,
    add_systems,
    common_settings,
    format_common,
    markdown,
    plot,
    plot_directory,
    system_configs,
)

DESCRIPTION = """\
Measure on one clip what reuse does to a model, by architecture: saturation (fidelity over patches skipped), degradation
(fidelity as positions are stretched to larger inputs), active shift against cache staleness, the representation gap by
block, the entropy of the pooling head's attention, and the stability of cached tokens for patches that the gate selects
and for the others.

SOURCE is a video file or a directory of images, MODEL as for `neuroflow run`. Saturation uses all thresholds, the other
laws the first. The frames are kept in memory.
"""

EXAMPLES = """\
examples:
  neuroflow eval laws clip.mp4 --model ./my-siglip --preset published --arch C E --plots plots
  neuroflow eval laws clip.mp4 --model ./my-siglip --threshold 0.1 0.05 0.2 --sizes 224 448 672 --out laws.json
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `neuroflow eval laws`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.set_defaults(function=eval_laws)
    add_model(parser)
    parser.add_argument(
        "--sizes",
        type=size,
        nargs="+",
        metavar="WxH",
        help="sizes for the degradation law (default: the model's, and twice that)",
    )
    add_systems(parser)
    add_frames(parser, 32, "at most N frames (default: 32)")
    add_findings(parser)


def eval_laws(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow eval laws` and return the exit code.

    Raises:
        CommandError: bad options, or a clip of one frame.
        JournalError: the unfinished run was made with other settings, or cannot be read.
        OutputError: an output cannot be written, or another run is writing it.
        SourceError: the source gives no frames.
    """
    with report_file(arguments.report) as page:
        return _eval_laws(arguments, page)


def _eval_laws(arguments: argparse.Namespace, page: Path | None) -> int:
    """Measure the laws, and write the report to `page`."""
    configs = system_configs(arguments)
    thresholds = list(dict.fromkeys(config.threshold for config in configs.values()))
    if None in thresholds:
        raise CommandError(
            f"--config {arguments.config}: holds a budget, and the laws vary a threshold; give --threshold"
        )
    firsts = {config.arch: config for config in reversed(configs.values())}  # of each architecture, the first threshold
    firsts = dict(reversed(firsts.items()))
    plots = plot_directory(arguments.plots)
    settings = common_settings(arguments, configs) | {"sizes": arguments.sizes}
    with contextlib.closing(Source(arguments.source, max_pixels=arguments.max_pixels)) as source:
        if source.live:
            raise CommandError(
                f"{source.address}: a live source gives each frame only once; record a clip, and give the file"
            )
        findings = open_findings(arguments, settings, lambda rows: _law_table({"": rows}))
        model, preprocess = load_model(arguments)
        sizes = _sizes(model, preprocess, arguments.sizes)
        chosen = itertools.islice(every(source, arguments.stride), arguments.max_frames)
        bar = tqdm(chosen, desc="reading", total=arguments.max_frames, unit="frame", dynamic_ncols=True)
        read = [[each(frame) for each in (preprocess, *sizes)] for frame in bar]
    if len(read) < 2:
        raise CommandError(f"{source.address}: gives {len(read)} frame(s), and the first is not counted; give more")
    frames, *stretched = (torch.cat(each) for each in zip(*read, strict=True))
    measures = {
        "saturation": lambda config: laws.saturation(model, frames, config, thresholds),
        "degradation": lambda config: laws.degradation(model, stretched, config),
        "active shift": lambda config: laws.active_shift(model, frames, config),
        "representation gap": lambda config: laws.representation_gap(model, frames, config),
        "head entropy": lambda config: laws.head_entropy(model, frames, config),
        "token stability": lambda config: laws.token_stability(model, frames, config),
    }
    if not sizes:
        print("warning: degradation is left out: the model takes one size only", file=sys.stderr)
        del measures["degradation"]
    if not laws.has_attention_head(model):
        print("warning: head entropy is left out: no pooling head attends to all tokens", file=sys.stderr)
        del measures["head entropy"]
    jobs = {f"{law} {LETTERS[arch]}": (law, config) for law in measures for arch, config in firsts.items()}
    try:
        for name, (law, config) in (bar := tqdm(jobs.items(), unit="law", dynamic_ncols=True)):
            bar.set_postfix_str(name)
            if name not in findings.done:
                findings.append(name, [row._asdict() for row in measures[law](config)])
    except KeyboardInterrupt:
        print(f"interrupted after {len(findings.done)} of {len(jobs)} laws", file=sys.stderr)
        if arguments.out is not None:
            print(KEPT, file=sys.stderr)
        return INTERRUPTED
    except ValueError as error:
        raise CommandError(str(error)) from None
    finally:
        findings.close()
    findings.finish(machine=machine(model.device))
    found = {law: {LETTERS[arch]: findings.done[f"{law} {LETTERS[arch]}"] for arch in firsts} for law in measures}
    facts = {
        "frames": f"{len(frames)}, the first of which is dense and not counted",
        "model": f"{type(model).__name__}, {preprocess.width}x{preprocess.height}",
        "NeuroFlow": format_common(configs),
        "machine": machine(model.device),
    }
    if page is not None:
        write_evaluation(
            page,
            source=shown_address(arguments.source),
            kind="eval laws",
            sections=[
                Section(law, lines_chart(law, *_law_lines(law, found[law])), *_law_cells(found[law])) for law in found
            ],
            settings=settings,
            facts=facts,
        )
    for name, value in facts.items():
        print(f"{name:<11}{value}")
    for law, by_arch in found.items():
        print(f"\n{law}\n\n{_law_table(by_arch)}")
    if plots is not None:
        _plot_laws(plots, found)
    return 0


def _sizes(model: nn.Module, preprocess: Preprocessor, asked: list[tuple[int, int]] | None) -> list[Preprocessor]:
    """The sizes for the degradation law: those given, or the model's and twice that; none if it takes only one."""
    own = (preprocess.width, preprocess.height)
    if TOWERS[model.config.model_type].fixed(model.config):
        return []
    asked = asked or [own, (2 * own[0], 2 * own[1])]
    found = [input_size(model, preprocess, size) for size in asked]
    return [preprocess.resized(height, width) for height, width in found]


def _law_table(by_arch: dict[str, list[dict]]) -> str:
    """The Markdown table of a law."""
    names, rows = _law_cells(by_arch)
    return markdown(names, rows) if rows else "all frames are key frames: nothing to count"


def _law_cells(by_arch: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """The column names of a law and its rows; for rows by frame, their means."""
    rows = []
    for arch, found in by_arch.items():
        if found and "frame" in found[0]:
            columns = {name: [row[name] for row in found if row[name] is not None] for name in found[0]}
            means = {name: fmean(values) if values else None for name, values in columns.items()}
            found = [{"frames": len(found)} | {name: means[name] for name in means if name != "frame"}]
        rows += [{"arch": arch} | {name: value for name, value in row.items() if name != "arch"} for row in found]
    shown = [
        ["-" if value is None else f"{value:.4f}" if type(value) is float else str(value) for value in row.values()]
        for row in rows
    ]
    return list(rows[0]) if rows else [], shown


def _plot_laws(directory: Path, found: dict[str, dict[str, list[dict]]]) -> None:
    """A plot of each law."""
    for law, by_arch in found.items():
        plot(directory / f"{law.replace(' ', '-')}.png", *_law_lines(law, by_arch))


def _law_lines(law: str, by_arch: dict[str, list[dict]]) -> tuple[str, str, dict[str, list[tuple[float, float]]]]:
    """The axis labels and the lines of a law, over skip rate, patches, blocks or frames."""
    axes = {
        "saturation": ("skipped", "share of patches skipped", {"gap": ""}, "distance to dense"),
        "degradation": ("patches", "patches", {"fidelity": ""}, "cosine to dense"),
        "active shift": ("frame", "frame", {"active": ", active", "cached": ", cached"}, "distance to dense"),
        "representation gap": ("block", "block", {"distance": ""}, "distance to dense"),
        "head entropy": ("frame", "frame", {"dense": ", dense", "sparse": ", sparse"}, "entropy, nats"),
        "token stability": ("frame", "frame", {"active": ", active", "inactive": ", inactive"}, "cosine to cached"),
    }
    across, xlabel, columns, ylabel = axes[law]
    lines = {
        f"{arch}{suffix}": [(row[across], row[column]) for row in rows if row[column] is not None]
        for arch, rows in by_arch.items()
        for column, suffix in columns.items()
    }
    return xlabel, ylabel, lines

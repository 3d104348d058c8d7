"""`neuroflow eval video` and `neuroflow eval laws`: what reuse costs, on labelled clips and on one of one's own."""

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer

import neuroflow

from .. import laws
from ..config import ARCHITECTURES
from ..evaluation import (
    DENSE,
    PUBLISHED,
    Answer,
    Clip,
    Row,
    classify,
    find_clips,
    read_classes,
    read_clip,
    spoken,
    tabulate,
)
from ..models import STREET, ClassHead, load_classes
from ..video.ahead import ReadAhead
from ..video.preprocess import Preprocessor
from ..video.source import Source, SourceError
from ..weights import copy_sharing_weights
from . import CommandError
from .model import TOWERS
from .report import machine
from .run import INTERRUPTED, every, input_size, load_model

WITH_TEXT = ("clip", "siglip")
LETTERS = {arch: letter for letter, arch in ARCHITECTURES.items()}
KEPT = "what is done is kept: the same command with --resume continues it"


class Journal:
    """What a run has found so far, line by line beside its file until `finish` writes that.

    The journal has `.journal` added to the file's name. Its first line pins what the run was made with.

    Args:
        path: the JSON file to write; None writes nothing.
        settings: what the run is made with, of JSON's types.
        resume: go on from the journal of an unfinished run, or from the file of a finished one.

    Attributes:
        done: what has been found, by name.

    Raises:
        CommandError: a path that cannot be written, or a run that was made with other settings.
    """

    def __init__(self, path: Path | None, settings: dict, *, resume: bool = False) -> None:
        self.done: dict[str, Any] = {}
        self._path = path
        self._settings = json.loads(json.dumps(settings))
        self._file: BinaryIO | None = None
        if path is None:
            if resume:
                raise CommandError("--resume: there is nothing to continue without --out; give the unfinished run's")
            return
        if path.suffix != ".json" or path.is_dir() or not path.parent.is_dir():
            raise CommandError(f"--out {path}: cannot be written; give a .json file in a directory that exists")
        self._journal = path.with_name(path.name + ".journal")
        if resume:
            self._resume()
        elif self._journal.exists():
            warnings.warn(f"the unfinished {self._journal} is discarded: --resume was not given", stacklevel=2)

    def append(self, name: str, found: Any) -> None:
        """Note what came of `name`, of JSON's types. It survives a kill once this has returned."""
        self.done[name] = found
        if self._path is None:
            return
        if self._file is None:
            self._file = self._journal.open("wb")
            self._write({"settings": self._settings})
            for each in self.done.items():
                self._write(each)
        else:
            self._write((name, found))

    def finish(self, **content: Any) -> None:
        """Write the file, `content` after the settings and before what was found, and remove the journal."""
        self.close()
        if self._path is None:
            return
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text(json.dumps({"settings": self._settings, **content, "found": self.done}, indent=1) + "\n")
        partial.replace(self._path)
        self._journal.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the journal to be continued by a later run."""
        if self._file is not None:
            self._file.close()

    def _write(self, line: Any) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def _resume(self) -> None:
        path = self._journal if self._journal.exists() else self._path
        if not path.exists():
            return
        try:
            if path == self._path:
                content = json.loads(path.read_bytes())
                settings, self.done = content["settings"], dict(content["found"])
            else:
                # A kill can leave half a line behind.
                header, *lines = (line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n"))
                settings, self.done = json.loads(header)["settings"], dict(json.loads(line) for line in lines)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CommandError(f"{path}: cannot be continued ({error}); remove it, or run without --resume") from None
        for name in sorted(settings.keys() | self._settings.keys()):
            was, now = settings.get(name), self._settings.get(name)
            if was != now:
                message = f"was made with {name} {was}, not {now}; use that, or run without --resume"
                raise CommandError(f"{path}: {message}")


def video(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow eval video` and return the exit code.

    Raises:
        CommandError, SourceError: bad input.
    """
    configs = _configs(arguments)
    plots = _plots(arguments.plots)
    try:
        labels, clips = find_clips(Path(arguments.source), arguments.testlist)
        classes = None if arguments.classes is None else read_classes(arguments.classes)
    except ValueError as error:
        raise CommandError(str(error)) from None
    if classes is None and arguments.model is None:
        classes = load_classes()
    _require_labels(clips, labels if classes is None else classes.names, arguments)
    settings = _settings(arguments, configs) | {
        "testlist": None if arguments.testlist is None else str(arguments.testlist.resolve()),
        "classes": None if arguments.classes is None else str(arguments.classes.resolve()),
        "template": arguments.template,
    }
    journal = Journal(arguments.out, settings, resume=arguments.resume)
    model, preprocess = load_model(arguments)
    project = None
    if classes is None:
        classes, project = text_classes(arguments.model, labels, arguments.template, model.device)
    patched = {system: _patched(model, config) for system, config in configs.items()}
    left_out: dict[str, str] = {}
    waiting = [clip for clip in clips if clip.name not in journal.done]
    try:
        with contextlib.ExitStack() as stack:
            start, right = len(clips) - len(waiting), 0
            bar = stack.enter_context(tqdm(total=len(clips), initial=start, unit="clip", dynamic_ncols=True))
            for clip, pixels in stack.enter_context(ReadAhead(_read(waiting, preprocess, arguments), depth=2)):
                if isinstance(pixels, SourceError):
                    left_out[clip.name] = str(pixels)
                    bar.write(f"warning: left out: {pixels}", file=sys.stderr)
                else:
                    answers = classify(pixels, model, patched, classes, project)
                    found = {system: dataclasses.asdict(answer) for system, answer in answers.items()}
                    journal.append(clip.name, {"label": clip.label, "answers": found})
                    right += answers[DENSE].top[0] == clip.label
                    bar.set_postfix_str(f"dense top-1 {right / (bar.n + 1 - start - len(left_out)):.1%}", refresh=False)
                bar.update()
    except KeyboardInterrupt:
        print(f"interrupted after {len(journal.done)} clips", file=sys.stderr)
        if arguments.out is not None:
            print(KEPT, file=sys.stderr)
        return INTERRUPTED
    except ValueError as error:
        raise CommandError(str(error)) from None
    finally:
        journal.close()
    records = [journal.done[clip.name] for clip in clips if clip.name in journal.done]
    if not records:
        raise CommandError(f"{arguments.source}: none of its {len(clips)} clips can be read, {clips[0].name} first")
    rows = tabulate(
        (record["label"], {system: Answer(**record["answers"][system]) for system in (DENSE, *configs)})
        for record in records
    )
    journal.finish(
        machine=machine(model.device), table=[row._asdict() for row in rows], left_out=left_out, classes=classes.names
    )
    height, width = preprocess.height, preprocess.width
    print(f"clips      {len(records)} of {len(clips)}, {len(classes.names)} classes")
    print(
        f"frames     {arguments.max_frames} of each clip from its first, stride {arguments.stride}; their mean is named"
    )
    print(f"model      {type(model).__name__}, {width}x{height}, {str(model.dtype).removeprefix('torch.')}")
    print(f"NeuroFlow  {_common(next(iter(configs.values())))}")
    print(f"machine    {machine(model.device)}\n")
    print(format_rows(rows))
    if plots is not None:
        _plot_accuracy(plots, rows, configs)
    return 0


def laws_of_reuse(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow eval laws` and return the exit code.

    Raises:
        CommandError, SourceError: bad input.
    """
    configs = _configs(arguments)
    thresholds = list(dict.fromkeys(config.threshold for config in configs.values()))
    if None in thresholds:
        raise CommandError(
            f"--config {arguments.config}: holds a budget, and the laws vary a threshold; give --threshold"
        )
    firsts = {config.arch: config for config in reversed(configs.values())}  # of each architecture, the first threshold
    firsts = dict(reversed(firsts.items()))
    plots = _plots(arguments.plots)
    settings = _settings(arguments, configs) | {"sizes": arguments.sizes}
    with contextlib.closing(Source(arguments.source, max_pixels=arguments.max_pixels)) as source:
        if source.live:
            raise CommandError(f"{source.address}: a live source gives each frame once; record some, and give the file")
        journal = Journal(arguments.out, settings, resume=arguments.resume)
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
            if name not in journal.done:
                journal.append(name, [row._asdict() for row in measures[law](config)])
    except KeyboardInterrupt:
        print(f"interrupted after {len(journal.done)} of {len(jobs)} laws", file=sys.stderr)
        if arguments.out is not None:
            print(KEPT, file=sys.stderr)
        return INTERRUPTED
    except ValueError as error:
        raise CommandError(str(error)) from None
    finally:
        journal.close()
    journal.finish(machine=machine(model.device))
    found = {law: {LETTERS[arch]: journal.done[f"{law} {LETTERS[arch]}"] for arch in firsts} for law in measures}
    print(f"frames     {len(frames)}, of which the first is dense and is not counted")
    print(f"model      {type(model).__name__}, {preprocess.width}x{preprocess.height}")
    print(f"NeuroFlow  {_common(next(iter(configs.values())))}")
    print(f"machine    {machine(model.device)}")
    for law, by_arch in found.items():
        print(f"\n{law}\n\n{_law_table(law, by_arch)}")
    if plots is not None:
        _plot_laws(plots, found)
    return 0


def text_classes(
    name: str, labels: list[str], templates: list[str], device: torch.device
) -> tuple[ClassHead, nn.Module | None]:
    """Class embeddings from a model's own text tower.

    Args:
        name: Hugging Face id or local directory of a SigLIP, SigLIP 2 of fixed resolution or CLIP with its tokenizer.
        labels: class folders' names.
        templates: prompts with {} for the class; the embeddings of several are averaged.
        device: of the vision tower.

    Returns:
        the classes, and what projects the vision tower's embeddings into their space, if anything does.

    Raises:
        CommandError: there is no text tower, or model or tokenizer cannot be loaded.
    """
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind not in WITH_TEXT:
            raise CommandError(
                f"model {name}: its type, {kind}, has no text tower; give --classes FILE of class embeddings, or a "
                f"whole model of type {' or '.join(WITH_TEXT)}"
            )
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
    except CommandError:
        raise
    # Hub, tokenizer and weights each fail in their own ways.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CommandError(f"model {name}: its text tower cannot be loaded ({reason}); give --classes FILE") from None
    length = model.config.text_config.max_position_embeddings
    embeddings = []
    for template in templates:
        # SigLIP 2's tokenizer leaves the case to its caller; the others lower it themselves.
        prompts = [template.replace("{}", spoken(label)).lower() for label in labels]
        # SigLIP was trained on prompts padded to full length, without a mask.
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        mask = {"attention_mask": tokens["attention_mask"]} if kind == "clip" else {}
        with torch.inference_mode():
            features = model.get_text_features(input_ids=tokens["input_ids"], **mask)
        features = features if isinstance(features, torch.Tensor) else features.pooler_output  # from transformers 5 on
        embeddings.append(F.normalize(features, dim=1))
    project = getattr(model, "visual_projection", None)
    classes = ClassHead(tuple(labels), torch.stack(embeddings).mean(0), model.logit_scale.exp().item())
    return classes, None if project is None else project.to(device)


def format_rows(rows: list[Row]) -> str:
    """The Markdown table of an evaluation."""

    def interval(share: float, bounds: tuple[float, float]) -> list[str]:
        return [f"{share:.2%}", f"{bounds[0]:.1%} to {bounds[1]:.1%}"]

    return markdown(
        ["system", "top-1", "95 % interval", "top-3", "95 % interval", "patches skipped", "cosine to dense"],
        [
            [
                row.system,
                *interval(row.top1, row.top1_interval),
                *interval(row.top3, row.top3_interval),
                "-" if row.skipped is None else f"{row.skipped:.1%}",
                "-" if row.cosine is None else f"{row.cosine:.4f}",
            ]
            for row in rows
        ],
    )


def markdown(names: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    lines = [names, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def _configs(arguments: argparse.Namespace) -> dict[str, neuroflow.NeuroFlowConfig]:
    """Every architecture at every threshold, by the name that tables have for it."""
    archs, thresholds = ["C", "E"], None
    try:
        if arguments.preset == "published":
            base, archs, thresholds = neuroflow.NeuroFlowConfig(**PUBLISHED), ["C"], [0.05, 0.1, 0.2]
        elif arguments.config is not None:
            base = neuroflow.NeuroFlowConfig.load(arguments.config)
            archs = [base.arch]
        else:
            base = neuroflow.NeuroFlowConfig()
        if base.dense_above is None:
            base = dataclasses.replace(base, dense_above=1.0)  # fidelity does not depend on the machine's speed
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


def _common(config: neuroflow.NeuroFlowConfig) -> str:
    """What all settings of one evaluation share and is not the default, one line."""
    default = dataclasses.asdict(neuroflow.NeuroFlowConfig())
    varied = ("arch", "threshold", "budget")
    values = dataclasses.asdict(config).items()
    others = [f"{name} {value}" for name, value in values if name not in varied and value != default[name]]
    return ", ".join(others) or "the default settings"


def _settings(arguments: argparse.Namespace, configs: dict[str, neuroflow.NeuroFlowConfig]) -> dict:
    """What a continued run must have in common with the one that it continues."""
    model = STREET if arguments.model is None else Path(arguments.model)
    return {
        "source": str(Path(arguments.source).resolve()),
        "model": str(model.resolve()) if model.exists() else arguments.model,
        "size": arguments.size,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "stride": arguments.stride,
        "max_frames": arguments.max_frames,
        "systems": list(configs),
        "gate": _common(next(iter(configs.values()))),
    }


def _patched(model: nn.Module, config: neuroflow.NeuroFlowConfig) -> nn.Module:
    patched = copy_sharing_weights(model)
    try:
        neuroflow.enable_cache(patched, config)
    except ValueError as error:
        raise CommandError(str(error)) from None
    return patched


def _require_labels(clips: list[Clip], names: Iterable[str], arguments: argparse.Namespace) -> None:
    unknown = sorted({clip.label for clip in clips} - set(names))
    if unknown:
        where = "the package's own tower" if arguments.classes is None else f"classes {arguments.classes}"
        raise CommandError(f"{where}: has no class {unknown[0]!r}, which clips in {arguments.source} are labelled with")


def _read(
    clips: list[Clip], preprocess: Preprocessor, arguments: argparse.Namespace
) -> Iterator[tuple[Clip, torch.Tensor | SourceError]]:
    """Each clip's frames, or why there are none."""
    for clip in clips:
        try:
            pixels = read_clip(
                clip.path, preprocess, arguments.max_frames, arguments.stride, max_pixels=arguments.max_pixels
            )
        except SourceError as error:
            pixels = error
        yield clip, pixels


def _sizes(model: nn.Module, preprocess: Preprocessor, asked: list[tuple[int, int]] | None) -> list[Preprocessor]:
    """The sizes of the degradation law: those asked for, or the model's own and twice that; none if it has but one."""
    own = (preprocess.width, preprocess.height)
    if TOWERS[model.config.model_type].fixed(model.config):
        return []
    asked = asked or [own, (2 * own[0], 2 * own[1])]
    found = [input_size(model, preprocess, size) for size in asked]
    return [dataclasses.replace(preprocess, height=height, width=width) for height, width in found]


def _plots(directory: Path | None) -> Path | None:
    """The directory for plots, made."""
    if directory is None:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--plots: matplotlib is missing; install the bench extra: neuroflow[bench]")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--plots {directory}: cannot be made ({error.strerror}); give another") from None
    return directory


def _law_table(law: str, by_arch: dict[str, list[dict]]) -> str:
    """The rows of a law; of those of frames, their means."""
    rows = []
    for arch, found in by_arch.items():
        if found and "frame" in found[0]:
            columns = {name: [row[name] for row in found if row[name] is not None] for name in found[0]}
            means = {name: fmean(values) if values else None for name, values in columns.items()}
            found = [{"frames": len(found)} | {name: means[name] for name in means if name != "frame"}]
        rows += [{"arch": arch} | {name: value for name, value in row.items() if name != "arch"} for row in found]
    if not rows:
        return "no frame but key frames: nothing to count"
    shown = [
        ["-" if value is None else f"{value:.4f}" if type(value) is float else str(value) for value in row.values()]
        for row in rows
    ]
    return markdown(list(rows[0]), shown)


def _plot_accuracy(directory: Path, rows: list[Row], configs: dict[str, neuroflow.NeuroFlowConfig]) -> None:
    dense, *sparse = rows
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in sparse:
        if row.skipped is not None:
            point = 100 * row.skipped, 100 * (dense.top1 - row.top1)
            lines.setdefault(LETTERS[configs[row.system].arch], []).append(point)
    _plot(directory / "accuracy.png", "patches skipped, %", "top-1 below dense, points", lines)


def _plot_laws(directory: Path, found: dict[str, dict[str, list[dict]]]) -> None:
    """A picture of each law: what its rows hold over the skip rate, the patches, the blocks or the frames."""
    axes = {
        "saturation": ("skipped", "share of patches skipped", {"gap": ""}, "distance to dense"),
        "degradation": ("patches", "patches", {"fidelity": ""}, "cosine to dense"),
        "active shift": ("frame", "frame", {"active": ", active", "cached": ", cached"}, "distance to dense"),
        "representation gap": ("block", "block", {"distance": ""}, "distance to dense"),
        "head entropy": ("frame", "frame", {"dense": ", dense", "sparse": ", sparse"}, "entropy, nats"),
        "token stability": ("frame", "frame", {"active": ", active", "inactive": ", inactive"}, "cosine to cached"),
    }
    for law, by_arch in found.items():
        across, xlabel, columns, ylabel = axes[law]
        lines = {
            f"{arch}{suffix}": [(row[across], row[column]) for row in rows if row[column] is not None]
            for arch, rows in by_arch.items()
            for column, suffix in columns.items()
        }
        _plot(directory / f"{law.replace(' ', '-')}.png", xlabel, ylabel, lines)


def _plot(path: Path, xlabel: str, ylabel: str, lines: dict[str, list[tuple[float, float]]]) -> None:
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

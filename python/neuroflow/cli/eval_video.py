"""`neuroflow eval video`: classify labelled clips with the unpatched model and with patched ones."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer

import neuroflow

from ..classes import ClassHead, read_classes
from ..evaluation import DENSE, Answer, Row, classify, spoken, tabulate
from ..report.pages import Section, accuracy, shown_address, write_evaluation
from ..street import load_classes
from ..video.ahead import ReadAhead
from ..video.clips import Clip, find_clips, read_clip
from ..video.preprocess import Preprocessor
from ..video.source import SourceError
from ..weights import copy_sharing_weights
from . import CommandError
from .common import INTERRUPTED, KEPT, load_model, open_findings, report_file
from .options import add_frames, add_model
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
Classify labelled clips zero-shot, with the unpatched model and with every architecture and threshold side by side, from
the same decoded frames. Reports top-1, top-3, their 95 % intervals, patches skipped and cosine to dense.

FOLDER is laid out like UCF-101: one folder for each class, named after it, with its clips as video files or directories
of images. A clip is classified by the mean embedding of its first frames. They are consecutive (or --stride apart), not
spread over the clip, because a gate compares each frame with earlier ones. Classes are embedded by the model's own text
tower (SigLIP, SigLIP 2 of fixed resolution, CLIP), or come from a file. The default is the tower in the package and its
classes. A damaged clip is reported and left out.
"""

EXAMPLES = """\
examples:
  neuroflow eval video UCF-101 --testlist testlist01.txt --model google/siglip-base-patch16-224 --preset published
  neuroflow eval video clips --model ./my-siglip --arch C E --threshold 0.05 0.1 --template "a photo of {}." "{}"
  neuroflow eval video clips --model ./my-vit --classes classes.npz --out result.json --report report.html
  neuroflow eval video clips --model ./my-vit --classes classes.npz --out result.json --resume
"""

WITH_TEXT = ("clip", "siglip")
NAMES = ["system", "top-1", "95 % interval", "top-3", "95 % interval", "patches skipped", "cosine to dense"]
TEMPLATE = "a video of a person doing {}."


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `neuroflow eval video`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.set_defaults(function=eval_video)
    add_model(parser, "FOLDER", "directory with a folder of clips for each class")
    parser.add_argument("--testlist", type=Path, metavar="FILE", help="clips to use, one per line: Class/clip.avi")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help=".npz or .safetensors with class names and embeddings [C, D]"
    )
    parser.add_argument(
        "--template",
        type=_template,
        nargs="+",
        default=[TEMPLATE],
        metavar="T",
        help=f"prompts with {{}} for the class, averaged (default: {TEMPLATE!r})",
    )
    add_systems(parser)
    add_frames(parser, 16, "the first N frames of each clip (default: 16)")
    add_findings(parser)


def _template(text: str) -> str:
    if "{}" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} has no {{}} for the class")
    return text


def eval_video(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow eval video` and return the exit code.

    Raises:
        CommandError: bad options, or no clip that can be read.
        JournalError: the unfinished run was made with other settings, or cannot be read.
        OutputError: an output cannot be written, or another run is writing it.
    """
    with report_file(arguments.report) as page:
        return _eval_video(arguments, page)


def _eval_video(arguments: argparse.Namespace, page: Path | None) -> int:
    """Name the clips, and write the report to `page`."""
    configs = system_configs(arguments)
    plots = plot_directory(arguments.plots)
    try:
        labels, clips = find_clips(Path(arguments.source), arguments.testlist)
    except ValueError as error:
        raise CommandError(str(error)) from None
    classes = _read_classes(arguments)
    _require_labels(clips, labels if classes is None else classes.names, arguments)
    settings = common_settings(arguments, configs) | {
        "testlist": None if arguments.testlist is None else str(arguments.testlist.resolve()),
        "classes": None if arguments.classes is None else str(arguments.classes.resolve()),
        "template": arguments.template,
    }
    findings = open_findings(arguments, settings, lambda record: tabulate([_answers(record, configs)]))
    model, preprocess = load_model(arguments)
    project = None
    if classes is None:
        classes, project = text_classes(arguments.model, labels, arguments.template, model.device)
    patched = {system: _patched(model, config) for system, config in configs.items()}
    left_out: dict[str, str] = {}
    waiting = [clip for clip in clips if clip.name not in findings.done]

    def table() -> list[Row]:
        """The rows of the clips classified so far; empty if there are none."""
        done = [findings.done[clip.name] for clip in clips if clip.name in findings.done]
        return tabulate(_answers(record, configs) for record in done) if done else []

    def facts(rows: list[Row]) -> dict[str, str]:
        return {
            "clips": f"{rows[0].clips} of {len(clips)}, {len(classes.names)} classes",
            "frames": f"the first {arguments.max_frames} of each clip, stride {arguments.stride}; their mean is "
            "classified",
            "model": f"{type(model).__name__}, {preprocess.width}x{preprocess.height}, "
            + str(model.dtype).removeprefix("torch."),
            "NeuroFlow": format_common(configs),
            "machine": machine(model.device),
        }

    def write_page(rows: list[Row], interrupted: bool = False) -> None:
        if page is not None and rows:
            archs = {system: LETTERS[config.arch] for system, config in configs.items()}
            write_evaluation(
                page,
                source=shown_address(arguments.source),
                kind="eval video",
                sections=[Section("accuracy", accuracy(rows, archs), NAMES, _cells(rows))],
                settings=settings,
                facts=facts(rows),
                interrupted=interrupted,
                left_out=left_out,
            )

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
                    findings.append(clip.name, {"label": clip.label, "answers": found})
                    right += answers[DENSE].top[0] == clip.label
                    bar.set_postfix_str(f"dense top-1 {right / (bar.n + 1 - start - len(left_out)):.1%}", refresh=False)
                bar.update()
    except KeyboardInterrupt:
        print(f"interrupted after {len(findings.done)} clips", file=sys.stderr)
        if arguments.out is not None:
            print(KEPT, file=sys.stderr)
        write_page(table(), interrupted=True)
        return INTERRUPTED
    except ValueError as error:
        raise CommandError(str(error)) from None
    finally:
        findings.close()
    rows = table()
    if not rows:
        raise CommandError(f"{arguments.source}: none of its {len(clips)} clips can be read, {clips[0].name} first")
    findings.finish(
        machine=machine(model.device), table=[row._asdict() for row in rows], left_out=left_out, classes=classes.names
    )
    write_page(rows)
    for name, value in facts(rows).items():
        print(f"{name:<11}{value}")
    print(f"\n{format_rows(rows)}")
    if plots is not None:
        _plot_accuracy(plots, rows, configs)
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
        kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
        if kind not in WITH_TEXT:
            raise CommandError(
                f"model {name}: its type, {kind}, has no text tower; give --classes FILE of class embeddings, or a "
                f"whole model of type {' or '.join(WITH_TEXT)}"
            )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModel.from_pretrained(name, dtype=torch.float32, trust_remote_code=False).eval()
    except CommandError:
        raise
    # Hub, tokenizer and weights each raise their own errors.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CommandError(f"model {name}: its text tower cannot be loaded ({reason}); give --classes FILE") from None
    length = model.config.text_config.max_position_embeddings
    embeddings = []
    for template in templates:
        # SigLIP 2's tokenizer leaves lower-casing to its caller; the others do it themselves.
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
    return markdown(NAMES, _cells(rows))


def _cells(rows: list[Row]) -> list[list[str]]:
    """The rows of an evaluation under NAMES."""

    def interval(share: float, bounds: tuple[float, float]) -> list[str]:
        return [f"{share:.2%}", f"{bounds[0]:.1%} to {bounds[1]:.1%}"]

    return [
        [
            row.system,
            *interval(row.top1, row.top1_interval),
            *interval(row.top3, row.top3_interval),
            "-" if row.skipped is None else f"{row.skipped:.1%}",
            "-" if row.cosine is None else f"{row.cosine:.4f}",
        ]
        for row in rows
    ]


def _answers(record: dict, configs: Iterable[str]) -> tuple[str, dict[str, Answer]]:
    """A clip's label, and the answer of each system, from its record."""
    return record["label"], {system: Answer(**record["answers"][system]) for system in (DENSE, *configs)}


def _patched(model: nn.Module, config: neuroflow.NeuroFlowConfig) -> nn.Module:
    patched = copy_sharing_weights(model)
    try:
        neuroflow.enable_cache(patched, config)
    except ValueError as error:
        raise CommandError(str(error)) from None
    return patched


def _read_classes(arguments: argparse.Namespace) -> ClassHead | None:
    """The classes of --classes or of the package's tower; None if the model's text tower has to embed them."""
    if arguments.classes is None:
        return load_classes() if arguments.model is None else None
    try:
        classes = read_classes(arguments.classes)
    except ValueError as error:
        raise CommandError(f"--classes {error}") from None
    different = len(set(classes.names))
    if different < len(classes.names):
        message = f"holds {different} different names for {len(classes.names)} embeddings; give each its own name"
        raise CommandError(f"--classes {arguments.classes}: {message}")
    return classes


def _require_labels(clips: list[Clip], names: Iterable[str], arguments: argparse.Namespace) -> None:
    unknown = sorted({clip.label for clip in clips} - set(names))
    if unknown:
        where = "the package's own tower" if arguments.classes is None else f"--classes {arguments.classes}"
        raise CommandError(f"{where}: has no class {unknown[0]!r}, a label of clips in {arguments.source}")


def _read(
    clips: list[Clip], preprocess: Preprocessor, arguments: argparse.Namespace
) -> Iterator[tuple[Clip, torch.Tensor | SourceError]]:
    """Each clip's frames, or the error."""
    for clip in clips:
        try:
            pixels = read_clip(
                clip.path, preprocess, arguments.max_frames, arguments.stride, max_pixels=arguments.max_pixels
            )
        except SourceError as error:
            pixels = error
        yield clip, pixels


def _plot_accuracy(directory: Path, rows: list[Row], configs: dict[str, neuroflow.NeuroFlowConfig]) -> None:
    dense, *sparse = rows
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in sparse:
        if row.skipped is not None:
            point = 100 * row.skipped, 100 * (dense.top1 - row.top1)
            lines.setdefault(LETTERS[configs[row.system].arch], []).append(point)
    plot(directory / "accuracy.png", "patches skipped, %", "top-1 below dense, points", lines)

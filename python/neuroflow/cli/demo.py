"""`neuroflow demo`: draw labelled scenes and classify them with the tower that comes with the package."""

import argparse
import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, SiglipVisionConfig, SiglipVisionModel

import neuroflow

from ..classes import ClassHead
from ..street import STREET, load_classes
from ..street.scene import CAMERAS, CLASSES, RATE, TRAJECTORIES, Scene, scenes, write_scene
from ..video.ahead import prepare
from ..video.overlay import OverlayWriter
from ..video.preprocess import Preprocessor
from ..video.results import Record, Results
from ..video.source import Source
from ..video.stream import Encoded, encode_stream
from ..weights import copy_sharing_weights
from . import CommandError
from .encoding import caption, encode_video
from .model import load_tower

DESCRIPTION = (
    "Draw labelled scenes, classify them with the tower that comes with the package, dense and patched side by side, "
    "and print accuracy, skip rate and time of each; then the speed of a SigLIP of base size with random weights. "
    "Writes the scenes, and overlay.mp4 and result.jsonl for one of them."
)

SCENES, FRAMES = 10, 120
SPEED_SIZE, SPEED_FRAMES = 448, 40
SIGLIP_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
RANDOM_WEIGHTS = "its weights are random, so only the speed counts"


@dataclass(frozen=True)
class Scored:
    """The result for one frame of a scene; `label` is the class of its subject, None while that is out of view."""

    scene: Scene
    label: str | None
    record: Record


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `neuroflow demo`."""
    parser.description = DESCRIPTION
    parser.set_defaults(function=demo)
    parser.add_argument(
        "--out-dir", type=Path, default=Path("demo"), metavar="DIR", help="directory to write to (default: demo)"
    )


def demo(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow demo` and return the exit code.

    Raises:
        CommandError: the directory cannot be made.
    """
    directory = arguments.out_dir
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out-dir {directory}: cannot be made ({error.strerror}); give another") from None
    model, classes = load_tower(str(STREET), torch.device("cpu"), torch.float32), load_classes()
    dense = copy_sharing_weights(model)
    neuroflow.enable_cache(model)
    clips = {
        scene: directory / f"{scene.subject}-{scene.trajectory}-{scene.camera}.mp4"
        for scene in scenes(SCENES, held_out=True)
    }
    print(f"drawing {SCENES} scenes that the tower was not trained on", file=sys.stderr)
    scored = []
    for scene, clip in tqdm(clips.items(), unit="scene", dynamic_ncols=True):
        scored += score_scene(scene, clip, model, dense, classes)
    print(format_scores(scored, "trajectory", TRAJECTORIES))
    print(format_scores(scored, "camera", CAMERAS))
    shown = showcase(scored)
    overlay, result = directory / "overlay.mp4", directory / "result.jsonl"
    _write_showcase(clips[shown], overlay, result, model, dense, classes)
    print(f"\nA SigLIP of base size on a drawn street; {RANDOM_WEIGHTS}.", flush=True)
    code = _speed(directory / "street.mp4")
    print(farewell(shown.subject, clips[shown], overlay, result))
    return code


def score_scene(
    scene: Scene, clip: Path, model: PreTrainedModel, dense: PreTrainedModel, classes: ClassHead
) -> list[Scored]:
    """Draw a scene into `clip` and run both towers over it, the patched one from nothing.

    Args:
        scene: what is drawn.
        clip: the MP4 to write.
        model: the patched tower.
        dense: the same, unpatched.
        classes: theirs.
    """
    labels = [CLASSES[label] if label >= 0 else None for label in write_scene(clip, scene, FRAMES, _side(model))]
    encoded = _encode(clip, model, dense, classes)
    return [Scored(scene, labels[each.record.frame], each.record) for each in encoded]


def showcase(scored: list[Scored]) -> Scene:
    """The scene that dense names rightly most often; among several, the one of which most is skipped."""
    groups: dict[Scene, list[Scored]] = {}
    for one in scored:
        if not one.record.first:
            groups.setdefault(one.scene, []).append(one)

    def rank(scene: Scene) -> tuple[float, float]:
        group = groups[scene]
        return _top1(group, "dense_predicted"), np.mean([one.record.skipped for one in group])

    return max(groups, key=rank)


def farewell(subject: str, clip: Path, overlay: Path, result: Path) -> str:
    """What to open, and what to type next."""
    command = started_as()
    own = f"{command} run CLIP --model google/siglip2-base-patch16-224 --compare --overlay overlay.mp4"
    return f"""
Open {overlay}: the {subject} beside its surprise and the patches that were encoded.
The numbers behind it, frame by frame, are in {result}.

The same scene at a higher threshold, which skips more patches:
  {command} run {shlex.quote(str(clip))} --threshold 0.3 --compare
Your own video, CLIP, and a model from Hugging Face:
  {own}
All options:
  {command} run --help"""


def started_as() -> str:
    """The command as it was typed, for a shell."""
    if sys.argv[0].endswith(".py"):
        return f"{shlex.quote(sys.executable)} -m neuroflow_cli"
    found = shutil.which("neuroflow")
    if found is not None and os.path.abspath(found) == os.path.abspath(sys.argv[0]):
        return "neuroflow"
    return shlex.quote(sys.argv[0])


def _encode(clip: Path, model: PreTrainedModel, dense: PreTrainedModel, classes: ClassHead) -> Iterator[Encoded]:
    neuroflow.reset_cache(model)
    with contextlib.closing(Source(str(clip))) as source:
        yield from encode_stream(prepare(source, Preprocessor(_side(model), _side(model))), model, dense, classes)


def _side(model: PreTrainedModel) -> int:
    return model.config.image_size


def _write_showcase(
    clip: Path, overlay: Path, result: Path, model: PreTrainedModel, dense: PreTrainedModel, classes: ClassHead
) -> None:
    results = Results(result, {"source": str(clip), "model": "street"})
    with contextlib.closing(results), OverlayWriter(overlay, RATE) as writer:
        for encoded in _encode(clip, model, dense, classes):
            text = caption(encoded.record, encoded.key_frame)
            writer.draw(encoded.prepared.frame, encoded.active, encoded.surprise, text)
            results.append(encoded.record, encoded.embedding)
        results.finish()


def format_scores(scored: list[Scored], field: str, names: Iterable[str]) -> str:
    """The table of scored frames, a row for each of `names` that a scene's `field` takes, and one for all."""
    counted = [one for one in scored if not one.record.first]
    lines = [
        f"\n{'':<14}{'top-1':>19}{'':>9}{'patches':>10}{'ms/frame':>19}",
        f"{field:<14}{'dense':>9}{'NeuroFlow':>10}{'cosine':>9}{'skipped':>10}{'dense':>9}{'NeuroFlow':>10}",
    ]
    for name in names:
        group = [one for one in counted if getattr(one.scene, field) == name]
        if group:
            lines.append(_row(name, group))
    return "\n".join([*lines, _row("all", counted)])


def _row(name: str, group: list[Scored]) -> str:
    dense, sparse = (_top1(group, of) for of in ("dense_predicted", "predicted"))
    cosine, skipped = (np.mean([getattr(one.record, of) for one in group]) for of in ("cosine", "skipped"))
    dense_ms, sparse_ms = (np.median([getattr(one.record, of) for one in group]) for of in ("dense_ms", "neuroflow_ms"))
    return f"{name:<14}{dense:>9.1%}{sparse:>10.1%}{cosine:>9.4f}{skipped:>10.1%}{dense_ms:>9.1f}{sparse_ms:>10.1f}"


def _top1(group: list[Scored], of: str) -> float:
    return np.mean([getattr(one.record, of) == one.label for one in group if one.label is not None])


def _speed(clip: Path) -> int:
    write_scene(clip, Scene("car", "traversal", "static", seed=1), SPEED_FRAMES, SPEED_SIZE)
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**SIGLIP_BASE, image_size=SPEED_SIZE, patch_size=16)).eval()
    with contextlib.closing(Source(str(clip))) as source:
        return encode_video(
            source, model, Preprocessor(SPEED_SIZE, SPEED_SIZE), neuroflow.NeuroFlowConfig(), compare=True
        )

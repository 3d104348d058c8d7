"""`neuroflow demo`: draw labelled scenes and classify them with the tower that comes with the package."""

import argparse
import contextlib
import sys
from collections.abc import Iterable
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
from ..video.stream import encode_stream
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
    chosen = scenes(SCENES, held_out=True)
    shown = next(scene for scene in chosen if scene.camera == "static")
    print(f"drawing {SCENES} scenes that the tower was not trained on", file=sys.stderr)
    scored = []
    for scene in tqdm(chosen, unit="scene", dynamic_ncols=True):
        clip = directory / f"{scene.subject}-{scene.trajectory}-{scene.camera}.mp4"
        scored += score_scene(scene, clip, model, dense, classes, write_beside=scene is shown)
    print(format_scores(scored, "trajectory", TRAJECTORIES))
    print(format_scores(scored, "camera", CAMERAS))
    print(f"\nA SigLIP of base size on a drawn street; {RANDOM_WEIGHTS}.", flush=True)
    code = _speed(directory / "street.mp4")
    print(f"\nwritten to {directory}: the scenes; overlay.mp4 and result.jsonl are of the {shown.subject}")
    return code


def score_scene(
    scene: Scene,
    clip: Path,
    model: PreTrainedModel,
    dense: PreTrainedModel,
    classes: ClassHead,
    *,
    write_beside: bool = False,
) -> list[Scored]:
    """Draw a scene into `clip` and run both towers over it, the patched one from nothing.

    Args:
        scene: what is drawn.
        clip: the MP4 to write.
        model: the patched tower.
        dense: the same, unpatched.
        classes: theirs.
        write_beside: write overlay.mp4 and result.jsonl into the directory of `clip`.
    """
    side = model.config.image_size
    labels = [CLASSES[label] if label >= 0 else None for label in write_scene(clip, scene, FRAMES, side)]
    neuroflow.reset_cache(model)
    scored = []
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(contextlib.closing(Source(str(clip))))
        writer = results = None
        if write_beside:
            writer = stack.enter_context(OverlayWriter(clip.with_name("overlay.mp4"), RATE))
            results = Results(clip.with_name("result.jsonl"), {"source": str(clip), "model": "street"})
            stack.callback(results.close)
        inputs = prepare(source, Preprocessor(side, side))
        for encoded in encode_stream(inputs, model, dense, classes):
            record = encoded.record
            scored.append(Scored(scene, labels[record.frame], record))
            if writer is not None:
                writer.draw(encoded.prepared.frame, encoded.active, caption(record))
                results.append(record, encoded.embedding)
        if results is not None:
            results.finish()
    return scored


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
    seen = [one for one in group if one.label is not None]
    dense, sparse = (
        np.mean([getattr(one.record, of) == one.label for one in seen]) for of in ("dense_predicted", "predicted")
    )
    cosine, skipped = (np.mean([getattr(one.record, of) for one in group]) for of in ("cosine", "skipped"))
    dense_ms, sparse_ms = (np.median([getattr(one.record, of) for one in group]) for of in ("dense_ms", "neuroflow_ms"))
    return f"{name:<14}{dense:>9.1%}{sparse:>10.1%}{cosine:>9.4f}{skipped:>10.1%}{dense_ms:>9.1f}{sparse_ms:>10.1f}"


def _speed(clip: Path) -> int:
    write_scene(clip, Scene("car", "traversal", "static", seed=1), SPEED_FRAMES, SPEED_SIZE)
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**SIGLIP_BASE, image_size=SPEED_SIZE, patch_size=16)).eval()
    with contextlib.closing(Source(str(clip))) as source:
        return encode_video(
            source, model, Preprocessor(SPEED_SIZE, SPEED_SIZE), neuroflow.NeuroFlowConfig(), compare=True
        )

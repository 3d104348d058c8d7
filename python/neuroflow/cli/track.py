"""`neuroflow track`: what moves in a video, as boxes and tracks."""

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import PreTrainedModel

import neuroflow

from ..adapters.anatomy import interpolation
from ..models import load_classes
from ..objects import Track, Tracker, box_in_pixels, component_embeddings, components, motion, nearest
from ..policies import AROUND_WEIGHT
from ..video.ahead import Prepared, ReadAhead, prepare
from ..video.overlay import BoxWriter
from ..video.source import Frame, Source, SourceError
from . import CommandError
from .run import DIRECTORY_RATE, INTERRUPTED, STREAM, every, load_model

LONG = 15  # frames, of the tracks that the report counts


class Labels(NamedTuple):
    """Names [K] and their embeddings [K, D]."""

    names: tuple[str, ...]
    embeddings: torch.Tensor


class Tracked(NamedTuple):
    """A frame, the tracks that are seen in it, and height and width of a patch in its pixels."""

    frame: Frame
    tracks: list[Track]
    patch_size: tuple[float, float]


def track(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow track` and return the exit code.

    Raises:
        CommandError, SourceError: bad input.
    """
    for option, path, suffix in (("--out", arguments.out, ".json"), ("--overlay", arguments.overlay, ".mp4")):
        if path is not None and (path.suffix != suffix or path.is_dir() or not path.parent.is_dir()):
            raise CommandError(f"{option} {path}: cannot be written; give a {suffix} file in a directory that exists")
    with contextlib.closing(Source(arguments.source, max_pixels=arguments.max_pixels)) as source:
        model, preprocess = load_model(arguments)
        labels = None
        if arguments.labels is not None:
            labels = load_labels(arguments.labels)
        elif arguments.model is None:
            classes = load_classes()
            labels = Labels(classes.names, classes.embeddings)
        neuroflow.enable_cache(model, background_gate(arguments.threshold, arguments.ema_decay))
        frames = itertools.islice(every(source, arguments.stride), arguments.max_frames)
        total = None if source.frame_count is None else -(-source.frame_count // arguments.stride)
        if arguments.max_frames is not None:
            total = arguments.max_frames if total is None else min(total, arguments.max_frames)
        lines, found = [], {}
        try:
            with contextlib.ExitStack() as stack:
                bar = stack.enter_context(tqdm(total=total, unit="frame", dynamic_ncols=True))
                writer = None
                if arguments.overlay is not None:
                    rate = (source.rate or DIRECTORY_RATE) / arguments.stride
                    writer = stack.enter_context(BoxWriter(arguments.overlay, rate))
                # Ctrl-C is how a live source ends, but it cuts a file short.
                stack.enter_context(contextlib.suppress(KeyboardInterrupt) if source.live else contextlib.nullcontext())
                inputs = prepare(frames, preprocess)
                if not source.live:
                    inputs = stack.enter_context(ReadAhead(inputs))
                for tracked in track_frames(inputs, model, arguments.threshold):
                    lines.append(_line(tracked, labels, found))
                    if writer is not None:
                        boxes = [(each["id"], each["box"], _text(each)) for each in lines[-1]["objects"]]
                        writer.draw(tracked.frame, boxes)
                    bar.update()
                    bar.set_postfix_str(f"{len(tracked.tracks)} objects, {len(found)} tracks", refresh=False)
        except KeyboardInterrupt:
            print(f"interrupted after {len(lines)} frames: nothing is written, and a run starts over", file=sys.stderr)
            return INTERRUPTED
        except ValueError as error:
            raise error if isinstance(error, SourceError) else CommandError(str(error)) from None
    if not lines:
        raise SourceError(f"{source.address}: {source.stopped or 'it ended before a frame was encoded'}; try again")
    if source.stopped:
        print(f"warning: {source.address}: {source.stopped}; the frames before are used", file=sys.stderr)
    if arguments.out is not None:
        height, width = tracked.frame.size
        settings = {"source": arguments.source, "model": arguments.model, "size": [width, height]}
        settings |= {"threshold": arguments.threshold, "ema_decay": arguments.ema_decay}
        content = settings | {"frames": lines, "tracks": list(found.values())}
        partial = arguments.out.with_name(arguments.out.name + ".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(arguments.out)
    print(_report(lines, list(found.values()), neuroflow.summary(model).streams[STREAM].skipped))
    return 0


def background_gate(threshold: float, ema_decay: float) -> neuroflow.NeuroFlowConfig:
    """A gate whose surprise tells what moves: the dual-rate reference, which no refresh sets back.

    The embedding tells it best (bench/results/highway.md): beside a position, the noise of what is flat counts less.
    What stops stays surprising until the slow average has taken it in. Every patch whose `motion` lies above
    `threshold` is encoded: one in the 3 x 3 around it has a surprise of that over (1 + AROUND_WEIGHT)^2.
    """
    return neuroflow.NeuroFlowConfig(
        threshold=threshold / (1 + AROUND_WEIGHT) ** 2,
        signal="embedding",
        reference="dual",
        ema_decay=ema_decay,
        score="surprise",
        dilation=1,
        refresh="rolling",
        cut_share=None,
        dense_above=1.0,
    )


def track_frames(inputs: Iterable[Prepared], model: PreTrainedModel, threshold: float) -> Iterator[Tracked]:
    """The tracks in every frame.

    Args:
        inputs: the frames.
        model: a tower patched with `background_gate`.
        threshold: patches of more `motion` move.

    Raises:
        ValueError: the tower's output has no token for each patch.
    """
    tracker = None
    for prepared in inputs:
        pixels = prepared.pixels.to(model.device, model.dtype)
        with torch.inference_mode(), neuroflow.cache_context(model, STREAM):
            tokens = model(pixel_values=pixels, **interpolation(model, pixels)).last_hidden_state[0]
        stream = neuroflow.summary(model).streams[STREAM]
        tracker = tracker or Tracker(stream.grid)
        moving = components(motion(stream.surprise) > threshold)
        tracks = tracker.update(moving, component_embeddings(model, tokens, stream.grid, moving))
        size = prepared.frame.size
        yield Tracked(prepared.frame, tracks, (size[0] / stream.grid[0], size[1] / stream.grid[1]))


def load_labels(path: Path) -> Labels:
    """Labels from a safetensors file that holds `embeddings` [K, D], and as metadata `names`, a JSON list of K.

    Raises:
        CommandError: it cannot be read, or holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            names = tuple(json.loads(file.metadata()["names"]))
            embeddings = file.get_tensor("embeddings")
    # No metadata at all is None, and what is no file of this kind has its own error.
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        accepted = "a .safetensors file with `embeddings` [K, D] and, in its metadata, `names`, a JSON list"
        raise CommandError(f"--labels {path}: cannot be read ({reason}); give {accepted}") from None
    if embeddings.ndim != 2 or len(embeddings) != len(names):
        held = f"{len(names)} names for embeddings of shape {list(embeddings.shape)}"
        raise CommandError(f"--labels {path}: holds {held}; give one row for each name")
    return Labels(names, embeddings)


def _line(tracked: Tracked, labels: Labels | None, found: dict[int, dict]) -> dict:
    """What the file says of a frame; `found` has what it says of each track, by id, and is brought up to date."""
    names: list[tuple[str | None, float | None]] = [(None, None)] * len(tracked.tracks)
    if labels is not None and tracked.tracks:
        embeddings = torch.stack([each.embedding for each in tracked.tracks])
        names = nearest(embeddings, labels.embeddings, labels.names)
    objects = []
    for each, (name, cosine) in zip(tracked.tracks, names, strict=True):
        box = [round(edge, 1) for edge in box_in_pixels(each.component, tracked.patch_size)]
        label = {} if name is None else {"label": name, "cosine": round(cosine, 4)}
        objects.append({"id": each.id, "box": box} | label)
        first = found.get(each.id, {"first": tracked.frame.index})["first"]
        found[each.id] = {"id": each.id, "first": first, "last": tracked.frame.index, "seen": each.seen} | label
    return {"frame": tracked.frame.index, "time_s": round(tracked.frame.time, 6), "objects": objects}


def _text(described: dict) -> str:
    return " ".join(str(described[key]) for key in ("id", "label") if key in described)


def _report(lines: list[dict], tracks: list[dict], skipped: float) -> str:
    several = [one for one in tracks if one["seen"] >= LONG]
    objects = sum(len(line["objects"]) for line in lines) / len(lines)
    return "\n".join(
        [
            f"frames            {len(lines)}",
            f"objects           {objects:.1f} a frame",
            f"tracks            {len(tracks)}, {len(several)} of them seen in {LONG} frames or more",
            f"patches skipped   {skipped:.1%}",
        ]
    )

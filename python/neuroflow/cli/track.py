"""`neuroflow track`: follow what moves in a video, as boxes and tracks."""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import neuroflow

from ..classes import ClassHead, read_classes
from ..embedding import encode_frames
from ..engine.scores import AROUND_WEIGHT
from ..files import replacing, to_json
from ..objects import Track, Tracker, box_in_pixels, component_embeddings, components, motion, nearest
from ..street import load_classes
from ..video.ahead import Prepared, ReadAhead, prepare
from ..video.overlay import BoxWriter
from ..video.source import DIRECTORY_RATE, Frame, Source, SourceError, every
from ..video.stream import STREAM
from . import CommandError
from .common import INTERRUPTED, load_model, require_writable
from .options import add_frames, add_model, share

DESCRIPTION = """\
Follow what moves in a video: patches that differ from a slow background form components, and their positions and
embeddings link them into tracks. This needs a static camera, but no detector and no training.

SOURCE and MODEL are as for `neuroflow run`; the model must output a token for each patch. A component has at least 2
patches, so small objects need a larger --size. Tracks depend on every earlier frame, so a run that is stopped writes no
file and has to start over.
"""

EXAMPLES = """\
examples:
  neuroflow track clip.mp4 --out tracks.json --overlay overlay.mp4
  neuroflow track clip.mp4 --model ./my-siglip --labels texts.safetensors --size 640x352 --out tracks.json

--labels FILE holds a tensor `embeddings` [K, D] and, in its metadata, `names`, a JSON list of K:
  safetensors.torch.save_file({"embeddings": texts}, "texts.safetensors", {"names": json.dumps(names)})
"""

LONG = 15  # frames from which the report counts a track as long


class Tracked(NamedTuple):
    """A frame, the tracks seen in it, and, in pixels, the corner of its first patch and a patch's height and width."""

    frame: Frame
    tracks: list[Track]
    corner: tuple[float, float]
    patch_size: tuple[float, float]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `neuroflow track`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.set_defaults(function=track)
    add_model(parser)
    moves = parser.add_argument_group("what moves")
    moves.add_argument(
        "--threshold",
        type=_above_zero,
        default=1.6,
        metavar="T",
        help="motion above which a patch counts as moving; lower finds fainter objects and more noise (default: 1.6)",
    )
    moves.add_argument(
        "--ema-decay",
        type=share,
        default=0.01,
        metavar="A",
        help="weight of the new frame in the background; what stops is kept for about 1/A frames (default: 0.01)",
    )
    moves.add_argument("--labels", type=Path, metavar="FILE", help="embeddings to name objects with, .safetensors")
    add_frames(parser, None, "stop after N frames")
    output = parser.add_argument_group("what is written")
    output.add_argument("--out", type=Path, metavar="FILE", help="boxes and tracks, .json")
    output.add_argument("--overlay", type=Path, metavar="FILE", help="an .mp4 of the frames with boxes and ids")


def _above_zero(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def track(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow track` and return the exit code.

    Raises:
        CommandError: bad options.
        OutputError: an output cannot be written, or another run is writing it.
        SourceError: the source gives no frames.
    """
    for option, path, suffix in (("--out", arguments.out, ".json"), ("--overlay", arguments.overlay, ".mp4")):
        if path is not None:
            require_writable(option, path, suffix)
    with contextlib.nullcontext() if arguments.out is None else replacing(arguments.out) as out:
        return _track(arguments, out)


def _track(arguments: argparse.Namespace, out: Path | None) -> int:
    """Follow what moves, and write it to `out`."""
    with contextlib.closing(Source(arguments.source, max_pixels=arguments.max_pixels)) as source:
        model, preprocess = load_model(arguments)
        labels = _labels(arguments)
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
                # Ctrl-C ends a live source normally, but cuts a file short.
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
            print(
                f"interrupted after {len(lines)} frames: nothing is written; run it again from the start",
                file=sys.stderr,
            )
            return INTERRUPTED
        except ValueError as error:
            raise error if isinstance(error, SourceError) else CommandError(str(error)) from None
    if not lines:
        raise SourceError(f"{source.address}: {source.stopped or 'it ended before a frame was encoded'}; try again")
    if source.stopped:
        print(f"warning: {source.address}: {source.stopped}; the frames before are used", file=sys.stderr)
    if out is not None:
        height, width = tracked.frame.size
        settings = {"source": arguments.source, "model": arguments.model, "size": [width, height]}
        settings |= {"threshold": arguments.threshold, "ema_decay": arguments.ema_decay}
        content = settings | {"frames": lines, "tracks": list(found.values())}
        try:
            out.write_text(to_json(content, indent=1) + "\n")
        except ValueError as error:
            raise CommandError(f"--out {arguments.out}: {error}; give --dtype float32 or other weights") from None
    print(_report(lines, list(found.values()), neuroflow.summary(model).streams[STREAM].skipped))
    return 0


def background_gate(threshold: float, ema_decay: float) -> neuroflow.NeuroFlowConfig:
    """A gate whose surprise shows what moves: with the dual-rate reference, which no refresh resets.

    The embedding works best (bench/results/studies/highway.md): next to a positional embedding, the noise of flat
    patches counts less.
    An object that stops stays surprising until the slow average has absorbed it. Every patch whose `motion` lies above
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
        cut_light=None,
        dense_above=1.0,
    )


def track_frames(inputs: Iterable[Prepared], model: PreTrainedModel, threshold: float) -> Iterator[Tracked]:
    """Yield every frame with its tracks.

    Args:
        inputs: the frames.
        model: a tower patched with `background_gate`.
        threshold: `motion` above which a patch counts as moving.

    Raises:
        ValueError: the tower's output has no token for each patch.
    """
    tracker = None
    for prepared in inputs:
        with torch.inference_mode(), neuroflow.cache_context(model, STREAM):
            tokens = encode_frames(model, prepared.pixels).last_hidden_state[0]
        (report,) = neuroflow.last_pass(model)
        rows, columns = report.active.shape
        tracker = tracker or Tracker((rows, columns))
        moving = components(motion(report.surprise) > threshold)
        tracks = tracker.update(moving, component_embeddings(model, tokens, (rows, columns), moving))
        left, top, right, bottom = prepared.region
        yield Tracked(prepared.frame, tracks, (left, top), ((bottom - top) / rows, (right - left) / columns))


def _labels(arguments: argparse.Namespace) -> ClassHead | None:
    """The labels for objects: --labels, or the classes of the package's tower."""
    if arguments.labels is None:
        return load_classes() if arguments.model is None else None
    try:
        return read_classes(arguments.labels)
    except ValueError as error:
        raise CommandError(f"--labels {error}") from None


def _line(tracked: Tracked, labels: ClassHead | None, found: dict[int, dict]) -> dict:
    """The file's entry for a frame; also updates `found`, its entries for tracks by id."""
    names: list[tuple[str | None, float | None]] = [(None, None)] * len(tracked.tracks)
    if labels is not None and tracked.tracks:
        embeddings = torch.stack([each.embedding for each in tracked.tracks])
        names = nearest(embeddings, labels.embeddings, labels.names)
    objects = []
    for each, (name, cosine) in zip(tracked.tracks, names, strict=True):
        edges = zip(box_in_pixels(each.component, tracked.patch_size), tracked.corner * 2, strict=True)
        box = [round(edge + begin, 1) for edge, begin in edges]
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

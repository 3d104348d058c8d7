"""`neuroflow run`: a video through a model, frame by frame."""

import argparse
import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

import neuroflow

from ..adapters.anatomy import interpolation
from ..models import STREET, ClassHead, load_classes
from ..video.ahead import Prepared, ReadAhead, prepare
from ..video.overlay import OverlayWriter
from ..video.preprocess import Preprocessor
from ..video.results import Record, Results
from ..video.source import Frame, Source, SourceError
from ..weights import copy_sharing_weights, distilled_config
from . import CommandError
from .model import TOWERS, load_tower
from .report import Stages, format_report

STREAM = "video"
DIRECTORY_RATE = Fraction(25)
INTERRUPTED = 130
EMBEDDED = (
    "no --model given: using the small SigLIP that comes with the package, which needs no download and knows the "
    "drawn scenes of `neuroflow demo` only; give --model for your own"
)


@dataclass(frozen=True)
class Encoded:
    """What came of one frame.

    Attributes:
        prepared: the frame and the model's input.
        record: what is known of it besides its embedding.
        embedding: [D] float32.
        active: [rows, columns] bool, the patches that were encoded.
        wait_ms: until the input was there.
    """

    prepared: Prepared
    record: Record
    embedding: np.ndarray
    active: torch.Tensor
    wait_ms: float


def run(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow run` and return the exit code.

    Raises:
        CommandError, SourceError, ResultError: bad input.
    """
    config = gate_config(arguments)
    if arguments.resume and arguments.out is None:
        raise CommandError("--resume: there is nothing to continue without --out; give that of the unfinished run")
    overlay = arguments.overlay
    if overlay is not None and (overlay.suffix != ".mp4" or overlay.is_dir() or not overlay.parent.is_dir()):
        raise CommandError(f"--overlay {overlay}: cannot be written; give an .mp4 file in a directory that exists")
    with contextlib.closing(Source(arguments.source, max_pixels=arguments.max_pixels)) as source:
        if arguments.resume and source.live:
            raise CommandError("--resume: a live source cannot be continued; run without it")
        results = None
        if arguments.out is not None:
            results = Results(arguments.out, _pinned(arguments, config), resume=arguments.resume)
        model, preprocess = load_model(arguments)
        code = encode_video(
            source,
            model,
            preprocess,
            config,
            classes=load_classes() if arguments.model is None else None,
            weights=arguments.weights,
            compare=arguments.compare,
            stride=arguments.stride,
            max_frames=arguments.max_frames,
            results=results,
            overlay=overlay,
        )
    if code == INTERRUPTED and results is not None:
        print("what is done is kept: the same command with --resume continues it", file=sys.stderr)
    return code


def load_model(arguments: argparse.Namespace) -> tuple[PreTrainedModel, Preprocessor]:
    """The model that the options ask for, and what gives its input.

    Raises:
        CommandError: it cannot be loaded, the device cannot be used, or the size does not fit.
    """
    name = str(STREET) if arguments.model is None else arguments.model
    model = load_tower(name, torch_device(arguments.device), getattr(torch, arguments.dtype))
    mean, std = TOWERS[model.config.model_type].normalisation
    usual = Preprocessor(*_pair(model.config.image_size), mean=mean, std=std)
    preprocess = Preprocessor.from_pretrained(name, usual)
    height, width = input_size(model, preprocess, arguments.size)
    if arguments.model is None:
        print(EMBEDDED, file=sys.stderr)
    return model, dataclasses.replace(preprocess, height=height, width=width)


def encode_video(
    source: Source,
    model: PreTrainedModel,
    preprocess: Preprocessor,
    config: neuroflow.NeuroFlowConfig,
    *,
    classes: ClassHead | None = None,
    weights: Path | None = None,
    compare: bool = False,
    stride: int = 1,
    max_frames: int | None = None,
    results: Results | None = None,
    overlay: Path | None = None,
) -> int:
    """Encode a source's frames, with progress on stderr and the table on stdout, and return the exit code.

    Args:
        source: where the frames come from.
        model: a vision tower; it is patched when this returns.
        preprocess: gives its input.
        config: how it is patched.
        classes: what its embeddings are told apart as, if anything.
        weights: what `neuroflow distill` wrote for the model.
        compare: run every frame through the unpatched model as well.
        stride: encode every so many frames.
        max_frames: of the results, those of a run that is continued among them.
        results: where every frame's embedding and record go.
        overlay: an MP4 to write, of the frames beside their active patches.

    Raises:
        CommandError: a configuration that does not fit the model. SourceError: no frame.
    """
    dense = copy_sharing_weights(model) if compare else None
    try:
        neuroflow.enable_cache(model, config, weights=weights)
    except ValueError as error:
        raise CommandError(str(error)) from None
    records, stages = list(results.resumed) if results is not None else [], []
    start = 0
    if records:
        start = records[-1].frame + stride
        note = ", and the overlay begins there" if overlay is not None else ""
        print(f"resuming at frame {start}: it is a key frame{note}", file=sys.stderr)
    frames = every(source, stride, start)
    total = None if source.frame_count is None else -(-source.frame_count // stride)
    if max_frames is not None:
        frames = itertools.islice(frames, max(max_frames - len(records), 0))
        total = max_frames if total is None else min(total, max_frames)
    try:
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=total, initial=len(records), unit="frame", dynamic_ncols=True))
            writer = None
            if overlay is not None:
                writer = stack.enter_context(OverlayWriter(overlay, (source.rate or DIRECTORY_RATE) / stride))
            # Ctrl-C is how a live source ends, but it cuts a file short.
            stack.enter_context(contextlib.suppress(KeyboardInterrupt) if source.live else contextlib.nullcontext())
            inputs = prepare(frames, preprocess)
            # A live source decodes in a thread of its own, and what waits here would no longer be the newest.
            if not source.live:
                inputs = stack.enter_context(ReadAhead(inputs))
            skipped = 0.0
            start = time.perf_counter()
            for encoded in encode_frames(inputs, model, dense, classes):
                record = encoded.record
                encoded_at = time.perf_counter()
                records.append(record)
                if results is not None:
                    results.append(record, encoded.embedding)
                if writer is not None:
                    writer.draw(encoded.prepared.frame, encoded.active, caption(record))
                skipped += record.skipped
                bar.update()
                bar.set_postfix_str(f"{skipped / (bar.n - bar.initial):.1%} skipped", refresh=False)
                end = time.perf_counter()
                stages.append(
                    Stages(
                        decode=encoded.prepared.decode_ms,
                        preprocess=encoded.prepared.preprocess_ms,
                        wait=encoded.wait_ms,
                        encode=record.neuroflow_ms,
                        dense=record.dense_ms,
                        write=(end - encoded_at) * 1e3,
                        total=(end - start) * 1e3,
                    )
                )
                start = end
    except KeyboardInterrupt:
        print(f"interrupted after {len(records)} frames", file=sys.stderr)
        return INTERRUPTED
    finally:
        if results is not None:
            results.close()
    if not records:
        raise SourceError(f"{source.address}: {source.stopped or 'it ended before a frame was encoded'}; try again")
    if source.stopped:
        print(f"warning: {source.address}: {source.stopped}; the frames before are kept", file=sys.stderr)
    if results is not None:
        results.finish()
    height, width = preprocess.height, preprocess.width
    rows, columns = (size // patch for size, patch in zip((height, width), _pair(model.config.patch_size), strict=True))
    dtype = str(model.dtype).removeprefix("torch.")
    name = f"{type(model).__name__}, {width}x{height}, {rows * columns} patches, {dtype}"
    state_bytes = neuroflow.summary(model).state_bytes
    print(format_report(records, stages, state_bytes, name, format_gate(config), model.device))
    return 0


def encode_frames(
    inputs: Iterable[Prepared],
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    classes: ClassHead | None,
) -> Iterator[Encoded]:
    """What comes of each frame."""

    def predicted(embedding: torch.Tensor | None) -> str | None:
        if classes is None or embedding is None:
            return None
        return classes.names[classes.scores(embedding[None]).argmax()]

    embedding_of = neuroflow.adapters.describe(model).embedding
    key_frames = 0
    asked = time.perf_counter()
    for number, prepared in enumerate(inputs):
        wait_ms = (time.perf_counter() - asked) * 1e3
        pixels = prepared.pixels.to(model.device, model.dtype)
        # Taking turns, so that neither always finds the processor's cache as the other left it.
        if dense is not None and number % 2 == 0:
            reference, dense_ms = _timed(dense, pixels)
        with neuroflow.cache_context(model, STREAM):
            output, neuroflow_ms = _timed(model, pixels)
        if dense is not None and number % 2 == 1:
            reference, dense_ms = _timed(dense, pixels)
        embedding = embedding_of(output)[0].float()
        expected = None if dense is None else embedding_of(reference)[0].float()
        stream = neuroflow.summary(model).streams[STREAM]
        active = int(stream.active.sum())
        record = Record(
            frame=prepared.frame.index,
            time_s=round(prepared.frame.time, 6),
            skipped=1 - active / stream.active.numel(),
            active=active,
            key_frame=stream.key_frames > key_frames,
            neuroflow_ms=neuroflow_ms,
            dense_ms=dense_ms if dense is not None else None,
            cosine=None if expected is None else F.cosine_similarity(embedding, expected, 0).item(),
            first=number == 0,
            predicted=predicted(embedding),
            dense_predicted=predicted(expected),
        )
        key_frames = stream.key_frames
        yield Encoded(prepared, record, embedding.cpu().numpy(), stream.active, wait_ms)
        asked = time.perf_counter()


@torch.inference_mode()
def _timed(model: PreTrainedModel, pixels: torch.Tensor) -> tuple[ModelOutput, float]:
    """The model's output and the milliseconds that it took."""
    arguments = interpolation(model, pixels)
    synchronise(pixels.device)
    start = time.perf_counter()
    output = model(pixel_values=pixels, **arguments)
    synchronise(pixels.device)
    return output, (time.perf_counter() - start) * 1e3


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def every(source: Source, stride: int, start: int = 0) -> Iterator[Frame]:
    """The source's frames from `start`, at least `stride` apart: a live source has gaps of its own."""
    for frame in source:
        if frame.index >= start:
            start = frame.index + stride
            yield frame


def caption(record: Record) -> str:
    """What the overlay says of a frame."""
    text = f"frame {record.frame}"
    if record.predicted is not None:
        text += f"    {record.predicted}"
    if record.dense_predicted not in (None, record.predicted):
        text += f" (dense: {record.dense_predicted})"
    text += f"    {record.skipped:.1%} skipped    NeuroFlow {record.neuroflow_ms:.1f} ms"
    if record.dense_ms is not None:
        text += f"    dense {record.dense_ms:.1f} ms"
    return text + "    key frame" * record.key_frame


def format_gate(config: neuroflow.NeuroFlowConfig) -> str:
    """The settings that are in force, one line: the main ones, and of the others those that are not the defaults."""
    rule = f"threshold {config.threshold}" if config.budget is None else f"budget {config.budget:g}"
    reference = f"ema {config.ema_decay}" if config.reference == "ema" else config.reference
    age = f", at most {config.max_age} frames old" if config.max_age else ""
    main = f"{config.arch}, {rule}, floor {config.floor}, signal {config.signal}, reference {reference}{age}"
    shown = ("arch", "threshold", "budget", "floor", "signal", "reference", "ema_decay", "max_age")
    default = dataclasses.asdict(neuroflow.NeuroFlowConfig())
    values = dataclasses.asdict(config).items()
    others = [f"{name} {value}" for name, value in values if name not in shown and value != default[name]]
    return ", ".join([main, *others])


def gate_config(arguments: argparse.Namespace) -> neuroflow.NeuroFlowConfig:
    """The settings of --config, or the defaults, under those that were given as options.

    Raises:
        CommandError: a file or a value that NeuroFlowConfig does not accept.
    """
    names = ("arch", "threshold", "budget", "floor", "max_age", "refresh", "score", "signal", "reference", "ema_decay")
    names += ("dilation", "normalise_motion", "precision")
    given = {name: value for name in names if (value := vars(arguments).get(name)) is not None}
    # One of the two given takes the place of the other in the file.
    if "threshold" in given:
        given.setdefault("budget", None)
    elif "budget" in given or "score" in given:
        given["threshold"] = None
    try:
        load = neuroflow.NeuroFlowConfig.load
        config = neuroflow.NeuroFlowConfig() if arguments.config is None else load(arguments.config)
        if arguments.config is None and vars(arguments).get("weights") is not None:
            config = distilled_config(arguments.weights)
        if "ema_decay" in given and config.reference != "dual":
            given.setdefault("reference", "ema")
        return dataclasses.replace(config, **given)
    except ValueError as error:
        raise CommandError(str(error)) from None


def torch_device(name: str) -> torch.device:
    """The device that --device names.

    Raises:
        CommandError: it cannot be used.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # torch answers a device that is misspelt, not built in or not there with several classes.
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device {name}: cannot be used ({reason}); cpu always can") from None
    return device


def input_size(model: PreTrainedModel, preprocess: Preprocessor, asked: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the model's input; preprocess: as its checkpoint has it, asked: width and height."""
    if TOWERS[model.config.model_type].fixed(model.config):
        height, width = _pair(model.config.image_size)
        if asked not in (None, (width, height)):
            raise CommandError(
                f"--size {asked[0]}x{asked[1]}: the model takes {width}x{height} only; give that or none"
            )
        return height, width
    if asked is None:
        return preprocess.height, preprocess.width
    patch_height, patch_width = _pair(model.config.patch_size)
    width, height = asked
    if width % patch_width or height % patch_height:
        raise CommandError(f"--size {width}x{height}: give multiples of the patch size, {patch_width}x{patch_height}")
    return height, width


def _pair(size: int | Iterable[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _pinned(arguments: argparse.Namespace, config: neuroflow.NeuroFlowConfig) -> dict:
    """What a continued run must have in common with the one that it continues."""
    source, model = Path(arguments.source), STREET if arguments.model is None else Path(arguments.model)
    return {
        "source": str(source.resolve()) if source.exists() else arguments.source,
        "source_bytes": source.stat().st_size if source.is_file() else None,
        "model": str(model.resolve()) if model.exists() else arguments.model,
        "weights": None if arguments.weights is None else str(arguments.weights.resolve()),
        "size": arguments.size,
        "stride": arguments.stride,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "compare": arguments.compare,
        **dataclasses.asdict(config),
    }

"""Encode a source's frames, from the first to the table at the end."""

import contextlib
import dataclasses
import itertools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm
from transformers import PreTrainedModel

import neuroflow

from ..classes import ClassHead
from ..report.figures import Figures, Stages
from ..report.pages import RunReport
from ..video.ahead import ReadAhead, prepare
from ..video.overlay import OverlayWriter
from ..video.preprocess import Preprocessor
from ..video.results import Record, Results
from ..video.source import DIRECTORY_RATE, Source, SourceError, every
from ..video.stream import encode_stream
from ..weights import copy_sharing_weights
from . import CommandError
from .common import INTERRUPTED, format_gate, pair
from .options import LIVE
from .report import format_report, machine

if TYPE_CHECKING:
    from ..video.recording import Recorder


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
    clip: int = 1,
    results: Results | None = None,
    overlay: Path | None = None,
    rerun: Path | None = None,
    report: RunReport | None = None,
) -> int:
    """Encode a source's frames, with progress on stderr and the table on stdout, and return the exit code.

    Args:
        source: where the frames come from.
        model: a vision tower; it is patched when this returns.
        preprocess: makes its input.
        config: how it is patched.
        classes: classes to name each frame by; None for none.
        weights: a file that `neuroflow distill` wrote for the model.
        compare: also run every frame through the unpatched model.
        stride: encode every `stride`-th frame.
        max_frames: maximum number of frames in the results, including those of the run that is continued.
        clip: frames of a file in one call of the model; frames of a live source go one by one.
        results: where every frame's embedding and record go.
        overlay: an MP4 to write, of the frames beside their surprise and active patches.
        rerun: a recording to write for Rerun's viewer; LIVE starts the viewer instead.
        report: looks at every frame, and is written in the end, also of a run that is interrupted.

    Raises:
        CommandError: a configuration that the model does not support, no frame is left for the overlay or the
            recording, or the viewer cannot be started.
        JournalError: an embedding with NaN or Inf.
        OutputError: results, overlay, recording or report cannot be written.
        SourceError: no frame.
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
        note = "" if overlay is None and rerun is None else ", and the overlay or recording begins there"
        print(f"resuming at frame {start}: it is a key frame{note}", file=sys.stderr)
    frames = every(source, stride, start)
    count = None if source.frame_count is None else -(-source.frame_count // stride)
    if max_frames is not None:
        frames = itertools.islice(frames, max(max_frames - len(records), 0))
        count = max_frames if count is None else min(count, max_frames)
    try:
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=count, initial=len(records), unit="frame", dynamic_ncols=True))
            writer = None
            if overlay is not None:
                writer = stack.enter_context(OverlayWriter(overlay, (source.rate or DIRECTORY_RATE) / stride))
            recorder = None if rerun is None else stack.enter_context(_recorder(rerun))
            # Ctrl-C ends a live source normally, but cuts a file short.
            stack.enter_context(contextlib.suppress(KeyboardInterrupt) if source.live else contextlib.nullcontext())
            inputs = prepare(frames, preprocess)
            # A live source decodes in its own thread; a frame that waited here would no longer be the newest.
            if not source.live:
                inputs = stack.enter_context(ReadAhead(inputs, depth=clip + 2))
            skipped, together = 0.0, 0
            start = time.perf_counter()
            for encoded in encode_stream(inputs, model, dense, classes, 1 if source.live else clip):
                record = encoded.record
                encoded_at = time.perf_counter()
                records.append(record)
                if results is not None:
                    results.append(record, encoded.embedding)
                if writer is not None:
                    writer.draw(
                        encoded.prepared.frame,
                        encoded.active,
                        encoded.surprise,
                        caption(record, encoded.key_frame),
                        encoded.prepared.region,
                    )
                if recorder is not None:
                    recorder.log(encoded)
                if report is not None:
                    report.moments.note(encoded)
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
                start, together = end, together + 1
                if together == encoded.together:
                    stages[-together:] = shares(stages[-together:])
                    together = 0
    except KeyboardInterrupt:
        print(f"interrupted after {len(records)} frames", file=sys.stderr)
        if report is not None and records:
            report.write(_figures(records, stages, model, preprocess, config), interrupted=True)
        return INTERRUPTED
    if not records:
        raise SourceError(f"{source.address}: {source.stopped or 'it ended before a frame was encoded'}; try again")
    if source.stopped:
        print(f"warning: {source.address}: {source.stopped}; the frames before are kept", file=sys.stderr)
    if results is not None:
        results.finish()
    for option, path in (("overlay", overlay), ("rerun", rerun)):
        if path not in (None, LIVE) and not stages:
            message = "is not written: the run that is continued left no frame for it; run without --resume"
            raise CommandError(f"--{option} {path}: {message}")
    figures = _figures(records, stages, model, preprocess, config)
    if report is not None:
        report.write(figures)
    print(format_report(figures))
    return 0


def _figures(
    records: list[Record],
    stages: list[Stages],
    model: PreTrainedModel,
    preprocess: Preprocessor,
    config: neuroflow.NeuroFlowConfig,
) -> Figures:
    height, width = preprocess.height, preprocess.width
    rows, columns = (size // patch for size, patch in zip((height, width), pair(model.config.patch_size), strict=True))
    dtype = str(model.dtype).removeprefix("torch.")
    name = f"{type(model).__name__}, {width}x{height}, {rows * columns} patches, {dtype}"
    state_bytes = neuroflow.summary(model).state_bytes
    return Figures(records, stages, state_bytes, name, format_gate(config), machine(model.device))


def shares(stages: list[Stages]) -> list[Stages]:
    """Spread the time of one call over its frames; it was measured in the first frame's total only."""
    total, write = (sum(getattr(one, stage) for one in stages) / len(stages) for stage in ("total", "write"))
    return [dataclasses.replace(one, total=total, write=write) for one in stages]


def _recorder(rerun: Path) -> "Recorder":
    # Imported here, because only --rerun needs Rerun.
    from ..video.recording import Recorder

    try:
        return Recorder(None if rerun == LIVE else rerun)
    except RuntimeError as error:
        raise CommandError(f"--rerun {rerun}: the viewer cannot be started ({error})") from None


def caption(record: Record, key_frame: str | None = None) -> str:
    """The overlay's caption for a frame; `key_frame` is the reason if it is one, as in `FrameReport`."""
    text = f"frame {record.frame}"
    if record.predicted is not None:
        text += f"    {record.predicted}"
    if record.dense_predicted not in (None, record.predicted):
        text += f" (dense: {record.dense_predicted})"
    text += f"    {record.skipped:.1%} skipped    NeuroFlow {record.neuroflow_ms:.1f} ms"
    if record.dense_ms is not None:
        text += f"    dense {record.dense_ms:.1f} ms"
    return text if key_frame is None else f"{text}    key frame: {key_frame}"

"""`neuroflow run`: encode a video, frame by frame."""

import argparse
import contextlib
import dataclasses
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import neuroflow

from ..embedding import CLIP
from ..report.advice import Setup
from ..report.pages import RunReport, shown_address
from ..street import load_classes
from ..video.results import Results
from ..video.source import Source
from . import CommandError
from .common import INTERRUPTED, KEPT, gate_config, load_model, pinned_model, report_file, require_writable
from .encoding import encode_video
from .options import LIVE, add_frames, add_gate, add_model, add_report, add_rule, count

DESCRIPTION = """\
Encode a video with a vision transformer, re-encoding only the patches that changed. Reports what that saved and, with
--compare, what it cost.

SOURCE is a video file, a directory of images (in natural order, without hidden files), a named pipe, a webcam (0,
/dev/video0) or an rtsp://, rtsps://, http://, https:// or file:// address. From files, also over HTTP, every frame is
read, decoded and resized a few frames ahead of the model. Live sources give their newest frame until --max-frames or
Ctrl-C, and are reopened when they drop. The report's pipeline line shows where the time went.
MODEL is a Hugging Face id or a local directory. Its vision tower is used: SigLIP, SigLIP 2 of fixed resolution, CLIP,
ViT, DeiT, I-JEPA, ViT-MAE, DINOv2, DINOv3, AIMv2, InternVL, SAM or ViTDet, alone or in a larger model such as LLaVA.
The default is a small SigLIP that comes with the package: it needs no download, and knows the drawn scenes of
`neuroflow demo`.
"""

EXAMPLES = """\
examples:
  neuroflow run clip.mp4 --compare
  neuroflow run clip.mp4 --model google/siglip2-base-patch16-224 --compare
  neuroflow run clip.mp4 --model ./my-vit --out result.parquet --overlay overlay.mp4
  neuroflow run clip.mp4 --model ./my-vit --compare --report report.html
  neuroflow run clip.mp4 --model ./my-vit --compare --rerun run.rrd
  neuroflow run rtsp://camera/stream --model ./my-vit --device cuda --dtype float16 --max-frames 1000
  neuroflow run clip.mp4 --model ./my-vit --out result.jsonl --resume
  neuroflow run clip.mp4 --model ./my-vit --config config.json
  neuroflow run clip.mp4 --model ./my-vit --preset published --threshold 0.05 --compare
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `neuroflow run`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.set_defaults(function=run)
    add_model(parser)
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights for partial frames, with their gate, written by `distill`"
    )
    parser.add_argument(
        "--compare", action="store_true", help="also run the unpatched model, to measure speed-up and fidelity"
    )
    add_rule(add_gate(parser))
    frames = add_frames(parser, None, "stop after N frames")
    frames.add_argument(
        "--clip",
        type=count,
        default=CLIP,
        metavar="N",
        help=f"frames of a file in one call of the model (default: {CLIP}); live frames go one by one",
    )
    output = parser.add_argument_group("what is written")
    output.add_argument(
        "--out", type=Path, metavar="FILE", help="each frame's embedding, skip and timing: .jsonl, .npz or .parquet"
    )
    output.add_argument(
        "--overlay", type=Path, metavar="FILE", help="an .mp4 of the frames next to their surprise and active patches"
    )
    output.add_argument(
        "--rerun",
        type=Path,
        metavar="FILE",
        help="frames, active patches, surprise and curves for Rerun's viewer: an .rrd, or live to watch as it runs",
    )
    add_report(output)
    output.add_argument("--resume", action="store_true", help="continue the unfinished --out of the same command")


def run(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow run` and return the exit code.

    Raises:
        CommandError: bad options.
        JournalError: --out cannot be written or continued.
        OutputError: an output cannot be written, or another run is writing it.
        SourceError: the source gives no frames.
    """
    config = gate_config(arguments)
    if arguments.resume and arguments.out is None:
        raise CommandError("--resume: there is nothing to continue without --out; give that of the unfinished run")
    overlay = arguments.overlay
    if overlay is not None:
        require_writable("--overlay", overlay, ".mp4")
    if arguments.rerun is not None:
        _require_viewer(arguments.rerun)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(contextlib.closing(Source(arguments.source, max_pixels=arguments.max_pixels)))
        if arguments.resume and source.live:
            raise CommandError("--resume: a live source cannot be continued; run without it")
        results = None
        if arguments.out is not None:
            results = Results(arguments.out, _settings(arguments, config), resume=arguments.resume)
            stack.callback(results.close)
        report = None
        page = stack.enter_context(report_file(arguments.report))
        if page is not None:
            report = RunReport(page, _shown(arguments, config), _setup(arguments, config, source.live))
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
            clip=arguments.clip,
            results=results,
            overlay=overlay,
            rerun=arguments.rerun,
            report=report,
        )
    if code == INTERRUPTED and results is not None:
        print(KEPT, file=sys.stderr)
    return code


def _setup(arguments: argparse.Namespace, config: neuroflow.NeuroFlowConfig, live: bool) -> Setup:
    source = shown_address(arguments.source)
    return Setup(source, arguments.model, config, live=live, overlay=arguments.overlay is not None)


def _shown(arguments: argparse.Namespace, config: neuroflow.NeuroFlowConfig) -> dict[str, Any]:
    """The settings that the report shows."""
    return _settings(arguments, config) | {"source": shown_address(arguments.source)}


def _require_viewer(rerun: Path) -> None:
    """Refuse what --rerun cannot do, before anything is run.

    Raises:
        CommandError: the file cannot be written, or there is no display.
        ModuleNotFoundError: Rerun is not installed.
    """
    importlib.import_module("rerun")
    if rerun != LIVE:
        require_writable("--rerun", rerun, ".rrd")
    elif sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        raise CommandError(
            "--rerun live: there is no display here; give --rerun run.rrd, and type `rerun run.rrd` where there is one"
        )


def _settings(arguments: argparse.Namespace, config: neuroflow.NeuroFlowConfig) -> dict[str, Any]:
    """What a continued run must share with the run it continues."""
    source = Path(arguments.source)
    return {
        "source": str(source.resolve()) if source.exists() else arguments.source,
        "source_bytes": source.stat().st_size if source.is_file() else None,
        "model": pinned_model(arguments),
        "weights": None if arguments.weights is None else str(arguments.weights.resolve()),
        "size": arguments.size,
        "stride": arguments.stride,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "compare": arguments.compare,
        **dataclasses.asdict(config),
    }

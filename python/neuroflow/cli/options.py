"""Options shared by several commands, and the types of their values."""

import argparse
import contextlib
from pathlib import Path

from ..config import MOST

LIVE = Path("live")  # what --rerun takes in place of a file
MOST_PIXELS = 178_956_970  # in a frame, and in the model's input


def add_model(
    parser: argparse.ArgumentParser, source: str = "SOURCE", source_help: str = "file, directory, webcam or address"
) -> None:
    """The source, and the options of `load_model`.

    Args:
        parser: of the command.
        source: what the help calls the source.
        source_help: what it may be.
    """
    parser.add_argument("source", metavar=source, help=source_help)
    add_dtype(parser)
    add_loading(parser)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The option for the model's dtype."""
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="default: float32")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """The options of `load_model`, without the dtype."""
    parser.add_argument(
        "--model", metavar="MODEL", help="Hugging Face id or local directory (default: the one in the package)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument(
        "--size", type=size, metavar="WxH", help="input size in pixels, such as 448 or 640x384 (default: the model's)"
    )


def add_gate(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options of `gate_config`, without threshold and budget."""
    gate = parser.add_argument_group("which patches are encoded", "the defaults are those of NeuroFlowConfig")
    gate.add_argument(
        "--preset", choices=("published",), help="the published gate with architecture C, unless options override it"
    )
    gate.add_argument(
        "--config", type=Path, metavar="FILE", help="settings written by `calibrate` or NeuroFlowConfig.save"
    )
    gate.add_argument("--arch", help="context (E), dual (C), active (B), mlp (A) or midlayer (D) (default: context)")
    gate.add_argument("--floor", type=int, metavar="N", help="encode at least N patches (default: 4)")
    gate.add_argument("--max-age", type=int, metavar="N", help="encode every patch within N frames (default: 128)")
    gate.add_argument("--refresh", help="key (a key frame) or rolling (a few patches a frame) (default: key)")
    gate.add_argument("--score", help="staleness or surprise (default: staleness)")
    gate.add_argument("--signal", help="patch (without positional embedding), embedding or pixel (default: patch)")
    gate.add_argument("--reference", help="refreshed, previous, ema or dual (default: refreshed)")
    gate.add_argument(
        "--ema-decay",
        type=float,
        metavar="A",
        help="weight of the new frame in the moving average; implies --reference ema",
    )
    gate.add_argument(
        "--dilation", type=int, metavar="N", help="also encode patches within N of an active one (default: 0)"
    )
    gate.add_argument(
        "--normalise-motion",
        action="store_const",
        const=True,
        help="subtract the frame's mean surprise, for moving cameras",
    )
    gate.add_argument("--precision", help="for partial frames of a float32 model: model or bfloat16 (default: model)")
    gate.add_argument(
        "--kernels", help="for partial frames on a CPU: measured (the fastest), rows or torch (default: measured)"
    )
    return gate


def add_rule(gate: argparse._ArgumentGroup) -> None:
    """Threshold and budget."""
    gate.add_argument("--threshold", type=float, metavar="T", help="encode patches that score above T; 0 encodes all")
    gate.add_argument(
        "--budget", type=float, metavar="K", help="instead: encode the K highest scores, a count or a share < 1"
    )


def add_frames(
    parser: argparse.ArgumentParser, most: int | None = None, most_help: str | None = None
) -> argparse._ArgumentGroup:
    """Which of the source's frames are read, `most` by default; without `most_help` there is no --max-frames."""
    frames = parser.add_argument_group("which frames")
    frames.add_argument("--stride", type=count, default=1, metavar="N", help="every Nth frame (default: 1)")
    if most_help is not None:
        frames.add_argument("--max-frames", type=count, default=most, metavar="N", help=most_help)
    frames.add_argument(
        "--max-pixels",
        type=count,
        default=MOST_PIXELS,
        metavar="N",
        help=f"refuse larger frames (default: {MOST_PIXELS})",
    )
    return frames


def add_report(output: argparse._ActionsContainer) -> None:
    """The page that `report_file` makes room for."""
    output.add_argument("--report", type=Path, metavar="FILE", help="an .html page to look at, in one file")


def share(text: str) -> float:
    """A number between 0 and 1."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")


def count(text: str) -> int:
    """An integer from 1 to the largest int32."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    if number > MOST:
        raise argparse.ArgumentTypeError(f"{text:.40} is more than {MOST}")
    return number


def size(text: str) -> tuple[int, int]:
    """Width and height."""
    sides = [int(side) if side.isdecimal() else 0 for side in text.lower().split("x")]
    if len(sides) > 2 or 0 in sides:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a size; give 448 or 640x384")
    if sides[0] * sides[-1] > MOST_PIXELS:
        raise argparse.ArgumentTypeError(f"{text!r:.80} has more than {MOST_PIXELS} pixels; give 448 or 640x384")
    return sides[0], sides[-1]

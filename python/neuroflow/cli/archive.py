"""`neuroflow archive`: encode many recordings, each into its own file."""

import argparse
import functools
import sys
from pathlib import Path

from ..embedding import CLIP
from ..serve.archive import SUMMARY, Row, archive
from ..street import load_classes
from . import CommandError
from .common import INTERRUPTED, KEPT, format_gate, gate_config, load_model, pinned_model
from .options import add_dtype, add_frames, add_gate, add_loading, add_rule, count

DESCRIPTION = """\
Encode recordings with a vision transformer, re-encoding only the patches that changed. Writes one Parquet file of
frames for each recording and one table of all recordings, in this process or with Ray, on one machine or many.

A SOURCE is a video file, a directory of images, a directory to search for both, or a pattern such as
'archive/**/*.mp4'. Each recording is its own stream. DIR gets a NAME-HASH.parquet for each, with a hash of its full
path, and summary.parquet with the path, bytes, frames, share skipped, key frames, file and error of each. A recording
that cannot be read, or not to its end, is reported there and on stderr; the others are still encoded.

The output is bit-for-bit the same in this process and with any number of workers, on processors of one kind. To that
end each worker computes on one thread, nothing is measured (`measured` kernels become `rows`, and no frame runs dense
because that is faster), and every shot begins with a key frame and depends on nothing before it. A new shot begins
where a frame has little in common with the previous one, and also, if refresh is `key`, --max-age frames after the last
shot began. `neuroflow run` may place key frames elsewhere. This lets --by-shot split one long recording between
workers; one of them looks for the shots first, and each decodes the file from its beginning.

The state is in DIR: after a kill, or with more SOURCES, the same command with --resume continues, and retries what
failed. Another model, size or setting is refused. A worker that dies is replaced, and its recording is encoded again,
up to three times. On a cluster, every machine needs neuroflow, and SOURCES, MODEL and DIR under the same paths.

Exits with 0 if everything was encoded, 1 if some recordings failed, 2 on bad input.
"""

EXAMPLES = """\
examples:
  neuroflow archive recordings/ --out embeddings/
  neuroflow archive recordings/ --out embeddings/ --resume
  neuroflow archive 'cameras/*/2026-*.mp4' --out embeddings/ --model ./my-vit --ray local --workers 8
  neuroflow archive film.mp4 --out embeddings/ --model ./my-vit --ray local --workers 8 --by-shot
  neuroflow archive /mnt/archive --out /mnt/embeddings --model ./my-vit --ray auto --workers 64 --stride 5
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `neuroflow archive`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.set_defaults(function=run)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="file, directory or pattern")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write to")
    add_dtype(parser)
    add_loading(parser)
    add_rule(add_gate(parser))
    frames = add_frames(parser)
    frames.add_argument(
        "--clip",
        type=count,
        default=CLIP,
        metavar="N",
        help=f"frames in one call of the model (default: {CLIP})",
    )
    parser.add_argument("--resume", action="store_true", help="continue the archive in --out")
    spread = parser.add_argument_group("workers")
    spread.add_argument(
        "--ray", metavar="ADDRESS", help="local starts Ray on this machine; auto or an address joins a cluster"
    )
    spread.add_argument(
        "--workers", type=count, metavar="N", help="number of Ray workers, each with a core and a model (default: 1)"
    )
    spread.add_argument("--by-shot", action="store_true", help="split long recordings between workers")


def run(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow archive` and return the exit code.

    Raises:
        CommandError: bad options.
        JournalError: --out holds another archive.
        OutputError: --out cannot be written, or another run is writing it.
    """
    for option, given in (("--workers", arguments.workers is not None), ("--by-shot", arguments.by_shot)):
        if given and arguments.ray is None:
            raise CommandError(f"{option}: needs Ray; also give --ray local, or a cluster's address")
    config, model = gate_config(arguments), pinned_model(arguments)
    # Workers may run in another directory.
    asked = argparse.Namespace(**vars(arguments) | {"model": None if arguments.model is None else model})
    settings = {
        "model": model,
        "size": arguments.size,
        "device": arguments.device,
        "dtype": arguments.dtype,
    }
    try:
        rows = archive(
            arguments.sources,
            arguments.out,
            functools.partial(load_model, asked),
            config,
            settings=settings,
            classes=load_classes() if arguments.model is None else None,
            stride=arguments.stride,
            clip=arguments.clip,
            max_pixels=arguments.max_pixels,
            ray=arguments.ray,
            workers=arguments.workers or 1,
            gpus=float(arguments.device.startswith("cuda")),
            by_shot=arguments.by_shot,
            resume=arguments.resume,
        )
    except ValueError as error:
        raise CommandError(str(error)) from None
    except KeyboardInterrupt:
        print(KEPT, file=sys.stderr)
        return INTERRUPTED
    failed = [row for row in rows if row.error is not None]
    for row in failed:
        print(f"failed: {row.error}", file=sys.stderr)
    print(format_rows(rows))
    print(f"NeuroFlow         {format_gate(config.reproducible())}")
    print(f"written           {arguments.out / SUMMARY}")
    return 1 if failed else 0


def format_rows(rows: list[Row]) -> str:
    """Totals over one or more recordings."""
    frames = sum(row.frames for row in rows)
    failed = sum(row.output is None for row in rows)
    cut = sum(row.error is not None for row in rows) - failed
    lines = [
        f"recordings        {len(rows)}: {failed} cannot be read, {cut} not to the end",
        f"frames            {frames}, {sum(row.key_frames for row in rows)} of them key frames",
    ]
    if frames:
        skipped = sum(row.skipped * row.frames for row in rows if row.frames) / frames
        lines.append(f"patches skipped   {skipped:.1%}, key frames included")
    return "\n".join(lines)

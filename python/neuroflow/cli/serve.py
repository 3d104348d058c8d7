"""`neuroflow serve`: encode cameras' frames over HTTP."""

import argparse
import os
import sys
from pathlib import Path

import neuroflow

from ..files import writing
from . import CommandError
from .common import format_gate, gate_config, load_model
from .options import add_dtype, add_gate, add_loading, add_rule, count

DESCRIPTION = """\
An HTTP server that encodes frames from cameras, one stream for each, and returns their embeddings. One process.

  curl --data-binary @frame.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/v1/streams/cam-1/frames

Frames from different cameras that arrive together are encoded in one pass. http://127.0.0.1:8000/ shows the cameras
live, /docs describes every route, and /metrics is for Prometheus. Ctrl-C answers what has arrived, then exits.

By default only this machine can connect. --host opens it to others, and requires NEUROFLOW_TOKEN in the environment,
which clients send as `Authorization: Bearer`.
"""

EXAMPLES = """\
examples:
  neuroflow serve
  neuroflow serve --model google/siglip2-base-patch16-224 --max-streams 40 --state ./streams
  NEUROFLOW_TOKEN=... neuroflow serve --model ./my-vit --config config.json --host 0.0.0.0
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `neuroflow serve`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.set_defaults(function=run)
    add_loading(parser)
    add_dtype(parser)
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights for partial frames, with their gate, written by `distill`"
    )
    add_rule(add_gate(parser))
    server = parser.add_argument_group("address")
    server.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1, this machine only)")
    server.add_argument("--port", type=port, default=8000, help="0 picks a free one (default: 8000)")
    streams = parser.add_argument_group("streams")
    streams.add_argument(
        "--max-streams", type=count, default=64, metavar="N", help="maximum number of open cameras (default: 64)"
    )
    streams.add_argument(
        "--max-bytes", type=size_in_bytes, metavar="N", help="maximum memory of their state, such as 8G or 500M"
    )
    streams.add_argument(
        "--idle-seconds",
        type=positive,
        default=300.0,
        metavar="S",
        help="idle time after which a camera makes room for a new one (default: 300)",
    )
    streams.add_argument("--state", type=Path, metavar="DIR", help="directory to keep streams in between runs")
    passes = parser.add_argument_group("passes and limits")
    passes.add_argument(
        "--window-ms",
        type=positive,
        default=5.0,
        metavar="MS",
        help="time a frame waits for those of other cameras (default: 5)",
    )
    passes.add_argument(
        "--most", type=count, default=16, metavar="N", help="maximum number of frames in a pass (default: 16)"
    )
    passes.add_argument(
        "--queue", type=count, default=64, metavar="N", help="requests that may wait; more get a 503 (default: 64)"
    )
    passes.add_argument(
        "--max-body",
        type=size_in_bytes,
        default=16 * 2**20,
        metavar="N",
        help="maximum size of a request (default: 16M)",
    )
    passes.add_argument(
        "--max-pixels",
        type=count,
        default=33_177_600,
        metavar="N",
        help="maximum size of an image (default: 33177600, 8K)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow serve` and return the exit code.

    Raises:
        CommandError: bad options, or an address that cannot be listened on.
        OutputError: --state cannot be made.
    """
    from ..serve.app import LOOPBACK, create_app
    from ..serve.server import listening, serve
    from ..serve.service import Service

    token = os.environ.get("NEUROFLOW_TOKEN") or None
    if arguments.host not in LOOPBACK and token is None:
        raise CommandError(
            f"--host {arguments.host}: reachable by others, but NEUROFLOW_TOKEN is not set; set it, or omit --host"
        )
    config = gate_config(arguments)
    try:
        listener = listening(arguments.host, arguments.port)
    except OSError as error:
        where = f"--host {arguments.host} --port {arguments.port}"
        raise CommandError(f"{where}: cannot be listened on ({error.strerror}); give another") from None
    if arguments.state is not None:
        with writing(arguments.state):
            arguments.state.mkdir(parents=True, exist_ok=True)
    streams = neuroflow.StreamCache(arguments.max_streams, arguments.max_bytes, arguments.idle_seconds)
    model, preprocess = load_model(arguments)
    try:
        neuroflow.enable_cache(model, config, streams=streams, weights=arguments.weights)
    except ValueError as error:
        raise CommandError(str(error)) from None
    service = Service(
        model,
        preprocess,
        streams,
        window_ms=arguments.window_ms,
        most=arguments.most,
        queue=arguments.queue,
        state=arguments.state,
    )
    app = create_app(service, token=token, max_body=arguments.max_body, max_pixels=arguments.max_pixels)
    size = f"{preprocess.width}x{preprocess.height}"
    print(f"{type(model).__name__}, {size}, {format_gate(config)}", file=sys.stderr)
    return serve(app, listener)


def port(text: str) -> int:
    """A TCP port."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a port; give 0 to 65535")
    return int(text)


def positive(text: str) -> float:
    """A number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not above 0")
    return number


def size_in_bytes(text: str) -> int:
    """A number of bytes: 500000, 16M, 8G."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if unit not in ("", "K", "M", "G") or not number.isdecimal() or not int(number):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a size; give bytes, or 500K, 16M, 8G")
    return int(number) * 1024 ** ["", "K", "M", "G"].index(unit)

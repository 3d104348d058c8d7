"""The `neuroflow` command: what there is, and errors as one line.

It lies outside of the package, which cannot be imported without torch and transformers: what needs neither, such as the
list of commands, is there at once.
"""

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

# Name -> module and help.
COMMANDS = {
    "run": ("neuroflow.cli.run", "encode a video with a model"),
    "calibrate": ("neuroflow.cli.calibrate", "find the threshold for a fidelity or a skip rate"),
    "distill": ("neuroflow.cli.distill", "train a tower to work from the active patches alone"),
    "eval": (None, "measure what reuse costs: accuracy on labelled clips, the laws of reuse, language models"),
    "archive": ("neuroflow.cli.archive", "encode many recordings, in this process or by Ray"),
    "serve": ("neuroflow.cli.serve", "encode the frames that cameras send over HTTP"),
    "track": ("neuroflow.cli.track", "follow what moves"),
    "demo": ("neuroflow.cli.demo", "draw labelled scenes, classify them dense and patched, show the table"),
}
EVALUATIONS = {
    "video": ("neuroflow.cli.eval_video", "top-1 and top-3 on labelled clips, dense beside every architecture"),
    "laws": ("neuroflow.cli.eval_laws", "what reuse does to fidelity, tokens, blocks and pooling head, on one clip"),
    "llm": (
        "neuroflow.cli.eval_llm",
        "perplexity and drift of a language model whose layers repeat themselves between decode steps",
    ),
}
# Library -> the extra that brings it.
EXTRAS = {
    **dict.fromkeys(("av", "PIL", "pyarrow", "scipy"), "video"),
    **dict.fromkeys(("fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn"), "serve"),
    "ray": "ray",
    "rerun": "viz",
}


class _Parser(argparse.ArgumentParser):
    """A parser that takes the options of its command from its module, once they are asked for.

    The module's `add_options(parser)` sets the description and the options, and as the default of `function` what
    carries the command out: namespace -> exit code.
    """

    def __init__(self, *, module: str | None = None, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self._module = module

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if self._module is not None:
            importlib.import_module(self._module).add_options(self)
            self._module = None
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0, 1 where a part failed, 2 after bad input, 130 after Ctrl-C."""
    warnings.showwarning = _show_warning
    try:
        return _carry_out(_parser().parse_args(argv))
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        extra = EXTRAS.get(library)
        if extra is None:
            raise
        print(f"neuroflow: error: {library} is missing; install the {extra} extra: neuroflow[{extra}]", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="neuroflow", description="Vision transformers over video, at the cost of what changed.")
    evaluate = _add_commands(parser, COMMANDS)["eval"]
    evaluate.description = "Measure what reuse costs."
    _add_commands(evaluate, EVALUATIONS)
    return parser


def _add_commands(
    parser: argparse.ArgumentParser, commands: dict[str, tuple[str | None, str]]
) -> dict[str, argparse.ArgumentParser]:
    names = ",".join(commands)
    group = parser.add_subparsers(required=True, metavar=f"{{{names}}}")
    return {name: group.add_parser(name, module=module, help=text) for name, (module, text) in commands.items()}


def _carry_out(arguments: argparse.Namespace) -> int:
    # Late, as all of the package is.
    from neuroflow.cli import CommandError
    from neuroflow.cli.apart import require_apart
    from neuroflow.journal import JournalError
    from neuroflow.video.source import SourceError

    try:
        require_apart(arguments)
        return arguments.function(arguments)
    # Names and files fail the system's calls in more ways than there are places where one is looked at.
    except (CommandError, JournalError, SourceError, OSError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        message = "there is not enough memory for this; give a smaller model, --size, --clip or --max-frames"
    print(f"neuroflow: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

"""Check that no output of a command is one of its inputs, under any name."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from . import CommandError
from .options import LIVE

INPUTS = ("source", "videos", "outside", "model", "weights", "config", "labels", "classes", "testlist", "text")
OUTPUTS = ("out", "overlay", "rerun", "report")
BESIDE = ("", ".partial", ".journal", ".checkpoint", ".lock")  # suffixes of the files that belong to an output


def require_apart(arguments: argparse.Namespace) -> None:
    """Refuse a command that would overwrite its input, before it reads or writes anything.

    Files are compared by identity: links and hard links to a file, and files in a directory that is read, are the same.

    Raises:
        CommandError: an output is an input or another output, or a name holds a NUL.
    """
    given = {name: value for name, value in vars(arguments).items() if isinstance(value, str | Path | list)}
    for name in (*INPUTS, *OUTPUTS, "plots", "out_dir"):
        if "\0" in str(given.get(name, "")):
            raise CommandError(f"{_option(name)}: its name holds a NUL; give another")
    if given.get("rerun") == LIVE:
        del given["rerun"]
    written: dict[tuple[int, int], str] = {}
    for option in OUTPUTS:
        for suffix in BESIDE if option in given else ():
            identity = _identity(Path(f"{given[option]}{suffix}"))
            if identity is not None and not os.path.isdir(f"{given[option]}{suffix}"):
                other = written.setdefault(identity, option)
                if other != option:
                    raise CommandError(f"--{option} {given[option]}: is also what --{other} writes; give another")
    for name in INPUTS if written else ():
        for path in _files(name, given.get(name), labelled=hasattr(arguments, "testlist")):
            if (option := written.get(_identity(path))) is not None:
                message = f"would overwrite {path}, which is read; give another"
                raise CommandError(f"--{option} {given[option]}: {message}")
    plots, source = given.get("plots"), Path(given.get("source", ""))
    if plots is not None and source.is_dir() and plots.resolve().is_relative_to(source.resolve()):
        raise CommandError(f"--plots {plots}: lies in {source}, which is read; give another")


def _files(name: str, value: str | Path | list | None, labelled: bool) -> Iterator[Path]:
    """The files behind an input; a source holds frames, or `labelled` clips."""
    for each in value if isinstance(value, list) else [] if value is None else [value]:
        path = Path(str(each).removeprefix("file:")) if _identity(Path(each)) is None else Path(each)
        if not path.is_dir():
            yield path
        elif name == "model":
            yield from path.iterdir()
        else:
            # Imported here because both need PyAV, which `eval llm` does not.
            from ..video.clips import VIDEO_SUFFIXES
            from ..video.source import IMAGE_SUFFIXES

            frames = name == "source" and not labelled
            suffixes = IMAGE_SUFFIXES if frames else IMAGE_SUFFIXES + VIDEO_SUFFIXES
            inside = path.iterdir() if frames else path.rglob("*")
            yield from (each for each in inside if each.suffix.lower() in suffixes)


def _identity(path: Path) -> tuple[int, int] | None:
    """The identity of a file, whatever its name; None if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _option(name: str) -> str:
    return name.upper() if name in ("source", "videos") else f"--{name.replace('_', '-')}"

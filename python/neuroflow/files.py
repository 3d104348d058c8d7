"""Files that are written as a whole or not at all, by one process at a time, and JSON as its standard has it."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

try:
    import fcntl
except ImportError:  # on Windows, where nobody is kept out
    fcntl = None


class OutputError(OSError):
    """A file cannot be written. The message is one line and says what to do."""


@contextlib.contextmanager
def writing(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Makes one line of an OSError in writing `path`, or of `others`, which libraries raise in its place.

    Raises:
        OutputError: instead of these.
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, *others) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path}: cannot be written ({reason}); give another, or mend that") from None


def lock(path: Path) -> BinaryIO:
    """Open a file for one process alone, until it is closed or the process dies; an empty one where there is none.

    Raises:
        OSError: it cannot be opened, another process has it, or it is a link or no file.
    """

    def opened(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)

    if "\0" in str(path):
        raise OSError(errno.EINVAL, "its name holds a NUL")
    while True:
        if path.is_symlink():
            raise OSError(errno.ELOOP, f"{path.name} is a link")
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "r+b", opener=opened))
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise OSError(errno.EBUSY, "another run is writing it") from None
            own = os.fstat(file.fileno())
            # Whoever had it a moment ago may have renamed or removed it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(own, os.lstat(path)):
                    if not stat.S_ISREG(own.st_mode) or own.st_nlink > 1:
                        raise OSError(errno.EMLINK, f"{path.name} is a link, or no file")
                    stack.pop_all()
                    return file


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside `path` to write to; it takes the place of `path` when the block ends.

    Where the block raises, or leaves it empty or removes it, `path` stays as it was, and nothing is left beside it.

    Raises:
        OutputError: it cannot be written, or another process is writing it.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path), lock(partial) as file:
        try:
            file.truncate()  # what a killed run has left
            yield partial
            if partial.exists() and partial.stat().st_size:
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def to_json(value: Any, **layout: Any) -> str:
    """JSON of a value of its types; `layout` is that of `json.dumps`.

    Raises:
        ValueError: NaN or Inf in it, which JSON does not have.
    """
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except ValueError:
        raise ValueError("NaN or Inf in what is to be written, which JSON does not have") from None


def from_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, holds NaN or Inf, or is nested deeper than Python goes.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")

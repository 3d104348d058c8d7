"""Files written completely or not at all, by one process at a time, and strict JSON."""

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
except ImportError:  # on Windows, where other processes are not kept out
    fcntl = None


class OutputError(OSError):
    """A file cannot be written. The message is one line and says what to do."""


@contextlib.contextmanager
def writing(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Turn an OSError while writing `path`, or a library's `others`, into a one-line error.

    Raises:
        OutputError: in place of these.
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, *others) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path}: cannot be written ({reason}); give another, or fix that") from None


def lock(path: Path) -> BinaryIO:
    """Open a file exclusively, until it is closed or the process dies; creates an empty one if it is missing.

    Raises:
        OSError: it cannot be opened, another process holds it, or it is a link or not a regular file.
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
            # Its last holder may have renamed or removed it just now.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(own, os.lstat(path)):
                    if not stat.S_ISREG(own.st_mode) or own.st_nlink > 1:
                        raise OSError(errno.EMLINK, f"{path.name} is a link, or not a file")
                    stack.pop_all()
                    return file


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file to write to, which replaces `path` when the block ends.

    If the block raises, or leaves the file empty or removes it, `path` stays as it was and nothing else is left.

    Raises:
        OutputError: it cannot be written, or another process is writing it.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path), lock(partial) as file:
        try:
            file.truncate()  # leftovers of a killed run
            yield partial
            if partial.exists() and partial.stat().st_size:
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def to_json(value: Any, **layout: Any) -> str:
    """Serialise a value to JSON; `layout` goes to `json.dumps`.

    Raises:
        ValueError: it holds NaN or Inf, which JSON does not have.
    """
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except ValueError:
        raise ValueError("the result holds NaN or Inf, which JSON does not have") from None


def from_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: invalid JSON, NaN or Inf, or nesting deeper than Python supports.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")

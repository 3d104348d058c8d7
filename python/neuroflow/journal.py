"""What a run has found so far, kept beside the file that is written in the end, so that a run that stops can go on."""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .config import RENAMED
from .files import replacing

# Where the package's own tower lay when journals were written before, and where it lies.
OLD_STREET, STREET = "neuroflow/models/street", "neuroflow/street/weights"


class JournalError(ValueError):
    """Results cannot be written or continued. The message is one line and says what to do."""


class Journal:
    """Lines of JSON in a file of their own, `.journal` added to the name of the one that is written in the end.

    The first line pins what the run is made with. The others survive a kill, each once `append` has returned.

    Args:
        path: the file that is written in the end.
        settings: what the run is made with, of JSON's types.
        read: is called with every line but the first that an unfinished run has left, where it is continued.
        resume: continue the unfinished run, if there is one.

    Attributes:
        path: the journal.
        settings: as JSON gives them back.

    Raises:
        JournalError: a journal that was made with other settings, or that cannot be read.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], read: Callable[[Any], object], *, resume: bool = False
    ) -> None:
        self.path = path.with_name(f"{path.name}.journal")
        self.settings = json.loads(json.dumps(settings))
        self._file: BinaryIO | None = None
        if resume and self.path.exists():
            self._resume(read)
        elif self.path.exists():
            warnings.warn(f"the unfinished {self.path} is discarded: --resume was not given", stacklevel=3)

    def append(self, line: Any) -> None:
        """Add a line, of JSON's types."""
        if self._file is None:
            self._file = self.path.open("wb")
            self._write({"settings": self.settings})
        self._write(line)

    def lines(self) -> Iterator[bytes]:
        """All lines but the first, as they are in the file."""
        with self.path.open("rb") as file:
            file.readline()
            yield from file

    def close(self) -> None:
        """Leave the journal to be continued by a later run."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Close and delete the journal: the file that it stood in for is written."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _write(self, line: Any) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def _resume(self, read: Callable[[Any], object]) -> None:
        with _continuing(self.path), self.path.open("rb") as file:
            settings = json.loads(file.readline())["settings"]
            end = file.tell()
            for line in file:
                # A kill can leave half a line behind.
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                read(json.loads(line))
        _require_same(self.path, settings, self.settings)
        self._file = self.path.open("r+b")
        self._file.truncate(end)
        self._file.seek(end)


class Findings:
    """What a run has found so far, by name: in a journal, and in the file once `finish` has written that.

    Args:
        path: the JSON file to write; None writes nothing.
        settings: what the run is made with, of JSON's types.
        resume: continue an unfinished run, or add to the file of a finished one.

    Attributes:
        done: what has been found, by name.

    Raises:
        JournalError: a run that was made with other settings, or a file that cannot be read.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], *, resume: bool = False) -> None:
        self.done: dict[str, Any] = {}
        self._path = path
        self._journal: Journal | None = None
        self._finished: list[tuple[str, Any]] = []  # what is in the file, until it is in the journal as well
        if path is None:
            return
        self._journal = Journal(path, settings, lambda line: self.done.update([line]), resume=resume)
        if resume and path.exists() and not self._journal.path.exists():
            with _continuing(path):
                content = json.loads(path.read_bytes())
                settings, self.done = content["settings"], dict(content["found"])
            _require_same(path, settings, self._journal.settings)
            self._finished = list(self.done.items())

    def append(self, name: str, found: Any) -> None:
        """Note what came of `name`, of JSON's types. It survives a kill once this has returned."""
        self.done[name] = found
        if self._journal is not None:
            for line in (*self._finished, (name, found)):
                self._journal.append(line)
            self._finished.clear()

    def finish(self, **content: Any) -> None:
        """Write the file, `content` after the settings and before what was found, and remove the journal."""
        if self._journal is None:
            return
        with replacing(self._path) as partial:
            whole = {"settings": self._journal.settings, **content, "found": self.done}
            partial.write_text(json.dumps(whole, indent=1) + "\n")
        self._journal.remove()

    def close(self) -> None:
        """Leave the journal to be continued by a later run."""
        if self._journal is not None:
            self._journal.close()


@contextlib.contextmanager
def _continuing(path: Path) -> Iterator[None]:
    """What is wrong with a file that is continued, as one line."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise JournalError(f"{path}: cannot be continued ({error}); remove it, or run without --resume") from None


def _require_same(path: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to continue a file whose settings differ, other than by what has been renamed since."""
    was, now = _renamed(was), _renamed(now)
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            message = f"was made with {name} {was.get(name)}, not {now.get(name)}; use that, or run without --resume"
            raise JournalError(f"{path}: {message}")


def _renamed(settings: dict[str, Any]) -> dict[str, Any]:
    settings = {RENAMED.get(name, name): value for name, value in settings.items()}
    if isinstance(settings.get("model"), str):
        settings["model"] = settings["model"].replace(OLD_STREET, STREET)
    return settings

"""The findings of a run, kept next to its output file so that an interrupted run can continue."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .config import RENAMED
from .files import from_json, lock, replacing, to_json, writing

# Where the package's tower was in earlier releases, as older journals record it, and where it is now.
OLD_STREET, STREET = "neuroflow/models/street", "neuroflow/street/weights"


class JournalError(ValueError):
    """Results cannot be written or continued. The message is one line and says what to do."""


class Journal:
    """Lines of JSON in their own file, named after the output file with `.journal` appended.

    The first line pins the run's settings. The others survive a kill once `append` has returned. Until `close` or
    `remove` no other process can open it. A line that a kill left half-written is dropped.

    Args:
        path: the output file.
        settings: the run's settings, as JSON types.
        read: called with every line but the first of the unfinished run that is continued.
        resume: continue the unfinished run, if there is one.

    Attributes:
        path: the journal.
        settings: as read back from JSON.
        begun: it has its first line, from this run or from the one that is continued.

    Raises:
        JournalError: a journal that was made with other settings, or that cannot be read.
        OutputError: it cannot be written, or another run is writing it.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], read: Callable[[Any], object], *, resume: bool = False
    ) -> None:
        self.path = path.with_name(f"{path.name}.journal")
        self.settings = from_json(to_json(settings))
        self.begun = False
        with writing(path):
            self._file = lock(self.path)
        try:
            if resume:
                self._resume(read)
            elif self.path.stat().st_size:
                warnings.warn(f"the unfinished {self.path} is discarded, because --resume was not given", stacklevel=3)
        except BaseException:
            self.close()
            raise

    def append(self, line: Any) -> None:
        """Append a line of JSON types.

        Raises:
            JournalError: it holds NaN or Inf.
            OutputError: it cannot be written.
        """
        if not self.begun:
            with writing(self.path):
                self._file.truncate(0)
            self._write({"settings": self.settings})
            self.begun = True
        self._write(line)

    def lines(self) -> Iterator[bytes]:
        """All lines but the first, as bytes."""
        with self.path.open("rb") as file:
            file.readline()
            yield from file

    def close(self) -> None:
        """Leave the journal, unless it is empty, for a later run to continue."""
        if not self._file.closed:
            if not os.fstat(self._file.fileno()).st_size:
                self.path.unlink(missing_ok=True)
            # Closing retries a line that did not fit on the disk; `append` has reported it.
            with contextlib.suppress(OSError):
                self._file.close()

    def remove(self) -> None:
        """Delete and close the journal, once the output file is written."""
        self.path.unlink(missing_ok=True)
        self._file.close()

    def _write(self, line: Any) -> None:
        try:
            text = to_json(line, separators=(",", ":"))
        except ValueError as error:
            raise JournalError(f"{self.path}: {error}; earlier results are kept") from None
        with writing(self.path):
            self._file.write(text.encode() + b"\n")
            self._file.flush()

    def _resume(self, read: Callable[[Any], object]) -> None:
        with continuing(self.path):
            first = self._file.readline()
            # A kill can leave half a line. If it is the first, there is nothing to continue.
            if not first.endswith(b"\n"):
                self._file.seek(0)
                return
            require_same(self.path, from_json(first)["settings"], self.settings)
            end = self._file.tell()
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                read(from_json(line))
            self._file.truncate(end)
            self._file.seek(end)
        self.begun = True


class Findings:
    """The findings of a run, by name: in a journal, and in the output file once `finish` has written it.

    Args:
        path: the JSON file to write; None writes nothing.
        settings: the run's settings, as JSON types.
        resume: continue an unfinished run, or add to the file of a finished one.
        read: called with each finding of the earlier run; if it raises, nothing is continued.

    Attributes:
        done: findings so far, by name.

    Raises:
        JournalError: a run that was made with other settings, or a file that cannot be read.
        OutputError: the file cannot be written, or another run is writing it.
    """

    def __init__(
        self,
        path: Path | None,
        settings: dict[str, Any],
        *,
        resume: bool = False,
        read: Callable[[Any], object] = lambda found: None,
    ) -> None:
        self.done: dict[str, Any] = {}
        self._path = path
        self._read = read
        self._journal: Journal | None = None
        self._finished: list[tuple[str, Any]] = []  # findings in the file that are not yet in the journal
        if path is None:
            return
        self._journal = Journal(path, settings, lambda line: self._take(*line), resume=resume)
        if resume and path.exists() and not self._journal.begun:
            try:
                with continuing(path):
                    content = from_json(path.read_bytes())
                    require_same(path, content["settings"], self._journal.settings)
                    for name, found in content["found"].items():
                        self._take(name, found)
            except JournalError:
                self.close()
                raise
            self._finished = list(self.done.items())

    def _take(self, name: str, found: Any) -> None:
        if not isinstance(name, str):
            raise TypeError("a name in it is not a string")
        self._read(found)
        self.done[name] = found

    def append(self, name: str, found: Any) -> None:
        """Record a finding of JSON types. It survives a kill once this has returned."""
        self.done[name] = found
        if self._journal is not None:
            for line in (*self._finished, (name, found)):
                self._journal.append(line)
            self._finished.clear()

    def finish(self, **content: Any) -> None:
        """Write the file, with `content` between the settings and the findings, and remove the journal."""
        if self._journal is None:
            return
        whole = {"settings": self._journal.settings, **content, "found": self.done}
        try:
            text = to_json(whole, indent=1)
        except ValueError as error:
            raise JournalError(f"{self._path}: {error}") from None
        with replacing(self._path) as partial:
            partial.write_text(text + "\n")
        self._journal.remove()

    def close(self) -> None:
        """Leave the journal for a later run to continue."""
        if self._journal is not None:
            self._journal.close()


@contextlib.contextmanager
def continuing(path: Path) -> Iterator[None]:
    """Report errors in a file that is continued in one line.

    Raises:
        JournalError: in place of what the block raises.
    """
    try:
        yield
    except JournalError:
        raise
    # A damaged file can raise anything, anywhere it is read.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise JournalError(f"{path}: cannot be continued ({reason}); remove it, or run without --resume") from None


def require_same(path: Path, was: dict[str, Any], now: dict[str, Any], otherwise: str = "run without --resume") -> None:
    """Refuse to continue a file whose settings differ, other than by renaming.

    Args:
        path: the file.
        was: its settings.
        now: the settings of this run.
        otherwise: what the user can do instead.

    Raises:
        JournalError: they differ.
    """
    if not isinstance(was, dict):
        raise TypeError("it has no settings")
    was, now = _renamed(was), _renamed(now)
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            message = f"was made with {name} {was.get(name)}, not {now.get(name)}; use that, or {otherwise}"
            raise JournalError(f"{path}: {message}")


def _renamed(settings: dict[str, Any]) -> dict[str, Any]:
    settings = {RENAMED.get(name, name): value for name, value in settings.items()}
    if isinstance(settings.get("model"), str):
        settings["model"] = settings["model"].replace(OLD_STREET, STREET)
    return settings

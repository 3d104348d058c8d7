"""Per-frame results on disk: a journal that survives a kill, and the file made of it when the run succeeds."""

import importlib.util
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np

SUFFIXES = (".jsonl", ".npz", ".parquet")


class ResultError(ValueError):
    """Results cannot be written or continued. The message is one line and says what to do."""


@dataclass(frozen=True)
class Record:
    """What came of one frame, besides its embedding.

    Attributes:
        frame: index in the source.
        time_s: its time there, in seconds.
        skipped: share of the patches that were not encoded, 0 to 1.
        active: how many were.
        key_frame: the frame was encoded in full, from nothing.
        neuroflow_ms: time in the patched model, in milliseconds.
        dense_ms: time in the unpatched model, None without a comparison.
        cosine: between the two models' embeddings, None without a comparison.
        first: the frame began a run, or its continuation; it is dense for that alone, so no statistics count it.
        predicted: the class that the embedding comes nearest to, None for a model without classes.
        dense_predicted: that of the unpatched model, None without a comparison.
    """

    frame: int
    time_s: float
    skipped: float
    active: int
    key_frame: bool
    neuroflow_ms: float
    dense_ms: float | None
    cosine: float | None
    first: bool
    predicted: str | None = None
    dense_predicted: str | None = None


class Results:
    """The results of one run, journalled line by line until `finish` turns them into the file asked for.

    The journal lies beside the file, `.journal` added to its name. Its first line pins what the run was made with.

    Args:
        path: the file to write, .jsonl, .npz or .parquet.
        settings: what the run was made with, of JSON's types.
        resume: continue the journal that an unfinished run left.

    Attributes:
        resumed: the records of the run that is continued.

    Raises:
        ResultError: a path that cannot be written, or a journal that was made with other settings.
    """

    def __init__(self, path: Path, settings: dict, *, resume: bool = False) -> None:
        if path.suffix not in SUFFIXES:
            raise ResultError(f"{path}: not a known format; end the name in one of {', '.join(SUFFIXES)}")
        if path.is_dir() or not path.parent.is_dir():
            raise ResultError(f"{path}: cannot be written there; give a file in a directory that exists")
        if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise ResultError(f"{path}: parquet needs pyarrow; install it, or end the name in .jsonl or .npz")
        self.resumed: list[Record] = []
        self._path = path
        self._settings = json.loads(json.dumps(settings))
        self._journal = path.with_name(path.name + ".journal")
        self._file: BinaryIO | None = None
        if resume and self._journal.exists():
            self._resume()
        elif self._journal.exists():
            warnings.warn(f"the unfinished {self._journal} is discarded: resume was not asked for", stacklevel=2)

    def append(self, record: Record, embedding: np.ndarray) -> None:
        """Note a frame and its embedding, [D] float32. They survive a kill once this has returned."""
        if self._file is None:
            self._file = self._journal.open("wb")
            self._write_line({"settings": self._settings})
        # Through float32's own shortest text, which float64's would triple.
        self._write_line({**asdict(record), "embedding": [float(str(value)) for value in embedding]})

    def finish(self) -> None:
        """Write the file asked for in full, then remove the journal. At least one frame has been appended."""
        self.close()
        partial = self._path.with_name(self._path.name + ".partial")
        write = {".jsonl": self._write_jsonl, ".npz": self._write_npz, ".parquet": self._write_parquet}
        try:
            with partial.open("wb") as file:
                write[self._path.suffix](file)
            partial.replace(self._path)
        finally:
            partial.unlink(missing_ok=True)
        self._journal.unlink()

    def close(self) -> None:
        """Leave the journal to be continued by a later run."""
        if self._file is not None:
            self._file.close()

    def _resume(self) -> None:
        try:
            with self._journal.open("rb") as file:
                header = json.loads(file.readline())["settings"]
                end = file.tell()
                for line in file:
                    # A kill can leave half a line behind.
                    if not line.endswith(b"\n"):
                        break
                    end += len(line)
                    self.resumed.append(_record(json.loads(line)))
        except (ValueError, KeyError, TypeError, OSError) as error:
            message = f"{self._journal}: cannot be continued ({error}); remove it, or run without --resume"
            raise ResultError(message) from None
        for name in sorted(header.keys() | self._settings.keys()):
            was, now = header.get(name), self._settings.get(name)
            if was != now:
                message = f"{self._journal}: was made with {name} {was}, not {now}; use that, or run without --resume"
                raise ResultError(message)
        self._file = self._journal.open("r+b")
        self._file.truncate(end)
        self._file.seek(end)

    def _write_line(self, line: dict) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def _lines(self) -> Iterator[bytes]:
        with self._journal.open("rb") as file:
            file.readline()
            yield from file

    def _columns(self) -> tuple[list[Record], np.ndarray]:
        records, embeddings = [], []
        for line in self._lines():
            row = json.loads(line)
            embeddings.append(np.array(row["embedding"], np.float32))
            records.append(_record(row))
        return records, np.stack(embeddings)

    def _write_jsonl(self, file: BinaryIO) -> None:
        file.writelines(self._lines())

    def _write_npz(self, file: BinaryIO) -> None:
        records, embedding = self._columns()
        columns = {}
        for field in fields(Record):
            values = [getattr(record, field.name) for record in records]
            columns[field.name] = np.array(values, float if None in values else None)
        np.savez(file, **columns, embedding=embedding, settings=json.dumps(self._settings))

    def _write_parquet(self, file: BinaryIO) -> None:
        import pyarrow
        import pyarrow.parquet

        records, embedding = self._columns()
        columns = {field.name: [getattr(record, field.name) for record in records] for field in fields(Record)}
        columns["embedding"] = pyarrow.FixedSizeListArray.from_arrays(embedding.ravel(), embedding.shape[1])
        table = pyarrow.table(columns).replace_schema_metadata({"neuroflow": json.dumps(self._settings)})
        pyarrow.parquet.write_table(table, file)


def _record(row: dict) -> Record:
    return Record(**{field.name: row[field.name] for field in fields(Record)})

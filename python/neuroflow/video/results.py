"""Per-frame results on disk: a journal that survives a kill, and the file made from it when the run succeeds."""

import importlib.util
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, get_args, get_type_hints

import numpy as np

from ..config import LARGEST
from ..files import from_json, replacing
from ..journal import Journal, JournalError

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".jsonl", ".npz", ".parquet")


@dataclass(frozen=True)
class Record:
    """The result for one frame, besides its embedding.

    Attributes:
        frame: index in the source.
        time_s: its time in the source, in seconds.
        skipped: share of patches that were not encoded, 0 to 1.
        active: number of patches that were encoded.
        key_frame: whether the frame was encoded in full, without caches.
        neuroflow_ms: time in the patched model, in milliseconds.
        dense_ms: time in the unpatched model; None without a comparison.
        cosine: between the two models' embeddings; None without a comparison.
        first: whether it is the first frame of a run or of its continuation, which is dense for that reason alone and
            excluded from statistics.
        predicted: the class nearest to the embedding; None for a model without classes.
        dense_predicted: the unpatched model's; None without a comparison.
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
    """The results of one run, journalled frame by frame until `finish` turns them into the requested file.

    Args:
        path: the file to write, .jsonl, .npz or .parquet.
        settings: the settings of the run, as JSON types; `stride` (1 if missing) is the distance between frames of a
            run that is continued.
        resume: continue the journal of an unfinished run.

    Attributes:
        resumed: the records of the run that is continued.

    Raises:
        JournalError: a path that cannot be written, or a journal that is damaged or was made with other settings.
        OutputError: a path that cannot be written, or that another run is writing.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool = False) -> None:
        if path.suffix not in SUFFIXES:
            raise JournalError(f"{path}: not a known format; end the name in one of {', '.join(SUFFIXES)}")
        if path.is_dir() or not path.parent.is_dir():
            raise JournalError(f"{path}: cannot be written there; give a file in a directory that exists")
        if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise JournalError(f"{path}: parquet needs pyarrow; install it, or end the name in .jsonl or .npz")
        self.resumed: list[Record] = []
        self._path = path
        self._stride = settings.get("stride", 1)
        self._dimension: int | None = None
        self._journal = Journal(path, settings, self._take, resume=resume)

    def append(self, record: Record, embedding: np.ndarray) -> None:
        """Record a frame and its embedding, [D] float32. They survive a kill once this has returned.

        Raises:
            JournalError: an embedding with NaN or Inf, or with another D than before.
            OutputError: it cannot be written.
        """
        self._require_dimension(len(embedding))
        # As the shortest text of a float32; a float64's would be three times as long.
        self._journal.append({**asdict(record), "embedding": [float(str(value)) for value in embedding]})

    def finish(self) -> None:
        """Write the requested file, then remove the journal. At least one frame must have been appended.

        Raises:
            OutputError: it cannot be written; the journal stays.
        """
        write = {".jsonl": self._write_jsonl, ".npz": self._write_npz, ".parquet": self._write_parquet}
        with replacing(self._path) as partial, partial.open("wb") as file:
            write[self._path.suffix](file)
        self._journal.remove()

    def close(self) -> None:
        """Leave the journal for a later run to continue."""
        self._journal.close()

    def _take(self, row: Any) -> None:
        """Read a row of the run that is continued."""
        record, embedding = _record(row), row["embedding"]
        expected = len(self.resumed) * self._stride
        if record.frame != expected:
            raise ValueError(f"it has frame {record.frame} in place of {expected}")
        if not embedding or not all(type(value) is float and abs(value) <= LARGEST for value in embedding):
            raise ValueError(f"the embedding of frame {record.frame} is not a list of finite numbers")
        self._require_dimension(len(embedding))
        self.resumed.append(record)

    def _require_dimension(self, dimension: int) -> None:
        if dimension != (self._dimension or dimension):
            message = f"embeddings have {self._dimension} dimensions, but the next frame's has {dimension}"
            raise JournalError(f"{self._path}: {message}; use the model of the earlier frames")
        self._dimension = dimension

    def _columns(self) -> tuple[list[Record], np.ndarray]:
        records, embeddings = [], []
        for line in self._journal.lines():
            row = from_json(line)
            embeddings.append(np.array(row["embedding"], np.float32))
            records.append(_record(row))
        return records, np.stack(embeddings)

    def _write_jsonl(self, file: BinaryIO) -> None:
        file.writelines(self._journal.lines())

    def _write_npz(self, file: BinaryIO) -> None:
        records, embedding = self._columns()
        columns = {}
        for field in fields(Record):
            values = [getattr(record, field.name) for record in records]
            if any(isinstance(value, str) for value in values):
                values = [value or "" for value in values]
            columns[field.name] = np.array(values, float if None in values else None)
        np.savez(file, **columns, embedding=embedding, settings=json.dumps(self._journal.settings))

    def _write_parquet(self, file: BinaryIO) -> None:
        import pyarrow.parquet

        records, embedding = self._columns()
        columns = {field.name: [getattr(record, field.name) for record in records] for field in fields(Record)}
        table = parquet_table(columns, embedding)
        about = {"neuroflow": json.dumps(self._journal.settings)}
        pyarrow.parquet.write_table(table.replace_schema_metadata(about), file)


def parquet_table(columns: dict[str, Any], embedding: np.ndarray) -> "pyarrow.Table":
    """A table of T frames.

    Args:
        columns: T values or a pyarrow array by name.
        embedding: [T, D] float32.
    """
    import pyarrow

    vectors = pyarrow.FixedSizeListArray.from_arrays(embedding.ravel(), embedding.shape[1])
    return pyarrow.table({**columns, "embedding": vectors})


def _record(row: dict) -> Record:
    """The record in a journal's row.

    Raises:
        ValueError: an invalid value.
    """
    for name, kind in get_type_hints(Record).items():
        kinds = get_args(kind) or (kind,)
        value = row[name]
        fits = type(value) in kinds or (type(value) is int and float in kinds)
        if not fits or (type(value) is float and not math.isfinite(value)) or (type(value) is int and value < 0):
            raise ValueError(f"{name} is {value!r:.40}")
    return Record(**{field.name: row[field.name] for field in fields(Record)})

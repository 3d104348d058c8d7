"""Results survive a kill, appear whole or not at all, and read back the same in every format."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet
import pytest
from neuroflow.journal import JournalError
from neuroflow.video.results import Record, Results

SETTINGS = {"source": "clip.mp4", "size": (448, 448), "threshold": 0.05}


def record(number):
    return Record(number, number / 10, 0.75, 49, number == 0, 1.5 + number, None, None, number == 0)


def embedding(number):
    return np.random.default_rng(number).standard_normal(5).astype(np.float32)


def write(path, numbers, *, resume=False):
    results = Results(path, SETTINGS, resume=resume)
    for number in numbers:
        results.append(record(number), embedding(number))
    return results


def read(path):
    if path.suffix == ".npz":
        columns = np.load(path)
        return columns["frame"], columns["neuroflow_ms"], columns["dense_ms"], columns["embedding"]
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        rows = table.to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    columns = ([row[name] for row in rows] for name in ("frame", "neuroflow_ms", "dense_ms", "embedding"))
    return tuple(np.array(column, float) for column in columns)


@pytest.mark.parametrize("suffix", [".jsonl", ".npz", ".parquet"])
def test_every_format_reads_back(tmp_path, suffix):
    path = tmp_path / f"result{suffix}"
    results = write(path, range(3))
    assert not path.exists()
    results.finish()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    frame, milliseconds, dense, vectors = read(path)
    assert frame.tolist() == [0, 1, 2] and milliseconds.tolist() == [1.5, 2.5, 3.5] and np.isnan(dense).all()
    assert np.array_equal(vectors.astype(np.float32), [embedding(number) for number in range(3)])


@pytest.mark.parametrize("suffix", [".jsonl", ".npz", ".parquet"])
def test_class_names_read_back(tmp_path, suffix):
    path = tmp_path / f"result{suffix}"
    results = Results(path, SETTINGS)
    for number, name in enumerate(("car", "motorcycle")):
        results.append(dataclasses.replace(record(number), predicted=name), embedding(number))
    results.finish()
    if suffix == ".jsonl":
        names = [json.loads(line)["predicted"] for line in path.read_text().splitlines()]
    elif suffix == ".npz":
        names = np.load(path)["predicted"].tolist()
    else:
        names = pyarrow.parquet.read_table(path)["predicted"].to_pylist()
    assert names == ["car", "motorcycle"]


def test_settings_travel_with_the_binary_formats(tmp_path):
    write(tmp_path / "a.npz", range(1)).finish()
    write(tmp_path / "a.parquet", range(1)).finish()
    expected = json.loads(json.dumps(SETTINGS))
    assert json.loads(str(np.load(tmp_path / "a.npz")["settings"])) == expected
    assert json.loads(pyarrow.parquet.read_schema(tmp_path / "a.parquet").metadata[b"neuroflow"]) == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".npz", ".parquet"])
@pytest.mark.parametrize("torn", [b"", b'{"frame":2,"embedding":[' + b"0.125," * 200])
def test_killed_run_is_continued(tmp_path, suffix, torn):
    path = tmp_path / f"result{suffix}"
    write(path, range(2))  # never closed: what was appended must be on disk by itself
    with (tmp_path / f"result{suffix}.journal").open("ab") as journal:
        journal.write(torn)
    results = Results(path, SETTINGS, resume=True)
    assert results.resumed == [record(0), record(1)]
    results.append(record(2), embedding(2))
    results.finish()
    frame, _, _, vectors = read(path)
    assert frame.tolist() == [0, 1, 2]
    assert np.array_equal(vectors.astype(np.float32), [embedding(number) for number in range(3)])


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "result.jsonl"
    write(path, range(2)).close()
    with pytest.raises(JournalError, match=r"made with threshold 0\.05, not 0\.1"):
        Results(path, {**SETTINGS, "threshold": 0.1}, resume=True)


def test_damaged_journal_is_refused(tmp_path):
    path = tmp_path / "result.jsonl"
    write(path, range(2)).close()
    journal = tmp_path / "result.jsonl.journal"
    journal.write_bytes(journal.read_bytes().replace(b'"frame":0', b'"fra'))
    with pytest.raises(JournalError, match="cannot be continued"):
        Results(path, SETTINGS, resume=True)


def test_without_resume_an_unfinished_run_is_discarded_and_said(tmp_path):
    path = tmp_path / "result.jsonl"
    write(path, range(2)).close()
    with pytest.warns(UserWarning, match="is discarded"):
        results = write(path, [7])
    results.finish()
    assert read(path)[0].tolist() == [7]


def test_failed_conversion_leaves_the_old_file_and_the_journal(tmp_path, monkeypatch):
    path = tmp_path / "result.npz"
    path.write_bytes(b"old")
    results = write(path, range(2))

    def fail(file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        results.finish()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["result.npz", "result.npz.journal"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("name", "words"), [("result.csv", "not a known format"), ("no/result.npz", "a directory that exists")]
)
def test_target_that_cannot_be_written(tmp_path, name, words):
    with pytest.raises(JournalError, match=words):
        Results(tmp_path / name, SETTINGS)

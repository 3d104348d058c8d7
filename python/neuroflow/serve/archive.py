"""Encode many recordings, in this process or with Ray Data: a Parquet file for each, and a table of all.

The state is in the directory: a complete file of frames that was made with the same settings, from a source of the same
size, is kept, whoever made it. Ray Data's own checkpoint (`CheckpointConfig`) is not used. As of Ray 2.60 it filters
only behind file readers and in front of Ray's writers, which write a file per block, not per row; it counts failures as
done; it knows neither the settings nor whether the file still exists; and it does nothing without Ray.
"""

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import neuroflow
import neuroflow_kernels

from ..classes import ClassHead
from ..embedding import CLIP
from ..files import from_json, lock, replacing, to_json, writing
from ..journal import JournalError, continuing, require_same
from ..video.ahead import ReadAhead, prepare
from ..video.clips import VIDEO_SUFFIXES
from ..video.preprocess import Preprocessor
from ..video.results import parquet_table
from ..video.shots import Shots, encode_shots
from ..video.source import MAX_PIXELS, Source, SourceError, every, images_in, natural_order
from ..video.stream import Encoded

PINNED, SUMMARY = "archive.json", "summary.parquet"
ABOUT, STOPPED = (
    b"neuroflow",
    b"neuroflow.stopped",
)  # metadata of a file: its origin; why it ends early, or null
ROWS = 4096  # frames in a row group
LEAST = 512  # minimum number of frames in a part
TRIES = 3  # for a recording whose worker dies
DIED = f"its worker died {TRIES} times, perhaps out of memory or from a damaged file; --resume tries again"
OBJECT_STORE = 200 * 2**20  # bytes; workers exchange nothing large

Load = Callable[[], tuple[PreTrainedModel, Preprocessor]]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table of all recordings.

    Args:
        path: absolute path of the recording.
        bytes: its size, or the total size of a directory's images.
        frames: number of encoded frames.
        skipped: mean share of patches that were not encoded, 0 to 1; None without frames.
        key_frames: number of frames encoded in full.
        output: name of the file of frames; None if there is none.
        error: why there is no file, or why it ends before the recording does; None if neither.
    """

    path: str
    bytes: int
    frames: int
    skipped: float | None
    key_frames: int
    output: str | None
    error: str | None


@dataclasses.dataclass(frozen=True)
class Video:
    """A recording.

    Args:
        path: a file or a directory of images; absolute, without links.
        bytes: its size, or the total size of the images.
    """

    path: Path
    bytes: int

    @classmethod
    def at(cls, path: Path) -> "Video":
        """The recording at a path; 0 bytes if it cannot be read, which is reported when it is encoded."""
        with contextlib.suppress(OSError):
            files = images_in(path) if path.is_dir() else [path]
            return cls(path, sum(file.stat().st_size for file in files))
        return cls(path, 0)

    @property
    def text(self) -> str:
        """The path, with bytes that are not UTF-8 escaped."""
        return os.fsencode(self.path).decode(errors="backslashreplace")

    @property
    def name(self) -> str:
        """Stem of its output's name: its own name, shortened, and a hash of the full path."""
        stem = os.fsencode(self.path.stem).decode(errors="replace")[:60]
        return f"{stem}-{hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]}"


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of a recording.

    Args:
        video: the recording.
        begin: its first frame, where a shot begins.
        end: the frame after its last; None: to the end of the recording.
        why: the reason for the key frame at `begin`.
    """

    video: Video
    begin: int = 0
    end: int | None = None
    why: str = "first"

    @property
    def output(self) -> str:
        if (self.begin, self.end) == (0, None):
            return f"{self.video.name}.parquet"
        return f"{self.video.name}.{self.begin}-{'' if self.end is None else self.end}.part"


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What every worker needs to know.

    Args:
        out: directory that files are written to.
        load: returns the unpatched tower and its preprocessor; called once in every worker.
        config: how the tower is patched.
        classes: classes to name each frame by; None for none.
        stride: encode every `stride`-th frame.
        clip: frames in one call of the model.
        max_pixels: maximum number of pixels in a frame.
        settings: everything, as JSON types, that a continued archive must share.
    """

    out: Path
    load: Load
    config: neuroflow.NeuroFlowConfig
    classes: ClassHead | None
    stride: int
    clip: int
    max_pixels: int
    settings: dict[str, Any]

    def about(self, part: Part) -> dict[str, Any]:
        """The origin of a part, as recorded in its file."""
        about = {"source": str(part.video.path), "source_bytes": part.video.bytes, **self.settings}
        place = {"begin": part.begin, "end": part.end, "why": part.why}
        return about if part == Part(part.video) else about | place

    def row(self, part: Part) -> Row | None:
        """The row of a finished part; None if it is not finished."""
        path = self.out / part.output
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if from_json(file.metadata.metadata[ABOUT]) != from_json(to_json(self.about(part))):
                    return None
                stopped = from_json(file.metadata.metadata[STOPPED])
                columns = file.read(["skipped", "key_frame"])
        # A damaged file, or one by another writer, can raise anything.
        except Exception:
            return None
        skipped, key_frames = (column.to_numpy() for column in columns.columns)
        return Row(
            path=part.video.text,
            bytes=part.video.bytes,
            frames=len(skipped),
            skipped=float(skipped.mean()),
            key_frames=int(key_frames.sum()),
            output=part.output,
            error=None if stopped is None else f"{part.video.text}: {stopped}",
        )


class Encoder:
    """A worker: a patched model that encodes on one thread, so that results do not depend on the number of workers.

    Raises:
        ValueError: a configuration that the model does not support, or whatever `Encoding.load` raises.
    """

    def __init__(self, encoding: Encoding) -> None:
        torch.set_num_threads(1)
        self._encoding = encoding
        self._model, self._preprocess = encoding.load()
        neuroflow.enable_cache(self._model, encoding.config)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Encode a part given as a Ray row (see `_item`); returns it with `error`, empty if it is done."""
        part = _part(item)
        done = self._encoding.row(part) is not None
        return item | {"error": "" if done else _failure(part.video, self._try, part) or ""}

    def encode(self, part: Part) -> str | None:
        """Write the file of a part. Returns a one-line error, or None."""
        return _failure(part.video, self._encode, part)

    def _try(self, part: Part) -> None:
        """Like `_encode`, but give up on a part whose workers keep dying: Ray would retry forever."""
        tries = self._encoding.out / f"{part.output}.tries"
        with writing(tries), tries.open("ab") as file:
            file.write(b".")
            number = file.tell()
        try:
            if number > TRIES:
                (self._encoding.out / f"{part.output}.partial").unlink(missing_ok=True)
                raise SourceError(f"{part.video.text}: {DIED}")
            self._encode(part)
        finally:
            tries.unlink(missing_ok=True)

    def _encode(self, part: Part) -> None:
        encoding, preprocess = self._encoding, self._preprocess
        with contextlib.ExitStack() as stack:
            source = Source(str(part.video.path), max_pixels=encoding.max_pixels)
            stack.enter_context(contextlib.closing(source))
            frames = every(source, encoding.stride, part.begin, part.end)
            inputs = stack.enter_context(ReadAhead(prepare(frames, preprocess), depth=encoding.clip + 2))
            shots = Shots(preprocess, encoding.config, part.why)
            encoded = encode_shots(inputs, self._model, shots, encoding.classes, encoding.clip)
            _write(encoding, part, _tables(encoded, part), lambda: source.stopped)


def _failure(video: Video, work: Callable[..., None], *args: Any) -> str | None:
    """Call `work`. Returns a one-line error, or None."""
    try:
        work(*args)
    # An untrusted file can make a decoder raise anything; only this recording fails.
    except Exception as error:
        own = isinstance(error, SourceError | JournalError | OSError)
        message = str(error) if own else f"{video.text}: {type(error).__name__}: {error}"
        return " ".join(os.fsencode(message).decode(errors="backslashreplace").split())


def archive(
    sources: Sequence[str | Path],
    out: str | Path,
    load: Load,
    config: neuroflow.NeuroFlowConfig | None = None,
    *,
    settings: dict[str, Any] | None = None,
    classes: ClassHead | None = None,
    stride: int = 1,
    clip: int = CLIP,
    max_pixels: int = MAX_PIXELS,
    ray: str | None = None,
    workers: int = 1,
    gpus: float = 0,
    by_shot: bool = False,
    resume: bool = False,
) -> list[Row]:
    """Encode recordings, each as its own stream, and write a Parquet file of frames for each.

    `out` gets NAME-HASH.parquet for each recording, with a row for each frame: its number in the source, time in
    seconds, share of patches skipped, number of active patches, whether it is a key frame and why, its class if the
    model has classes, and its embedding, [D] float32. SUMMARY has a row for each recording. A recording that cannot be
    read has no file; its row says why.

    The output depends neither on timing nor on which worker encodes what: every worker computes on one thread, the
    configuration is made `reproducible`, and recordings are encoded shot by shot, see `Shots`. Another kind of
    processor rounds differently.

    Args:
        sources: files, directories of images, directories to search for both, and glob patterns.
        out: output directory, created if missing; on a cluster, one that all machines share.
        load: returns the unpatched tower and its preprocessor. Called once in every worker, so it must be picklable.
        config: how the tower is patched; `NeuroFlowConfig()` by default.
        settings: what `load` depends on, as JSON types. An archive made with other settings is not continued.
        classes: classes to name each frame by; None for none.
        stride: encode every `stride`-th frame, 1 or more.
        clip: frames in one call of the model, 1 or more.
        max_pixels: maximum number of pixels in a frame.
        ray: "local" starts Ray on this machine; "auto" or an address joins a cluster. If this process has joined one
            already, that is used. None: encode in this process, on one thread.
        workers: number of Ray workers, each with a core and a model.
        gpus: GPUs for each worker; may be a fraction.
        by_shot: split long recordings between workers. The output stays the same.
        resume: continue the archive in `out`: keep what is there and fits, retry what failed.

    Returns:
        the rows of `sources`, ordered by path.

    Raises:
        ValueError: a source does not exist; workers or by_shot without ray; or a configuration that the model does not
            support.
        JournalError: `out` holds an archive and `resume` is not given, or it was made with other settings.
        OutputError: `out` cannot be written, or another run is writing it.

    Example:
        >>> from neuroflow.serve.archive import archive
        >>> from neuroflow.video.preprocess import Preprocessor
        >>> rows = archive(["recordings/"], "embeddings/", lambda: (model, Preprocessor(224, 224)))  # doctest: +SKIP
        >>> [row.error for row in rows if row.error]  # doctest: +SKIP
        []
    """
    if ray is None and (workers != 1 or by_shot):
        name, value = ("by_shot", True) if by_shot else ("workers", workers)
        raise ValueError(f"{name} is {value} without ray; also give ray, such as 'local'")
    config, out = (config or neuroflow.NeuroFlowConfig()).reproducible(), Path(out)
    videos = find_videos(sources)
    pinned = {**(settings or {}), "stride": stride, "clip": clip, **dataclasses.asdict(config)}
    pinned = from_json(to_json(pinned))
    encoding = Encoding(out.absolute(), load, config, classes, stride, clip, max_pixels, pinned)
    with writing(out):
        out.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        held = out / f"{PINNED}.lock"
        with writing(out):
            stack.enter_context(lock(held))
        stack.callback(held.unlink, missing_ok=True)
        _pin(out / PINNED, pinned, resume)
        for tries in out.glob("*.tries"):
            tries.unlink()
        before = _read_summary(out / SUMMARY)
        waiting = [video for video in videos if encoding.row(Part(video)) is None]
        bar = stack.enter_context(tqdm(total=len(videos), unit="video", dynamic_ncols=True))
        bar.update(len(videos) - len(waiting))
        if not waiting:
            errors = {}
        elif ray is None:
            errors = _in_process(encoding, waiting, bar)
        else:
            stack.enter_context(_ray(ray, workers))
            errors = _by_ray(encoding, waiting, bar, workers, gpus, by_shot)
        rows = [encoding.row(Part(video)) or _failed(video, errors.get(video)) for video in videos]
        _write_summary(out / SUMMARY, (before | {row.path: row for row in rows}).values())
        for part in out.glob("*.part"):
            if (out / part.name.rsplit(".", 2)[0]).with_suffix(".parquet").exists():
                part.unlink()
    return rows


def find_videos(sources: Iterable[str | Path]) -> list[Video]:
    """Find the recordings that sources stand for, each once, ordered by path in natural order.

    A directory counts as a directory of images if it holds images and no video. Otherwise it is searched, without
    hidden files.

    Args:
        sources: files, directories and glob patterns.

    Returns:
        the recordings.

    Raises:
        ValueError: a source does not exist, or holds no video.

    Example:
        >>> from neuroflow.serve.archive import find_videos
        >>> find_videos(["missing.mp4"])
        Traceback (most recent call last):
        ValueError: missing.mp4: no such file or directory; give one, or a pattern that something matches
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        paths = [path] if os.path.exists(path) else [Path(name) for name in glob.glob(str(source), recursive=True)]
        if not paths:
            raise ValueError(f"{source}: no such file or directory; give one, or a pattern that something matches")
        inside = [each for path in paths for each in (_inside(path) if path.is_dir() else [path])]
        if not inside:
            raise ValueError(f"{source}: holds no video; accepted are {', '.join(VIDEO_SUFFIXES)}, and images")
        found |= dict.fromkeys(Path(os.path.realpath(each)) for each in inside)
    return [Video.at(path) for path in sorted(found, key=natural_order)]


def _inside(directory: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        videos = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
        yield from videos or ([Path(folder)] if images_in(Path(folder)) else [])


def _pin(path: Path, settings: dict[str, Any], resume: bool) -> None:
    """Record an archive's settings, or check that a continued archive has the same."""
    if not path.exists():
        with replacing(path) as partial:
            partial.write_text(to_json({"settings": settings}, indent=1) + "\n")
        return
    if not resume:
        raise JournalError(f"{path}: there is an archive already; --resume continues it, or give another --out")
    with continuing(path):
        require_same(path, from_json(path.read_bytes())["settings"], settings, "give another --out")


def _in_process(encoding: Encoding, videos: list[Video], bar: tqdm) -> dict[Video, str | None]:
    threads = torch.get_num_threads()
    errors = {}
    try:
        encoder = Encoder(encoding)
        for video in videos:
            errors[video] = encoder.encode(Part(video))
            bar.update()
    finally:
        torch.set_num_threads(threads)
    return errors


@contextlib.contextmanager
def _ray(address: str, workers: int) -> Iterator[None]:
    """Run Ray for the duration of the block, quietly and without telemetry, or use the running one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    # Dead workers are reported at the end, by recording.
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if ray.is_initialized():
        yield
        return
    if address == "local":
        # The workers have this process's environment, and with it PYTHONPATH.
        where = {
            "address": "local",
            "num_cpus": workers,
            "object_store_memory": OBJECT_STORE,
            "include_dashboard": False,
        }
    else:
        where = {"address": address, "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(_import_path())}}}
    try:
        ray.init(**where, logging_level=logging.CRITICAL, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"ray {address}: cannot be joined ({error}); give local, auto or an address") from None
    try:
        yield
    finally:
        ray.shutdown()


def _import_path() -> list[str]:
    """Paths that let a worker on another machine import this package from a checkout, before its own paths."""
    roots = {Path(package.__file__).resolve().parents[1] for package in (neuroflow, neuroflow_kernels)}
    own = [str(root) for root in sorted(roots) if "site-packages" not in root.parts]
    return own + list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))


def _trial(encoding: Encoding) -> tuple[Preprocessor, list[str]]:
    """Load and patch the model in a worker; its preprocessor, and the warnings this gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model, preprocess = encoding.load()
        neuroflow.enable_cache(model, encoding.config)
    return preprocess, [str(one.message) for one in caught if issubclass(one.category, UserWarning)]


def _split(encoding: Encoding, preprocess: Preprocessor, video: Video, workers: int) -> list[Part]:
    """Split a long recording at shots into parts of similar length, at most one for each worker."""
    torch.set_num_threads(1)
    last, found = 0, []
    with contextlib.ExitStack() as stack:
        # A recording that cannot be read is not split; encoding it reports why.
        stack.enter_context(contextlib.suppress(SourceError, OSError))
        source = stack.enter_context(contextlib.closing(Source(str(video.path), max_pixels=encoding.max_pixels)))
        if source.frame_count is not None and source.frame_count < 2 * LEAST * encoding.stride:
            return [Part(video)]
        shots = Shots(preprocess, encoding.config)
        for prepared in stack.enter_context(ReadAhead(prepare(every(source, encoding.stride), preprocess))):
            last = prepared.frame.index
            found.append(shots(prepared))
    number, begins = min(workers, len(found) // LEAST), dict(found)
    ideal = [last * part / number for part in range(1, number)]
    chosen = sorted({0, *(min(begins, key=lambda begin: abs(begin - place)) for place in ideal)})
    return [Part(video, begin, end, begins.get(begin, "first")) for begin, end in itertools.pairwise([*chosen, None])]


def _by_ray(
    encoding: Encoding, videos: list[Video], bar: tqdm, workers: int, gpus: float, by_shot: bool
) -> dict[Video, str | None]:
    import ray
    import ray.data

    resources = {"num_cpus": 1, "num_gpus": gpus}
    try:
        preprocess, messages = ray.get(ray.remote(_trial).options(**resources).remote(encoding))
    except ray.exceptions.RayTaskError as error:
        raise ValueError(str(error.cause)) from None
    for message in messages:
        warnings.warn(message, stacklevel=4)
    # Largest first, so that no large one is left for the end.
    parts = {video: [Part(video)] for video in sorted(videos, key=lambda video: video.bytes, reverse=True)}
    if by_shot:
        split = ray.remote(max_retries=0)(_split)
        asked = {video: split.remote(encoding, preprocess, video, workers) for video in parts}
        for video, answer in asked.items():
            with contextlib.suppress(
                ray.exceptions.RayError
            ):  # whatever killed the worker will do so again, and is reported then
                parts[video] = ray.get(answer)
    items = [_item(part) for own in parts.values() for part in own]
    data = ray.data.from_items(items, override_num_blocks=len(items))  # one at a time, to whichever worker is free
    data.context.enable_progress_bars = data.context.print_on_execution_start = False
    data.context.max_errored_blocks = -1  # lost items are found missing at the end
    answers = data.map(
        Encoder,
        fn_constructor_args=(encoding,),
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        **resources,
    ).iter_rows()
    missing = {video: set(own) for video, own in parts.items()}
    errors: dict[Video, str | None] = {}
    for answer in answers:
        part = _part(answer)
        video = part.video
        missing[video].discard(part)
        errors[video] = errors.get(video) or answer["error"] or None
        if not missing[video]:
            if len(parts[video]) > 1 and errors[video] is None:
                errors[video] = _failure(video, _join, encoding, video, parts[video])
            bar.update()
    return errors | {video: f"{video.text}: {DIED}" for video, left in missing.items() if left}


def _item(part: Part) -> dict[str, Any]:
    """A part as a Ray row, which supports neither surrogates nor None."""
    place = {"begin": part.begin, "end": -1 if part.end is None else part.end, "why": part.why}
    return {"path": os.fsencode(part.video.path), "bytes": part.video.bytes, **place}


def _part(item: dict[str, Any]) -> Part:
    video = Video(Path(os.fsdecode(item["path"])), item["bytes"])
    return Part(video, item["begin"], None if item["end"] < 0 else item["end"], item["why"])


def _tables(encoded: Iterable[Encoded], part: Part) -> Iterator[pyarrow.Table]:
    """The frames as tables, ROWS at a time.

    Raises:
        JournalError: an embedding with NaN or Inf.
    """
    # Drop each decoded frame at once.
    kept = ((one.record, one.key_frame, one.embedding) for one in encoded)
    while batch := list(itertools.islice(kept, ROWS)):
        records, reasons, embeddings = zip(*batch, strict=True)
        embedding = np.stack(embeddings)
        if not np.isfinite(embedding).all():
            (number, *_) = np.flatnonzero(~np.isfinite(embedding).all(1))
            frame = records[number].frame
            raise JournalError(f"{part.video.path}: the embedding of frame {frame} holds NaN or Inf; check the model")
        columns = {
            "frame": pyarrow.array([record.frame for record in records], pyarrow.int64()),
            "time_s": pyarrow.array([record.time_s for record in records], pyarrow.float64()),
            "skipped": pyarrow.array([record.skipped for record in records], pyarrow.float64()),
            "active": pyarrow.array([record.active for record in records], pyarrow.int64()),
            "key_frame": pyarrow.array([record.key_frame for record in records], pyarrow.bool_()),
            "key_frame_reason": pyarrow.array(reasons, pyarrow.string()),
            "predicted": pyarrow.array([record.predicted for record in records], pyarrow.string()),
        }
        yield parquet_table(columns, embedding)


def _join(encoding: Encoding, video: Video, parts: list[Part]) -> None:
    """Write the file of a recording from its parts, identical to one written in one piece."""
    with contextlib.ExitStack() as stack:
        stopped = None

        def tables() -> Iterator[pyarrow.Table]:
            nonlocal stopped
            rest = None
            for part in parts:
                file = stack.enter_context(pyarrow.parquet.ParquetFile(encoding.out / part.output))
                for batch in file.iter_batches(ROWS):
                    # Built again, since what is read has its own metadata.
                    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                    vectors = columns.pop("embedding").flatten().to_numpy()
                    table = parquet_table(columns, vectors.reshape(len(batch), -1))
                    rest = table if rest is None else pyarrow.concat_tables([rest, table])
                    while len(rest) >= ROWS:
                        yield rest.slice(0, ROWS)
                        rest = rest.slice(ROWS)
                stopped = from_json(file.metadata.metadata[STOPPED])
                if stopped is not None:
                    break
            if len(rest):
                yield rest

        _write(encoding, Part(video), tables(), lambda: stopped)


def _write(encoding: Encoding, part: Part, tables: Iterable[pyarrow.Table], stopped: Callable[[], str | None]) -> None:
    """Write the file of a part atomically, with a row group for each table; `stopped` is called after the last.

    Raises:
        OutputError: it cannot be written, or another process is writing it.
    """
    about = {ABOUT: to_json(encoding.about(part))}
    with contextlib.ExitStack() as stack:
        partial, writer = stack.enter_context(replacing(encoding.out / part.output)), None
        for table in tables:
            table = table.combine_chunks().replace_schema_metadata(about)
            writer = writer or stack.enter_context(pyarrow.parquet.ParquetWriter(partial, table.schema))
            writer.write_table(table)
        writer.add_key_value_metadata({STOPPED: to_json(stopped())})


def _failed(video: Video, error: str | None) -> Row:
    return Row(video.text, video.bytes, 0, None, 0, None, error or f"{video.text}: its output has disappeared")


def _read_summary(path: Path) -> dict[str, Row]:
    """The rows of an earlier run by path; none if it did not finish."""
    with contextlib.suppress(Exception):
        return {row["path"]: Row(**row) for row in pyarrow.parquet.read_table(path).to_pylist()}
    return {}


def _write_summary(path: Path, rows: Iterable[Row]) -> None:
    kinds = (pyarrow.string(), pyarrow.int64(), pyarrow.int64(), pyarrow.float64(), pyarrow.int64(), pyarrow.string())
    names = [field.name for field in dataclasses.fields(Row)]
    schema = pyarrow.schema(list(zip(names, (*kinds, pyarrow.string()), strict=True)))
    ordered = [dataclasses.asdict(row) for row in sorted(rows, key=lambda row: natural_order(Path(row.path)))]
    with replacing(path) as partial:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ordered, schema), partial)

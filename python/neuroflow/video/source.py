"""Frames from a video file, a directory of images, a webcam or a network address, through PyAV."""

import collections
import contextlib
import functools
import os
import re
import select
import stat
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.video.reformatter import VideoReformatter

MAX_PIXELS = 178_956_970
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
DIRECTORY_RATE = Fraction(25)  # frames per second of a directory of images
DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each attempt to reopen a dropped live source
STEADY = 60.0  # seconds after which a reopened source gets all of its attempts back
# What FFmpeg may open for an address: a playlist disguised as a video must not reach from files to the network.
LOCAL = "file,pipe,crypto,data"
WEB = "http,https,httpproxy,tcp,tls,crypto,data"
NETWORK = {"http": WEB, "https": WEB, "rtsp": f"rtsp,rtp,srtp,udp,{WEB}", "rtsps": f"rtsp,rtp,srtp,udp,{WEB}"}

# Formats that PNGs decode to, and hardly any video.
PNG_FORMATS = {"gray", "gray16be", "monob", "pal8", "rgb24", "rgb48be", "rgba", "rgba64be", "ya16be", "ya8"}

T = TypeVar("T")


class SourceError(ValueError):
    """A source gives no frames. The message is one line and says what to do."""


@dataclass(frozen=True)
class Frame:
    """One decoded frame: `index` counts the source's frames from 0, `time` is in seconds."""

    index: int
    time: float
    picture: av.VideoFrame

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, upright."""
        size = self.picture.height, self.picture.width
        return size[::-1] if self._upright[0] else size

    def rgb(self, height: int, width: int, reformatter: VideoReformatter | None = None) -> np.ndarray:
        """The frame, upright, resized by area averaging: [height, width, 3] uint8.

        To resize many frames to one size, keep one reformatter per thread; without one, every frame makes its own,
        which starts threads.
        """
        transposed, rows, columns = self._upright
        if transposed:
            height, width = width, height
        reformatter = reformatter or VideoReformatter()
        resized = reformatter.reformat(self.picture, width, height, format="rgb24", interpolation="AREA").to_ndarray()
        if transposed:
            resized = resized.swapaxes(0, 1)
        return resized[:: -1 if rows else 1, :: -1 if columns else 1]

    @functools.cached_property
    def _upright(self) -> tuple[bool, bool, bool]:
        """How to turn the decoded picture upright: whether to transpose it, then reverse its rows, and its columns."""
        matrix = _side_data(self.picture).get(Type.DISPLAYMATRIX)
        if matrix is None:
            return False, False, False
        # A pixel at (x, y) is shown at (a x + c y, b x + d y).
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(float)
        transposed = abs(b) + abs(c) > abs(a) + abs(d)
        return (True, b < 0, c < 0) if transposed else (False, d < 0, a < 0)


class Source:
    """The frames of one source, in order, readable once.

    Files and directories give every frame. Live sources (webcam, RTSP, a network stream without an end) are read in a
    thread and give the newest frame; the indices of skipped frames are missing. A live source that drops is reopened,
    with a warning each time, up to five times until it has held for a minute. Packets that cannot be decoded are
    skipped, and counted in a warning at the end.

    Times increase from frame to frame, in presentation order. If a container has none, they follow from its rate; a
    directory counts as 25 frames a second.

    Args:
        address: a video or image file, a directory of images (in natural order, without hidden files), a named pipe, a
            webcam (`0`, `/dev/video0`), or an http, https, rtsp, rtsps or file URL.
        max_pixels: frames with more pixels (height x width) are refused before they are decoded.
        timeout: seconds to wait for a pipe, network or live source to open, and for each frame.

    Attributes:
        live: frames are skipped rather than queued.
        frame_count: number of frames that the container announces, which may be wrong; None if it does not say.
        rate: frames per second; None for a directory.
        stopped: why frames ended early; None if they did not.
        garbled: packets of a live source that could not be decoded so far.

    Raises:
        SourceError: the source cannot be opened, or its first frame cannot be decoded.
    """

    def __init__(self, address: str, *, max_pixels: int = MAX_PIXELS, timeout: float = 10.0) -> None:
        self.address = address
        self.live = False
        self.frame_count: int | None = None
        self.rate: Fraction | None = None
        self.stopped: str | None = None
        self.garbled = 0
        self._max_pixels = max_pixels
        self._over = f"over the ceiling of {max_pixels:,} pixels, see --max-pixels"
        self._timeout = timeout
        self._due = 0.0  # when a live source has been silent for too long, by time.monotonic
        self._closing = threading.Event()
        self._pipe: BinaryIO | None = None
        self._frames = self._open()
        self._first = _apart(lambda: next(self._frames, None))
        if self._first is None:
            raise SourceError(f"{address}: {self.stopped or 'it holds no video frame'}; give another source")

    def __iter__(self) -> Iterator[Frame]:
        # By the time the caller is ready the first frame of a live source is old, unless it is also the last.
        first = next(self._frames, None) if self.live else self._first
        if first is None and not self.stopped:
            first = self._first
        if first is not None:
            yield first
        yield from self._frames

    def close(self) -> None:
        """Release the file or device; no more frames can be read."""
        # A thread that hangs in a read holds the generator; it releases the file when it returns.
        with contextlib.suppress(ValueError):
            self._frames.close()
            if self._pipe is not None:
                self._pipe.close()

    def _open(self) -> Iterator[Frame]:
        path = Path(self.address)
        scheme = re.match("([A-Za-z][A-Za-z0-9+.-]*)://", self.address)
        if scheme:
            name, rest = scheme[1].lower(), self.address[scheme.end() :]
            if name in NETWORK:
                options = {"rtsp_transport": "tcp"} if name.startswith("rtsp") else {}
                return self._open_container(f"{name}://{rest}", options | {"protocol_whitelist": NETWORK[name]})
            if name != "file":
                accepted = ", ".join(f"{name}://" for name in (*NETWORK, "file"))
                raise SourceError(f"{self.address}: {name}:// is not supported; give a path, or one of {accepted}")
            path = Path(urllib.parse.unquote(rest.removeprefix("localhost")))
        elif self.address.isdecimal() and not os.path.exists(path):
            path = Path(f"/dev/video{self.address}")
        try:
            kind = path.stat().st_mode
        except (OSError, ValueError) as error:
            if path.match("/dev/video*"):
                webcams = ", ".join(sorted(str(device) for device in Path("/dev").glob("video*"))) or "none"
                message = f"{self.address}: there is no webcam {path}; webcams on this machine: {webcams}"
            else:
                message = f"{self.address}: {self._reason(error).lower()}; check the path"
            raise SourceError(message) from None
        if stat.S_ISDIR(kind):
            return self._open_directory(path)
        if stat.S_ISREG(kind):
            # "file:" takes the rest literally: a % in a name does not start a numbered series.
            return self._open_container(f"file:{path}", {"protocol_whitelist": LOCAL, "pattern_type": "none"})
        if stat.S_ISFIFO(kind):
            return self._open_pipe(path)
        if path.resolve().match("/dev/video*"):
            return self._open_container(str(path), {}, device="v4l2")
        raise SourceError(f"{path}: not a file, directory, pipe or webcam; give one of these")

    def _open_directory(self, path: Path) -> Iterator[Frame]:
        try:
            images = images_in(path)
        except OSError as error:
            raise SourceError(f"{path}: {self._reason(error).lower()}; give a directory that can be read") from None
        if not images:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise SourceError(f"{path}: no image in this directory; give a video file or a directory of {suffixes}")
        self.frame_count = len(images)
        return self._read_images(images)

    def _open_pipe(self, path: Path) -> Iterator[Frame]:
        # Non-blocking, so that neither opening nor reading waits past the time-out for a writer.
        self._pipe = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        if not poll.poll(self._timeout * 1e3):
            self._pipe.close()
            raise SourceError(f"{path}: nobody wrote to this pipe for {self._timeout:g} seconds; start its writer")
        return self._open_container(f"pipe:{self._pipe.fileno()}", {"protocol_whitelist": LOCAL})

    def _open_container(self, name: str, options: dict[str, str], device: str | None = None) -> Iterator[Frame]:
        def opened() -> InputContainer:
            container = self._container(name, options, device)
            if not container.streams.video:
                container.close()
                raise SourceError(f"{self.address}: it holds no video, only other streams; give another source")
            return container

        try:
            container = _apart(opened)
        except SourceError:
            raise
        # Damaged input raises MemoryError, IndexError, UnicodeDecodeError and more besides FFmpegError.
        except Exception as error:
            message = f"{self.address}: it cannot be opened ({self._reason(error)}); give another source"
            raise SourceError(message) from None
        stream = container.streams.video[0]
        self.rate = stream.average_rate
        self.live = device is not None or name.startswith("rtsp") or _is_endless(container, name)
        if self.live:
            return self._newest(self._read_live(container, opened, name))
        self.frame_count = stream.frames or None
        if not stream.frames and container.duration and stream.average_rate:
            self.frame_count = round(container.duration / av.time_base * stream.average_rate)
        return self._read_file(container)

    def _container(self, name: str, options: dict[str, str], device: str | None) -> InputContainer:
        ceiling = {"max_pixels": str(self._max_pixels)}
        # To open a file FFmpeg decodes a frame or two with its own decoder: both need the ceiling.
        container = av.open(name, format=device, options={**options, **ceiling}, timeout=self._timeout)
        for stream in container.streams.video:
            stream.codec_context.options = ceiling
        return container

    def _read_images(self, images: list[Path]) -> Iterator[Frame]:
        options = {"protocol_whitelist": LOCAL, "pattern_type": "none"}
        for index, path in enumerate(images):
            try:
                with self._container(f"file:{path}", options, None) as container:
                    picture = next(container.decode(video=0))
            except Exception as error:
                self.stopped = f"image {path.name} cannot be read ({self._reason(error)})"
                return
            yield Frame(index, float(index / DIRECTORY_RATE), picture)

    def _read_file(self, container: InputContainer) -> Iterator[Frame]:
        index = 0
        try:
            for frame in self._read(container):
                yield frame
                index += 1
        except Exception as error:
            where = f"it cannot be decoded past frame {index}" if index else "none of its frames can be decoded"
            self.stopped = f"{where} ({self._reason(error)})"

    def _read_live(self, container: InputContainer, reopen: Callable[[], InputContainer], name: str) -> Iterator[Frame]:
        frame, seen, tries = None, 0.0, 0
        while True:
            since = time.monotonic()
            # A server says where a recording ends; for a camera, an end is a drop too.
            ends = container.duration is not None or name.startswith("http")
            try:
                if frame is None:
                    frames = self._read(container)
                else:
                    frames = self._read(container, frame.index + 1, frame.time + since - seen)
                for frame in frames:
                    seen = time.monotonic()
                    yield frame
                if ends:
                    return
                reason = "it ended"
            except Exception as error:
                reason = self._reason(error)
            if frame is None:
                self.stopped = f"none of its frames can be decoded ({reason})"
                return
            if time.monotonic() - since > STEADY:
                tries = 0
            container = None
            while container is None:
                if tries == len(DELAYS):
                    self.stopped = f"it dropped after frame {frame.index} ({reason}), and could not be reopened"
                    return
                delay = DELAYS[tries]
                tries += 1
                again = f"reopening in {delay:g} s, try {tries} of {len(DELAYS)}"
                warnings.warn(f"{self.address}: it dropped after frame {frame.index} ({reason}); {again}", stacklevel=2)
                self._due = time.monotonic() + delay + 2 * self._timeout
                if self._closing.wait(delay):
                    return
                try:
                    container = reopen()
                except Exception as error:
                    reason = self._reason(error)

    def _read(self, container: InputContainer, index: int = 0, begin: float | None = None) -> Iterator[Frame]:
        """Every frame of a container, which is closed at the end. Raises what PyAV raises.

        Args:
            container: an open container.
            index: index of the first frame.
            begin: time of the first frame; None for the container's.
        """
        with container:
            stream = container.streams.video[0]
            if stream.width * stream.height > self._max_pixels:
                raise SourceError(f"{stream.width}x{stream.height} is {self._over}")
            step = float(1 / (stream.guessed_rate or stream.average_rate or DIRECTORY_RATE))
            # AVI has decoding times, not presentation times.
            ordered = container.format.name != "avi"
            if not ordered and begin is None:
                begin = 0.0
            before = offset = None
            for packet in container.demux(stream):
                try:
                    pictures = packet.decode()
                except Exception:
                    if not self.live:
                        raise
                    self.garbled += 1
                    continue
                for picture in pictures:
                    ticks = picture.pts if ordered else picture.dts
                    when = None if ticks is None else float(ticks * picture.time_base)
                    if when is not None and offset is None:
                        offset = 0.0 if begin is None else begin - when
                    when = None if when is None else when + offset
                    if before is not None and (when is None or when <= before):
                        when = before + step
                    before = (begin or 0.0) if when is None else when
                    yield Frame(index, before, picture)
                    index += 1

    def _newest(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        newest: collections.deque[Frame] = collections.deque(maxlen=1)
        change = threading.Condition()
        ended = False

        def read() -> None:
            nonlocal ended
            try:
                for frame in frames:
                    with change:
                        newest.append(frame)
                        change.notify()
                    if self._closing.is_set():
                        break
                frames.close()
            finally:
                with change:
                    ended = True
                    change.notify()

        threading.Thread(target=read, daemon=True).start()
        try:
            while True:
                with change:
                    # FFmpeg's own time-out comes first, but a device's driver may not honour it.
                    self._due = max(self._due, time.monotonic() + 2 * self._timeout)
                    while not newest and not ended:
                        left = self._due - time.monotonic()
                        if left <= 0:
                            self.stopped = f"no frame came for {self._timeout:g} seconds"
                            return
                        change.wait(left)
                    if not newest:
                        return
                    frame = newest.popleft()
                yield frame
        finally:
            self._closing.set()
            if self.garbled:
                stepped = f"{self.garbled} packets could not be decoded and were skipped"
                warnings.warn(f"{self.address}: {stepped}", stacklevel=2)

    def _reason(self, error: Exception) -> str:
        if isinstance(error, av.error.ArgumentError):
            return f"damaged, or {self._over}"
        if isinstance(error, av.error.ExitError):
            return f"nothing came for {self._timeout:g} seconds"
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return " ".join(text.split())


def every(source: Source, stride: int, begin: int = 0, end: int | None = None) -> Iterator[Frame]:
    """Frames from `begin` up to `end`, at least `stride` apart; a live source has gaps of its own."""
    for frame in source:
        if end is not None and frame.index >= end:
            return
        if frame.index >= begin:
            begin = frame.index + stride
            yield frame


def images_in(directory: Path) -> list[Path]:
    """The images in a directory, in natural order, without hidden files.

    Raises:
        OSError: the directory cannot be read.
    """
    images = [path for path in directory.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path)]
    return sorted(images, key=natural_order)


def is_hidden(path: Path) -> bool:
    """Whether the name starts with a dot, like the files that macOS leaves next to images and videos."""
    return path.name.startswith(".")


def natural_order(path: Path) -> list[tuple[list[int | str], str]]:
    """A sort key that compares numbers in paths as numbers, so that 2 comes before 10."""
    split = [re.split(r"(\d+)", part) for part in path.parts]
    return [([int(text) if place % 2 else text for place, text in enumerate(part)], "".join(part)) for part in split]


def _is_endless(container: InputContainer, name: str) -> bool:
    """Whether nothing says where a stream read over HTTP ends."""
    if not name.startswith("http"):
        return False
    # The length of a playlist says nothing about what it plays, and cameras invent one for their pictures.
    sized = container.size > 0 and container.format.name not in ("hls", "dash", "mpjpeg")
    return container.duration is None and not sized


def _side_data(picture: av.VideoFrame) -> dict:
    # PyAV 18 returns nothing if any side data is unknown to it, such as EXIF, and frees the name of a colour profile,
    # which PNGs have, twice. Without these two kinds it works.
    if picture.format.name not in PNG_FORMATS:
        with contextlib.suppress(ValueError):
            return picture.side_data
    graph = av.filter.Graph()
    base = picture.time_base or Fraction(1)
    nodes = [graph.add_buffer(width=picture.width, height=picture.height, format=picture.format, time_base=base)]
    numbers = (Type.ICC_PROFILE.value, *range(len(Type), 40))
    nodes += [graph.add("sidedata", f"mode=delete:type={number}") for number in numbers]
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    graph.push(picture)
    return graph.pull().side_data


def _apart(call: Callable[[], T]) -> T:
    """Run a call in its own thread, so that Ctrl-C need not wait until FFmpeg gives up."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()

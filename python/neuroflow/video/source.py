"""Frames from a video file, a directory of images, a webcam or a network address, through PyAV."""

import collections
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

MAX_PIXELS = 178_956_970
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


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
        return size if self.picture.rotation % 180 == 0 else size[::-1]

    def rgb(self, height: int, width: int, reformatter: VideoReformatter | None = None) -> np.ndarray:
        """The frame, upright, resized by area averaging: [height, width, 3] uint8.

        One who resizes many frames to one size keeps a reformatter for them, in one thread: without, each frame makes
        its own, which starts threads.
        """
        turns = self.picture.rotation // 90 % 4
        if turns % 2:
            height, width = width, height
        reformatter = reformatter or VideoReformatter()
        resized = reformatter.reformat(self.picture, width, height, format="rgb24", interpolation="AREA")
        return np.rot90(resized.to_ndarray(), turns)


class Source:
    """The frames of one source, in order, once.

    Files and directories give every frame. Live sources (webcam, RTSP, a network stream without an end) are read in a
    thread and give the newest frame; the indices of frames that were passed over are missing.

    Args:
        address: a video or image file, a directory (its images, in name order), a webcam (`0`, `/dev/video0`) or a URL.
        max_pixels: frames of more pixels (height x width) are refused, before they are decoded.
        timeout: seconds to wait for a network or live source, for opening and for each frame.

    Attributes:
        live: frames are passed over rather than queued.
        frame_count: how many frames the container announces, None where it does not say.
        rate: frames per second, None for a directory.
        stopped: why the frames ended early, None when they did not.

    Raises:
        SourceError: the source cannot be opened, or its first frame cannot be decoded.
    """

    def __init__(self, address: str, *, max_pixels: int = MAX_PIXELS, timeout: float = 10.0) -> None:
        self.address = address
        self.live = False
        self.frame_count: int | None = None
        self.rate: Fraction | None = None
        self.stopped: str | None = None
        self._max_pixels = max_pixels
        self._over = f"over the ceiling of {max_pixels:,} pixels, see --max-pixels"
        self._timeout = timeout
        self._frames = self._open()
        self._first = next(self._frames, None)
        if self._first is None:
            raise SourceError(f"{address}: {self.stopped or 'it holds no video frame'}; give another source")

    def __iter__(self) -> Iterator[Frame]:
        # The first frame of a live source is old by the time that the caller is ready.
        if not self.live:
            yield self._first
        yield from self._frames

    def close(self) -> None:
        """Gives the file or device back; the source cannot be read any further."""
        # A thread that hangs in a read has the generator; it gives the file back when it returns.
        with contextlib.suppress(ValueError):
            self._frames.close()

    def _open(self) -> Iterator[Frame]:
        path = Path(self.address)
        if "://" in self.address:
            return self._open_container(self.address, {"rtsp_transport": "tcp"})
        if self.address.isdecimal() and not path.exists():
            path = Path(f"/dev/video{self.address}")
        if path.match("/dev/video*"):
            if not path.exists():
                webcams = ", ".join(sorted(str(device) for device in Path("/dev").glob("video*"))) or "none"
                raise SourceError(f"{self.address}: there is no webcam {path}; webcams on this machine: {webcams}")
            return self._open_container(str(path), {}, device="v4l2")
        if not path.exists():
            raise SourceError(f"{self.address}: no such file or directory; check the path")
        if path.is_dir():
            images = sorted(image for image in path.iterdir() if image.suffix.lower() in IMAGE_SUFFIXES)
            if not images:
                suffixes = ", ".join(IMAGE_SUFFIXES)
                raise SourceError(f"{path}: no image in this directory; give a video file or a directory of {suffixes}")
            self.frame_count = len(images)
            return self._read_images(images)
        # A playlist that calls itself a video must not reach out to the network.
        return self._open_container(str(path), {"protocol_whitelist": "file,crypto,data"})

    def _open_container(self, name: str, options: dict[str, str], device: str | None = None) -> Iterator[Frame]:
        try:
            container = self._container(name, options, device)
        # Damaged input raises MemoryError, IndexError, UnicodeDecodeError and more besides FFmpegError.
        except Exception as error:
            message = f"{self.address}: it cannot be opened ({self._reason(error)}); give another source"
            raise SourceError(message) from None
        if not container.streams.video:
            container.close()
            raise SourceError(f"{self.address}: there is no video in it, only other streams; give another source")
        stream = container.streams.video[0]
        self.rate = stream.average_rate
        self.live = device is not None or name.startswith("rtsp") or ("://" in name and container.duration is None)
        if self.live:
            return self._newest(self._read_container(container, stream))
        self.frame_count = stream.frames or None
        if not stream.frames and container.duration and stream.average_rate:
            self.frame_count = round(container.duration / av.time_base * stream.average_rate)
        return self._read_container(container, stream)

    def _container(self, name: str, options: dict[str, str], device: str | None) -> av.container.InputContainer:
        ceiling = {"max_pixels": str(self._max_pixels)}
        # FFmpeg decodes a frame or two to open a file, with a decoder of its own: both need the ceiling.
        container = av.open(name, format=device, options={**options, **ceiling}, timeout=self._timeout)
        for stream in container.streams.video:
            stream.codec_context.options = ceiling
        return container

    def _read_images(self, images: list[Path]) -> Iterator[Frame]:
        for index, path in enumerate(images):
            try:
                with self._container(str(path), {}, None) as container:
                    picture = next(container.decode(video=0))
            except Exception as error:
                self.stopped = f"image {path.name} cannot be read ({self._reason(error)})"
                return
            yield Frame(index, float(index), picture)

    def _read_container(self, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[Frame]:
        index = 0
        with container:
            try:
                if stream.width * stream.height > self._max_pixels:
                    raise SourceError(f"{stream.width}x{stream.height} is {self._over}")
                for packet in container.demux(stream):
                    try:
                        pictures = packet.decode()
                    except Exception:
                        if self.live:
                            continue
                        raise
                    for picture in pictures:
                        time = picture.time if picture.time is not None else float(index / (self.rate or 1))
                        yield Frame(index, time, picture)
                        index += 1
            except Exception as error:
                where = f"it cannot be decoded past frame {index}" if index else "no frame of it can be decoded"
                self.stopped = f"{where} ({self._reason(error)})"
                return
        # A count estimated from the duration may be a little off, or cover sound that outlasts the pictures.
        if self.frame_count and index < self.frame_count * (1.0 if stream.frames else 0.9):
            self.stopped = f"it ends at frame {index} of the {self.frame_count} that the file announces"

    def _newest(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        newest: collections.deque[Frame] = collections.deque(maxlen=1)
        change = threading.Condition()
        ended = closing = False

        def read() -> None:
            nonlocal ended
            for frame in frames:
                with change:
                    newest.append(frame)
                    change.notify()
                if closing:
                    break
            frames.close()
            with change:
                ended = True
                change.notify()

        threading.Thread(target=read, daemon=True).start()
        try:
            while True:
                with change:
                    if not change.wait_for(lambda: newest or ended, self._timeout):
                        self.stopped = f"no frame came for {self._timeout:g} seconds"
                        return
                    if not newest:
                        return
                    frame = newest.popleft()
                yield frame
        finally:
            closing = True

    def _reason(self, error: Exception) -> str:
        if isinstance(error, av.error.ArgumentError):
            return f"damaged, or {self._over}"
        text = error.strerror if isinstance(error, av.FFmpegError) else str(error)
        return " ".join((text or type(error).__name__).split())

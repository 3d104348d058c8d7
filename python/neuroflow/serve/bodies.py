"""Decode request bodies to the model's input, bounded in memory and in what they can reach."""

import dataclasses
import io
import math
import re
import struct
import threading
import zlib
from collections.abc import Iterator

import av
import numpy as np
import torch

from ..video.preprocess import Preprocessor
from ..video.source import Frame

PICTURES = "a JPEG, PNG or WebP picture"
VIDEOS = "a video in MP4, WebM or Matroska"
# Chunks with a PNG's pixels and orientation. Others may hold text or profiles that unpack from a few bytes to
# gigabytes, or the further images of an animation.
PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"cICP", b"sBIT", b"eXIf", b"IDAT", b"IEND"}
# Each scan of a progressive JPEG costs a pass over all pixels, however few bytes it has; encoders make about 10.
MAX_SCANS = 64
MAX_PARTS = 20_000  # chunks, segments or boxes in a file; visiting one is slower here than in a decoder
VIDEO_DECODERS = "h264,hevc,av1,libdav1d,vp8,vp9,libvpx,libvpx-vp9,mpeg4,mjpeg"
# FFmpeg allocates gigabytes for a few bytes that claim many samples, or many empty tracks.
MAX_SAMPLES = 1_000_000
MAX_DESCRIPTION = 256 * 2**10  # bytes of a video other than frames; a clip of a few seconds has about 4,000
COUNTED = re.compile(rb"(?:stsz|stz2)....(?:....)(....)|trun....(....)|(cmov)", re.DOTALL)
SEGMENT, CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
BLOCKS = (b"\xa3", b"\xa0", b"\xec")  # SimpleBlock, BlockGroup and Void
ALIGNMENT = 128  # FFmpeg rounds widths up, by less than this

_own = threading.local()


class BodyError(ValueError):
    """A body that is not accepted. The message is one line and says what is.

    Attributes:
        status: HTTP status: 400 damaged, 413 too large, 415 another type, 422 another shape.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def picture(body: bytes, preprocess: Preprocessor, max_pixels: int) -> torch.Tensor:
    """Decode a JPEG, PNG or WebP, recognised by its content, as `Source` and `preprocess` do for a file.

    Safe to call from several threads: each uses its own copy of the preprocessor. An animated PNG gives its still
    image; an animated WebP is refused.

    Args:
        body: the file's content.
        preprocess: turns frames into the model's input.
        max_pixels: images with more pixels (height x width) are refused before they are decoded.

    Returns:
        [1, 3, height, width] float32.

    Raises:
        BodyError: 400, 413 or 415.
    """
    codec, width, height, body = _still(body)
    _check_pixels("picture", width, height, max_pixels)
    try:
        context = av.CodecContext.create(codec, "r")
        context.thread_count = 1
        context.options = {"max_pixels": str((width + ALIGNMENT) * height)}
        decoded = context.decode(av.Packet(body)) or context.decode(None)
    # Damaged input raises MemoryError, IndexError, UnicodeDecodeError and more besides FFmpegError.
    except Exception as error:
        raise _damaged("picture", error) from None
    if not decoded:
        raise _damaged("picture", None)
    return _prepared(Frame(0, 0.0, decoded[0]), preprocess, max_pixels)


def array(body: bytes, shape: tuple[int, int, int], clip: int | None = None) -> torch.Tensor:
    """Read frames in NumPy's format: float32 or float16, in any byte or axis order.

    Args:
        body: what `numpy.save` writes.
        shape: 3, height and width of the model's input.
        clip: maximum T of [T, 3, height, width]; None for a single frame, [3, height, width] or T = 1.

    Returns:
        [T, 3, height, width] float32, T = 1 without `clip`. Values are not checked.

    Raises:
        BodyError: 400, 413, 415 or 422.
    """
    sides = ", ".join(str(side) for side in shape)
    accepted = f"float32 or float16 of [{'T, ' if clip else ''}{sides}] in NumPy's format"
    if not body.startswith(np.lib.format.MAGIC_PREFIX):
        raise BodyError(415, f"the body is not an array; accepted is {accepted}")
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        claimed, by_columns, dtype = read(file)
    # The header is a Python literal, so parsing it can raise almost anything.
    except Exception:
        raise BodyError(400, f"the array's header cannot be read; accepted is {accepted}") from None
    if dtype.newbyteorder("=") not in (np.float32, np.float16):
        raise BodyError(422, f"the array is {str(dtype)[:40]}; accepted is {accepted}")
    frames = claimed if clip or len(claimed) == 4 else (1, *claimed)
    if len(frames) != 4 or frames[1:] != shape or frames[0] < 1 or (clip is None and frames[0] > 1):
        found = ", ".join(str(side) for side in claimed[:6])
        raise BodyError(422, f"the array is [{found[:60]}]; accepted is {accepted}")
    if clip is not None and frames[0] > clip:
        raise BodyError(413, f"the array has {frames[0]} frames; accepted are {clip} at most, send it in parts")
    begin, size = file.tell(), math.prod(frames) * dtype.itemsize
    if len(body) - begin != size:
        raise BodyError(400, f"the array has {len(body) - begin:,} bytes where its shape takes {size:,}; send it whole")
    values = np.frombuffer(body, dtype, offset=begin).reshape(frames, order="F" if by_columns else "C")
    return torch.from_numpy(values.astype(np.float32, order="C"))


def video(body: bytes, preprocess: Preprocessor, max_pixels: int, most: int) -> torch.Tensor:
    """Decode every frame of a short MP4, WebM or Matroska, recognised by its content, as `Source` and `preprocess` do.

    Safe to call from several threads: each uses its own copy of the preprocessor. A decoder holds up to 17 pictures of
    `max_pixels` at a time.

    Args:
        body: the file's content.
        preprocess: turns frames into the model's input.
        max_pixels: videos with more pixels per frame (height x width) are refused before they are decoded.
        most: maximum number of frames.

    Returns:
        [T, 3, height, width] float32, T at most `most`.

    Raises:
        BodyError: 400, 413 or 415.
    """
    if body[4:8] == b"ftyp":
        container_format, check = "mp4", _check_boxes
    elif body.startswith(b"\x1a\x45\xdf\xa3"):
        container_format, check = "matroska", _check_elements
    else:
        raise BodyError(415, f"the body is not a known kind of video; accepted is {VIDEOS}")
    prepared = []
    try:
        check(body)
        for frame in _frames(body, container_format, max_pixels):
            if len(prepared) == most:
                raise BodyError(413, f"the video has more frames than {most}; send it in parts")
            prepared.append(_prepared(frame, preprocess, max_pixels))
    except BodyError:
        raise
    except Exception as error:
        raise _damaged("video", error) from None
    if not prepared:
        raise BodyError(400, f"the video has no frame; accepted is {VIDEOS}")
    return torch.cat(prepared)


def _still(body: bytes) -> tuple[str, int, int, bytes]:
    """The decoder for an image, its width and height, and the part of the body to decode."""
    try:
        if body.startswith(b"\xff\xd8\xff"):
            return "mjpeg", *_jpeg_size(body), body
        if body.startswith(b"\x89PNG\r\n\x1a\n"):
            return "png", *struct.unpack_from(">II", body, 16), _png_pixels(body)
        if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
            return "webp", *_webp_size(body), body
    except (IndexError, struct.error, zlib.error):
        raise _damaged("picture", None) from None
    raise BodyError(415, f"the body is not a known kind of picture; accepted is {PICTURES}")


def _jpeg_size(body: bytes) -> tuple[int, int]:
    if body.rfind(b"\xff\xd9") < body.rfind(b"\xff\xda"):
        raise BodyError(400, "the picture is cut off; send it whole")
    if body.count(b"\xff\xda") > MAX_SCANS:
        raise BodyError(413, f"the picture has more scans than {MAX_SCANS}; send a JPEG that is not progressive")
    place = 2
    for _ in range(MAX_PARTS):
        if body[place] != 0xFF:
            break
        marker = body[place + 1]
        if marker == 0xFF:
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", body, place + 5)
            return width, height
        else:
            place += 2 + struct.unpack_from(">H", body, place + 2)[0]
    raise IndexError


def _png_pixels(body: bytes) -> bytes:
    """A PNG without the chunks that its pixels do not need."""
    kept, pixels, place = [body[:8]], [], 8
    for _ in range(MAX_PARTS):
        size, name = struct.unpack_from(">I4s", body, place)
        if place + size + 12 > len(body) or (place == 8 and (name, size) != (b"IHDR", 13)):
            break
        if name in PNG_CHUNKS:
            kept.append(body[place : place + size + 12])
        if name == b"IDAT":
            pixels.append(body[place + 8 : place + 8 + size])
        if name == b"IEND":
            _check_unpacked(b"".join(pixels), *struct.unpack_from(">II", body, 16))
            return b"".join(kept)
        place += size + 12
    raise IndexError


def _check_unpacked(packed: bytes, width: int, height: int) -> None:
    """FFmpeg keeps unpacking after it has all pixels, which takes seconds for each megabyte of zeros."""
    most = (8 * width + 16) * height  # four channels of 16 bits, and a byte for each row of each pass
    unpacker, unpacked = zlib.decompressobj(), 0
    for begin in range(0, len(packed), 2**16):
        left = packed[begin : begin + 2**16]
        while left and not unpacker.eof:
            unpacked += len(unpacker.decompress(left, 2**20))
            left = unpacker.unconsumed_tail
            if unpacked > most:
                raise BodyError(400, "the picture unpacks to more than its pixels; send it as it was encoded")


def _webp_size(body: bytes) -> tuple[int, int]:
    size, kind = struct.unpack_from("<I4x4s", body, 4)
    if size + 8 > len(body):
        raise IndexError
    if kind == b"VP8X":
        if body[20] & 2:
            raise BodyError(415, f"the picture is an animation; accepted is {PICTURES}, or a clip of several")
        return tuple(int.from_bytes(body[place : place + 3], "little") + 1 for place in (24, 27))
    if kind == b"VP8L":
        (sides,) = struct.unpack_from("<I", body, 21)
        return (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", body, 26)
    return width & 0x3FFF, height & 0x3FFF


def _check_boxes(body: bytes) -> None:
    """Refuse an MP4 that claims more than a short video has. Raises struct.error or IndexError if damaged."""
    place = described = samples = 0
    for _ in range(MAX_PARTS):
        if place == len(body):
            break
        size, name = struct.unpack_from(">I4s", body, place)
        if size == 1:
            (size,) = struct.unpack_from(">Q", body, place + 8)
        elif size == 0:
            size = len(body) - place
        if size < 8 or place + size > len(body):
            raise IndexError("it is cut off")
        if name != b"mdat":
            described += size
            if described > MAX_DESCRIPTION:
                break
            for found in COUNTED.finditer(body, place, place + size):
                packed = found[3] is not None
                samples += MAX_SAMPLES + 1 if packed else int.from_bytes(found[1] or found[2], "big")
        place += size
    if place != len(body) or samples > MAX_SAMPLES:
        raise BodyError(413, "the video has more samples or metadata than a short one; send it in parts")


def _check_elements(body: bytes) -> None:
    """Refuse a Matroska that describes more than a short video has. Raises IndexError if damaged."""
    place = described = 0
    for _ in range(MAX_PARTS):
        if place == len(body):
            break
        length = 9 - body[place].bit_length()
        name, place = body[place : place + length], place + length
        length = 9 - body[place].bit_length()
        unknown = (1 << 7 * length) - 1
        size, place = int.from_bytes(body[place : place + length], "big") & unknown, place + length
        if name in (SEGMENT, CLUSTER):  # whose size may be unknown
            continue
        if size == unknown or place + size > len(body):
            raise IndexError("it is cut off")
        if name not in BLOCKS:
            described += size
        place += size
    if place != len(body) or described > MAX_DESCRIPTION:
        raise BodyError(413, "the video has more metadata than a short one; send it in parts")


def _frames(body: bytes, container_format: str, max_pixels: int) -> Iterator[Frame]:
    # The file cannot open anything else, and only common video codecs are decoded.
    options = {
        "protocol_whitelist": "none",
        "codec_whitelist": VIDEO_DECODERS,
        "max_pixels": str(max_pixels + ALIGNMENT * 2**14),
    }
    with av.open(io.BytesIO(body), format=container_format, options=options) as container:
        if not container.streams.video:
            raise BodyError(415, f"the body holds no video; accepted is {VIDEOS}")
        stream = container.streams.video[0]
        _check_pixels("video", stream.width, stream.height, max_pixels)
        stream.codec_context.options = options
        stream.codec_context.thread_count = 1
        for index, decoded in enumerate(container.decode(stream)):
            _check_pixels("video", decoded.width, decoded.height, max_pixels)
            yield Frame(index, 0.0, decoded)


def _check_pixels(what: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BodyError(413, f"the {what} is {width}x{height}; accepted are {max_pixels:,} pixels at most")


def _prepared(frame: Frame, preprocess: Preprocessor, max_pixels: int) -> torch.Tensor:
    left, top, right, bottom = preprocess.region(frame.size)
    # Resizing the short side of a sliver can make it far larger than it was.
    grown = preprocess.height * preprocess.width / ((right - left) * (bottom - top))
    height, width = frame.size
    if height * width * grown > max_pixels:
        raise BodyError(
            413, f"{width}x{height} is over {max_pixels:,} pixels once it is resized to be cropped; crop it"
        )
    if getattr(_own, "given", None) != preprocess:
        _own.given, _own.copy = preprocess, dataclasses.replace(preprocess)
    return _own.copy(frame)


def _damaged(what: str, error: Exception | None) -> BodyError:
    reason = getattr(error, "strerror", None) or type(error).__name__
    why = f" ({reason})" if error else ""
    return BodyError(
        400, f"the {what} is damaged or cut off{why}; accepted is {PICTURES if what == 'picture' else VIDEOS}"
    )

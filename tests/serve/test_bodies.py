"""Bodies of requests: the same frames as from files, and what becomes of those that are hostile."""

import io
import struct
import threading
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from neuroflow.serve.bodies import MAX_DESCRIPTION, MAX_PARTS, MAX_SCANS, BodyError, array, picture, video
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Source
from PIL import Image

PREPROCESS = Preprocessor(24, 32)
CROPPING = Preprocessor(24, 24, crop=True, resize=28)
LIMIT = 64 * 48


def noise(height=48, width=64, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels)[: 3 if channels > 1 else 2], np.uint8)


def encoded(kind, image=None, **options):
    file = io.BytesIO()
    Image.fromarray(noise() if image is None else image).save(file, kind, **options)
    return file.getvalue()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def clip(kind="mp4", frames=6, height=48, width=64, codec="libx264"):
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            image = np.roll(noise(height, width), 3 * number, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def saved(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def described(header, content=b""):
    header = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def refused(status, call, *arguments):
    with pytest.raises(BodyError) as caught:
        call(*arguments)
    assert caught.value.status == status and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("preprocess", [PREPROCESS, CROPPING])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("form", ["plain", "turned", "grey", "progressive or lossless", "described"])
def test_a_picture_is_what_its_file_would_be(tmp_path, suffix, form, preprocess):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {
        "turned": {"exif": exif},
        "progressive or lossless": {"progressive": True} if suffix == ".jpg" else {"lossless": True},
        "described": {"exif": exif} | ({} if suffix == ".png" else {"icc_profile": bytes(3000)}),
    }.get(form, {})
    path = tmp_path / f"picture{suffix}"
    Image.fromarray(noise(channels=1 if form == "grey" else 3)).save(path, **options)
    (frame,) = Source(str(path))
    assert frame.size == ((64, 48) if "exif" in options else (48, 64))
    assert picture(path.read_bytes(), preprocess, LIMIT).equal(preprocess(frame))


def test_an_animated_png_is_its_first_picture(tmp_path):
    first, second = noise(), 255 - noise()
    body = encoded("PNG", first, save_all=True, append_images=[Image.fromarray(second)])
    assert picture(body, PREPROCESS, LIMIT).equal(picture(encoded("PNG", first), PREPROCESS, LIMIT))
    body = encoded("WEBP", first, save_all=True, append_images=[Image.fromarray(second)])
    assert "animation" in refused(415, picture, body, PREPROCESS, LIMIT)


def test_pictures_in_several_threads_at_once():
    bodies = [encoded("JPEG", noise(48 + side, 64)) for side in range(8)]
    expected = [picture(body, PREPROCESS, 10 * LIMIT) for body in bodies]
    found = [[] for _ in bodies]

    def prepare(number):
        for _ in range(20):
            found[number].append(picture(bodies[number], PREPROCESS, 10 * LIMIT))

    threads = [threading.Thread(target=prepare, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(each.equal(right) for right, each_thread in zip(expected, found, strict=True) for each in each_thread)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_limit_on_pixels_is_exact(kind):
    assert picture(encoded(kind), PREPROCESS, LIMIT).shape == (1, 3, 24, 32)
    assert "64x48" in refused(413, picture, encoded(kind), PREPROCESS, LIMIT - 1)
    assert "64x48" in refused(413, picture, encoded(kind, lossless=True), PREPROCESS, LIMIT - 1)
    assert "64x48" in refused(413, picture, encoded(kind, noise(channels=4)[..., :3]), PREPROCESS, LIMIT - 1)


def test_bombs_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(av.CodecContext, "create", None)
    png, webp, jpeg = encoded("PNG"), encoded("WEBP", lossless=True), encoded("JPEG")
    header = struct.pack(">II5B", 30_000, 30_000, 8, 2, 0, 0, 0)
    many = 30 * 2**20
    assert "30000x30000" in refused(413, picture, png[:8] + chunk(b"IHDR", header) + png[33:], PREPROCESS, many)
    sides = struct.pack("<I", 16_383 | 16_383 << 14)
    assert "16384x16384" in refused(413, picture, webp[:21] + sides + webp[25:], PREPROCESS, many)
    place = jpeg.index(b"\xff\xc0") + 5
    assert "65535x65535" in refused(413, picture, jpeg[:place] + b"\xff" * 4 + jpeg[place + 4 :], PREPROCESS, many)
    assert "scans" in refused(413, picture, jpeg[:-2] + b"\xff\xda" * MAX_SCANS + b"\xff\xd9", PREPROCESS, many)


def test_a_png_s_text_is_not_unpacked(monkeypatch):
    png, seen, packet = encoded("PNG"), [], av.Packet
    monkeypatch.setattr(av, "Packet", lambda body: seen.append(body) or packet(body))
    texts = [chunk(name, b"a\0\0" + zlib.compress(bytes(9999))) for name in (b"zTXt", b"iTXt", b"iCCP")]
    picture(png[:33] + b"".join(texts) + png[33:], PREPROCESS, LIMIT)
    assert seen == [png]


def test_pixels_beyond_those_of_a_png_are_not_unpacked():
    png = encoded("PNG")
    zeros = zlib.compress(bytes(64 * 48 * 8 + 48 * 16 + 1))
    body = png[:33] + chunk(b"IDAT", zeros) + png[-12:]
    assert "more than its pixels" in refused(400, picture, body, PREPROCESS, LIMIT)


def test_more_parts_than_pictures_have_are_refused():
    png, jpeg = encoded("PNG"), encoded("JPEG")
    refused(400, picture, png[:33] + chunk(b"tEXt", b"") * MAX_PARTS + png[33:], PREPROCESS, LIMIT)
    refused(400, picture, jpeg[:2] + b"\xff\xfe\x00\x02" * MAX_PARTS + jpeg[2:], PREPROCESS, LIMIT)


def test_a_sliver_is_not_resized_to_what_has_no_bound():
    refused(413, picture, encoded("PNG", noise(1, 3000)), CROPPING, LIMIT)
    assert picture(encoded("PNG", noise(1, 3000)), PREPROCESS, LIMIT).shape == (1, 3, 24, 32)


@pytest.mark.parametrize(("kind", "magic"), [("JPEG", 3), ("PNG", 8), ("WEBP", 12)])
def test_damaged_pictures_are_refused(kind, magic):
    body = encoded(kind)
    for cut in (*range(3, 40), len(body) // 2, len(body) - 13):
        refused(415 if cut < magic else 400, picture, body[:cut], PREPROCESS, LIMIT)
    generator = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(body)
        for place in generator.integers(12, len(body), 5):
            damaged[place] = generator.integers(256)
        try:
            assert picture(bytes(damaged), PREPROCESS, LIMIT).shape == (1, 3, 24, 32)
        except BodyError as error:
            assert error.status in (400, 413, 415)


@pytest.mark.parametrize("body", [b"", b"\xff", b"GIF89a" + bytes(50), encoded("BMP"), encoded("TIFF"), clip()])
def test_other_pictures_are_refused(body):
    assert "JPEG, PNG or WebP" in refused(415, picture, body, PREPROCESS, LIMIT)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", ">f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_in_either_order(dtype, order):
    values = np.random.default_rng(0).standard_normal((5, 3, 4, 6)).astype(dtype, order=order)
    values[0, 0, 0, 0] = np.nan
    expected = torch.from_numpy(values.astype("=f4", order="C"))
    found = array(saved(values), (3, 4, 6), clip=5)
    assert found.dtype == torch.float32 and found.is_contiguous() and found[1:].equal(expected[1:])
    assert found[0, 0, 0, 0].isnan()
    for one in (values[1], values[1:2]):
        assert array(saved(np.asarray(one, order=order)), (3, 4, 6)).equal(expected[1:2])
    assert "5 frames" in refused(413, array, saved(values), (3, 4, 6), 4)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (415, b""),
        (415, b"\x93NUMP"),
        (400, b"\x93NUMPY"),
        (400, b"\x93NUMPY\x03\x00\x10\x00\x00\x00" + bytes(16)),
        (400, b"\x93NUMPY\x02\x00\xff\xff\xff\xff{"),
        (400, described("(" * 9000)),
        (400, described("-" * 9000 + "1")),
        (400, described("{" + "'a':1," * 5000 + "}")),
        (400, described("{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (3, 4, 6)}")),
        (400, described("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4, 6)}")),
        (400, described("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4, 6)}", bytes(4 * 73))),
        (422, described("{'descr': '|O', 'fortran_order': False, 'shape': (3, 4, 6)}", bytes(8 * 72))),
        (422, described("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3, 4, 6)}", bytes(4 * 72))),
        (422, described("{'descr': ('<f4', (10000, 10000)), 'fortran_order': False, 'shape': (3, 4, 6)}")),
        (422, described("{'descr': '<f8', 'fortran_order': False, 'shape': (3, 4, 6)}", bytes(8 * 72))),
        (422, described("{'descr': '<f4', 'fortran_order': False, 'shape': ()}")),
        (422, described("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 6, 3)}", bytes(4 * 72))),
        (422, described("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 4, 6)}", bytes(8 * 72))),
        (422, described("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3, 4, 6)}", bytes(4 * 72))),
        (422, described("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 800 + ", 3, 4, 6)}")),
    ],
)
def test_hostile_arrays_are_refused(status, body):
    assert "[3, 4, 6]" in refused(status, array, body, (3, 4, 6)) or status == 400
    with pytest.raises(BodyError):
        array(body[: len(body) // 2], (3, 4, 6), clip=8)


@pytest.mark.parametrize("preprocess", [PREPROCESS, CROPPING])
@pytest.mark.parametrize(
    ("kind", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("matroska", "libx264"), ("mp4", "mpeg4")]
)
def test_a_video_is_what_its_file_would_be(tmp_path, kind, codec, preprocess):
    body = clip(kind, codec=codec)
    (tmp_path / "clip").write_bytes(body)
    expected = torch.cat([preprocess(frame) for frame in Source(str(tmp_path / "clip"))])
    assert len(expected) == 6 and video(body, preprocess, LIMIT, 6).equal(expected)
    assert "more frames than 5" in refused(413, video, body, preprocess, LIMIT, 5)
    assert "64x48" in refused(413, video, body, preprocess, LIMIT - 1, 6)


def test_videos_that_are_damaged_or_none_are_refused():
    mp4, webm = clip(), clip("webm", codec="libvpx-vp9")
    for cut in (*range(12, 200, 7), len(mp4) // 2):
        refused(400, video, mp4[:cut], PREPROCESS, LIMIT, 6)
    for body in (b"", encoded("JPEG"), clip("avi", codec="mpeg4"), b"#EXTM3U\nfile:///etc/passwd\n", b"ffconcat"):
        assert "MP4, WebM or Matroska" in refused(415, video, body, PREPROCESS, LIMIT, 6)
    generator = np.random.default_rng(0)
    for body in (mp4, webm):
        for _ in range(60):
            damaged = bytearray(body)
            for place in generator.integers(12, len(body), 5):
                damaged[place] = generator.integers(256)
            try:
                assert 1 <= len(video(bytes(damaged), PREPROCESS, LIMIT, 6)) <= 6
            except BodyError as error:
                assert error.status in (400, 413, 415)


def test_what_videos_claim_is_not_believed():
    """FFmpeg makes gigabytes of any of these."""
    mp4, matroska = clip(), clip("matroska")

    def patched(name, offset, content):
        place = mp4.index(name) + offset
        return mp4[:place] + content + mp4[place + len(content) :]

    refused(413, video, patched(b"stsz", 8, struct.pack(">II", 1, 50_000_000)), PREPROCESS, LIMIT, 6)
    refused(413, video, patched(b"stsz", 0, b"trun" + struct.pack(">II", 0, 50_000_000)), PREPROCESS, LIMIT, 6)
    refused(413, video, mp4 + struct.pack(">I4s", 16, b"moov") + struct.pack(">I4s", 8, b"cmov"), PREPROCESS, LIMIT, 6)
    refused(413, video, mp4 + struct.pack(">I4s", 8, b"free") * MAX_PARTS, PREPROCESS, LIMIT, 6)
    tracks = matroska.index(b"\x16\x54\xae\x6b", matroska.index(b"\x16\x54\xae\x6b") + 4)
    empty = b"\x16\x54\xae\x6b" + (1 << 28 | MAX_DESCRIPTION).to_bytes(4, "big") + b"\xae\x80" * (MAX_DESCRIPTION // 2)
    refused(413, video, matroska[:tracks] + empty + matroska[tracks:], PREPROCESS, LIMIT, 6)
    refused(413, video, matroska + b"\xec\x80" * MAX_PARTS, PREPROCESS, LIMIT, 6)


def test_videos_open_nothing_else(tmp_path):
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(clip())
    for body in (f"ffconcat version 1.0\nfile {secret}\n", f"#EXTM3U\n#EXTINF:1,\n{secret}\n"):
        refused(415, video, body.encode(), PREPROCESS, LIMIT, 6)
        refused(400, video, struct.pack(">I4s", 8, b"ftyp") + body.encode(), PREPROCESS, LIMIT, 6)

"""Frames from every kind of source, and what becomes of sources that are damaged, empty, too large or silent."""

import contextlib
import http.server
import re
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from neuroflow.video.encode import VideoWriter
from neuroflow.video.source import Frame, Source, SourceError
from PIL import Image


def write_clip(path, frames=12, height=48, width=64, container="mp4", grain=0):
    """Grey frames, brighter each time, so that a frame's number can be read off it; grain makes them large."""
    noise = np.random.default_rng(0).integers(0, grain + 1, (frames, height, width, 3))
    images = (noise + 10 * np.arange(frames)[:, None, None, None]).clip(0, 255).astype(np.uint8)
    if container == "mp4":
        with VideoWriter(path, Fraction(10)) as writer:
            for image in images:
                writer.write(image)
        return path
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream("mpeg2video", rate=10)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = height, width, "yuv420p", 1
        for image in images:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode())
    return path


def brightness(frame):
    return frame.rgb(*frame.size).mean()


def test_file_gives_every_frame_in_order(tmp_path):
    source = Source(str(write_clip(tmp_path / "clip.mp4")))
    frames = list(source)
    assert [frame.index for frame in frames] == list(range(12))
    assert [frame.time for frame in frames] == pytest.approx([i / 10 for i in range(12)])
    assert [brightness(frame) for frame in frames] == pytest.approx([10 * i for i in range(12)], abs=3)
    assert frames[0].size == (48, 64) and frames[0].rgb(24, 40).shape == (24, 40, 3)
    assert (source.frame_count, source.rate, source.live, source.stopped) == (12, 10, False, None)


def test_directory_gives_its_images_in_name_order(tmp_path):
    for name, level, size in (("b.png", 80, (40, 30)), ("a.JPG", 20, (64, 48)), ("c.bmp", 140, (40, 30))):
        Image.new("RGB", size, (level,) * 3).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    source = Source(str(tmp_path))
    frames = list(source)
    assert [brightness(frame) for frame in frames] == pytest.approx([20, 80, 140], abs=3)
    assert [frame.size for frame in frames] == [(48, 64), (30, 40), (30, 40)]
    assert (source.frame_count, source.rate, source.stopped) == (3, None, None)


def test_damaged_image_ends_a_directory_and_is_named(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"damaged")
    source = Source(str(tmp_path))
    assert len(list(source)) == 1
    assert source.stopped.startswith("image b.png cannot be read")


def test_rotated_video_comes_upright(tmp_path):
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, :32] = 200
    with VideoWriter(tmp_path / "clip.mp4", Fraction(10)) as writer:
        writer.write(image)
    content = (tmp_path / "clip.mp4").read_bytes()
    matrix = content.index(b"tkhd") + 44  # ISO/IEC 14496-12 8.3.2, version 0
    quarter_turn = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30], ">i4").tobytes()
    (tmp_path / "turned.mp4").write_bytes(content[:matrix] + quarter_turn + content[matrix + 36 :])
    frame = next(iter(Source(str(tmp_path / "turned.mp4"))))
    assert frame.size == (64, 48)
    upright = frame.rgb(64, 48)
    assert upright[:30].mean() > 150 and upright[34:].mean() < 50


def test_resolution_change_comes_through(tmp_path):
    small = write_clip(tmp_path / "small.ts", 5, 48, 64, container="mpegts")
    large = write_clip(tmp_path / "large.ts", 5, 96, 128, container="mpegts")
    (tmp_path / "both.ts").write_bytes(small.read_bytes() + large.read_bytes())
    sizes = [frame.size for frame in Source(str(tmp_path / "both.ts"))]
    assert sizes[0] == (48, 64) and sizes[-1] == (96, 128) and len(sizes) >= 9


def make_bad(kind, directory):
    path = directory / "bad.mp4"
    if kind == "text":
        path.write_text("this is not a video\n" * 50)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(write_clip(directory / "whole.mp4").read_bytes()[:400])
    elif kind == "sound":
        with av.open(str(path), "w") as output:
            stream = output.add_stream("aac", rate=8000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 8000
            output.mux(stream.encode(sound))
            output.mux(stream.encode())
    elif kind == "no frames":
        whole = write_clip(directory / "whole.mp4", frames=1).read_bytes()
        start = whole.index(b"mdat") + 4
        size = int.from_bytes(whole[start - 8 : start - 4], "big") - 8
        path.write_bytes(whole[:start] + bytes(size) + whole[start + size :])
    elif kind == "directory":
        path.mkdir()
    elif kind == "webcam":
        return "/dev/video97"
    elif kind == "refused":
        return "rtsp://127.0.0.1:9/stream"
    return str(path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such file"),
        ("text", "cannot be opened"),
        ("empty", "cannot be opened"),
        ("cut", "cannot be opened"),
        ("sound", "no video in it"),
        ("no frames", "no frame of it can be decoded|holds no video frame|ends at frame 0"),
        ("directory", "no image in this directory"),
        ("webcam", "there is no webcam"),
        ("refused", "cannot be opened"),
    ],
)
def test_a_source_without_frames_is_one_line(tmp_path, kind, words):
    with pytest.raises(SourceError, match=words) as error:
        Source(make_bad(kind, tmp_path))
    assert "\n" not in str(error.value) and ";" in str(error.value)


def test_frames_over_the_ceiling_are_refused(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4")
    assert len(list(Source(str(clip), max_pixels=64 * 48))) == 12
    with pytest.raises(SourceError, match="64x48 is over the ceiling of 3,071 pixels, see --max-pixels"):
        Source(str(clip), max_pixels=64 * 48 - 1)


@pytest.mark.parametrize("name", ["huge.png", "."])
def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path, name):
    Image.new("1", (20000, 10000)).save(tmp_path / "huge.png")  # 24 kB, 200 million pixels
    # FFmpeg learns the size of a PNG by decoding it: that the message cannot tell it shows that nothing was decoded.
    with pytest.raises(SourceError, match=r"\(damaged, or over the ceiling of 178,956,970 pixels, see --max-pixels\)"):
        Source(str(tmp_path / name))


def test_growing_over_the_ceiling_ends_a_stream(tmp_path):
    small = write_clip(tmp_path / "small.ts", 5, 48, 64, container="mpegts")
    large = write_clip(tmp_path / "large.ts", 5, 96, 128, container="mpegts")
    (tmp_path / "both.ts").write_bytes(small.read_bytes() + large.read_bytes())
    source = Source(str(tmp_path / "both.ts"), max_pixels=64 * 48)
    assert {frame.size for frame in source} == {(48, 64)}
    assert "--max-pixels" in source.stopped


@pytest.mark.parametrize("damage", ["overwritten", "cut off"])
def test_damage_half_way_keeps_what_came_before(tmp_path, damage):
    if damage == "overwritten":
        content = bytearray(write_clip(tmp_path / "clip.mp4", 24, grain=90).read_bytes())
        middle = len(content) // 2
        content[middle : middle + 5000] = np.random.default_rng(0).bytes(5000)
    else:
        # The index stands at the end of an MP4, which nothing can be read without: this container needs none.
        content = write_clip(tmp_path / "clip.mkv", 24, container="matroska").read_bytes()
        content = content[: len(content) // 2]
    (tmp_path / "damaged").write_bytes(content)
    source = Source(str(tmp_path / "damaged"))
    kept = list(source)
    assert 3 < len(kept) < 22
    assert [frame.index for frame in kept] == list(range(len(kept)))
    assert re.search(rf"frame {len(kept)}\b", source.stopped)


@pytest.fixture
def serve():
    """serve(send) -> the address of a server that answers each request by send(write)."""
    servers = []

    def start(send):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Type", "video/mp2t")
                self.end_headers()
                with contextlib.suppress(OSError):  # the reader may have gone
                    send(self.wfile.write)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/stream.ts"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_live_source_keeps_the_newest_and_ends_when_it_falls_silent(tmp_path, serve):
    clip = write_clip(tmp_path / "clip.ts", 20, container="mpegts", grain=60).read_bytes()
    consumer_waits, silence = threading.Event(), threading.Event()

    def send(write):
        write(clip)
        consumer_waits.set()
        silence.wait(5)

    source = Source(serve(send), timeout=1.0)
    assert source.live
    consumer_waits.wait(5)
    time.sleep(0.3)
    frames = list(source)
    silence.set()
    assert len(frames) <= 2 and frames[-1].index >= 15
    assert source.stopped


def test_driver_that_hangs_does_not_hang_the_caller(monkeypatch):
    release = threading.Event()

    def stuck():
        yield Frame(0, 0.0, None)
        release.wait(5)

    monkeypatch.setattr(Source, "_open", lambda self: self._newest(stuck()))
    source = Source("/dev/video0", timeout=0.2)
    source.live = True
    assert list(source) == []
    release.set()
    assert source.stopped == "no frame came for 0.2 seconds"


def test_server_that_never_answers_times_out(serve):
    silence, ended = threading.Event(), []
    address = serve(lambda write: ended.append(silence.wait(60)))
    with pytest.raises(SourceError, match="cannot be opened"):
        Source(address, timeout=0.5)
    assert not ended  # the server had not given up
    silence.set()


def test_real_clips(data):
    source = Source(str(data("videos/bird.mkv")))
    frames = list(source)
    assert len(frames) == 63 and frames[-1].size == (480, 640) and source.stopped is None

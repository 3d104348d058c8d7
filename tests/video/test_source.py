"""Frames from every kind of source, and what becomes of sources that are damaged, empty, too large or silent."""

import contextlib
import http.server
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from fractions import Fraction

import av
import numpy as np
import pytest
from neuroflow.video.clips import read_clip
from neuroflow.video.encode import VideoWriter
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Frame, Source, SourceError
from PIL import Image, ImageOps

VARYING = (
    0,
    33,
    66,
    500,
    533,
    2000,
    2033,
    2066,
    2500,
    2533,
    3000,
    4000,
)  # milliseconds, as a screen recording has them


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


def write_timed(path, times, codec="libx264", max_b_frames=0):
    """Grey frames at times in milliseconds, frame k of level 20 k."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base, stream.codec_context.max_b_frames = Fraction(1, 1000), max_b_frames
        for number, milliseconds in enumerate(times):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * number, np.uint8), format="rgb24")
            picture.pts, picture.time_base = milliseconds, Fraction(1, 1000)
            output.mux(stream.encode(picture))
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


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "libx264"),
        ("mkv", "libx264"),
        ("ts", "libx264"),
        ("avi", "libx264"),
        ("avi", "mpeg4"),
        ("h264", "libx264"),
    ],
)
def test_times_are_those_of_presentation_whatever_the_container(tmp_path, container, codec):
    """With frames that are decoded out of turn, which AVI has no times for, and H.264 by itself none at all."""
    frames = list(Source(str(write_timed(tmp_path / f"clip.{container}", range(0, 1200, 100), codec, max_b_frames=2))))
    assert [brightness(frame) for frame in frames] == pytest.approx([20 * i for i in range(12)], abs=8)
    step = frames[1].time - frames[0].time if container == "h264" else 0.1
    assert [frame.time - frames[0].time for frame in frames] == pytest.approx([step * i for i in range(12)], abs=2e-3)


def test_pictures_with_a_colour_profile(tmp_path):
    """Whose name PyAV would free twice, which ends the process now or later."""
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"):
        Image.new(mode, (64, 48)).save(tmp_path / f"{mode}.png", icc_profile=bytes(300))
    code = """
import gc, sys
from neuroflow.video.source import Source
for _ in range(20):
    assert {frame.size for frame in Source(sys.argv[1])} == {(48, 64)}
    gc.collect()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_times_rise_where_a_containers_begin_again(tmp_path):
    clip = write_clip(tmp_path / "clip.ts", 5, container="mpegts").read_bytes()
    (tmp_path / "twice.ts").write_bytes(clip * 2)
    times = np.array([frame.time for frame in Source(str(tmp_path / "twice.ts"))])
    assert len(times) >= 9 and (np.diff(times) > 0).all()


@pytest.mark.parametrize("kind", ["varying rate", "late clock", "hidden beginning", "cut off"])
def test_a_number_of_frames_that_is_announced_is_no_promise(tmp_path, kind):
    path = tmp_path / "clip.mp4"
    if kind == "varying rate":
        write_timed(tmp_path / "clip.webm", VARYING, "libvpx-vp9").rename(path)
    elif kind == "late clock":
        write_timed(tmp_path / "clip.mkv", range(5000, 6200, 100)).rename(path)
    elif kind == "hidden beginning":
        content = bytearray(write_timed(path, range(0, 1200, 100)).read_bytes())
        begin = content.index(b"elst") + 16  # ISO/IEC 14496-12 8.6.6, version 0
        content[begin : begin + 4] = (int.from_bytes(content[begin : begin + 4], "big") + 8000).to_bytes(4, "big")
        path.write_bytes(content)
    else:
        whole = write_clip(tmp_path / "clip.mkv", 24, container="matroska").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    source = Source(str(path))
    count = len(list(source))
    assert source.stopped is None and 3 < count < source.frame_count
    assert len(read_clip(path, Preprocessor(16, 16), frames=16)) == min(count, 16)


def test_directory_gives_its_images_as_a_reader_counts(tmp_path):
    names = ("9.png", "10.JPG", "frame2.bmp", "frame10.png", "frame10b.png", "frame010.png")
    order = ("9.png", "10.JPG", "frame2.bmp", "frame010.png", "frame10.png", "frame10b.png")
    for name in names:
        Image.new("RGB", (40, 30) if "frame" in name else (64, 48), (20 * order.index(name),) * 3).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._9.png").write_bytes(b"what macOS leaves")
    source = Source(str(tmp_path))
    frames = list(source)
    assert [brightness(frame) for frame in frames] == pytest.approx([20 * place for place in range(6)], abs=3)
    assert [frame.size for frame in frames] == [(48, 64)] * 2 + [(30, 40)] * 4
    assert [frame.time for frame in frames] == pytest.approx([place / 25 for place in range(6)])
    assert (source.frame_count, source.rate, source.stopped) == (6, None, None)


@pytest.mark.parametrize(
    "name",
    ["rtsp_cam.mkv", "12:30.mkv", "file:a.mkv", "http:", "concat:a|b.mkv", "100%d.mkv", "a#b?c d.mkv", "-.mkv", "4"],
)
def test_a_path_is_a_path_whatever_it_looks_like(tmp_path, monkeypatch, name):
    write_clip(tmp_path / "clip.mkv", container="matroska").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for address in (name, f"./{name}", str(tmp_path / name), f"file://{urllib.parse.quote(str(tmp_path / name))}"):
        source = Source(address)
        assert len(list(source)) == 12 and not source.live


def test_an_image_is_no_pattern(tmp_path):
    levels = {"a%d.png": 100, "a1.png": 200, "[a]*.png": 50}
    for name, level in levels.items():
        Image.new("RGB", (40, 30), (level,) * 3).save(tmp_path / name)
    for name, level in levels.items():
        assert [round(brightness(frame)) for frame in Source(str(tmp_path / name))] == [level]


@pytest.mark.parametrize("address", ["ftp://a/b.mp4", "udp://127.0.0.1:9", "concat://a|b", "UNIX://a", "pipe://0"])
def test_other_protocols_are_refused(address):
    with pytest.raises(
        SourceError, match=r"(ftp|udp|concat|unix|pipe):// is not supported; .* http://, https://, rtsp"
    ):
        Source(address)


def test_damaged_image_ends_a_directory_and_is_named(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"damaged")
    source = Source(str(tmp_path))
    assert len(list(source)) == 1
    assert source.stopped.startswith("image b.png cannot be read")


# EXIF orientation -> a, b, c and d of the matrix that says the same of a video
MATRICES = dict(enumerate(("+00+", "-00+", "-00-", "+00-", "0++0", "0+-0", "0--0", "0-+0"), 1))


@pytest.mark.parametrize("orientation", MATRICES)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".mp4"])
def test_turned_and_mirrored_pictures_come_upright(tmp_path, orientation, suffix):
    image = np.zeros((48, 64, 3), np.uint8)
    image[:24, :32] = 200
    path, exif = tmp_path / f"picture{suffix}", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(tmp_path / "exif.png", exif=exif)
    if suffix == ".mp4":
        with VideoWriter(path, Fraction(10)) as writer:
            writer.write(image)
        content = path.read_bytes()
        matrix = content.index(b"tkhd") + 44  # ISO/IEC 14496-12 8.3.2, version 0
        a, b, c, d = ({"+": 1, "0": 0, "-": -1}[sign] << 16 for sign in MATRICES[orientation])
        changed = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
        path.write_bytes(content[:matrix] + changed + content[matrix + 36 :])
    else:
        Image.fromarray(image).save(path, exif=exif)
    with Image.open(tmp_path / "exif.png") as turned:
        expected = np.asarray(ImageOps.exif_transpose(turned)).astype(float)
    (frame,) = Source(str(path))
    assert frame.size == expected.shape[:2]
    assert np.abs(frame.rgb(*frame.size) - expected).mean() < 5
    half = frame.rgb(frame.size[0] // 2, frame.size[1] // 2)
    assert np.abs(half - expected[::2, ::2]).mean() < 5


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
        ("sound", "it holds no video, only other streams"),
        ("no frames", "none of its frames can be decoded|holds no video frame|ends at frame 0"),
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


def test_damage_half_way_keeps_what_came_before(tmp_path):
    content = bytearray(write_clip(tmp_path / "clip.mp4", 24, grain=90).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 5000] = np.random.default_rng(0).bytes(5000)
    (tmp_path / "damaged").write_bytes(content)
    source = Source(str(tmp_path / "damaged"))
    kept = list(source)
    assert 3 < len(kept) < 22
    assert [frame.index for frame in kept] == list(range(len(kept)))
    assert re.search(rf"frame {len(kept)}\b", source.stopped)


def test_a_pipe_gives_every_frame(tmp_path):
    clip = write_clip(tmp_path / "clip.ts", 30, container="mpegts", grain=60).read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    closed, silence = threading.Event(), threading.Event()

    def write():
        with pipe.open("wb") as file:
            file.write(clip)
        closed.wait(60)
        with contextlib.suppress(BrokenPipeError), pipe.open("wb") as file:
            file.write(clip[: len(clip) // 2])
            file.flush()
            silence.wait(60)

    threading.Thread(target=write, daemon=True).start()
    source = Source(str(pipe))
    assert len(list(source)) == 30 and not source.live and source.stopped is None
    source.close()
    closed.set()
    source = Source(str(pipe), timeout=0.5)
    assert 5 < len(list(source)) < 30 and "nothing came for 0.5 seconds" in source.stopped
    silence.set()


def test_a_pipe_that_nobody_writes_to_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match=r"nobody wrote to this pipe for 0.2 seconds; start its writer"):
        Source(str(tmp_path / "pipe"), timeout=0.2)


@pytest.fixture
def serve():
    """serve(send, **headers) -> the address of a server that answers each request by send(write)."""
    servers = []

    def start(send, **headers):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                for name, value in {"Content_Type": "video/mp2t", **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
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


def test_a_file_over_http_gives_every_frame(tmp_path, serve):
    clip = write_clip(tmp_path / "clip.ts", 24, container="mpegts").read_bytes()
    source = Source(serve(lambda write: write(clip), Content_Length=str(len(clip))).replace("http", "HTTP", 1))
    assert len(list(source)) == 24 and not source.live and source.stopped is None


def test_live_source_keeps_the_newest(tmp_path, serve):
    clip = write_clip(tmp_path / "clip.ts", 80, container="mpegts", grain=60).read_bytes()
    sent, silence = threading.Event(), threading.Event()

    def send(write):
        write(clip)
        sent.set()
        silence.wait(5)

    source = Source(serve(send))
    assert source.live
    sent.wait(5)
    time.sleep(0.3)
    frame = next(iter(source))
    silence.set()
    source.close()
    assert frame.index >= 60


@pytest.mark.parametrize("how", ["dropped", "silent"])
def test_live_source_that_drops_is_opened_again_a_few_times(tmp_path, serve, monkeypatch, how):
    monkeypatch.setattr("neuroflow.video.source.DELAYS", (0.01, 0.02))
    clip = write_clip(tmp_path / "clip.ts", 20, container="mpegts", grain=60).read_bytes()
    silence, connections = threading.Event(), []

    def send(write):
        connections.append(None)
        write(clip)
        silence.wait(60 if how == "silent" else 0)

    with pytest.warns(UserWarning) as warned:
        source = Source(serve(send), timeout=0.5)
        frames = list(source)
    silence.set()
    assert len(connections) == 3
    assert frames[-1].index > 20  # it counts on
    assert (np.diff([frame.index for frame in frames]) > 0).all() and (
        np.diff([frame.time for frame in frames]) > 0
    ).all()
    messages = [str(warning.message) for warning in warned]
    assert [re.search("try . of .", message)[0] for message in messages if "try" in message] == [
        "try 1 of 2",
        "try 2 of 2",
    ]
    reason = "nothing came for 0.5 seconds" if how == "silent" else "Input/output error"
    assert re.fullmatch(rf"it dropped after frame \d+ \({reason}\), and could not be reopened", source.stopped)


def test_live_source_that_held_has_all_of_its_tries_again(tmp_path, serve, monkeypatch):
    monkeypatch.setattr("neuroflow.video.source.DELAYS", (0.01,))
    monkeypatch.setattr("neuroflow.video.source.STEADY", 0.0)
    clip = write_clip(tmp_path / "clip.ts", 20, container="mpegts").read_bytes()
    with pytest.warns(UserWarning, match="try 1 of 1"):
        source = Source(serve(lambda write: write(clip)))
        assert max(frame.index for frame in itertools.takewhile(lambda frame: frame.index < 70, source)) > 20
    assert source.stopped is None
    source.close()


def chunked(content):
    """The body of an answer that says where it ends, RFC 9112 7.1."""
    return f"{len(content):x}\r\n".encode() + content + b"\r\n0\r\n\r\n"


def test_live_source_that_ends_in_order_has_ended(tmp_path, serve, recwarn):
    clip = write_clip(tmp_path / "clip.ts", 20, container="mpegts").read_bytes()
    connections = []

    def send(write):
        connections.append(None)
        write(chunked(clip))

    source = Source(serve(send, Transfer_Encoding="chunked"))
    assert source.live
    assert [frame.index for frame in source][-1] == 19
    assert source.stopped is None and len(connections) == 1 and not recwarn.list


def test_packets_that_cannot_be_decoded_are_stepped_over_and_counted(serve):
    stream = io.BytesIO()
    for number in range(40):
        picture = io.BytesIO()
        Image.new("RGB", (64, 48), (5 * number,) * 3).save(picture, "jpeg")
        content = picture.getvalue()
        stream.write(content.replace(b"\xff\xc0", b"\xff\xc9") if number in (10, 11, 30) else content)

    content = chunked(stream.getvalue())
    with pytest.warns(UserWarning, match="3 packets could not be decoded and were skipped"):
        source = Source(serve(lambda write: write(content), Transfer_Encoding="chunked"))
        frames = list(source)
    assert source.live and source.garbled == 3 and source.stopped is None
    assert frames[-1].index == 36


def test_the_only_frame_of_a_live_source_is_not_lost(monkeypatch):
    monkeypatch.setattr(Source, "_open", lambda self: self._newest(frame for frame in [Frame(0, 0.0, None)]))
    source = Source("/dev/video0")
    source.live = True
    assert [frame.index for frame in source] == [0]


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


@pytest.mark.parametrize("source", ["server", "pipe"])
def test_ctrl_c_does_not_wait_for_a_silent_source(tmp_path, serve, source, neuroflow):
    silence, ended = threading.Event(), []
    if source == "server":
        address = serve(lambda write: ended.append(silence.wait(60)))
    else:
        address = tmp_path / "pipe"
        os.mkfifo(address)
    interrupt = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    code, *_ = neuroflow("run", address)
    assert code == 130 and not ended
    silence.set()


def test_real_clips(data):
    source = Source(str(data("videos/bird.mkv")))
    frames = list(source)
    assert len(frames) == 63 and frames[-1].size == (480, 640) and source.stopped is None

"""Reports: pages of one file that need no network, say what the other outputs say, and trust no name."""

import importlib.util
import json
import re
import shutil
from collections import Counter
from fractions import Fraction
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import tiny
from neuroflow import NeuroFlowConfig
from neuroflow.report import charts
from neuroflow.report.advice import Setup, advise
from neuroflow.report.figures import Figures, Stages
from neuroflow.report.moments import SPACED, Moments
from neuroflow.report.pages import shown_address
from neuroflow.video.encode import VideoWriter
from neuroflow.video.results import Record, Results

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES, SIDE = 10, 48
HOSTILE = '"><img src=x onerror=alert(1)><script>{{ 7*7 }} & co.mp4'


VOID = ("meta", "br", "img", "link", "input")


class Page(HTMLParser):
    """A page's elements and its text; one that is not well-formed, or that reaches out, does not get through."""

    def __init__(self, path):
        super().__init__()
        self.source, self.tags, self.images, self._open, self._text = path.read_text(), Counter(), 0, [], []
        self.feed(self.source)
        self.close()
        assert self._open == [] and self.source.startswith("<!doctype html>")
        assert not re.search("https?:|@import|file:", self.source)
        assert not re.search(r"url\((?!#)", self.source)
        self.text = " ".join("".join(self._text).split())

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("src", "srcset", "action", "data")
            if name.endswith("href"):
                assert value.startswith(("#", "data:image/jpeg;base64,"))
                self.images += value.startswith("data:")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag
        if tag not in ("b", "code", "small", "i"):
            self._text.append(" ")

    def handle_data(self, text):
        if self._open and self._open[-1] != "style":
            self._text.append(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "siglip"
    tiny("siglip", SIDE).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A square that moves over a texture, and another texture from frame 6 on."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    random = np.random.default_rng(0)
    with VideoWriter(path, Fraction(10)) as writer:
        for number in range(FRAMES):
            if number in (0, 6):
                texture = random.integers(0, 256, (6, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            image = texture.copy()
            image[8:16, 4 * number % 40 :][:, :8] = 128
            writer.write(image)
    return path


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(frames): Ctrl-C when so many are noted; None: no more."""
    append = Results.append

    def arm(frames):
        def interrupted(self, record, embedding):
            append(self, record, embedding)
            if frames is not None and record.frame == frames - 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(Results, "append", interrupted)

    return arm


def test_a_runs_page_says_what_its_results_say(neuroflow, clip, model, tmp_path):
    out, report = tmp_path / "result.jsonl", tmp_path / "report.html"
    code, table, message = neuroflow(
        "run", clip, "--model", model, "--compare", "--clip", 3, "--out", out, "--report", report
    )
    assert code == 0, message
    page = Page(report)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    scored = rows[1:]
    cosine = np.array([row["cosine"] for row in scored])
    sparse, dense = (np.array([row[name] for row in scored]) for name in ("neuroflow_ms", "dense_ms"))
    skipped = np.mean([row["skipped"] for row in scored])
    assert 0 < skipped < 1
    for words in (
        f"Speed-up {np.median(dense) / np.median(sparse):.2f}x",
        f"Latency, NeuroFlow {np.median(sparse):.1f} ms p20 {np.quantile(sparse, 0.2):.1f}",
        f"Latency, unpatched {np.median(dense):.1f} ms",
        f"Patches skipped {skipped:.1%}",
        f"{cosine.mean():.4f} p5 {np.quantile(cosine, 0.05):.4f}, min {cosine.min():.4f}",
        "Key frames 2 of 10 frames",
        f"6 0:00.60 cut {rows[6]['neuroflow_ms']:.1f} ms {rows[6]['dense_ms']:.1f} ms",
        "threshold 0.1",
    ):
        assert words in page.text, words
    assert next(line for line in table.splitlines() if line.startswith("model"))[18:] in page.text
    lowest = scored[int(cosine.argmin())]
    assert re.search(
        rf"[Ll]owest cosine frame {lowest['frame']}, \S+ · \S+% encoded · cosine {lowest['cosine']:.4f}", page.text
    )
    busiest = max((row for row in scored if not row["key_frame"]), key=lambda row: row["active"])
    assert re.search(rf"[Mm]ost patches encoded[a-z, ]* frame {busiest['frame']}, ", page.text)
    assert page.images == page.source.count("<figure>") >= 4
    reused = f"{np.mean([row['skipped'] == 0 for row in scored]):.1%}"  # the two are told apart
    assert reused != f"{1 - skipped:.1%}" and f"{1 - skipped:.1%}" in page.text.partition("Age of patches")[2]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "result.jsonl"]


def test_key_frames_that_follow_each_other_are_one_row(neuroflow, clip, model, tmp_path):
    report = tmp_path / "report.html"
    assert neuroflow("run", clip, "--model", model, "--max-age", 1, "--report", report)[0] == 0
    page = Page(report)
    assert "0 0:00.00 first" in page.text and "1 to 9 0:00.10 to 0:00.90 age" in page.text
    assert "age max_age was reached 9" in page.text


def test_a_page_is_read_in_light_and_dark(neuroflow, clip, model, tmp_path):
    report = tmp_path / "report.html"
    assert neuroflow("run", clip, "--model", model, "--compare", "--report", report)[0] == 0
    drawn = re.findall(r'<svg class="chart".*?</svg>|<svg [^>]*class="chart".*?</svg>', report.read_text(), re.DOTALL)
    assert len(drawn) == 2
    for svg in drawn:
        assert not re.search(r"(?:fill|stroke): *(?:#|black|rgb)", svg) and "var(--quiet)" in svg and "<text" in svg
        used = set(re.findall(r"var\(--(\w+)\)", svg))
        for scheme in ("prefers-color-scheme: dark", "@media print"):
            style = report.read_text().partition(scheme)[2].partition("</style>")[0]
            assert all(f"--{name}:" in style for name in used)


@pytest.mark.parametrize("options", [(), ("--max-frames", 1), ("--compare", "--max-frames", 1), ("--max-frames", 2)])
def test_what_there_is_nothing_of_is_left_out(options, neuroflow, clip, model, tmp_path):
    report = tmp_path / "report.html"
    code, _, message = neuroflow("run", clip, "--model", model, "--report", report, *options)
    assert code == 0, message
    page = Page(report)
    assert "Speed-up" not in page.text and "unpatched model, to compare" not in page.text
    assert ("Over time" in page.text) == (1 not in options)
    if options:
        assert "None but the first frame" in page.text
    assert ("not measured; use --compare" in page.text) == (1 not in options)
    assert ("Age of patches" in page.text) == ("Where the time went" in page.text) == (1 not in options)


def test_names_are_text(neuroflow, clip, model, tmp_path):
    named, tower, report = tmp_path / HOSTILE, tmp_path / "<b onclick=x>", tmp_path / "report.html"
    shutil.copy(clip, named)
    shutil.copytree(model, tower)
    code, _, message = neuroflow("run", named, "--model", tower, "--report", report)
    assert code == 0, message
    page = Page(report)
    assert not {"script", "img"} & page.tags.keys() and page.tags["b"] == page.source.count("<b>")
    assert page.text.count(HOSTILE) >= 3 and "<b onclick=x>" in page.text  # title, heading, settings
    assert f"{HOSTILE}' --model '{tower}' --compare" in page.text


def test_an_interrupted_run_reports_what_it_has(neuroflow, clip, model, interrupt, tmp_path):
    out, report = tmp_path / "result.jsonl", tmp_path / "report.html"
    report.write_text("of an earlier run")
    options = ("run", clip, "--model", model, "--clip", 1, "--out", out, "--report", report)
    interrupt(4)
    code, table, message = neuroflow(*options)
    assert code == 130 and table == "" and "--resume" in message
    page = Page(report)
    assert "Interrupted after 4 frames" in page.text and "Key frames 1 of 4 frames" in page.text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "result.jsonl.journal"]


def test_a_continued_run_reports_all_of_it(neuroflow, clip, model, interrupt, tmp_path):
    out, report = tmp_path / "result.jsonl", tmp_path / "report.html"
    options = ("run", clip, "--model", model, "--clip", 1, "--out", out)
    interrupt(4)
    assert neuroflow(*options)[0] == 130
    interrupt(None)
    code, table, _ = neuroflow(*options, "--report", report, "--resume")
    assert code == 0 and "key frames        3" in table
    page = Page(report)
    assert "Interrupted" not in page.text and "Key frames 3 of 10 frames" in page.text
    assert (
        "unknown noted by the run that this one continues 1" in page.text
        and "first the stream's first frame 1" in page.text
    )


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
@pytest.mark.parametrize(
    "command",
    ["run {}", "calibrate {} --target-skip 0.5 --out {}.json", "eval laws {}", "eval video {}"],
)
def test_a_missing_library_is_said_before_anything_is_done(library, command, neuroflow, clip, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == library else find(name, *rest))
    words = command.format(clip, tmp_path / "config").split()
    code, table, message = neuroflow(*words, "--model", "none", "--report", tmp_path / "report.html")
    assert (code, table) == (2, "")
    assert message == f"neuroflow: error: --report: {library} is missing; install the report extra: neuroflow[report]\n"
    assert list(tmp_path.iterdir()) == []


def test_a_page_ends_in_html(neuroflow, clip, tmp_path):
    code, _, message = neuroflow("run", clip, "--report", tmp_path / "report.txt")
    assert code == 2 and "give a .html file" in message and message.count("\n") == 1


def test_a_calibrations_page(neuroflow, clip, model, tmp_path):
    out, report = tmp_path / "config.json", tmp_path / "report.html"
    code, table, message = neuroflow(
        "calibrate", clip, "--model", model, "--target-fidelity", 0.97, "--out", out, "--report", report
    )
    assert code == 0, message
    page = Page(report)
    rows = [line.split() for line in table.splitlines()[3:] if line.startswith(" ")]
    assert len(rows) > 3
    for threshold, skipped, mean, p5, *chosen in rows:
        assert " ".join((threshold, skipped, mean, p5, *chosen)) in page.text
    assert f"Chosen threshold {json.loads(out.read_text())['threshold']:.4g}" in page.text
    assert f"neuroflow run {clip} --model {model} --config {out} --compare" in page.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    """Two classes of the package's own tower, and a clip that cannot be read."""
    root = tmp_path_factory.mktemp("folder")
    for name in ("car/1.mp4", "bus/2.mp4", "bus/3.mp4"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(clip, root / name)
    (root / "car" / "<script>.mp4").write_bytes(b"no video")
    return root


def test_an_evaluations_page(neuroflow, folder, tmp_path):
    out, report = tmp_path / "result.json", tmp_path / "report.html"
    options = ("--arch", "C", "E", "--threshold", 0.05, 0.5, "--max-frames", 4, "--out", out, "--report", report)
    code, _, message = neuroflow("eval", "video", folder, *options)
    assert code == 0, message
    page, result = Page(report), json.loads(out.read_text())
    assert len(result["table"]) == 5
    for row in result["table"]:
        low, high = row["top1_interval"]
        assert f"{row['system']} {row['top1']:.2%} {low:.1%} to {high:.1%} {row['top3']:.2%}" in page.text
        if row["skipped"] is not None:
            assert f"{row['skipped']:.1%} {row['cosine']:.4f}" in page.text
    assert "clips: 3 of 4" in page.text and "car/<script>.mp4" in page.text.partition("Left out")[2]
    assert page.tags["script"] == 0


def test_an_interrupted_evaluations_page(neuroflow, folder, monkeypatch, tmp_path):
    from neuroflow.cli import eval_video

    classify, report = eval_video.classify, tmp_path / "report.html"
    calls = iter(range(10))

    def interrupted(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return classify(*arguments)

    monkeypatch.setattr(eval_video, "classify", interrupted)
    assert neuroflow("eval", "video", folder, "--arch", "E", "--max-frames", 2, "--report", report)[0] == 130
    page = Page(report)
    assert "Interrupted" in page.text and "clips: 2 of 4" in page.text


def test_the_laws_page(neuroflow, clip, model, tmp_path):
    out, report = tmp_path / "laws.json", tmp_path / "report.html"
    options = ("--arch", "E", "--threshold", 0.1, 0.5, "--max-frames", 4, "--out", out, "--report", report)
    code, _, message = neuroflow("eval", "laws", clip, "--model", model, *options)
    assert code == 0, message
    page, found = Page(report), json.loads(out.read_text())["found"]
    assert page.source.count('class="chart"') == 6
    for row in found["saturation E"]:
        assert f"E {row['threshold']:.4f} {row['skipped']:.4f} {row['gap']:.4f}" in page.text


def test_secrets_are_not_shown(monkeypatch, neuroflow, clip, model, tmp_path):
    monkeypatch.setenv("NEUROFLOW_TOKEN", "open-sesame")
    assert neuroflow("run", clip, "--model", model, "--max-frames", 2, "--report", tmp_path / "report.html")[0] == 0
    page = Page(tmp_path / "report.html")
    assert "open-sesame" not in page.source and "NEUROFLOW_TOKEN set" in page.text


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("rtsp://admin:p@ss:w@10.0.0.7:554/stream", "rtsp://10.0.0.7:554/stream"),
        ("https://host/clip.mp4?token=abc#t=1", "https://host/clip.mp4"),
        ("https://host/@user/clip.mp4", "https://host/@user/clip.mp4"),
        ("a@b.mp4", "a@b.mp4"),
        ("what?.mp4", "what?.mp4"),
        ("0", "0"),
    ],
)
def test_addresses_are_shown_without_secrets(source, shown):
    assert shown_address(source) == shown


def record(frame, skipped=0.9, key_frame=False, ms=10.0, dense=30.0, cosine=0.995, **others):
    active = round(100 * (1 - skipped))
    return Record(frame, frame / 10, skipped, active, key_frame, ms, dense, cosine, frame == 0, **others)


def figures(records=None, stages=(), **each):
    """Those of 41 frames that are alike, the first but one being key frames where it says so."""
    records = records or [record(0, 0.0, True), *(record(frame, **each) for frame in range(1, 41))]
    return Figures(records, list(stages), 2**20, "Model", "gate", "machine")


def stages(**milliseconds):
    usual = {"decode": 1, "preprocess": 1, "wait": 1, "encode": 10, "dense": 30, "write": 1, "total": 45}
    return [Stages(**usual | milliseconds)] * 3


def key_frames(count, ms):
    """41 frames, so many of which are key frames; the others take 10 ms."""
    keys = [record(frame, 0.0, True, ms) for frame in range(1, count + 1)]
    return [record(0, 0.0, True), *keys, *(record(frame) for frame in range(count + 1, 41))]


CLIP = Setup("my clip.mp4", "./my-vit", NeuroFlowConfig())
CALIBRATE = "neuroflow calibrate 'my clip.mp4' --model ./my-vit --target-fidelity 0.99 --out config.json"
RULES = {
    "nothing": (figures(), {}, CLIP, None),
    "one frame": (figures([record(0)]), {}, CLIP, ("No frame could be scored", "more frames", None)),
    "few frames": (figures([record(0), record(1)]), {}, CLIP, ("rest on 1 scored frame.", "Run over more", None)),
    "no comparison": (
        figures(dense=None, cosine=None),
        {},
        CLIP,
        ("Fidelity was not measured", "", "neuroflow run 'my clip.mp4' --model ./my-vit --compare"),
    ),
    "low cosine": (figures(cosine=0.98), {}, CLIP, ("mean cosine is 0.9800, below 0.99", "gives 0.99", CALIBRATE)),
    "low cosine, own tower": (
        figures(cosine=0.98),
        {},
        CLIP._replace(model=None, source="x"),
        ("below 0.99", "", "neuroflow calibrate x --target-fidelity 0.99 --out config.json"),
    ),
    "low cosine, live": (figures(cosine=0.98), {}, CLIP._replace(live=True), ("below 0.99", "Record some", None)),
    "low cosine, budget": (
        figures(cosine=0.98),
        {},
        CLIP._replace(config=NeuroFlowConfig(budget=20)),
        ("below 0.99", "larger --budget, now 20", None),
    ),
    "room": (
        figures(cosine=0.9999, skipped=0.7),
        {},
        CLIP,
        ("0.9999 with 70.0% of the patches skipped", "gives 0.99", CALIBRATE),
    ),
    "one bad frame": (
        figures([*figures().records[:-1], record(40, cosine=0.8)]),
        {},
        CLIP,
        ("frame 40 falls to 0.8000", "--max-age", None),
    ),
    "the camera moves": (
        figures(skipped=0.5),
        {},
        CLIP,
        ("as when the camera moves: half of the partial frames encode 50% of", "--normalise-motion", None),
    ),
    "the camera moves, key frames": (
        figures(key_frames(20, 30.0)),
        dict.fromkeys(range(1, 21), "dense"),
        CLIP,
        ("50% of the frames are key frames for it", "--normalise-motion", None),
    ),
    "the camera moves, nothing else": (
        figures(skipped=0.0, key_frame=True, cosine=1.0),
        dict.fromkeys(range(1, 41), "cut"),
        CLIP,
        ("as when the camera moves: 100% of the frames are key frames for it.", "cut_surprise", None),
    ),
    "light": (
        figures(key_frames(12, 30.0)),
        dict.fromkeys(range(1, 13), "cut"),
        CLIP,
        ("12 key frames for cuts and changes of light took 56%", "cut_light (now 0.12) or cut_share (now 0.5)", None),
    ),
    "large changes": (
        figures(key_frames(1, 90.0)),
        {1: "dense"},
        CLIP,
        ("1 key frame for large changes took 19%", "--threshold", None),
    ),
    "age": (
        figures(key_frames(4, 30.0)),
        dict.fromkeys(range(1, 5), "age"),
        CLIP,
        ("for age took 25%", "now 128", None),
    ),
    "NaN": (
        figures(key_frames(1, 10.0)),
        {1: "nonfinite"},
        CLIP,
        ("1 key frame after frames with NaN", "float32", None),
    ),
    "size": (figures(key_frames(1, 10.0)), {1: "size"}, CLIP, ("1 key frame for another size", "one size", None)),
    "decoding": (
        figures(stages=stages(decode=90, wait=84, total=130)),
        {},
        CLIP,
        (
            "84% of the time went to waiting for input: decoding takes 90.0 ms a frame, the model 10.0 ms",
            "--stride",
            None,
        ),
    ),
    "preprocessing": (
        figures(stages=stages(preprocess=90, wait=84, total=130)),
        {},
        CLIP,
        ("preprocessing takes 90.0 ms", "resized", None),
    ),
    "a live camera": (
        figures(stages=stages(wait=84, total=130)),
        {},
        CLIP._replace(live=True),
        ("waited for the camera for 84%", "16.0 of 100.0 ms: it could follow about 6 such cameras", None),
    ),
    "writing": (
        figures(stages=stages(write=30, total=75)),
        {},
        CLIP._replace(overlay=True),
        ("Writing took 67% of the time, 30.0 ms", "--overlay", None),
    ),
    "overhead": (figures(ms=29.0), {}, CLIP, ("90% of the patches are skipped", "--size", None)),
}


@pytest.mark.parametrize("rule", RULES)
def test_what_to_try_next(rule):
    numbers, reasons, setup, expected = RULES[rule]
    advice = advise(numbers, reasons, setup)
    if expected is None:
        assert advice == []
        return
    (found,) = advice
    for part, words in zip(found[:2], expected, strict=False):
        assert words in part
    assert found.command == expected[2]


def test_charts_are_reproducible_and_bounded():
    numbers = figures()
    assert charts.timeline(numbers, {0: "first"}) == charts.timeline(numbers, {0: "first"})
    random = np.random.default_rng(0)
    many = figures([record(0), *(record(each, cosine=float(random.uniform(0.9, 1))) for each in range(1, 30_000))])
    assert len(charts.timeline(many, {0: "first"})) < 300_000


class Frame:
    """A frame of one colour."""

    def __init__(self, number):
        self.index, self.time, self.size = number, number / 10, (20, 40)

    def rgb(self, height, width, _):
        return np.full((height, width, 3), self.index % 256, np.uint8)


def passed(number, active, reason=None, cosine=None):
    """What `encode_stream` gives of a frame, as far as a report looks at it."""
    came = record(number, 1 - active.float().mean().item(), reason is not None, cosine=cosine)
    prepared = SimpleNamespace(frame=Frame(number), region=(10.0, 0.0, 30.0, 20.0))
    return SimpleNamespace(prepared=prepared, record=came, active=active, key_frame=reason)


def test_moments():
    random = torch.Generator().manual_seed(0)
    moments, ages, counts = Moments(), np.zeros((3, 4), int), np.zeros(33, int)
    keys = {0: "first", 50: "age", 120: "cut", 150: "cut"}
    maps, cosines = [], []
    for number in range(200):
        active = torch.ones(3, 4, dtype=torch.bool)
        if number not in keys:
            active = torch.rand(3, 4, generator=random) < 0.05 + 0.3 * (number == 77)
        cosines.append(torch.rand(1, generator=random).item())
        maps.append(active)
        moments.note(passed(number, active, keys.get(number), cosines[-1]))
        ages = np.where(active, 0, ages + 1)
        for age in ages.ravel() if number else ():
            counts[0 if age == 0 else int(np.log2(age)) + 1] += 1
    assert moments.reasons == keys and np.array_equal(moments.ages, counts) and counts[5] > 0
    assert len(moments._spaced) < SPACED
    chosen = dict(moments.chosen())
    frames = {label: still.record.frame for label, still in chosen.items()}
    assert list(frames.values()) == sorted(frames.values())
    assert (frames["key frame: first"], frames["key frame: age"], frames["key frame: cut"]) == (0, 50, 120)
    lowest = 1 + int(np.argmin(cosines[1:]))
    assert next(frame for label, frame in frames.items() if "lowest cosine" in label) == lowest
    partial = [int(active.sum()) for number, active in enumerate(maps) if number not in keys]
    for label, still in chosen.items():
        if "typical" in label:
            assert still.record.active == record(0, 1 - np.median(partial) / 12).active
        if "most patches" in label:
            assert int(still.active.sum()) == max(partial)
        assert still.region == (0.25, 0.0, 0.75, 1.0) and still.picture.shape == (20, 40, 3)
        assert (still.picture == still.record.frame % 256).all()


def test_what_is_drawn_over_a_still():
    active = torch.tensor([[0, 1, 0], [1, 1, 0]], dtype=torch.bool)
    moments = Moments()
    moments.note(passed(0, torch.ones_like(active), "first"))
    moments.note(passed(1, active))
    still = dict(moments.chosen())["typical: median share encoded, most patches encoded"]
    assert still.inactive_path() == "M0 0h1v1h-1zM2 0h1v1h-1zM2 1h1v1h-1z"
    lines = re.findall(r"M(\d) (\d)([hv])1", still.outline_path())
    around = "10h 01h 02h 12h 10v 20v 01v 21v"
    assert sorted("".join(line) for line in lines) == sorted(around.split())
    first = dict(moments.chosen())["key frame: first"]
    assert first.inactive_path() == ""
    assert still.jpeg().startswith("data:image/jpeg;base64,/9j/")

"""The command as a user meets it: what it writes, what it says, and what it answers to bad input."""

import json
import re
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from neuroflow import NeuroFlowConfig
from neuroflow.cli import demo
from neuroflow.cli.encoding import caption
from neuroflow.cli.report import format_report
from neuroflow.report.figures import Figures
from neuroflow.street.scene import CAMERAS, CLASSES, TRAJECTORIES, Scene, draw_scene, scenes, write_scene
from neuroflow.video.encode import VideoWriter
from neuroflow.video.overlay import PANEL_HEIGHT
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.results import Record, Results
from neuroflow.video.source import Source
from neuroflow_cli import main
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES = 8


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The directory of tiny models; test_models.py has one of every type that the command takes."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    SiglipVisionModel(SiglipVisionConfig(**TINY, image_size=64)).save_pretrained(root / "siglip")
    ViTModel(ViTConfig(**TINY, image_size=64)).save_pretrained(root / "vit")
    partial = SiglipVisionModel(SiglipVisionConfig(**TINY, image_size=64))
    kept = {name: tensor for name, tensor in partial.state_dict().items() if "layers.1.mlp" not in name}
    partial.save_pretrained(root / "partial", state_dict=kept)
    (root / "unknown").mkdir()
    (root / "unknown" / "config.json").write_text("{")
    return root


def write_clip(path, frames=FRAMES, noise=0):
    """A square that moves over a still texture."""
    random = np.random.default_rng(0)
    background = random.integers(0, 256, (8, 12, 3), np.uint8).repeat(12, 0).repeat(12, 1)
    with VideoWriter(path, Fraction(10)) as writer:
        for number in range(frames):
            image = background.copy()
            image[20:44, 8 * (number % 12) : 8 * (number % 12) + 24] = 255
            grain = random.integers(0, noise + 1, image.shape)
            writer.write((image - np.minimum(grain, image)).astype(np.uint8))
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


@pytest.fixture
def neuroflow_run(models, capsys):
    """neuroflow_run(source, *options) -> exit code, stdout, stderr."""

    def call(source, *options, model="siglip"):
        name = str(models / model) if (models / model).exists() else model
        try:
            code = main(["run", str(source), "--model", name, *map(str, options)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_main_job(tmp_path, neuroflow_run, clip):
    out, overlay = tmp_path / "result.jsonl", tmp_path / "overlay.mp4"
    code, table, progress = neuroflow_run(clip, "--compare", "--out", out, "--overlay", overlay)
    assert code == 0
    for words in ("frames            8, 7 of them scored", "dense", "NeuroFlow", "speed-up", "p20", "p80"):
        assert words in table
    for words in (
        "patches skipped",
        "cosine to dense",
        "p5",
        "min",
        "key frames        1",
        "bytes",
        "float32",
        "threads 1 of",
        "pipeline",
        "wait for input",
    ):
        assert words in table
    assert "8/8" in progress and "skipped" in progress
    records = rows(out)
    assert [record["frame"] for record in records] == list(range(FRAMES))
    assert [record["key_frame"] for record in records] == [True] + [False] * (FRAMES - 1)
    assert all(record["neuroflow_ms"] > 0 and record["dense_ms"] > 0 for record in records)
    assert records[0]["active"] == 16 and records[0]["skipped"] == 0
    assert all(0 < record["active"] < 16 and record["skipped"] == 1 - record["active"] / 16 for record in records[1:])
    skipped = np.mean([record["skipped"] for record in records[1:]])
    assert f"patches skipped   {skipped:.1%}" in table
    cosine = np.array([record["cosine"] for record in records[1:]])
    assert f"mean {cosine.mean():.4f}   p5 {np.quantile(cosine, 0.05):.4f}   min {cosine.min():.4f}" in table
    assert len(list(Source(str(overlay)))) == FRAMES
    assert sorted(file.name for file in tmp_path.iterdir()) == ["overlay.mp4", "result.jsonl"]


@pytest.mark.parametrize("family", ["siglip", "vit"])
def test_embedding_is_the_models_own_where_nothing_is_skipped(tmp_path, neuroflow_run, models, clip, family):
    out = tmp_path / "result.npz"
    assert neuroflow_run(clip, "--threshold", 0, "--out", out, model=family)[0] == 0
    if family == "siglip":
        model = SiglipVisionModel.from_pretrained(models / family)
    else:
        model = ViTModel.from_pretrained(models / family, add_pooling_layer=False)
    pixels = torch.cat([Preprocessor(64, 64)(frame) for frame in Source(str(clip))])
    with torch.no_grad():
        output = model.eval()(pixel_values=pixels)
    expected = output.pooler_output if family == "siglip" else output.last_hidden_state[:, 0]
    torch.testing.assert_close(torch.from_numpy(np.load(out)["embedding"]), expected, rtol=1e-4, atol=1e-5)


def test_the_middle_of_frames_where_the_model_asks_for_it(tmp_path, neuroflow_run, models, clip):
    name, out, overlay = str(tmp_path / "model"), tmp_path / "result.npz", tmp_path / "overlay.mp4"
    shutil.copytree(models / "siglip", name)
    settings = {"size": {"shortest_edge": 72}, "do_center_crop": True, "crop_size": 64}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    options = ("--threshold", 0, "--out", out, "--overlay", overlay, "--max-frames", 2)
    code, table, _ = neuroflow_run(clip, *options, model=name)
    assert code == 0 and "64x64, 16 patches" in table
    pixels = torch.cat([Preprocessor(64, 64, crop=True, resize=72)(frame) for frame in Source(str(clip))][:2])
    with torch.no_grad():
        expected = SiglipVisionModel.from_pretrained(name).eval()(pixel_values=pixels).pooler_output
    torch.testing.assert_close(torch.from_numpy(np.load(out)["embedding"]), expected, rtol=1e-4, atol=1e-5)
    picture = next(iter(Source(str(overlay))))
    panel, _, patches = np.split(picture.rgb(*picture.size)[30:PANEL_HEIGHT].astype(float), 3, 1)
    ratio = patches.mean((0, 2)) / panel.mean((0, 2))  # of 108 columns, resized, 22 are cut away on either side
    assert ratio[8:96].max() < 0.5 and ratio[120:418].min() > 0.8 and ratio[442:530].max() < 0.5
    code, table, message = neuroflow_run(clip, "--size", "96x64", model=name)
    assert code == 0 and "96x64, 24 patches" in table
    assert "warning: frames are resized whole to 96x64, in place of the 64x64 that" in message
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(settings | {"image_std": [0.5, 0, 0.5]}))
    code, table, message = neuroflow_run(clip, model=name)
    assert code == 2 and table == "" and message.count("\n") == 1 and "image_std is [0.5, 0, 0.5]" in message


def test_without_compare_there_is_no_dense_time(tmp_path, neuroflow_run, clip):
    out = tmp_path / "result.jsonl"
    code, table, _ = neuroflow_run(clip, "--out", out)
    assert code == 0 and "speed-up" not in table and "--compare" in table
    assert {record["dense_ms"] for record in rows(out)} == {record["cosine"] for record in rows(out)} == {None}


def test_stride_and_max_frames(tmp_path, neuroflow_run, clip):
    out = tmp_path / "result.jsonl"
    assert neuroflow_run(clip, "--stride", 3, "--out", out)[0] == 0
    assert [record["frame"] for record in rows(out)] == [0, 3, 6]
    assert [record["time_s"] for record in rows(out)] == [0, 0.3, 0.6]
    assert neuroflow_run(clip, "--stride", 2, "--max-frames", 2, "--out", out)[0] == 0
    assert [record["frame"] for record in rows(out)] == [0, 2]


@pytest.mark.parametrize("family", ["siglip", "vit"])
def test_another_size_interpolates_positions(tmp_path, neuroflow_run, clip, family):
    out = tmp_path / "result.jsonl"
    code, table, _ = neuroflow_run(clip, "--size", "96x64", "--compare", "--threshold", 0, "--out", out, model=family)
    assert code == 0 and "96x64, 24 patches" in table
    assert all(record["active"] == 24 and record["cosine"] > 0.9999 for record in rows(out))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path, neuroflow_run, clip, dtype):
    code, table, _ = neuroflow_run(clip, "--dtype", dtype, "--compare", "--out", tmp_path / "result.jsonl")
    assert code == 0 and dtype in table
    assert all(record["cosine"] > 0.8 for record in rows(tmp_path / "result.jsonl"))


@pytest.mark.parametrize(
    ("options", "gate"),
    [
        ([], f"context, threshold {NeuroFlowConfig().threshold}, floor 4, signal patch, reference refreshed"),
        (
            ["--arch", "C", "--ema-decay", 0.02, "--threshold", 0.1],
            "dual, threshold 0.1, floor 4, signal patch, reference ema 0.02",
        ),
        (
            ["--budget", 3, "--floor", 1, "--max-age", 9],
            "budget 3, floor 1, signal patch, reference refreshed, at most 9 frames old",
        ),
        (["--signal", "embedding", "--reference", "ema"], "signal embedding, reference ema 0.01"),
        (["--precision", "bfloat16"], "at most 128 frames old, precision bfloat16"),
    ],
)
def test_gate_options_reach_the_gate(neuroflow_run, clip, options, gate):
    code, table, _ = neuroflow_run(clip, *options)
    assert code == 0 and gate in table


def test_directory_of_images(tmp_path, neuroflow_run, clip):
    for frame in Source(str(clip)):
        Image.fromarray(frame.rgb(*frame.size)).save(tmp_path / f"{frame.index:03}.png")
    code, table, _ = neuroflow_run(tmp_path, "--overlay", tmp_path / "overlay.mp4")
    assert code == 0 and "frames            8" in table and (tmp_path / "overlay.mp4").exists()


def bad_source(kind, directory):
    path = directory / "source.mp4"
    if kind == "text":
        path.write_text("this is not a video\n" * 50)
    elif kind == "cut":
        path.write_bytes(write_clip(directory / "whole.mp4").read_bytes()[:300])
        (directory / "whole.mp4").unlink()
    elif kind == "empty directory":
        path.mkdir()
    elif kind == "no frames":
        write_clip(path, frames=1)
        content = bytearray(path.read_bytes())
        start = content.index(b"mdat") + 4
        content[start:] = content[start:].replace(content[start : content.index(b"moov") - 4], b"")
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", ["missing", "text", "cut", "empty directory", "no frames"])
def test_bad_source_is_one_line_and_leaves_no_file(tmp_path, neuroflow_run, kind):
    source = bad_source(kind, tmp_path)
    before = sorted(tmp_path.iterdir())
    outputs = ("--out", tmp_path / "result.jsonl", "--overlay", tmp_path / "overlay.mp4")
    code, table, message = neuroflow_run(source, *outputs)
    assert code == 2 and table == ""
    assert message.startswith("neuroflow: error: ") and message.count("\n") == 1 and str(source) in message
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-pixels", 1000], "144x96 is over the ceiling of 1,000 pixels, see --max-pixels"),
        (["--max-pixels", 0], "0 is not 1 or more"),
        (["--arch", "F"], "arch is 'F'; accepted is one of"),
        (["--threshold", -1], "threshold is -1.0; accepted is"),
        (["--threshold", 0.1, "--budget", 4], "budget is 4.0"),
        (["--threshold", "low"], "invalid float value: 'low'"),
        (["--stride", 0], "0 is not 1 or more"),
        (["--size", 100], "multiples of the patch size, 16x16"),
        (["--size", "big"], "'big' is not a size; give 448 or 640x384"),
        (["--device", "cuda:77"], "--device cuda:77: cannot be used"),
        (["--device", "gpu"], "--device gpu: cannot be used"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--out", "result.csv"], "not a known format"),
        (["--out", "no/where/result.npz"], "a directory that exists"),
        (["--overlay", "overlay.gif"], "give a .mp4 file"),
        (["--resume"], "without --out"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_option_is_one_line(neuroflow_run, clip, options, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, table, message = neuroflow_run(clip, *options)
    message = "".join(line for line in message.splitlines(True) if not line.startswith("warning: "))
    assert code == 2 and table == ""
    assert "error: " in message and message.count("\n") == 1 and words in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("unknown", "cannot be loaded"),
        ("partial", "4 weights are missing"),
        ("/no/such/model", "no such directory"),
        ("nobody/no-such-model", "cannot be loaded"),
    ],
)
def test_bad_model_is_one_line(neuroflow_run, clip, model, words, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, table, message = neuroflow_run(clip, "--out", tmp_path / "result.jsonl", model=model)
    assert code == 2 and table == ""
    assert message.count("\n") == 1 and words in message
    assert list(tmp_path.iterdir()) == []


def test_damage_half_way_keeps_what_came_before(tmp_path, neuroflow_run):
    content = bytearray(write_clip(tmp_path / "clip.mp4", 24, noise=60).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 5000] = np.random.default_rng(0).bytes(5000)
    (tmp_path / "clip.mp4").write_bytes(content)
    code, table, message = neuroflow_run(tmp_path / "clip.mp4", "--out", tmp_path / "result.jsonl")
    kept = len(rows(tmp_path / "result.jsonl"))
    assert code == 0 and 3 < kept < 22
    assert f"frames            {kept}," in table
    (warning,) = (line for line in message.splitlines() if "past frame" in line)
    assert warning.startswith("warning: ") and f"past frame {kept} " in warning
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip.mp4", "result.jsonl"]


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(n): Ctrl-C comes once n frames are on disk; interrupt(None): it no longer does."""
    append = Results.append

    def arm(frames):
        count = 0

        def interrupted(self, *arguments):
            nonlocal count
            append(self, *arguments)
            count += 1
            if count == frames:
                raise KeyboardInterrupt

        monkeypatch.setattr(Results, "append", interrupted)

    return arm


def test_interrupted_run_is_continued(tmp_path, neuroflow_run, clip, interrupt):
    out, overlay = tmp_path / "result.npz", tmp_path / "overlay.mp4"
    options = (clip, "--compare", "--threshold", 2, "--out", out, "--overlay", overlay)
    interrupt(3)
    code, table, message = neuroflow_run(*options)
    assert code == 130 and table == "" and "interrupted after 3 frames" in message and "--resume" in message
    assert [file.name for file in tmp_path.iterdir()] == ["result.npz.journal"]
    interrupt(None)
    code, table, message = neuroflow_run(*options, "--resume")
    assert code == 0 and "resuming at frame 3: it is a key frame" in message
    assert "frames            8, 6 of them scored" in table and "key frames        2" in table
    result = np.load(out)
    assert result["frame"].tolist() == list(range(FRAMES))
    assert result["key_frame"].nonzero()[0].tolist() == [0, 3]
    assert len(list(Source(str(overlay)))) == FRAMES - 3
    assert not (tmp_path / "result.npz.journal").exists()


def test_continuing_another_run_is_refused(tmp_path, neuroflow_run, clip, interrupt):
    out = tmp_path / "result.npz"
    interrupt(3)
    neuroflow_run(clip, "--out", out)
    for changed, words in ((["--arch", "B"], "made with arch context, not active"), (["--size", 32], "made with size")):
        code, _, message = neuroflow_run(clip, "--out", out, "--resume", *changed)
        assert code == 2 and words in message and message.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["result.npz.journal"]


def test_resume_with_nothing_to_continue_begins_at_the_beginning(tmp_path, neuroflow_run, clip):
    out = tmp_path / "result.jsonl"
    assert neuroflow_run(clip, "--out", out, "--resume")[0] == 0
    assert len(rows(out)) == FRAMES


def test_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "SIGLIP_BASE", TINY)
    monkeypatch.setattr(demo, "SCENES", 5)
    monkeypatch.setattr(demo, "FRAMES", 16)
    assert main(["demo", "--out-dir", str(tmp_path / "demo")]) == 0
    table = capsys.readouterr().out
    for words in (*TRAJECTORIES, *CAMERAS, "top-1", "speed-up", "weights are random, so only the speed counts"):
        assert words in table
    clips = [f"{scene.subject}-{scene.trajectory}-{scene.camera}.mp4" for scene in scenes(5, held_out=True)]
    written = sorted(file.name for file in (tmp_path / "demo").iterdir())
    assert written == sorted([*clips, "overlay.mp4", "result.jsonl", "street.mp4"])
    records = rows(tmp_path / "demo" / "result.jsonl")
    assert len(records) == 16 and len(records[0]["embedding"]) == 192
    assert 0.5 < np.mean([record["skipped"] for record in records[1:]]) < 1
    clip = re.search(rf"^  {re.escape(demo.started_as())} run (\S+) --threshold", table, re.MULTILINE)[1]
    scene = scenes(5, held_out=True)[clips.index(Path(clip).name)]
    assert Path(clip).exists() and f"Open {tmp_path / 'demo' / 'overlay.mp4'}: the {scene.subject} beside" in table
    labels = [CLASSES[label] if label >= 0 else None for _, label in draw_scene(scene, 16)]
    named = [record["dense_predicted"] for record in records]
    assert all(label in (None, name) for label, name in zip(labels[1:], named[1:], strict=True)), (labels, named)


def test_the_showcase_is_what_dense_names_rightly_and_skips_most():
    wrong, right, better = (Scene("dog", "arc", "static", seed) for seed in range(3))

    def scored(scene, dense, skipped, *, label="dog", first=False):
        return demo.Scored(scene, label, Record(0, 0, skipped, 9, first, 2.0, 9.0, 0.9, first, "bird", dense))

    frames = [
        *(scored(wrong, "dog", 0.99), scored(wrong, "bird", 0.99)),
        *(scored(right, "bird", 0.0, first=True), scored(right, "dog", 0.5), scored(right, "cat", 0.5, label=None)),
        *(scored(better, "dog", 0.4), scored(better, "dog", 0.8)),
    ]
    assert demo.showcase(frames) == better
    assert demo.showcase(frames[:-2]) == right
    assert demo.showcase(frames[:2]) == wrong


@pytest.mark.parametrize(
    ("typed", "on_path", "expected"),
    [
        (".venv/bin/neuroflow", None, ".venv/bin/neuroflow"),
        ("/opt/bin/neuroflow", "/opt/bin/neuroflow", "neuroflow"),
        (".venv/bin/neuroflow", "/opt/bin/neuroflow", ".venv/bin/neuroflow"),
        ("/my env/bin/neuroflow", None, "'/my env/bin/neuroflow'"),
        ("/src/neuroflow_cli.py", "/opt/bin/neuroflow", f"{sys.executable} -m neuroflow_cli"),
    ],
)
def test_what_to_type_next_begins_as_the_demo_was_started(monkeypatch, typed, on_path, expected):
    monkeypatch.setattr(sys, "argv", [typed])
    monkeypatch.setattr(shutil, "which", lambda name: on_path)
    assert demo.started_as() == expected
    said = demo.farewell("bus", Path("my demo/bus.mp4"), Path("my demo/overlay.mp4"), Path("my demo/result.jsonl"))
    assert f"  {expected} run 'my demo/bus.mp4' --threshold" in said


def test_table_of_the_demo():
    car = Scene("car", "local", "static", 1)
    dog = Scene("dog", "arc", "pan", 3)

    def scored(scene, label, predicted, dense, *, first=False, skipped=0.5):
        return demo.Scored(scene, label, Record(0, 0, skipped, 98, first, 2.0, 9.0, 0.9, first, predicted, dense))

    table = demo.format_scores(
        [
            scored(car, "car", "dog", "dog", first=True, skipped=0.0),
            scored(car, "car", "car", "car"),
            scored(car, "car", "van", "car"),
            scored(car, None, "van", "van"),
            scored(dog, "dog", "dog", "bird", skipped=0.8),
        ],
        "trajectory",
        TRAJECTORIES,
    )
    assert [line.split() for line in table.splitlines()[3:]] == [
        ["local", "100.0%", "50.0%", "0.9000", "50.0%", "9.0", "2.0"],
        ["arc", "0.0%", "100.0%", "0.9000", "80.0%", "9.0", "2.0"],
        ["all", "66.7%", "66.7%", "0.9000", "57.5%", "9.0", "2.0"],
    ]


def test_without_model_the_packages_own_is_used_and_named(tmp_path, capsys):
    clip, out = tmp_path / "scene.mp4", tmp_path / "result.jsonl"
    labels = write_scene(clip, Scene("bus", "local", "static", 1), 8)
    assert main(["run", str(clip), "--compare", "--out", str(out)]) == 0
    table, message = capsys.readouterr()
    assert message.count("no --model given") == 1 and "224x224, 196 patches" in table
    records = rows(out)
    assert [record["dense_predicted"] for record in records] == [CLASSES[label] for label in labels] == ["bus"] * 8
    agreement = np.mean([record["predicted"] == record["dense_predicted"] for record in records[1:]])
    assert f"top-1 agreement   {agreement:.1%}" in table


def test_agreement_and_caption_name_what_differs():
    first, same, other = (
        Record(number, 0, 0.5, 98, number == 0, 2.0, 9.0, 0.9, number == 0, predicted, "car")
        for number, predicted in enumerate(("van", "car", "van"))
    )
    table = format_report(Figures([first, same, other], [], 0, "", "", ""))
    assert "top-1 agreement   50.0% of the frames" in table
    assert caption(same).startswith("frame 1    car    50.0% skipped")
    assert caption(other).startswith("frame 2    van (dense: car)    50.0% skipped")
    assert caption(same, "cut").endswith("    key frame: cut") and "key frame" not in caption(same)


def test_help_shows_examples_and_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    options = (
        "device dtype arch threshold ema-decay stride max-frames resume compare out overlay report size max-pixels"
    )
    assert all(f"--{option}" in text for option in options.split())

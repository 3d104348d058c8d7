"""`neuroflow calibrate`, and `neuroflow run --config` with what it wrote."""

import json
from fractions import Fraction

import numpy as np
import pytest
from models import PATCH, tiny, vit_tiny
from neuroflow import NeuroFlowConfig
from neuroflow.cli import calibrate
from neuroflow.video.encode import VideoWriter
from neuroflow.video.source import Source

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE, FRAMES = 96, 12


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "siglip"
    tiny("siglip", SIDE).save_pretrained(directory)
    return directory


def write_clip(path, frames=FRAMES, moving=True):
    """A texture under grain that grows from patch to patch."""
    random = np.random.default_rng(0)
    patches = SIDE // PATCH
    still = random.integers(60, 196, (SIDE, SIDE, 3))
    amount = np.geomspace(1, 60, patches**2).reshape(patches, patches).repeat(PATCH, 0).repeat(PATCH, 1)
    with VideoWriter(path, Fraction(10)) as writer:
        for _ in range(frames):
            grain = random.uniform(-1, 1, still.shape) * amount[..., None] * moving
            writer.write((still + grain).astype(np.uint8))
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


@pytest.fixture
def calibrated(neuroflow, clip, model, tmp_path):
    """calibrated(*options) -> the same of `calibrate`; and the file that it writes."""
    out = tmp_path / "config.json"
    return lambda *options: neuroflow("calibrate", clip, "--model", model, "--out", out, *options), out


def measured(neuroflow, path, clip, model, *options):
    """(table, mean skip, mean cosine) of `run --compare`."""
    out = path / "result.npz"
    code, table, message = neuroflow("run", clip, "--model", model, "--compare", "--out", out, *options)
    assert code == 0, message
    result = np.load(out)
    assert result["first"].tolist() == [True] + [False] * (len(result["first"]) - 1)
    return table, result["skipped"][1:].mean(), result["cosine"][1:].mean()


def test_target_skip_is_what_run_then_skips(neuroflow, calibrated, tmp_path, clip, model):
    call, out = calibrated
    code, table, progress = call("--target-skip", 0.6, "--floor", 2, "--max-age", 50)
    assert code == 0 and f"frames            {FRAMES}, {FRAMES - 1} of them scored" in table
    assert "dense" in progress and "trial 1" in progress
    config = NeuroFlowConfig.load(out)
    assert config == NeuroFlowConfig(threshold=config.threshold, floor=2, max_age=50)
    rows = [line.split() for line in table.splitlines() if "%" in line]
    assert [float(row[0]) for row in rows] == sorted(float(row[0]) for row in rows) and len(rows) > 1
    (chosen,) = (row for row in rows if row[-1] == "chosen")
    assert float(chosen[0]) == config.threshold
    of_run, skipped, cosine = measured(neuroflow, tmp_path, clip, model, "--config", out)
    assert skipped == pytest.approx(0.6, abs=0.005)
    assert chosen[1:3] == [f"{skipped:.1%}", f"{cosine:.4f}"]
    (setting,) = (line for line in table.splitlines() if line.startswith("NeuroFlow  "))
    assert setting in of_run and f"written           {out}" in table


def test_target_fidelity_is_what_run_then_reaches(neuroflow, calibrated, tmp_path, clip, model):
    call, out = calibrated
    options = ("--dtype", "bfloat16", "--size", 48, "--stride", 2, "--max-frames", 5)
    easy, hard = (measured(neuroflow, tmp_path, clip, model, *options, "--threshold", t)[2] for t in (1e-4, 2))
    target = (easy + hard) / 2
    code, table, _ = call("--target-fidelity", target, *options)
    assert code == 0 and "frames            5, 4 of them scored" in table
    cosine = measured(neuroflow, tmp_path, clip, model, *options, "--config", out)[2]
    assert target <= cosine < easy


def test_options_override_the_file(neuroflow, tmp_path, clip, model):
    threshold, budget, dual = (tmp_path / f"{name}.json" for name in ("threshold", "budget", "dual"))
    NeuroFlowConfig(arch="C", threshold=0.3, floor=7, max_age=9, score="surprise", dilation=1).save(threshold)
    NeuroFlowConfig(budget=5).save(budget)
    NeuroFlowConfig(reference="dual").save(dual)

    def setting(*options):
        code, table, _ = neuroflow("run", clip, "--model", model, "--max-frames", 2, "--config", *options)
        assert code == 0
        return next(line for line in table.splitlines() if line.startswith("NeuroFlow  "))

    rest = "signal patch, reference refreshed, at most 9 frames old, dilation 1, score surprise"
    assert setting(threshold).endswith(f" dual, threshold 0.3, floor 7, {rest}")
    assert setting(threshold, "--floor", 2, "--budget", 3).endswith(f" dual, budget 3, floor 2, {rest}")
    assert "context, threshold 0.25, floor 4" in setting(budget, "--threshold", 0.25)
    assert "reference ema 0.02" in setting(budget, "--ema-decay", 0.02)
    assert "reference dual" in setting(dual, "--ema-decay", 0.02)


def test_a_preset_is_the_published_gate_under_what_is_given(neuroflow, calibrated, tmp_path, clip, model):
    def setting(*options):
        code, table, _ = neuroflow("run", clip, "--model", model, "--max-frames", 2, "--preset", "published", *options)
        assert code == 0
        return next(line for line in table.splitlines() if line.startswith("NeuroFlow  ")).split(None, 1)[1]

    rest = "cut_share None, cut_surprise None, cut_light None, dense_above 1.0"
    gate = "signal embedding, reference ema 0.01"
    assert setting() == f"dual, threshold 0.02, floor 4, {gate}, score surprise, {rest}"
    assert (
        setting("--threshold", 0.05, "--arch", "E")
        == f"context, threshold 0.05, floor 4, {gate}, score surprise, {rest}"
    )
    assert setting("--budget", 3, "--ema-decay", 0.02).startswith(
        "dual, budget 3, floor 4, signal embedding, reference ema 0.02"
    )
    call, out = calibrated
    assert call("--target-skip", 0.5, "--preset", "published", "--floor", 3)[0] == 0
    config = NeuroFlowConfig.load(out)
    assert config == NeuroFlowConfig.published(floor=3, threshold=config.threshold)


@pytest.mark.parametrize("option", ["--config", "--weights"])
def test_a_preset_excludes_files_that_hold_a_gate(neuroflow, clip, model, tmp_path, option):
    path = tmp_path / "gate"
    NeuroFlowConfig().save(path)
    code, table, message = neuroflow("run", clip, "--model", model, "--preset", "published", option, path)
    assert code == 2 and table == ""
    assert (
        message == f"neuroflow: error: {option} {path}: has settings of its own; give it without --preset published\n"
    )


def test_a_calibration_starts_from_the_file_too(neuroflow, calibrated, tmp_path):
    call, out = calibrated
    NeuroFlowConfig(signal="embedding", floor=7).save(tmp_path / "base.json")
    assert call("--target-skip", 0.5, "--config", tmp_path / "base.json", "--floor", 3)[0] == 0
    config = NeuroFlowConfig.load(out)
    assert config == NeuroFlowConfig(signal="embedding", floor=3, threshold=config.threshold)


def test_a_changed_file_is_not_continued(neuroflow, tmp_path, clip, model, monkeypatch):
    config, out = tmp_path / "config.json", tmp_path / "result.npz"
    NeuroFlowConfig(threshold=0.1).save(config)
    monkeypatch.setattr("neuroflow.video.results.Results.finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    command = ("run", clip, "--model", model, "--config", config, "--out", out)
    assert neuroflow(*command, "--max-frames", 3)[0] == 130
    monkeypatch.undo()
    NeuroFlowConfig(threshold=0.2).save(config)
    code, _, message = neuroflow(*command, "--resume")
    assert code == 2 and "made with threshold 0.1, not 0.2" in message
    NeuroFlowConfig(threshold=0.1).save(config)
    assert neuroflow(*command, "--resume")[0] == 0
    assert np.load(out)["frame"].tolist() == list(range(FRAMES))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "one of the arguments --target-fidelity --target-skip is required"),
        (["--target-fidelity", 0.9, "--target-skip", 0.9], "not allowed with argument"),
        (["--target-fidelity", 1], "'1' is not a number between 0 and 1"),
        (["--target-skip", "most"], "'most' is not a number between 0 and 1"),
        (["--target-skip", 0.5, "--budget", 4], "unrecognized arguments: --budget"),
        (["--target-skip", 0.5, "--config", "budget.json"], "config has a budget of 4; accepted is None"),
        (["--target-skip", 0.5, "--config", "missing.json"], "missing.json"),
        (["--target-skip", 0.5, "--max-frames", 1], "gives 1 frame(s), and the first is not scored; give more"),
        (["--target-skip", 0.5, "--out", "no/where.json"], "--out no/where.json: cannot be written; give a file in a"),
        (
            ["--target-skip", 0.99],
            "of 99.0% is not reached: the nearest is threshold 1000, 97.2% of the patches skipped",
        ),
        (["--target-skip", 0.99], "; give a --target-skip closer to that, a smaller --floor, or other footage"),
        (["--target-fidelity", 0.9999999, "--dtype", "bfloat16"], "; give a lower --target-fidelity, or other footage"),
    ],
)
def test_what_cannot_be_done_is_one_line(neuroflow, clip, model, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    NeuroFlowConfig(budget=4).save("budget.json")
    monkeypatch.setattr(calibrate, "tqdm", lambda frames, **_: frames)
    code, table, message = neuroflow("calibrate", clip, "--model", model, "--out", "config.json", *options)
    assert code == 2 and table == ""
    assert "error: " in message and message.count("\n") == 1 and words in message
    assert [file.name for file in tmp_path.iterdir()] == ["budget.json"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("missing", "no such file"), ("text", "cannot be opened"), ("still", "nothing changes in the frames")],
)
def test_a_clip_that_gives_nothing_is_one_line(neuroflow, model, tmp_path, monkeypatch, kind, words):
    monkeypatch.setattr(calibrate, "tqdm", lambda frames, **_: frames)
    source, out = tmp_path / "source.mp4", tmp_path / "config.json"
    if kind == "text":
        source.write_text("this is not a video\n" * 50)
    elif kind == "still":
        write_clip(source, 3, moving=False)
        first = next(iter(Source(str(source))))
        source = tmp_path / "frames"
        source.mkdir()
        for number in range(3):
            first.picture.to_image().save(source / f"{number}.png")
    code, table, message = neuroflow("calibrate", source, "--model", model, "--target-skip", 0.5, "--out", out)
    assert code == 2 and table == "" and not out.exists()
    assert message.startswith("neuroflow: error: ") and message.count("\n") == 1 and words in message


def test_a_live_source_is_refused(neuroflow, model, clip, tmp_path, monkeypatch):
    def live(*arguments, **options):
        source = Source(*arguments, **options)
        source.live = True
        return source

    monkeypatch.setattr(calibrate, "Source", live)
    code, _, message = neuroflow(
        "calibrate", clip, "--model", model, "--target-skip", 0.5, "--out", tmp_path / "c.json"
    )
    assert code == 2 and "a live source gives each frame only once" in message and message.count("\n") == 1


@pytest.mark.parametrize("content", [None, "{", "[]", json.dumps({"threshold": -1.0}), json.dumps({"treshold": 0.1})])
def test_a_bad_config_file_is_one_line_of_run(neuroflow, model, clip, tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    code, table, message = neuroflow("run", clip, "--model", model, "--config", path)
    assert code == 2 and table == ""
    assert message.startswith("neuroflow: error: ") and message.count("\n") == 1 and str(path) in message


def test_a_real_vit_on_a_real_clip(data, neuroflow, tmp_path):
    vit_tiny(data("weights/vit_tiny_patch16_224.safetensors"), tmp_path / "vit")
    clip, out = data("videos/intel_bottle-detection.mp4"), tmp_path / "config.json"
    options = ("--model", tmp_path / "vit", "--max-frames", 40)
    assert neuroflow("calibrate", clip, *options, "--target-skip", 0.84, "--out", out)[0] == 0
    _, skipped, cosine = measured(neuroflow, tmp_path, clip, tmp_path / "vit", *options[2:], "--config", out)
    assert skipped == pytest.approx(0.84, abs=0.005) and cosine > 0.995

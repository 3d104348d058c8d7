"""The threshold that a clip asks for, measured again by hand; and the shift of logits."""

import dataclasses

import neuroflow
import pytest
import torch
import torch.nn.functional as F
from models import PATCH, clip, exact, tiny
from neuroflow import Calibration, CalibrationError, LogitShift, NeuroFlowConfig, calibrate
from neuroflow.adapters import describe
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = exact()


def drift(frames=12, side=48):
    """Pixels [T, 3, side, side] whose patches change from frame to frame by amounts spread over two decades."""
    generator = torch.Generator().manual_seed(0)
    patches = side // PATCH
    amount = torch.logspace(-2, 0, patches**2)[torch.randperm(patches**2, generator=generator)]
    amount = amount.view(patches, patches).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
    still = torch.randn(3, side, side, generator=generator)
    return torch.stack([still + amount * torch.randn(3, side, side, generator=generator) for _ in range(frames)])


def measured(model, frames, config, of="embedding"):
    """(mean skip, mean cosine, 5th percentile) of all frames but the first, frame by frame."""
    anatomy = describe(model)
    read = {"embedding": anatomy.embedding, "tokens": lambda output: output.last_hidden_state[:, anatomy.prefix :]}[of]
    skipped, cosine = [], []
    with torch.no_grad():
        dense = [read(model(pixel_values=frame[None])) for frame in frames]
        neuroflow.enable_cache(model, config)
        for frame, expected in zip(frames, dense, strict=True):
            cosine.append(F.cosine_similarity(read(model(pixel_values=frame[None])), expected, -1).mean().item())
            active = neuroflow.summary(model).streams["default"].active
            skipped.append(1 - active.sum().item() / active.numel())
        neuroflow.disable_cache(model)
    scored = torch.tensor(cosine[1:])
    return sum(skipped[1:]) / len(skipped[1:]), scored.mean().item(), scored.quantile(0.05).item()


@pytest.mark.parametrize(("family", "of"), [("siglip", "embedding"), ("vit", "embedding"), ("vit", "tokens")])
def test_fidelity_is_reached_by_the_largest_threshold(family, of):
    model, frames = tiny(family), drift()
    base = dataclasses.replace(PLAIN, floor=2, max_age=9)
    dense_like, sparse_like = (
        measured(model, frames, dataclasses.replace(base, threshold=threshold), of)[1] for threshold in (1e-4, 0.5)
    )
    target = (dense_like + sparse_like) / 2
    result = calibrate(model, frames, base, fidelity=target, of=of)
    assert isinstance(result, Calibration)
    assert result.config == dataclasses.replace(base, threshold=result.config.threshold)
    found = (result.skipped, result.fidelity, result.fidelity_p5)
    assert found == pytest.approx(measured(model, frames, result.config, of), abs=1e-5)
    assert (result.config.threshold, *found) in result.trials
    assert result.fidelity >= target
    beyond = [trial for trial in result.trials if trial.threshold > result.config.threshold]
    assert all(trial.fidelity < target or trial.skipped <= result.skipped for trial in beyond)
    failed = min(trial for trial in beyond if trial.fidelity < target)
    reached = [trial for trial in beyond if trial < failed]
    assert failed.threshold < 1.006 * max(reached, default=result.config).threshold


@pytest.mark.parametrize("skip", [0.3, 0.6, 0.84])
def test_skip_is_reached_within_half_a_point(skip):
    model, frames = tiny("siglip", 96), drift(side=96)
    result = calibrate(model, frames, dataclasses.replace(PLAIN, signal="embedding"), skip=skip)
    found = measured(model, frames, result.config)
    assert found[0] == pytest.approx(skip, abs=0.005)
    assert (result.skipped, result.fidelity, result.fidelity_p5) == pytest.approx(found, abs=1e-5)
    assert result.config.signal == "embedding"


def test_where_the_floor_reaches_the_target_the_lowest_such_threshold_is_chosen():
    model, frames = tiny("siglip"), drift()
    assert calibrate(model, frames, PLAIN, skip=1 - 4 / 36).config.threshold < 1
    result = calibrate(model, frames, PLAIN, fidelity=0.01)
    assert result.skipped == pytest.approx(1 - 4 / 36)
    for factor, floor_alone in ((0.98, False), (1.0, True)):
        config = dataclasses.replace(result.config, threshold=factor * result.config.threshold)
        assert (measured(model, frames, config)[0] == pytest.approx(1 - 4 / 36)) == floor_alone


class Frames:
    """Frames that count how often they are gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(drift()[:, None])


def test_frames_may_be_any_iterable_that_starts_over():
    model, frames = tiny("vit"), Frames()
    config = NeuroFlowConfig(cut_light=None)
    result = calibrate(model, frames, config, skip=0.7)
    assert result == calibrate(model, drift(), config, skip=0.7)
    assert frames.passes == 1 + len(result.trials)


def test_the_threshold_does_not_depend_on_the_machines_speed(monkeypatch):
    model, frames = tiny("siglip"), drift(frames=5)
    expected = calibrate(model, frames, PLAIN, skip=0.6)
    monkeypatch.setattr("neuroflow.engine.crossover.measure", lambda *_: 0.2)
    result = calibrate(model, frames, dataclasses.replace(PLAIN, dense_above=None), skip=0.6)
    assert result == dataclasses.replace(expected, config=dataclasses.replace(expected.config, dense_above=None))
    with pytest.raises(CalibrationError, match="is not reached"):  # with frames above it dense
        calibrate(model, frames, dataclasses.replace(PLAIN, dense_above=0.2), skip=0.6)


def test_a_bfloat16_model_takes_float32_frames():
    result = calibrate(tiny("siglip", 96).to(torch.bfloat16), drift(side=96), skip=0.7)
    assert result.skipped == pytest.approx(0.7, abs=0.005) and result.fidelity > 0.9


class Damaged:
    """Frames that cannot be read in the pass of this number."""

    def __init__(self, number):
        self.left = number

    def __iter__(self):
        self.left -= 1
        yield from drift()[:5, None]
        if self.left == 0:
            raise OSError("damaged")


@pytest.mark.parametrize("number", [1, 3])
def test_the_model_goes_out_as_it_came_in(number):
    model = tiny("siglip")
    forward = dict(vars(describe(model).tower))
    with pytest.raises(OSError, match="damaged"):
        calibrate(model, Damaged(number), fidelity=0.9)
    assert dict(vars(describe(model).tower)) == forward
    calibrate(model, drift(), fidelity=0.9)
    assert dict(vars(describe(model).tower)) == forward


def test_a_patched_model_is_refused_and_stays_patched():
    model = tiny("siglip")
    neuroflow.enable_cache(model)
    with pytest.raises(RuntimeError, match="SiglipVisionModel is patched; call"):
        calibrate(model, drift(), fidelity=0.9)
    neuroflow.summary(model)


@pytest.mark.parametrize(
    ("frames", "targets", "config", "message"),
    [
        (drift(2), {}, None, "fidelity is None and skip is None; accepted is one"),
        (drift(2), {"fidelity": 0.9, "skip": 0.9}, None, "fidelity is 0.9 and skip is 0.9; accepted is one"),
        (drift(2), {"fidelity": 1.0}, None, "fidelity is 1.0; accepted is a number between 0 and 1"),
        (drift(2), {"skip": float("nan")}, None, "skip is nan; accepted is a number between 0 and 1"),
        (drift(2), {"skip": 0.5}, NeuroFlowConfig(budget=4), "config has a budget of 4; accepted is None"),
        (drift(2), {"skip": 0.5, "of": "patches"}, None, "of is 'patches'; accepted is 'embedding' or 'tokens'"),
        (drift(2), {"skip": 0.5, "of": "tokens"}, NeuroFlowConfig(arch="B"), "which arch 'active' has for active"),
        (iter(drift(2)), {"skip": 0.5}, None, "which can be read only once; accepted is a tensor"),
        (drift(1), {"skip": 0.5}, None, "frames holds 1 frame"),
        ([], {"skip": 0.5}, None, "frames holds 0 frame"),
        (drift(2)[0], {"skip": 0.5}, None, r"frames holds a tensor \[1, 48, 48\]; accepted are \[1, 3, H, W\]"),
        (drift(4) * torch.tensor([1, 1, torch.nan, 1]).view(4, 1, 1, 1), {"skip": 0.5}, None, "of frame 2 holds NaN"),
    ],
)
def test_bad_arguments_are_named(frames, targets, config, message):
    with pytest.raises(ValueError, match=message):
        calibrate(tiny("siglip"), frames, config, **targets)


@pytest.mark.parametrize(
    ("frames", "target", "config", "message"),
    [
        (drift(), {"skip": 0.95}, PLAIN, r"a skip rate of 95.0% is not reached: the nearest is threshold 2, 88.9% of"),
        (drift(2), {"skip": 0.85}, PLAIN, r"a skip rate of 85.0% is not reached: the nearest is threshold 0\.\d+, 8"),
        (
            clip(changed=8),
            {"fidelity": 0.9999},
            dataclasses.replace(PLAIN, arch="B"),
            r"cosine of 0.9999 is not reached: the nearest is threshold .*, 77.8% of",
        ),
        (
            clip(),
            {"fidelity": 0.5},
            PLAIN,
            r"do not tell thresholds apart: each from 1.\d+e-06 to 2 gives 88.9% of the",
        ),
        (drift(1).repeat(4, 1, 1, 1), {"fidelity": 0.9}, None, "nothing changes in the frames"),
    ],
)
def test_a_target_out_of_reach_says_what_was_reached(frames, target, config, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(tiny("siglip"), frames, config, **target)


def test_a_skip_rate_over_the_floors_is_given_up_at_once():
    frames = Frames()
    with pytest.raises(CalibrationError):
        calibrate(tiny("siglip"), frames, skip=0.95)
    assert frames.passes == 2


def test_logit_shift_brings_the_mean_back(tmp_path, generator):
    dense = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    sparse = (0.8 * dense - 0.1).half()
    fitted = LogitShift.fit(dense, sparse)
    torch.testing.assert_close(fitted.shift, (dense - sparse).mean(0).float())
    torch.testing.assert_close(fitted.apply(sparse.double()).mean(0), dense.mean(0), rtol=0, atol=1e-6)
    assert fitted.apply(sparse[:3]).dtype == torch.float16 and fitted.apply(sparse[0]).shape == (5,)
    fitted.save(tmp_path / "shift.safetensors")
    assert LogitShift.load(tmp_path / "shift.safetensors").shift.equal(fitted.shift)


def test_logit_shift_refuses_what_does_not_fit(tmp_path):
    for dense, sparse in (((3, 5), (3, 4)), ((5,), (5,)), ((0, 5), (0, 5))):
        with pytest.raises(ValueError, match=r"accepted are \[T, classes\]"):
            LogitShift.fit(torch.zeros(dense), torch.zeros(sparse))
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        LogitShift.fit(torch.full((3, 5), torch.inf), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"logits is \[2, 1\]; accepted is \[..., 5\]"):
        LogitShift(torch.zeros(5)).apply(torch.zeros(2, 1))
    (tmp_path / "text").write_text("no tensors")
    save_file({"shift": torch.zeros(2, 2)}, tmp_path / "matrix")
    for name in ("missing", "text", "matrix"):
        with pytest.raises(ValueError, match=f"{name}: .*; accepted is a file that LogitShift.save wrote"):
            LogitShift.load(tmp_path / name)

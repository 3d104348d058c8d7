"""Sparse distillation: that the student computes what the patched model does, learns, is kept, and goes on."""

import copy
import itertools
import math

import neuroflow
import pytest
import torch
from models import tiny
from neuroflow import distillation
from neuroflow.adapters import describe
from neuroflow.distillation import (
    SHARES,
    Distillation,
    DistillationConfig,
    Epoch,
    Pictures,
    distillation_loss,
    distilled_config,
    load_weights,
)
from neuroflow.models import ClassHead
from neuroflow.patch import copy_sharing_weights, install
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 32
SETTINGS = {"epochs": 3, "rate": 1e-3, "frames": 5, "strides": 2, "thresholds": (0.01, 0.1)}


def video(seed, frames=9, side=SIDE):
    """Frames [1, 3, side, side] of a still picture with a square that moves over it."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(1, 3, side, side, generator=generator)
    square = torch.randn(1, 3, 12, 12, generator=generator)
    clip = []
    for number in range(frames):
        clip.append(still.clone())
        left = 2 * number % (side - 12)
        clip[-1][:, :, 4:16, left : left + 12] = square
    return clip


@pytest.fixture
def model():
    return tiny("siglip", SIDE)


@pytest.fixture
def videos():
    return [video(seed) for seed in range(3)]


def trained(model, videos, path=None, stop=None, **settings):
    """A `Distillation` gone on with until it is finished, or has as many evaluations as `stop`."""
    run = Distillation(model, DistillationConfig(**SETTINGS | settings))
    if path is not None and path.exists():
        run.resume(path)
    while not run.finished and len(run.history) != stop:
        loss = run.train(videos[1:]) if run.history and not run.trained else None
        run.evaluate(videos[:1], Pictures([clip[0] for clip in videos]), loss)
        if path is not None:
            run.checkpoint(path)
    return run


@pytest.mark.parametrize("threshold", [0.0, 0.03, 1.5])
@pytest.mark.parametrize("name", ["siglip", "clip", "vit", "dinov2", "dinov3"])
def test_the_student_computes_what_the_patched_model_does(name, threshold):
    model = tiny(name, SIDE)
    config = DistillationConfig()
    run = Distillation(model, config)
    run.engine.draw(threshold, 0.05)
    frames = video(0)
    install(run.engine)
    found = run.embed(model, torch.cat(frames))
    neuroflow.disable_cache(model)
    assert found.requires_grad
    gate = neuroflow.NeuroFlowConfig(**{**vars(config.gate(threshold=threshold)), "ema_decay": 0.05})
    neuroflow.enable_cache(model, gate)
    expected = torch.cat([run.embed(model, frame) for frame in frames])
    skipped = neuroflow.summary(model).streams["default"].skipped
    assert (skipped > 0) == (threshold > 0)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_definition(model):
    """Of the tower written out on the active tokens alone, with the plain pooling head."""
    run = Distillation(model, DistillationConfig())
    run.engine.draw(0.03, 0.05)
    frames = torch.cat(video(0, 3))
    seen = []
    install(run.engine)
    select = distillation.Frame.select
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            distillation.Frame, "select", lambda self, rows, tokens: (seen.append(rows), select(self, rows, tokens))[1]
        )
        with torch.no_grad():
            run.embed(model, frames)  # leaves nothing behind that has no gradient
        run.embed(model, frames).square().sum().backward()
    neuroflow.disable_cache(model)
    found = {name: parameter.grad.clone() for name, parameter in run.weights.items()}
    model.zero_grad()
    total, anatomy = 0, describe(model)
    for frame, rows in zip(frames.split(1), seen[-1], strict=True):
        tokens = anatomy.tower.embeddings(frame)
        tokens = tokens if rows is None else tokens[:, rows.long()]
        for layer in anatomy.layers:
            tokens = layer(tokens, None)
        total = total + anatomy.pool[0](anatomy.last(tokens)).square().sum()
    total.backward()
    assert any(rows is not None and 0 < len(rows) < 16 for rows in seen[-1])
    for name, parameter in run.weights.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("train", "blocks"), [("head", []), ("last-1", [3]), ("last-3", [1, 2, 3]), ("all", range(4))])
def test_what_is_trained(model, videos, train, blocks):
    before = copy.deepcopy(dict(model.named_parameters()))
    trained(model, videos, stop=2, train=train)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {int(name.split(".")[2]) for name in changed if "layers" in name} == set(blocks)
    assert any("head" in name for name in changed) and any("post_layernorm" in name for name in changed)
    assert not any("embeddings" in name for name in changed)


def test_it_learns(model, videos):
    run = trained(model, videos, epochs=8, strides=1, rate=3e-3, forgetting=1)
    losses = [epoch.loss for epoch in run.epochs[1:]]
    assert run.history[0].loss is None and len(losses) == 8 and losses[-1] < 0.5 * losses[0]
    assert run.history[0].skipped == pytest.approx(1 - max(int(16 * 0.1), 4) / 16)
    assert not neuroflow.is_patched(model)


def test_draws_and_clips(model, videos, monkeypatch):
    """The gate within its ranges, and every clip of consecutive frames at its stride."""
    drawn, clips, rates = [], [], []
    run = Distillation(model, DistillationConfig(**SETTINGS))
    monkeypatch.setattr(run.engine, "draw", lambda *gate: drawn.append(gate))
    monkeypatch.setattr(run, "_expected", lambda keys, frames: clips.append(keys) or torch.zeros(len(keys), 64))
    monkeypatch.setattr(
        run, "_step", lambda pixels, expected: rates.append(run.optimizer.param_groups[0]["lr"]) or float(len(pixels))
    )
    run.history = [Epoch(number, None, 0.0, 0.0, 0.0, None) for number in range(2)]
    assert run.train([video(0, 23)] * 20) > 1
    thresholds, decays = (torch.tensor(values).log() for values in zip(*drawn, strict=True))
    assert math.log(0.01) <= thresholds.min() < math.log(0.02) and math.log(0.05) < thresholds.max() <= math.log(0.1)
    assert math.log(1e-3) <= decays.min() < math.log(2e-3) and math.log(0.05) < decays.max() <= math.log(0.1)
    assert thresholds.mean() == pytest.approx(math.log(0.01 * 0.1) / 2, abs=0.2)  # evenly on a log scale
    strides = set()
    for keys in clips:
        numbers = [index for _, _, index in keys]
        assert 2 <= len(numbers) <= 5 and len({number for _, number, _ in keys}) == 1
        strides |= {after - before for before, after in itertools.pairwise(numbers)}
    assert strides == {1, 2}
    assert rates == pytest.approx([0.75e-3] * len(rates))  # the second of three epochs
    rates.clear()
    run.history.pop()
    run.train([video(0, 23)] * 20)
    assert rates[:2] == pytest.approx([1e-3 / 20, 2e-3 / 20]) and rates[19:] == pytest.approx([1e-3] * len(rates[19:]))
    assert {number for keys in clips for _, number, _ in keys} == set(range(20))


def test_what_is_encoded_does_not_depend_on_the_machines_speed():
    assert DistillationConfig().gate().dense_above == 1


def test_resumed_is_as_uninterrupted(videos, tmp_path):
    whole = trained(tiny("siglip", SIDE), videos, forgetting=1)
    path = tmp_path / "checkpoint"
    trained(tiny("siglip", SIDE), videos, path, stop=2, forgetting=1)
    resumed = trained(tiny("siglip", SIDE), videos, path, forgetting=1)
    assert resumed.history == whole.history and len(whole.history) == 4 + len(SHARES)
    for name, parameter in whole.weights.items():
        assert torch.equal(resumed.weights[name], parameter)
        assert torch.equal(resumed.best[name], whole.best[name])
    trained(tiny("siglip", SIDE), videos, path, stop=5, forgetting=1)
    finished = trained(tiny("siglip", SIDE), videos, path, forgetting=1)
    assert finished.chosen.number > 0 and finished.history == whole.history
    assert all(torch.equal(finished.best[name], whole.best[name]) for name in whole.best)
    with pytest.raises(ValueError, match="with other settings"):
        trained(tiny("siglip", SIDE), videos, path, rate=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_training_ends_when_it_forgets(model, videos, tmp_path):
    before = copy.deepcopy(model)
    run = trained(model, videos, rate=0.5, epochs=9, patience=2)
    assert run.history[0].outside == 1 and all(epoch.outside < 0.99 for epoch in run.epochs[-2:])
    assert run.epochs[-3].outside >= 0.99
    assert len(run.epochs) < 10 and run.finished and run.chosen.outside >= 0.99
    if run.chosen.number == 0:
        assert all(
            torch.equal(run.best[name], parameter) for name, parameter in before.named_parameters() if name in run.best
        )
    run.save(tmp_path / "best.safetensors")
    load_weights(before, tmp_path / "best.safetensors")
    assert all(torch.equal(dict(before.named_parameters())[name], run.best[name]) for name in run.best)


def test_weights_that_forgot_are_never_the_best(model, videos):
    run = Distillation(model, DistillationConfig(**SETTINGS))
    outside = Pictures([clip[0] for clip in videos])
    first = run.evaluate(videos[:1], outside)
    run.history[0] = first._replace(fidelity=-1.0, outside=2.0)
    before = copy.deepcopy(run.best)
    with torch.no_grad():
        for parameter in run.weights.values():
            parameter.add_(0.01)
    assert run.evaluate(videos[:1], outside).fidelity > run.chosen.fidelity and run.chosen.number == 0
    assert all(torch.equal(run.best[name], before[name]) for name in before)
    run.history = [first._replace(fidelity=-1.0)]
    run.evaluate(videos[:1], outside)
    assert run.chosen.number == 1 and all(torch.equal(run.best[name], run.weights[name]) for name in before)


def test_weights_on_the_way_to_the_trained_ones_are_tried(model, videos, monkeypatch):
    """Half-way ones are kept where the trained ones forgot, and the trained ones are not lost by that."""
    seen, outside = [], {1.0: 0.5, 0.75: 0.98, 0.5: 0.995, 0.25: 1.0}

    def figures(run, videos, pictures):
        name, parameter = next(iter(run.weights.items()))
        start = run.teacher.get_parameter(name)
        at = ((parameter - start).norm() / (reached - start).norm()).item() if run.trained else 1.0
        seen.append({name: parameter.clone() for name, parameter in run.weights.items()})
        return at if run.history else 0.0, 0.0, 0.9, outside[round(at, 2)] if run.history else 1.0

    run = Distillation(model, DistillationConfig(**SETTINGS | {"epochs": 1}))
    monkeypatch.setattr(Distillation, "_figures", figures)
    run.evaluate(videos[:1], None)
    run.evaluate(videos[:1], None, run.train(videos[1:]))
    weights = {name: parameter.detach().clone() for name, parameter in run.weights.items()}
    reached = next(iter(weights.values()))
    while not run.finished:
        run.evaluate(videos[:1], None)
        assert all(torch.equal(parameter, weights[name]) for name, parameter in run.weights.items())
    assert [(epoch.number, epoch.share) for epoch in run.history] == [(0, 1), (1, 1), (1, 0.75), (1, 0.5), (1, 0.25)]
    assert [epoch.fidelity for epoch in run.history] == pytest.approx(
        [0, 1, 0.75, 0.5, 0.25], abs=1e-3
    )  # where they lie
    assert run.chosen.share == 0.5 and run.epochs == run.history[:2]
    for name, parameter in weights.items():
        half = 0.5 * (run.teacher.get_parameter(name) + parameter)
        torch.testing.assert_close(run.best[name], half.detach())
        assert torch.equal(run.best[name], seen[3][name])


def test_what_is_known():
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    found = torch.tensor([[5.0, 1.0], [1.0, 4.0], [0.1, 1.0]])  # nearest to the first, the second, the second
    assert Pictures([], None).known(found, teacher) == pytest.approx(2 / 3)
    classes = ClassHead(("x", "y"), torch.eye(2), 1.0)
    assert Pictures([], [0, 0, 1], classes).known(found, teacher) == pytest.approx(2 / 3)
    assert Pictures([], [0, 1, 1], classes).known(found, teacher) == 1


def test_the_loss_is_the_definition():
    found, expected = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert distillation_loss(found, expected).item() == pytest.approx((1 + 4) / 4 + 0.5 * (0 + 1) / 2)


def test_a_clips_whole_frame_counts_as_much_as_the_others(model, monkeypatch):
    run = Distillation(model, DistillationConfig())
    found, expected = torch.zeros(3, 4) + torch.arange(3.0)[:, None] + 1, torch.ones(3, 4)
    weight = next(iter(run.weights.values()))
    monkeypatch.setattr(run, "embed", lambda model, pixels: found + 0 * weight.sum())
    assert run._step(torch.zeros(3, 3, SIDE, SIDE), expected) == pytest.approx(0.5 * (0 + (1 + 4) / 2))


def test_weights_come_back(model, videos, tmp_path):
    path = tmp_path / "b.safetensors"
    original = copy.deepcopy(model)
    run = trained(model, videos, train="last-1", skip=0.75)
    run.save(path)
    sharing = copy_sharing_weights(original)
    expected = run.embed(sharing, videos[0][0]).clone()
    load_weights(original, path)
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, run.best[name] if name in run.best else run.teacher.get_parameter(name))
    assert torch.equal(run.embed(sharing, videos[0][0]), expected)
    config = distilled_config(path)
    assert config.arch == "active" and config.budget == 0.25 and config.reference == "ema"
    with pytest.raises(ValueError, match=r"has .* and SiglipVisionModel has none such"):
        load_weights(type(model)(type(model.config)(hidden_size=48)), path)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no distilled weights"):
        load_weights(model, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"missing: cannot be read"):
        load_weights(model, tmp_path / "missing")


def test_mixed_precision_is_near(videos):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        run = Distillation(tiny("siglip", SIDE), DistillationConfig(**SETTINGS), dtype)
        run.evaluate(videos[:1], None)
        losses.append(run.train(videos[1:]))
        assert all(parameter.dtype == torch.float32 for parameter in run.weights.values())
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.parametrize(
    "changed",
    [
        {"train": "tail"},
        {"train": "last-0"},
        {"epochs": 0},
        {"rate": 0},
        {"frames": 1},
        {"strides": 0},
        {"thresholds": (0.2, 0.1)},
        {"decays": (0.1, 2)},
        {"skip": 1},
        {"forgetting": -1},
        {"patience": 0},
    ],
)
def test_settings_out_of_range(changed):
    (name,) = changed
    with pytest.raises(ValueError, match=rf"^{name} is .*; accepted is"):
        DistillationConfig(**changed)


def test_models_that_cannot_be_distilled(model, videos):
    with pytest.raises(ValueError, match=r"last-4 at most, as there are 4 blocks"):
        Distillation(model, DistillationConfig(train="last-5"))
    with pytest.raises(ValueError, match="IJepaModel has no pooled output"):
        Distillation(tiny("ijepa", SIDE), DistillationConfig())
    neuroflow.enable_cache(model)
    with pytest.raises(RuntimeError, match="is patched"):
        Distillation(model, DistillationConfig())
    neuroflow.disable_cache(model)
    with pytest.raises(ValueError, match="no clip of two frames"):
        Distillation(model, DistillationConfig(strides=1)).train([videos[0][:1]])

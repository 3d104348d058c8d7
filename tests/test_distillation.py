"""Sparse distillation: that the student computes what the patched model does, learns, is kept, and goes on."""

import copy
import dataclasses
import itertools
import math

import neuroflow
import pytest
import torch
from models import tiny
from neuroflow import distillation
from neuroflow.adapters import describe
from neuroflow.classes import ClassHead
from neuroflow.distillation import Distillation, DistillationConfig, Epoch, OpenVideo, Outside, distillation_loss
from neuroflow.embedding import frame_embeddings
from neuroflow.engine import passes
from neuroflow.engine.gate import Gate
from neuroflow.engine.passes import Plan
from neuroflow.engine.state import StreamState
from neuroflow.patch import engine_of, install

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 32
SETTINGS = {"epochs": 3, "rate": 1e-3, "batch": 10, "clips": 2, "strides": 2, "thresholds": (0.01, 0.1)}


def video(seed, frames=9, side=SIDE, turn=9):
    """Frames [1, 3, side, side] of a still picture with a square that moves over its upper half, from frame `turn` on
    over the lower one.
    """
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(1, 3, side, side, generator=generator)
    square = torch.randn(1, 3, 12, 12, generator=generator)
    clip = []
    for number in range(frames):
        clip.append(still.clone())
        left, top = 2 * number % (side - 12), 4 if number < turn else 16
        clip[-1][:, :, top : top + 12, left : left + 12] = square
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
        loss = run.train(videos[1:]) if run.history else None
        run.evaluate(videos[:1], Outside(videos), loss)
        if path is not None:
            run.checkpoint(path)
    return run


def clip_of(run, frames, decay=0.05, **rule):
    """A video of the frames for the run's engine."""
    config = dataclasses.replace(run.config.gate(**rule), ema_decay=decay)
    gate = Gate(Plan.of(run.engine.anatomy, config))
    return OpenVideo(0, enumerate(frames), gate, StreamState("clip"), len(frames))


def moved(run):
    """The run, with other weights than the model's."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in run.weights.values():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return run


@pytest.mark.parametrize("threshold", [0.0, 0.03, 1.5])
@pytest.mark.parametrize(
    ("name", "arch"),
    [
        *((name, "B") for name in ("siglip", "clip", "vit", "dinov2", "dinov3")),
        *(("siglip", arch) for arch in "ACDE"),
        *(("vit", arch) for arch in "CE"),
        ("dinov3", "E"),
    ],
)
def test_the_student_computes_what_the_patched_model_does(name, arch, threshold, tmp_path):
    """For two clips in one pass, each under its own gate, and twice for what follows of them."""
    model = tiny(name, SIDE)
    run = moved(Distillation(model, DistillationConfig(arch=arch)))
    run.best = dict(run.weights)
    run.save(tmp_path / "weights.safetensors")
    # Without what only the frame before tells; a pass of a student tells it to the next pass.
    always = {} if arch == "B" else {"score": "surprise", "cut_surprise": None}
    rules = [{"threshold": threshold} | always, {"budget": 0.25, "decay": 0.5} | always]
    videos = [video(0, turn=5), video(1, turn=5)]
    clips = [clip_of(run, frames, **rule) for frames, rule in zip(videos, rules, strict=True)]
    run.engine.videos, found = clips, []
    install(run.engine)
    for start, stop in ((0, 4), (4, 7), (7, 9)):
        for clip in clips:
            clip.count = stop - start
        frames = [frame for frames in videos for frame in frames[start:stop]]
        found.append(frame_embeddings(run.student, torch.cat(frames)))
    assert all(part.requires_grad for part in found)
    assert run.engine.whole == [threshold == 0] * 2 + [False] * 2
    for number, (frames, clip) in enumerate(zip(videos, clips, strict=True)):
        neuroflow.enable_cache(model, clip.gate.config, weights=tmp_path / "weights.safetensors")
        expected = torch.cat([frame_embeddings(model, frame) for frame in frames])
        skipped = neuroflow.summary(model).streams["default"].skipped
        neuroflow.disable_cache(model)
        assert (skipped > 0) == (clip.gate.config.threshold != 0)
        own = torch.cat([part.detach().chunk(2)[number] for part in found])
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_definition(model):
    """Of the tower written out on the active tokens alone, with the plain pooling head."""
    run = Distillation(model, DistillationConfig())
    frames, seen = torch.cat(video(0, 3)), []
    install(run.engine)
    select = passes.Pass.select
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            passes.Pass, "select", lambda self, rows, tokens: (seen.append(rows), select(self, rows, tokens))[1]
        )
        with torch.no_grad():
            run.engine.videos = [clip_of(run, frames, threshold=0.03)]
            frame_embeddings(run.student, frames)  # leaves nothing behind that has no gradient
        run.engine.videos = [clip_of(run, frames, threshold=0.03)]
        frame_embeddings(run.student, frames).square().sum().backward()
    total, anatomy = 0, describe(model)
    assert [rows is None for rows in seen[-1]] == [True, False, False]
    for frame, rows in list(zip(frames.split(1), seen[-1], strict=True))[1:]:
        tokens = anatomy.tower.embeddings(frame)[:, rows.long()]
        for layer in anatomy.layers:
            tokens = layer(tokens, None)
        total = total + anatomy.pool[0](anatomy.last(tokens)).square().sum()
    total.backward()
    for name, parameter in run.weights.items():
        torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in run.student.parameters())


@pytest.mark.parametrize(
    ("name", "arch"), [("siglip", "A"), ("siglip", "C"), ("siglip", "D"), ("siglip", "E"), ("vit", "E")]
)
def test_gradients_go_through_the_caches(name, arch):
    """Of what a pass gives for all its frames, as far as a small step along the weights tells."""
    model = tiny(name, SIDE).double()
    run = Distillation(model, DistillationConfig(arch=arch))
    frames = torch.cat(video(0, 5))
    install(run.engine)

    def total():
        run.engine.videos = [clip_of(run, frames, budget=0.25, score="surprise", cut_light=None)]
        return frame_embeddings(run.student, frames).double().square().sum()

    total().backward()
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(weight.shape, generator=generator).to(weight) for weight in run.weights.values()]
    found = sum((weight.grad * step).sum() for weight, step in zip(run.weights.values(), direction, strict=True))
    either = []
    with torch.no_grad():
        for length in (1e-4, -2e-4):
            for weight, step in zip(run.weights.values(), direction, strict=True):
                weight += length * step
            either.append(total())
    assert run.engine.whole == [True] + 4 * [False]
    assert found.item() == pytest.approx(((either[0] - either[1]) / 2e-4).item(), rel=1e-3)


@pytest.mark.parametrize(("name", "arch"), [("siglip", "C"), ("vit", "E")])
def test_attention_reaches_the_gate(name, arch):
    """That which the last frame of a pass paid, for the next pass to weigh by."""
    model = tiny(name, SIDE)
    run = Distillation(model, DistillationConfig(arch=arch))
    frames = video(0, 2)
    clips = [clip_of(run, frames, budget=budget) for budget in (0.25, 0.5)]
    run.engine.videos = clips
    install(run.engine)
    frame_embeddings(run.student, torch.cat([*frames, *frames])).sum().backward()
    for clip in clips:
        neuroflow.enable_cache(model, clip.gate.config)
        engine = engine_of(model)
        frame_embeddings(model, frames[0])
        engine.streams["default"].attention.fill_(1)  # as nothing is known of it in a clip's first pass
        frame_embeddings(model, frames[1])
        expected = engine.streams["default"].attention
        neuroflow.disable_cache(model)
        assert not clip.state.attention.requires_grad
        torch.testing.assert_close(clip.state.attention, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("train", "blocks"), [("head", []), ("last-1", [3]), ("last-3", [1, 2, 3]), ("all", range(4))])
def test_what_is_trained(model, videos, train, blocks):
    before = copy.deepcopy(dict(model.named_parameters()))
    run = trained(model, videos, stop=2, train=train)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    changed = {name for name, parameter in run.average.items() if not torch.equal(parameter, before[name])}
    assert changed == set(run.weights)
    assert {int(name.split(".")[2]) for name in changed if "layers" in name} == set(blocks)
    assert any("head" in name for name in changed) and any("post_layernorm" in name for name in changed)
    assert not any("embeddings" in name for name in changed)


def test_it_learns(model, videos):
    run = trained(model, videos, epochs=8, strides=1, rate=3e-3, forgetting=1)
    losses = [epoch.loss for epoch in run.history[1:]]
    assert run.history[0].loss is None and len(losses) == 8 and losses[-1] < 0.5 * losses[0]
    assert run.history[0].skipped == pytest.approx(1 - max(int(16 * 0.1), 4) / 16)
    assert not neuroflow.is_patched(model)


@pytest.mark.parametrize("arch", "ACDE")
def test_caches_go_from_step_to_step(model, videos, arch):
    """Without the gradients of the steps before."""
    run = Distillation(model, DistillationConfig(**SETTINGS | {"arch": arch, "batch": 4, "strides": 1}))
    run.evaluate(videos, None)
    before = {name: weight.detach().clone() for name, weight in run.weights.items()}
    assert 0 < run.train(videos) < 1 and run.steps > len(videos)
    assert all(not torch.equal(weight, before[name]) for name, weight in run.weights.items())
    assert run.history[0].fidelity > 0.9


def recorded_steps(run, videos, monkeypatch):
    """(clip numbers, indices, gates, rate) of every step of an epoch in which nothing is computed."""
    steps = []

    def step(clips, taken, rate):
        numbers = [clip.number for clip in clips]
        indices = [[index for index, _ in frames] for frames in taken]
        steps.append((numbers, indices, [clip.gate.config for clip in clips], rate))
        return [float(len(steps))]

    monkeypatch.setattr(run, "_step", step)
    monkeypatch.setattr(run, "_encode", lambda clips, frames: None)
    assert run.train(videos) == pytest.approx((len(steps) + 1) / 2)
    return steps


def test_a_step_takes_the_next_frames_of_many_videos(model, monkeypatch):
    run = Distillation(model, DistillationConfig(**SETTINGS | {"batch": 12, "clips": 3}))
    run.history = [Epoch(0, None, 0.0, 0.0, 0.0, None)]
    lengths = [*[23, 9, 16, 1, 30, 12, 7, 23] * 5, 200]
    steps = recorded_steps(run, [video(0, length) for length in lengths], monkeypatch)
    seen = {}
    for numbers, indices, gates, _ in steps:
        assert len(set(numbers)) == len(numbers) <= 3
        assert all(len(each) <= 12 // len(numbers) for each in indices)
        for number, each, gate in zip(numbers, indices, gates, strict=True):
            seen.setdefault(number, ([], gate))[0].extend(each)
            assert seen[number][1] is gate
    strides, starts = set(), set()
    assert set(seen) >= {number for number, length in enumerate(lengths) if length > 1}
    assert max(len(each) for numbers, indices, *_ in steps for each in indices if len(numbers) < 3) > 4
    for number, (indices, _) in seen.items():
        steps_between = {after - before for before, after in itertools.pairwise(indices)}
        assert len(steps_between) <= 1 and (indices or lengths[number] == 1)
        if steps_between:
            (stride,) = steps_between
            strides.add(stride)
            starts.add(indices[0] - stride)  # the first one is no part of a step
            assert indices[-1] + 2 >= lengths[number]  # to its end
    assert strides == {1, 2} and starts == {0, 1}
    full = [sum(len(each) for each in indices) for _, indices, *_ in steps]
    assert max(full) == 12 and sorted(full)[len(full) // 2] >= 9


def test_what_is_drawn_for_a_video(model, monkeypatch):
    """A threshold for every fourth one, the budget of `skip` for the others; all within their ranges."""
    run = Distillation(model, DistillationConfig(**SETTINGS))
    run.history = [Epoch(0, None, 0.0, 0.0, 0.0, None)]
    steps = recorded_steps(run, [video(0, 3)] * 60, monkeypatch)
    gates = list({id(gate): gate for _, _, gates, _ in steps for gate in gates}.values())
    drawn = [gate.threshold for gate in gates if gate.threshold is not None]
    assert len(gates) == 60 and len(drawn) == 15
    assert [gate.budget for gate in gates if gate.budget is not None] == pytest.approx([0.1] * 45)
    for values, low, high in ((drawn, 0.01, 0.1), ([gate.ema_decay for gate in gates], 1e-3, 0.1)):
        logs = torch.tensor(values).log()
        third = (math.log(high) - math.log(low)) / 3
        assert math.log(low) <= logs.min() < math.log(low) + third
        assert math.log(high) - third < logs.max() <= math.log(high)
        assert logs.mean() == pytest.approx(math.log(low * high) / 2, abs=third / 2)  # evenly on a log scale


def test_the_rate_falls_over_the_epochs(model, videos, monkeypatch):
    run = Distillation(model, DistillationConfig(**SETTINGS | {"clips": 1}))
    rates = []
    for number in range(3):
        run.history.append(Epoch(number, None, 0.0, 0.0, 0.0, None))
        rates += [rate for *_, rate in recorded_steps(run, [video(0, 5)] * 10, monkeypatch)]
    whole = len(rates)
    assert rates[0] == 1e-3 and rates == sorted(rates, reverse=True) and rates[-1] < 0.01e-3
    assert rates[whole // 2] == pytest.approx(0.5e-3, rel=0.1)


def test_a_step(model, monkeypatch):
    """What is whole has nothing to learn; the rate warms up; the average follows the weights."""
    run = Distillation(model, DistillationConfig(**SETTINGS))
    frames = [(index, torch.zeros(1, 3, SIDE, SIDE)) for index in range(3)]
    clip = clip_of(run, frames)
    name, weight = next(iter(run.weights.items()))
    found, expected = torch.zeros(3, 4) + torch.arange(3.0)[:, None] + 1, torch.ones(3, 4)
    monkeypatch.setattr(distillation, "frame_embeddings", lambda model, pixels: found + 0 * weight.sum())
    monkeypatch.setattr(run, "_expected", lambda keys, frames: expected)
    start, average = weight.detach().clone(), weight.detach().clone()
    for number in range(40):
        run.engine.whole = [True, False, False]
        assert run._step([clip], [frames], 1e-2) == pytest.approx([(1 + 4) / 2])
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * min((number + 1) / 30, 1))
        average.lerp_(weight.detach(), 1 - min(0.99, (number + 1) / (number + 10)))
    torch.testing.assert_close(run.average[name].detach(), average)
    assert not torch.equal(weight, start) and run.steps == 40  # by weight decay alone
    run.engine.whole = [True, True, True]
    assert run._step([clip], [frames], 1e-2) == [] and run.steps == 40


def test_videos_that_cannot_be_learned_from(model):
    run = Distillation(model, DistillationConfig(**SETTINGS))
    with pytest.raises(ValueError, match=r"frames of sizes \[\(32, 32\), \(48, 48\)\]; accepted is one size"):
        run.train([video(0), video(1, side=48)])
    with pytest.raises(ValueError, match=r"frames of sizes \[\(32, 32\), \(48, 48\)\]; accepted is one size"):
        run.evaluate([video(0), video(1, side=48)], None)
    for frames in ([], video(0)[:1]):
        with pytest.raises(ValueError, match="no video has a frame after its first"):
            run.train([frames, frames])
        with pytest.raises(ValueError, match="no video has a frame after its first"):
            run.evaluate([frames, frames], None)
    assert not neuroflow.is_patched(run.student)


def test_what_is_encoded_does_not_depend_on_the_machines_speed():
    assert DistillationConfig().gate().dense_above == 1


def test_resumed_is_as_uninterrupted(videos, tmp_path):
    whole = trained(tiny("siglip", SIDE), videos, forgetting=1)
    path = tmp_path / "checkpoint"
    trained(tiny("siglip", SIDE), videos, path, stop=2, forgetting=1)
    resumed = trained(tiny("siglip", SIDE), videos, path, forgetting=1)
    assert resumed.history == whole.history and len(whole.history) == 4
    for name, parameter in whole.weights.items():
        assert torch.equal(resumed.weights[name], parameter)
        assert torch.equal(resumed.best[name], whole.best[name])
    finished = trained(tiny("siglip", SIDE), videos, path, forgetting=1)
    assert finished.chosen.number > 0 and finished.history == whole.history
    assert all(torch.equal(finished.best[name], whole.best[name]) for name in whole.best)
    with pytest.raises(ValueError, match="with other settings"):
        trained(tiny("siglip", SIDE), videos, path, rate=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_training_ends_when_it_forgets(model, videos):
    run = trained(model, videos, rate=0.5, epochs=9, patience=2, skip=0.25)
    assert run.history[0].outside == 1 and all(epoch.outside < 0.99 for epoch in run.history[-2:])
    assert run.history[-3].outside >= 0.99
    assert len(run.history) < 10 and run.finished and run.chosen.outside >= 0.99
    if run.chosen.number == 0:
        assert all(torch.equal(best, model.get_parameter(name)) for name, best in run.best.items())


def test_weights_that_forgot_are_never_the_best(model, videos):
    run = Distillation(model, DistillationConfig(**SETTINGS))
    outside = Outside(videos)
    first = run.evaluate(videos[:1], outside)
    run.history[0] = first._replace(fidelity=-1.0, outside=2.0)
    before = copy.deepcopy(run.best)
    with torch.no_grad():
        for average in run.average.values():
            average.add_(0.01)
    assert run.evaluate(videos[:1], outside).fidelity > run.chosen.fidelity and run.chosen.number == 0
    assert all(torch.equal(run.best[name], before[name]) for name in before)
    run.history = [first._replace(fidelity=-1.0)]
    run.evaluate(videos[:1], outside)
    assert run.chosen.number == 1 and all(torch.equal(run.best[name], run.average[name]) for name in before)


def test_what_is_known():
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    found = torch.tensor([[5.0, 1.0], [1.0, 4.0], [0.1, 1.0]])  # nearest to the first, the second, the second
    assert Outside([], None).known(found, teacher) == pytest.approx(2 / 3)
    classes = ClassHead(("x", "y"), torch.eye(2), 1.0)
    assert Outside([], [0, 0, 1], classes).known(found, teacher) == pytest.approx(2 / 3)
    assert Outside([], [0, 1, 1], classes).known(found, teacher) == 1


def test_last_frames_are_to_be_known(model, videos, monkeypatch):
    """Of videos of any length, as the student gives them under the gate."""
    lengths, seen = [5, 9, 1, 7], []
    others = [video(seed, length) for seed, length in enumerate(lengths)]
    run = Distillation(model, DistillationConfig(**SETTINGS))
    monkeypatch.setattr(Outside, "known", lambda outside, *both: seen.append(both) or 0.25)
    assert run.evaluate(videos, Outside(others)).outside == 0.25
    ((found, teacher),) = seen
    for row, (frames, length) in enumerate(zip(others, lengths, strict=True)):
        torch.testing.assert_close(teacher[row], frame_embeddings(model, frames[-1])[0])
        neuroflow.enable_cache(model, run.config.gate())
        expected = [frame_embeddings(model, frame)[0] for frame in frames][-1]
        neuroflow.disable_cache(model)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)
        assert torch.allclose(found[row], teacher[row], rtol=0, atol=1e-5) == (length == 1)


def test_the_loss_is_the_definition():
    found, expected = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert distillation_loss(found, expected).item() == pytest.approx((1 + 4) / 4 + 0.5 * (0 + 1) / 2)


def test_the_result_is_run_as_it_was_evaluated(model, videos, tmp_path):
    path = tmp_path / "b.safetensors"
    run = trained(model, videos, train="last-1", epochs=8, strides=1, rate=3e-3, skip=0.75, forgetting=1)
    run.save(path)
    neuroflow.enable_cache(model, weights=path)
    config = engine_of(model).config
    assert config.arch == "active" and config.budget == 0.25 and config.reference == "ema"
    found = torch.cat([frame_embeddings(model, frame) for frame in videos[0]])
    neuroflow.disable_cache(model)
    expected = torch.cat([frame_embeddings(model, frame) for frame in videos[0]])
    cosines = torch.cosine_similarity(found, expected)
    assert cosines[1:].mean().item() == pytest.approx(run.chosen.fidelity, abs=1e-6)
    assert run.chosen.fidelity > run.history[0].fidelity


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
        {"arch": "F"},
        {"train": "tail"},
        {"train": "last-0"},
        {"epochs": 0},
        {"rate": 0},
        {"batch": 1},
        {"clips": 0},
        {"clips": 129},
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


def test_models_that_cannot_be_distilled(model):
    with pytest.raises(ValueError, match=r"last-4 at most, as there are 4 blocks"):
        Distillation(model, DistillationConfig(train="last-5"))
    with pytest.raises(ValueError, match="IJepaModel has no pooled output"):
        Distillation(tiny("ijepa", SIDE), DistillationConfig())
    neuroflow.enable_cache(model)
    with pytest.raises(RuntimeError, match="is patched"):
        Distillation(model, DistillationConfig())
    neuroflow.disable_cache(model)

"""Recorded frames, with a stand-in for CUDA graphs: `host_graph` does on the CPU what they do on a GPU."""

import dataclasses
import gc
import warnings
import weakref

import neuroflow
import pytest
import torch
from host_graph import HostGraph, memory, tensors
from models import FAMILIES, clip, exact, inputs, tiny
from neuroflow.engine import gate, graphs, projection
from neuroflow.engine.projection import project_windows
from neuroflow.patch import engine_of
from neuroflow.weights import write

LADDER = (4, 8, 16)
PLAIN = (
    "siglip", "clip", "vit", "deit", "ijepa", "vit_mae", "dinov2 with registers", "dinov3", "aimv2", "internvl",
    "videomae", "vivit", "vjepa2", "videomt",
)  # fmt: skip


@pytest.fixture
def clock(monkeypatch, one_thread):
    """Every device records; what is timed takes as long as this says."""
    times = {"dense": 1.0, "graph": 0.0}
    monkeypatch.setattr(graphs, "CudaGraph", HostGraph)
    for module in (gate, graphs):
        monkeypatch.setattr(module, "is_recordable", lambda device: True)

    # As on a GPU. What is projected with fewer patches differs in the last bit, by which unchanged ones fill a rung up.
    def project_all(convolution, weights, state, frames):
        return [project_windows(convolution, frame) for frame in frames]

    monkeypatch.setattr(projection, "_project_changed", project_all)

    def seconds(work, device):
        work()
        return times["graph" if getattr(work, "__self__", None).__class__ is HostGraph else "dense"]

    monkeypatch.setattr(graphs, "seconds", seconds)
    return times


def config(**settings):
    return exact(**{"threshold": 1e-4, "floor": 2, "ladder": LADDER} | settings)


def encoded(model, family, frames, names=("default",)):
    with torch.inference_mode(), neuroflow.cache_context(model, *names):
        return neuroflow.adapters.describe(model).embedding(model(**inputs(family, frames)))


def run(model, family, frames, settings, names=("default",), weights=None):
    """Of frames [T, S, 3, H, W]: embeddings [T, S, D], active patches [T, S, N], ages, the summary, the graphs."""
    neuroflow.enable_cache(model, settings, weights=weights)
    results, active, ages = [], [], []
    for batch in frames:
        results.append(encoded(model, family, batch, names))
        states = [engine_of(model).streams[name] for name in names]
        active.append(torch.stack([state.active for state in states]))
        ages.append(torch.stack([state.age for state in states]))
    summary, found = neuroflow.summary(model), engine_of(model).graphs
    neuroflow.disable_cache(model)
    return torch.stack(results), torch.stack(active), torch.stack(ages), summary, found


def compare(family, arch, frames, names=("default",), **settings):
    """The frames of a clip recorded, against the same launched one by one; returns the graphs."""
    model = tiny(family).double()
    eager = run(model, family, frames.double(), config(arch=arch, launch="eager", **settings), names)
    recorded = run(model, family, frames.double(), config(arch=arch, **settings), names)
    assert torch.equal(recorded[1], eager[1]) and torch.equal(recorded[2], eager[2])
    torch.testing.assert_close(recorded[0], eager[0], rtol=0, atol=1e-10)
    for name in names:
        ours, theirs = recorded[3].streams[name], eager[3].streams[name]
        assert (ours.frames, ours.key_frames, ours.nonfinite) == (theirs.frames, theirs.key_frames, theirs.nonfinite)
        assert ours.skipped == pytest.approx(theirs.skipped)
        torch.testing.assert_close(ours.surprise, theirs.surprise, rtol=0, atol=1e-6, equal_nan=True)
    assert eager[4] is None
    return recorded[4]


@pytest.mark.parametrize("kind", ["grey", "lifting"])
def test_another_light_is_seen_by_recorded_frames_too(clock, kind):
    """Where most patches are never encoded; and a slow change where each is in its turn, which is none to the rest."""
    day = 0.8 * clip(frames=1).expand(8, -1, -1, -1)
    if kind == "grey":
        frames, settings = torch.cat((day, day.mean(1, keepdim=True).expand_as(day))), {"threshold": 100.0}
    else:
        frames = day[:1] * torch.linspace(0.5, 0.74, 12)[:, None, None, None]
        settings = {"threshold": None, "budget": 16, "score": "staleness"}
    found = compare("siglip", "E", frames[:, None], cut_light=0.12, **settings)
    assert [each.calls for group in found.groups.values() for each in group.encoders.values()]


@pytest.mark.parametrize(("family", "arch"), [("siglip", "B"), ("siglip", "C"), ("vit", "E")])
def test_partial_frames_have_weights_of_their_own(clock, family, arch, tmp_path):
    model, frames = tiny(family).double(), clip(frames=6)[:, None].double()
    blocks = [name for name, _ in model.named_parameters() if "layer" in name or "head" in name]
    weights = {name: 1.1 * model.get_parameter(name).detach() for name in blocks}
    write(tmp_path / "weights", weights, {"config": "{}"})
    settings = [config(arch=arch, launch=launch) for launch in ("eager", "graph")]
    eager, recorded = (run(model, family, frames, each, weights=tmp_path / "weights") for each in settings)
    plain, _, _, _, _ = run(model, family, frames, settings[1])
    torch.testing.assert_close(recorded[0], eager[0], rtol=0, atol=1e-10)
    assert torch.equal(recorded[0][0], plain[0]) and not torch.allclose(recorded[0][1:], plain[1:], atol=1e-2)
    assert any(replays(recorded[4]).values())


def replays(found):
    """How often every number of patches was replayed."""
    return {rung: encoder.graph.replays for group in found.groups.values() for rung, encoder in group.encoders.items()}


def test_disabling_gives_the_memory_of_graphs_back_at_once(clock):
    model = tiny("siglip")
    neuroflow.enable_cache(model, config())
    gc.disable()
    try:
        for frame in clip(frames=5)[:, None]:
            encoded(model, "siglip", frame)
        engine = engine_of(model)
        [group] = engine.graphs.groups.values()
        left = [weakref.ref(each) for each in (engine, group, group.slab, *group.slab.caches.values())]
        assert group.encoders
        del engine, group
        neuroflow.disable_cache(model)
        assert [each() for each in left if each() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize(("family", "arch"), [(each, arch) for each in PLAIN for arch in FAMILIES[each].architectures])
def test_recorded_frames_equal_launched_ones(clock, family, arch):
    """The first is a key frame, the second is done as it is, the third recorded, timed by a replay, and replayed."""
    frames = torch.cat([clip(frames=6, changed=5), clip(frames=6, changed=5)[-1:]])[:, None]
    found = compare(family, arch, frames)
    # The last frame shows no change: the two patches of the floor, filled up to four.
    assert replays(found) == {8: 5, 4: 0} and not found.refused


@pytest.mark.parametrize("arch", ["B", "C", "D", "E"])
def test_products_in_bfloat16(clock, arch):
    model, frames = tiny("vit"), clip(frames=6, changed=5)[:, None]
    settings = {"arch": arch, "precision": "bfloat16"}
    eager = run(model, "vit", frames, config(launch="eager", **settings))
    recorded = run(model, "vit", frames, config(**settings))
    plain = run(model, "vit", frames, config(arch=arch))
    assert replays(recorded[4])[8] > 0 and torch.equal(recorded[1], eager[1])
    error = (recorded[0] - eager[0]).abs().max()
    assert error < 0.2 * (eager[0] - plain[0]).abs().max()


@pytest.mark.parametrize("arch", ["A", "C", "D", "E"])
@pytest.mark.parametrize("family", ["siglip", "vit", "dinov3"])
def test_several_streams_share_a_graph(clock, family, arch):
    clips = [clip(frames=7, seed=seed, changed=changed) for seed, changed in enumerate((1, 4, 2))]
    found = compare(family, arch, torch.stack(clips, 1), ("a", "b", "c"))
    assert replays(found)[8] >= 3 and len(found.groups) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"reference": "ema", "ema_decay": 0.3, "threshold": 0.2},
        {"reference": "dual", "ema_decay": 0.3, "fast_decay": 0.9, "threshold": 0.4},
        {"reference": "previous"},
        {"signal": "embedding"},
        {"signal": "pixel"},
        {"score": "staleness", "threshold": 0.5},
        {"normalise_motion": True},
        {"threshold": None, "budget": 5},
        {"threshold": None, "budget": 3, "share_budget": True},
        {"refresh": "rolling", "max_age": 9},
        {"refresh": "key", "max_age": 6},
        {"blend": 0.6},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_every_setting_is_recorded(clock, settings):
    for family, names in (("vit", "ab"), ("siglip", "a")):
        frames = torch.stack([clip(frames=9, seed=seed, changed=3) for seed in range(len(names))], 1)
        found = compare(family, "E", frames, tuple(names), **settings)
        assert sum(replays(found).values()) >= 3 and not found.refused


def test_attention_of_several_blocks_is_added_up(clock):
    frames, results = clip(frames=6, changed=5), []
    for launch in ("eager", "graph"):
        model = tiny("vit").double()
        neuroflow.enable_cache(model, config(score="staleness", threshold=None, budget=5, launch=launch))
        own = engine_of(model)
        own.plan = own.gate.plan = dataclasses.replace(own.plan, watched=range(1, 4))
        for frame in frames:
            encoded(model, "vit", frame[None].double())
        results.append(engine_of(model).streams["default"].attention)
    torch.testing.assert_close(results[1], results[0])


def test_outputs_belong_to_the_caller(clock):
    """A replay does not write into what an earlier one returned."""
    model, frames = tiny("siglip"), clip(frames=7, changed=5)
    neuroflow.enable_cache(model, config())
    with torch.inference_mode():
        outputs = [model(pixel_values=frame[None]) for frame in frames]
        copies = [output.last_hidden_state.clone() for output in outputs]
        model(pixel_values=frames[:1])
    assert type(outputs[-1]) is type(outputs[0])
    for output, copy in zip(outputs, copies, strict=True):
        assert torch.equal(output.last_hidden_state, copy)


def test_replayed_frames_run_no_python(clock):
    model, frames = tiny("siglip"), clip(frames=6, changed=5)
    calls = []
    layers = neuroflow.adapters.describe(model).layers
    neuroflow.enable_cache(model, config())
    for layer in layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    for frame in frames[:5]:
        encoded(model, "siglip", frame[None])
    del calls[:]
    encoded(model, "siglip", frames[5:])
    assert not calls


@pytest.mark.parametrize("family", PLAIN)
def test_what_a_graph_reads_is_kept(clock, family):
    """It finds tensors by where they lie: those that it did not make itself must stay there while it is used."""
    model, frames = tiny(family), clip(frames=5, changed=5)
    neuroflow.enable_cache(model, config(score="staleness", threshold=None, budget=5))
    for frame in frames:
        encoded(model, family, frame[None])
    engine = engine_of(model)
    [group] = engine.graphs.groups.values()
    tower, slab = engine.anatomy.tower, group.slab
    held = [*tower.parameters(), *tower.buffers(), *slab.caches.values(), *engine.gate._ladders.values()]
    held += [slab.age, slab.active, slab.surprise, slab.skipped, group.frames, group.decision]
    held += [value for part in tower.modules() for value in vars(part).values() if isinstance(value, torch.Tensor)]
    held += tensors([slab.attention, *(kept for _, kept in engine.derived._kept.values())])
    for recorded in (group.decider, *group.encoders.values()):
        assert recorded.calls >= 2
        known = {memory(tensor) for tensor in [*held, *tensors(group.decider.result), *tensors(recorded.result)]}
        made = {memory(result) for *_, fresh in recorded.graph.calls for result in fresh}
        read = {memory(given) for _, args, kwargs, _ in recorded.graph.calls for given in tensors((args, kwargs))}
        assert read <= known | made
    # Nothing here is read that was computed in front of the blocks; what a tower hands to all of them would be.
    [encoder] = group.encoders.values()
    assert encoder.result.kept and not made & {memory(tensor) for tensor in encoder.result.kept}


@pytest.mark.parametrize("what", ["cut", "nan", "many"])
def test_frames_that_are_none_for_a_graph(clock, what):
    """They run as they would without, and the graphs serve again afterwards."""
    frames = clip(frames=14, changed=3)
    settings = {}
    if what == "nan":
        frames[7, :, 3:5, 3:5] = torch.nan
    else:
        # Moved on by the gate already, an average must not be moved again.
        settings = {"ema_decay": 0.3, "reference": "ema", "threshold": 0.2}
        frames[7:] = clip(frames=7, seed=1, changed=3)
        settings |= {"cut_share": 0.5} if what == "cut" else {}
    model = tiny("siglip").double()
    pairs = [
        run(model, "siglip", frames[:, None].double(), config(**settings, launch=launch))
        for launch in ("eager", "graph")
    ]
    (expected, active, ages, summary, _), (ours, ours_active, ours_ages, ours_summary, found) = pairs
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10, equal_nan=True)
    assert torch.equal(ours_active, active) and torch.equal(ours_ages, ages)
    one, other = summary.streams["default"], ours_summary.streams["default"]
    assert (one.key_frames, one.nonfinite) == (other.key_frames, other.nonfinite)
    assert sum(replays(found).values()) >= 4


def test_a_frame_whose_patches_are_all_active_is_dense(clock):
    model, frames = tiny("siglip"), clip(frames=5, changed=36)
    dense = torch.cat([encoded_unpatched(model, frame) for frame in frames])
    result, active, _, _, found = run(model, "siglip", frames[:, None], config())
    assert active.all() and replays(found) == {}
    torch.testing.assert_close(result[:, 0], dense, rtol=1e-5, atol=1e-6)


def encoded_unpatched(model, frame):
    with torch.inference_mode():
        return neuroflow.adapters.describe(model).embedding(model(pixel_values=frame[None]))


def change_weights(model, how):
    with torch.no_grad():
        if how == "in place":
            for parameter in model.parameters():
                parameter.mul_(1.1)
        elif how == "another dtype":
            model.double()
        else:
            mlp = neuroflow.adapters.describe(model).layers[1].mlp
            if how == "another module":
                torch.manual_seed(1)
                mlp.fc1 = torch.nn.Linear(64, 128)
            else:
                mlp.fc1.weight = torch.nn.Parameter(mlp.fc1.weight * 1.1)


@pytest.mark.parametrize("how", ["in place", "another dtype", "another parameter", "another module"])
def test_changed_weights_are_recorded_anew(clock, how):
    frames = clip(frames=14, changed=3)
    results = []
    for launch in ("eager", "graph"):
        model = tiny("siglip")
        neuroflow.enable_cache(model, config(launch=launch))
        outputs = []
        for number, frame in enumerate(frames):
            if number == 7:
                before = list(engine_of(model).graphs.groups.values()) if launch == "graph" else []
                change_weights(model, how)
            frame = frame.to(next(model.parameters()).dtype)
            outputs.append(encoded(model, "siglip", frame[None]).double())
        results.append(torch.cat(outputs))
        after = list(engine_of(model).graphs.groups.values()) if launch == "graph" else []
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert len(before) == len(after) == 1 and before != after
    assert sum(encoder.graph.replays for encoder in after[0].encoders.values()) >= 3


def test_what_shapes_the_output_has_graphs_of_its_own(clock):
    model, frames = tiny("siglip"), clip(frames=5, changed=3)
    neuroflow.enable_cache(model, config())
    calls = {
        "plain": lambda frame: model(pixel_values=frame[None]),
        "autocast": lambda frame: torch.autocast("cpu", torch.bfloat16)(model)(pixel_values=frame[None]),
    }
    kinds = {}
    with torch.no_grad():
        for name, call in calls.items():
            for frame in frames:
                output = call(frame)
            assert sum(replays(engine_of(model).graphs).values()) >= 3, name
            kinds[name] = output.pooler_output.dtype
    assert kinds == {"plain": torch.float32, "autocast": torch.bfloat16}


@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_hidden_states_come_without_graphs(clock, how):
    model, frames = tiny("siglip"), clip(frames=5, changed=3)
    model.config.output_hidden_states = how == "configuration"
    neuroflow.enable_cache(model, config())
    asked = {"output_hidden_states": True} if how == "argument" else {}
    with torch.inference_mode(), pytest.warns(RuntimeWarning, match="hidden states or feature maps are asked for"):
        outputs = [model(pixel_values=frame[None], **asked) for frame in frames]
    assert all(output.hidden_states is not None for output in outputs) and not engine_of(model).graphs.groups


def test_hidden_states_between_recorded_frames(clock):
    """Each change of what is asked for is a key frame; caches that a graph does not know are not read after it."""
    model, frames = tiny("clip").double(), clip(frames=14, changed=3).double()
    asks = [number in (5, 6, 12) for number in range(14)]

    def outputs(**settings):
        neuroflow.enable_cache(model, config(**settings))
        found, keys = [], []
        for frame, asked in zip(frames, asks, strict=True):
            with torch.inference_mode():
                output = model(pixel_values=frame[None], output_hidden_states=asked)
            found += [output.last_hidden_state, *(output.hidden_states if asked else ())]
            keys.append(bool(neuroflow.summary(model).streams["default"].active.all()))
        groups = engine_of(model).graphs and engine_of(model).graphs.groups
        neuroflow.disable_cache(model)
        return found, keys, groups

    with pytest.warns(RuntimeWarning, match="other hidden states or feature maps are asked for"):
        recorded, keys, groups = outputs()
        eager, _, _ = outputs(launch="eager")
    assert [number for number, key in enumerate(keys) if key] == [0, 5, 7, 12, 13]
    assert groups
    for ours, theirs in zip(recorded, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_another_size_has_graphs_of_its_own(clock):
    model = tiny("siglip")
    neuroflow.enable_cache(model, config())
    small, large = clip(frames=6, changed=3), clip(frames=6, changed=3, size=(64, 64))
    for frames in (small, large, small):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of the size that changed
            for frame in frames:
                encoded(model, "siglip", frame[None])
        [group] = engine_of(model).graphs.groups.values()  # those of the other size went with its tensors
        assert group.frames.shape[2:] == frames.shape[2:] and sum(replays(engine_of(model).graphs).values()) >= 3


def test_streams_that_do_not_keep_together_have_no_graphs(clock):
    model, frames = tiny("siglip"), clip(frames=8, changed=3)
    neuroflow.enable_cache(model, config())
    for number, frame in enumerate(frames):
        names = ("a", "b") if number % 2 else ("a",)
        encoded(model, "siglip", frame[None].repeat(len(names), 1, 1, 1), names)
    assert not engine_of(model).graphs.groups


def test_closed_streams_give_the_memory_of_their_graphs_back(clock):
    model, frames = tiny("siglip"), clip(frames=6, changed=3)
    neuroflow.enable_cache(model, config())
    for frame in frames:
        for names in (("a", "b"), ("c",)):
            encoded(model, "siglip", frame[None].repeat(len(names), 1, 1, 1), names)
    found = engine_of(model).graphs
    assert len(found.groups) == 2
    both = neuroflow.summary(model).graph_bytes
    held = weakref.ref(next(iter(found.groups.values())).frames)
    closed = engine_of(model).streams["b"]  # which somebody may hold on to
    neuroflow.reset_cache(model, "b")
    gc.collect()
    assert len(found.groups) == 1 and held() is None and closed.slab is None
    assert 0 < neuroflow.summary(model).graph_bytes < both
    assert f"{neuroflow.summary(model).graph_bytes / 2**20:.1f} MiB in CUDA graphs" in str(neuroflow.summary(model))
    encoded(model, "siglip", frames[:1], ("a",))
    assert neuroflow.summary(model).streams["a"].frames == 7  # its neighbour's going does not touch it


def test_no_more_groups_than_the_limit(clock, monkeypatch):
    monkeypatch.setattr(graphs, "GROUPS", 2)
    model, frames = tiny("siglip"), clip(frames=4, changed=3)
    neuroflow.enable_cache(model, config())
    for name in "abc":
        for frame in frames:
            encoded(model, "siglip", frame[None], (name,))
    assert [group.names for group in engine_of(model).graphs.groups.values()] == [["b"], ["c"]]


def test_graphs_slower_than_a_dense_pass_are_not_used(clock):
    """Found out when the first is recorded; the next frame with as many patches is dense, those with fewer are not."""
    model, frames = tiny("siglip"), clip(frames=9, changed=9)
    neuroflow.enable_cache(model, config(dense_above=None))
    for frame in frames[:2]:
        encoded(model, "siglip", frame[None])
    clock["graph"] = 0.6  # of the gate and of what encodes, together more than the dense 1.0
    for frame in frames[2:6]:
        encoded(model, "siglip", frame[None])
    stream = neuroflow.summary(model).streams["default"]
    assert stream.active.all() and stream.key_frames >= 2
    assert list(neuroflow.summary(model).crossovers.values()) == [15 / 36]
    clock["graph"] = 0.3
    for _ in range(3):
        encoded(model, "siglip", frames[5:6])
    assert neuroflow.summary(model).streams["default"].active.sum() == 4


@pytest.mark.parametrize("share", [15 / 36, 16 / 36, 1.0])
def test_a_given_share_decides_instead_of_times(clock, share):
    clock["graph"] = 0.6
    found = compare("siglip", "E", clip(frames=6, changed=9)[:, None], dense_above=share)
    assert sum(len(group.encoders) for group in found.groups.values()) == (share >= 16 / 36)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("siglip2", {}, "the tower takes tensors besides the frames"),
        ("qwen3-vl", {}, "its frames are not a batch of one size with tokens in row-major order"),
        ("sam", {}, "not every query attends to every key"),
        ("eomt", {}, "aten::is_nonzero waits for the device"),
        ("siglip", {"dilation": 1, "ladder": None}, "dilation adds patches"),
    ],
)
def test_what_cannot_be_recorded_is_said_once_and_runs_as_before(clock, family, settings, reason):
    model, frames = tiny(family).double(), clip(frames=6, changed=3).double()
    with pytest.warns(RuntimeWarning, match=f"frames run without CUDA graphs: .*{reason}") as said:
        result, active, _, _, found = run(model, family, frames[:, None], config(**settings))
    assert len(said) == 1 and not found.groups
    expected, as_active, *_ = run(model, family, frames[:, None], config(launch="eager", **settings))
    # A pass that fails while it is set up, or recorded, leaves a key frame behind.
    later = slice({"sam": 2, "eomt": 3}.get(family), None)
    assert torch.equal(active[later], as_active[later])
    if later == slice(None):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


def test_several_streams_of_b_run_without(clock):
    model, frames = tiny("siglip"), clip(frames=3, changed=3)
    neuroflow.enable_cache(model, config(arch="B"))
    with pytest.warns(RuntimeWarning, match="arch 'active' pads its output"):
        encoded(model, "siglip", frames[:2], ("a", "b"))


def test_what_fails_while_it_is_recorded_runs_as_before(clock):
    """A module that waits for the device works as it is, and cannot be part of a graph."""
    model, frames = tiny("siglip"), clip(frames=6, changed=3)
    neuroflow.enable_cache(model, config())
    neuroflow.adapters.describe(model).layers[2].register_forward_hook(lambda *given: given[2].sum().item() and None)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs: .* waits for the device"):
        for frame in frames:
            result = encoded(model, "siglip", frame[None])
    assert result.isfinite().all() and not engine_of(model).graphs.groups
    stream = neuroflow.summary(model).streams["default"]
    assert stream.frames == 6 and stream.active.sum() == 4


def test_nothing_is_recorded_on_a_cpu():
    model, frames = tiny("siglip"), clip(frames=4, changed=3)
    neuroflow.enable_cache(model, config())
    for frame in frames:
        encoded(model, "siglip", frame[None])
    assert not engine_of(model).graphs.groups


def test_the_ladder_of_graphs_where_none_is_given(clock):
    """So that the frames that set graphs up have as many patches as those that are replayed."""
    model, frames = tiny("siglip", 128), clip(frames=5, size=(128, 128), changed=70)
    assert all(low < high <= 1.5 * low for low, high in zip(gate.LADDER, gate.LADDER[1:], strict=False))
    _, active, _, _, found = run(model, "siglip", frames[:, None], config(ladder=None))
    assert active[1:].sum(2).flatten().tolist() == [96] * 4 and replays(found) == {96: 4}
    assert engine_of_ladder(model, config(ladder=None, dilation=1)) is None


def engine_of_ladder(model, settings):
    neuroflow.enable_cache(model, settings)
    ladder = engine_of(model).gate.ladder(torch.device("cpu"))
    neuroflow.disable_cache(model)
    return ladder


def test_inference_mode_and_no_grad_may_alternate(clock):
    model, frames = tiny("vit"), clip(frames=9, changed=3)
    neuroflow.enable_cache(model, config(score="staleness", threshold=0.5))
    for number, frame in enumerate(frames):
        with torch.inference_mode() if number % 2 else torch.no_grad():
            assert model(**inputs("vit", frame[None])).last_hidden_state.isfinite().all()
    assert sum(replays(engine_of(model).graphs).values()) >= 3


def test_saved_streams_go_on(clock, tmp_path):
    model, frames = tiny("siglip"), clip(frames=10, changed=3)
    neuroflow.enable_cache(model, config())
    for frame in frames[:6]:
        encoded(model, "siglip", frame[None], ("a",))
    neuroflow.save_state(model, tmp_path / "state.safetensors")
    expected = [encoded(model, "siglip", frame[None], ("a",)) for frame in frames[6:]]
    skipped = neuroflow.summary(model).streams["a"].skipped
    neuroflow.load_state(model, tmp_path / "state.safetensors")
    again = [encoded(model, "siglip", frame[None], ("a",)) for frame in frames[6:]]
    torch.testing.assert_close(torch.cat(again), torch.cat(expected))
    assert neuroflow.summary(model).streams["a"].skipped == pytest.approx(skipped)


def test_a_frame_after_a_gap_is_none_for_a_graph(clock):
    model, frames = tiny("siglip"), clip(frames=7, changed=5)
    neuroflow.enable_cache(model, config())
    for number, frame in enumerate(frames[:6]):
        neuroflow.encode(model, frame[None], ["a"], [number])
    assert sum(replays(engine_of(model).graphs).values()) >= 3
    neuroflow.encode(model, frames[6:], ["a"], [9])
    assert neuroflow.last_pass(model)[0].key_frame == "gap"

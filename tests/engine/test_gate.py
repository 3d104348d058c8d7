"""Each choice of the gate: what it computes, and what it does to a stream."""

import neuroflow
import pytest
import torch
from models import clip, exact, inputs, tiny
from neuroflow.engine import scores
from neuroflow.engine.gate import Gate
from neuroflow.engine.passes import Pass, Plan
from neuroflow.engine.state import StreamState

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = (5, 7)


def run(model, frames, config, family="siglip"):
    """The active patches [T, rows, columns] and pooled outputs [T, D] of one stream."""
    neuroflow.enable_cache(model, config)
    active, pooled = [], []
    embedding = neuroflow.adapters.describe(model).embedding
    with torch.inference_mode():
        for frame in frames:
            pooled.append(embedding(model(**inputs(family, frame[None])))[0])
            active.append(neuroflow.summary(model).streams["default"].active)
    stream = neuroflow.summary(model).streams["default"]
    neuroflow.disable_cache(model)
    return torch.stack(active), torch.stack(pooled), stream


@pytest.mark.parametrize("family", ["siglip", "vit"])
@pytest.mark.parametrize(
    "settings", [{"threshold": 0.01}, {"budget": 3}, {"threshold": 0.01, "reference": "ema"}], ids=str
)
def test_a_gate_alone_chooses_what_the_engines_does(family, settings):
    """Two streams of which one has a damaged frame, from the tokens that reach the first block of a plain model."""
    model, frames = tiny(family), torch.stack([clip(seed=seed) for seed in (0, 1)], 1)  # [T, S, 3, H, W]
    frames[2, 1, 0, 0, 0] = torch.nan
    config = exact(signal="embedding", **settings)
    anatomy, tokens = neuroflow.adapters.describe(model), []
    gate, states = Gate(Plan.of(anatomy, config)), [StreamState("a"), StreamState("b")]
    hook = anatomy.layers[0].register_forward_pre_hook(lambda _, given: tokens.append(given[0]))
    with torch.inference_mode():
        for batch in frames:
            model(**inputs(family, batch))
    hook.remove()
    chosen = []
    for given in tokens:
        current = Pass(gate.plan, states, [(6, 6)] * 2)
        with torch.inference_mode(), pytest.MonkeyPatch.context() as quiet:
            quiet.setattr(gate, "warn", lambda message: None)
            rows = gate(current, given)
        current.complete()
        active = torch.zeros(2, 36 + anatomy.prefix, dtype=torch.bool)
        for stream, own in enumerate(rows):
            active[stream, slice(None) if own is None else own.long()] = True
        chosen.append((active[:, anatomy.prefix :], [report.key_frame for report in current.reports]))
    neuroflow.enable_cache(model, config)
    with torch.inference_mode(), pytest.warns(RuntimeWarning, match="holds NaN or Inf"):
        for batch, (active, key_frames) in zip(frames, chosen, strict=True):
            with neuroflow.cache_context(model, "a", "b"):
                model(**inputs(family, batch))
            reports = neuroflow.last_pass(model)
            assert torch.equal(torch.stack([report.active.flatten() for report in reports]), active)
            assert [report.key_frame for report in reports] == key_frames
    assert [key_frames for _, key_frames in chosen] == [
        ["first"] * 2, [None] * 2, [None] * 2, [None, "nonfinite"], [None] * 2, [None] * 2,
    ]  # fmt: skip


def test_staleness_by_hand(generator):
    both = torch.rand(2, 35, generator=generator) * 0.1
    ages, paid = torch.arange(70, dtype=torch.int32).view(2, 35), torch.rand(2, 35, generator=generator)
    surprise, age, attention = both[1].view(GRID), ages[1], paid[1]
    result = scores.staleness(both, ages, paid, GRID)[1].view(GRID)
    for row, column in [(0, 0), (2, 3), (4, 6), (0, 4)]:
        around = surprise[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].mean()
        drift = surprise[row, column].sqrt() + 0.8 * around.sqrt() + 0.5 * surprise.mean().sqrt()
        patch = row * 7 + column
        expected = drift**2 * (1 + age[patch]) ** 0.5 * attention[patch].sqrt()
        torch.testing.assert_close(result[row, column], expected)
    unweighted = scores.staleness(both[1:], ages[1:], None, GRID)
    torch.testing.assert_close(unweighted[0] * attention.sqrt(), result.flatten())


def test_staleness_where_nothing_changed_and_where_a_patch_is_broken():
    still = scores.staleness(torch.zeros(1, 35), torch.full((1, 35), 90), torch.ones(1, 35), GRID)
    assert (still == 0).all()
    surprise = torch.zeros(2, 35)
    surprise[1, 17] = torch.inf
    broken = scores.staleness(surprise, torch.zeros(2, 35), None, GRID)
    assert broken.isinf().nonzero().tolist() == [[1, 17]]


def test_attention_of_the_pooled_output_is_what_the_stream_keeps():
    """CLS against plain attention over the last blocks; the head against its own weights."""
    frames = clip(frames=3, changed=6)
    for family in ("vit", "siglip"):
        model = tiny(family)
        neuroflow.enable_cache(model, exact(score="staleness", threshold=0.5))
        for frame in frames:
            with torch.inference_mode():
                model(**inputs(family, frame[None]))
        state = neuroflow.adapters.describe(model).tower._neuroflow_engine.streams["default"]
        assert state.active.sum() < 36
        if family == "vit":
            anatomy = neuroflow.adapters.describe(model)
            attention = anatomy.attentions[-1]
            seen = {}
            projection = attention.q_proj if hasattr(attention, "q_proj") else attention.query  # to transformers 5.8
            hook = projection.register_forward_hook(lambda *a, seen=seen: seen.update(q=a[2]))
            with torch.inference_mode():
                model(**inputs(family, frames[2:]))
            hook.remove()
            keys = state.tensors["key", 3].unflatten(2, (4, 16))[0].transpose(0, 1)  # [heads, T, head_dim]
            query = seen["q"][0, 0].view(4, 1, 16)
            expected = (query @ keys.transpose(1, 2) * attention.scaling).softmax(-1)[:, 0, 1:].mean(0)
        else:
            head, tokens = neuroflow.adapters.describe(model).pool[0].attention, state.tensors["output"]
            probe = neuroflow.adapters.describe(model).pool[0].probe
            expected = head(probe, tokens, tokens, average_attn_weights=True)[1][0, 0]
        torch.testing.assert_close(state.attention, expected / expected.mean(), rtol=1e-4, atol=1e-5)
        neuroflow.disable_cache(model)


def test_common_motion_is_taken_off():
    surprise = torch.tensor([[0.5, 0.5, 0.5, 0.9, torch.inf], [0.0, 0.0, 0.0, 0.0, 1.0]])
    result = scores.without_common_motion(surprise)  # the means are 0.88 and 0.2
    torch.testing.assert_close(result, torch.tensor([[0.0, 0.0, 0.0, 0.02, torch.inf], [0.0, 0.0, 0.0, 0.0, 0.8]]))
    model, frames = tiny("siglip"), clip(frames=2, changed=36)
    frames[1] = torch.lerp(frames[0], frames[1], 0.3)
    frames[1, :, :8, :8] = -frames[0, :, :8, :8]
    plain, _, _ = run(model, frames, exact(threshold=0.03))
    normalised, _, _ = run(model, frames, exact(threshold=0.3, normalise_motion=True))
    assert plain[1].sum() > 30 and normalised[1, 0, 0] and normalised[1].sum() < 8


@pytest.mark.parametrize("rings", [1, 2, 10**9])
def test_dilation(rings):
    index = torch.tensor([0, 17], dtype=torch.int32)  # (0, 0) and (2, 3)
    grown = scores.dilated(index, GRID, rings)
    expected = [
        row * 7 + column
        for row in range(5)
        for column in range(7)
        if max(row, column) <= rings or max(abs(row - 2), abs(column - 3)) <= rings
    ]
    assert grown.dtype == torch.int32 and grown.tolist() == expected
    frames = clip(frames=2, changed=1)
    active, _, _ = run(tiny("siglip"), frames, exact(threshold=1e-4, floor=0, dilation=rings))
    changed = (frames[0] != frames[1]).any(0).unfold(0, 8, 8).unfold(1, 8, 8).any(-1).any(-1)
    assert active[1].nonzero().tolist() == [
        [row, column]
        for row in range(6)
        for column in range(6)
        if (changed.nonzero()[0] - torch.tensor([row, column])).abs().max() <= rings
    ]


@pytest.mark.parametrize("max_age", [1, 2, 3, 5, 8, 36, 100])
def test_no_patch_waits_longer_than_max_age(max_age):
    age, last = torch.zeros(36, dtype=torch.int32), torch.zeros(36)
    for t in range(1, 3 * max_age + 2):
        due, other = scores.due(torch.stack((age, age.flip(0))), max_age)
        assert torch.equal(other, due.flip(0)) or age.unique().numel() < 36  # of equal ages the first goes first
        assert due.sum() <= -(-2 * 36 // max_age)
        age = (age + 1).masked_fill(due, 0)
        last[due] = t
        assert t - last.min() < max_age


def test_cuts():
    surprise = torch.tensor([[0.2] * 36, [0.1] * 36])
    assert scores.is_cut(surprise, torch.tensor([18, 19]), 0.5, 0.21).tolist() == [False, True]
    assert scores.is_cut(surprise, torch.tensor([19, 18]), 0.5, None).tolist() == [True, False]
    assert scores.is_cut(surprise, torch.tensor([0, 0]), None, 0.19).tolist() == [True, False]
    assert scores.is_cut(surprise, torch.tensor([36, 36]), None, None).tolist() == [False, False]
    surprise[:, 0] = torch.inf  # one broken patch is no cut
    assert scores.is_cut(surprise, torch.tensor([1, 1]), 0.5, 0.3).tolist() == [False, False]


@pytest.mark.parametrize("rule", [{"threshold": 0.5}, {"budget": 4}])
@pytest.mark.parametrize("family", ["siglip", "vit"])
def test_a_hard_cut_is_a_key_frame(family, rule):
    model, before, after = tiny(family), clip(frames=3, changed=2), clip(frames=3, seed=1, changed=2)
    _, dense, _ = run(model, after, exact(threshold=0), family)
    active, pooled, stream = run(model, torch.cat((before, after)), neuroflow.NeuroFlowConfig(**rule), family)
    assert stream.key_frames == 2 and active[3].all()
    torch.testing.assert_close(pooled[3], dense[0], rtol=1e-4, atol=1e-5)


def test_no_patch_is_needed_where_there_is_cls():
    still = clip(frames=2, changed=0)
    assert [run(tiny(family), still, exact(floor=0), family)[0][1].sum() for family in ("vit", "siglip")] == [0, 1]


def test_previous_frame_as_reference():
    """A patch that changes slowly is compared with the last frame, not with where it began."""
    start, end = clip(frames=2, changed=5)
    frames = torch.stack([torch.lerp(start, end, t / 40) for t in range(20)])
    config = {"threshold": 0.005, "floor": 0}
    assert run(tiny("vit"), frames, exact(reference="previous", **config), "vit")[0][1:].sum() == 0
    assert run(tiny("vit"), frames, exact(reference="refreshed", **config), "vit")[0][1:].sum() > 0


def test_the_dual_reference_keeps_what_stopped():
    """An object that arrives and stays: the fast average has taken it in after some frames, the slow one has not."""
    empty, object_there = clip(frames=2, changed=4)
    frames = torch.stack([empty, *[object_there] * 12, empty])
    config = {"threshold": 0.05, "floor": 0}
    fast, dual, slow = (
        run(tiny("vit"), frames, exact(**config, **reference), "vit")[0]
        for reference in (
            {"reference": "ema", "ema_decay": 0.5},
            {"reference": "dual", "ema_decay": 0.001, "fast_decay": 0.5},
            {"reference": "ema", "ema_decay": 0.001},
        )
    )
    assert fast[12].sum() == 0 and dual[12].sum() == 4
    assert slow[13].sum() == 0 and fast[13].sum() == dual[13].sum() == 4  # novelty: it left


@pytest.mark.parametrize("family", ["siglip", "siglip2", "vit"])
def test_pixels_as_signal(family):
    model, frames = tiny(family), clip(frames=4, changed=5)
    with torch.no_grad():
        neuroflow.adapters.describe(model).projection.weight.zero_()  # what the model sees never changes
    active, _, _ = run(model, frames, exact(signal="pixel", threshold=1e-4, floor=0), family)
    for before, after, seen in zip(frames, frames[1:], active[1:], strict=False):
        assert torch.equal(seen, (before != after).any(0).unfold(0, 8, 8).unfold(1, 8, 8).any(-1).any(-1))


@pytest.mark.parametrize("family", ["siglip", "vit"])
def test_blend(family):
    """A cached output is a mixture of the old and the new one; CLS is always the new one."""
    model, frames = tiny(family).double(), clip(frames=2, changed=3).double()
    outputs = {}
    for blend in (1.0, 0.25):
        neuroflow.enable_cache(model, exact(threshold=1e-4, floor=0, blend=blend))
        with torch.inference_mode():
            outputs[blend] = [model(**inputs(family, frame[None])).last_hidden_state[0] for frame in frames]
        neuroflow.disable_cache(model)
    (first, new), (_, mixed) = outputs[1.0], outputs[0.25]
    prefix = 1 if family == "vit" else 0
    torch.testing.assert_close(mixed[prefix:], torch.lerp(first, new, 0.25)[prefix:])
    torch.testing.assert_close(mixed[:prefix], new[:prefix])


def test_a_shared_budget_goes_where_the_change_is():
    model = tiny("siglip")
    busy, calm = clip(frames=2, seed=1, changed=18), clip(frames=2, seed=2, changed=0)
    neuroflow.enable_cache(model, exact(budget=8, share_budget=True, floor=2))
    for t in range(2):
        neuroflow.encode(model, torch.stack((calm[t], busy[t])), ["calm", "busy"])
    streams = neuroflow.summary(model).streams
    assert {name: int(stream.active.sum()) for name, stream in streams.items()} == {"calm": 2, "busy": 14}


def test_configurations_survive_a_file(tmp_path):
    config = neuroflow.NeuroFlowConfig(arch="C", budget=0.2, reference="dual", max_age=None)
    config.save(tmp_path / "config.json")
    assert neuroflow.NeuroFlowConfig.load(tmp_path / "config.json") == config
    model = tiny("siglip")
    neuroflow.enable_cache(model, tmp_path / "config.json")
    neuroflow.enable_cache(model, config)  # the same: does nothing
    for text, message in [("[]", "JSON object"), ('{"arc": 1}', "no field 'arc'"), ('{"arch": "F"}', "arch is 'F'")]:
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=rf"bad\.json: .*{message}"):
            neuroflow.NeuroFlowConfig.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="cannot be read"):
        neuroflow.NeuroFlowConfig.load(tmp_path / "absent.json")


@pytest.mark.parametrize("damage", [4, 30])
@pytest.mark.parametrize("family", ["siglip", "vit"])
def test_the_default_heals_within_max_age(family, damage):
    """Ten corrupted frames leave nothing behind: max_age frames later the output is a fresh stream's."""
    model, still = tiny(family), clip(frames=1)
    damaged = torch.lerp(still.expand(10, -1, -1, -1), clip(frames=10, seed=9), 0.5)
    damaged[:, :, :, damage + 8 :] = still[:, :, :, damage + 8 :]
    config = neuroflow.NeuroFlowConfig(max_age=20)
    frames = torch.cat([still, damaged, still.expand(20, -1, -1, -1)])
    _, pooled, _ = run(model, frames, config, family)
    _, fresh, _ = run(model, still, config, family)
    assert (pooled[-1] - fresh[0]).abs().max() < 1e-3 * fresh[0].abs().max()

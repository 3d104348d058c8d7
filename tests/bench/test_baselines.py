"""The baselines of the benchmark: with nothing left out each is the unpatched model; each does what its paper says."""

import json

import neuroflow
import pytest
import torch
from models import PATCH, SIZES, clip, tiny
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from bench.baselines import STC, AttentionDropping, Eventful, FrameSkipping, PixelGate, Published, TokenMerging
from bench.baselines.attention_dropping import cls_attention, drop
from bench.baselines.eventful import Gated
from bench.baselines.tome import merge
from bench.baselines.tower import Tower
from bench.studies import peers
from bench.studies.protocol import embeddings

SIZE = (48, 64)  # not the models' native one: 6 x 8 patches
PATCHES = 48
EXACT = {torch.float32: 1e-5, torch.float64: 1e-10}
DENSE = {
    "frame skipping": lambda model: FrameSkipping(model, every=1),
    "published B": lambda model: Published(model, threshold=0, arch="B"),
    "published C": lambda model: Published(model, threshold=0, arch="C"),
    "pixel gate": lambda model: PixelGate(model, threshold=0),
    "token merging": lambda model: TokenMerging(model, r=0),
    "attention dropping": lambda model: AttentionDropping(model, share=1),
    "STC": lambda model: STC(model, share=1, period=100),
    "Eventful": lambda model: Eventful(model, count=PATCHES + 1),
}
SPARSE = {
    "frame skipping": lambda model: FrameSkipping(model, every=2),
    "published B": lambda model: Published(model, threshold=0.1, arch="B"),
    "published C": lambda model: Published(model, threshold=0.1, arch="C"),
    "pixel gate": lambda model: PixelGate(model, threshold=0.1),
    "token merging": lambda model: TokenMerging(model, r=5),
    "attention dropping": lambda model: AttentionDropping(model, share=0.5),
    "STC": lambda model: STC(model, share=0.25, period=3),
    "Eventful": lambda model: Eventful(model, count=12),
}
OF_CLS = ("token merging", "attention dropping")
SERVED = [(name, family) for name in DENSE for family in ("vit", "siglip") if family == "vit" or name not in OF_CLS]

pytestmark = pytest.mark.usefixtures("one_thread")


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def frames(count=5, **arguments):
    return clip(frames=count, size=SIZE, **arguments).split(1)


def flops_of(baseline, pixels):
    before = baseline.flops
    baseline(pixels)
    return baseline.flops - before


def linear_flops(tokens):
    """Of one block's linears on `tokens` tokens."""
    width, hidden = SIZES["hidden_size"], SIZES["intermediate_size"]
    return 2 * tokens * (4 * width**2 + 2 * width * hidden)


def attention_flops(queries, keys):
    return 4 * queries * keys * SIZES["hidden_size"]


PROJECTION = 2 * PATCHES * 3 * PATCH**2 * SIZES["hidden_size"]


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(("name", "family"), SERVED)
def test_nothing_left_out_is_the_unpatched_model(name, family, dtype):
    model = tiny(family).to(dtype)
    baseline, anatomy = DENSE[name](model), neuroflow.adapters.describe(model)
    for pixels in frames(3):
        pixels = pixels.to(dtype)
        with torch.inference_mode():
            expected = anatomy.embedding(model(pixel_values=pixels, interpolate_pos_encoding=True))
        assert relative(baseline(pixels), expected) < EXACT[dtype]


@pytest.mark.parametrize("name", DENSE)
def test_flops_are_those_of_the_products(name):
    model, pixels = tiny("vit"), frames(1)[0]
    model.set_attn_implementation("eager")  # the counter knows no other attention on a CPU
    with FlopCounterMode(display=False) as counter:
        embeddings(model, pixels)
    assert flops_of(DENSE[name](model), pixels) == counter.get_total_flops()


@pytest.mark.parametrize(("name", "family"), SERVED)
def test_a_stream_that_was_reset_starts_over(name, family):
    baseline = SPARSE[name](tiny(family))
    first = [baseline(pixels) for pixels in frames()]
    kept = [embedding.clone() for embedding in first]
    baseline.reset()
    second = [baseline(pixels) for pixels in frames()]
    # What was returned is the caller's: later frames do not write into it.
    assert all(map(torch.equal, first, kept)) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", OF_CLS)
def test_what_reads_cls_refuses_a_model_without(name):
    with pytest.raises(TypeError, match="SiglipVisionModel has no CLS token"):
        DENSE[name](tiny("siglip"))


def test_frame_skipping_repeats():
    model, shots = tiny("vit"), frames(5)
    skipping = FrameSkipping(model, every=3)
    found = [skipping(pixels) for pixels in shots]
    for embedding, source in zip(found, (0, 0, 0, 3, 3), strict=True):
        assert relative(embedding, embeddings(model, shots[source])) < 1e-5
    assert flops_of(skipping, shots[0]) == 0


@pytest.mark.parametrize("family", ["vit", "siglip"])
@pytest.mark.parametrize("arch", ["B", "C"])
@pytest.mark.parametrize("threshold", [0.1, 2.0])  # the second leaves the floor of patches
def test_published_is_what_the_engine_calls_so(family, arch, threshold):
    model, shots = tiny(family), frames()
    published = Published(model, threshold, arch)
    found = torch.cat([published(pixels) for pixels in shots])
    neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig.published(arch, threshold=threshold))
    expected = torch.cat([embeddings(model, pixels) for pixels in shots])
    assert 0 < neuroflow.summary(model).streams["default"].skipped < 1
    assert relative(found, expected) < 1e-5


def test_published_encodes_active_patches_alone():
    published = Published(tiny("vit"), threshold=2.0)
    first, second = frames(2)
    published(first)
    tokens = 1 + 4
    blocks = SIZES["num_hidden_layers"] * (linear_flops(tokens) + attention_flops(tokens, tokens))
    assert flops_of(published, second) == PROJECTION + blocks


def test_published_starts_over_at_another_size():
    model = tiny("vit")
    published = Published(model, threshold=0.1)
    published(frames(1)[0])
    other = clip(frames=1)
    assert relative(published(other), embeddings(model, other)) < 1e-5


def test_pixel_gate_compares_with_the_last_encoding():
    gate = PixelGate(tiny("vit"), threshold=0.1)
    still = frames(1)[0]
    before = gate(still)
    drifting = still.clone()
    for step in range(3):
        drifting[..., :PATCH, PATCH : 3 * PATCH] += 0.04
        drifting[..., :PATCH, 4 * PATCH :] += 0.03
        spent = flops_of(gate, drifting)
        # 0.04 and 0.08 are below, 0.12 is not; it becomes the reference.
        tokens = 1 + 2
        blocks = SIZES["num_hidden_layers"] * (linear_flops(tokens) + attention_flops(tokens, tokens))
        assert spent == (PROJECTION + blocks if step == 2 else 0)
        assert torch.equal(gate(drifting), before) == (step < 2)
    drifting[..., :PATCH, 4 * PATCH :] += 0.03
    assert flops_of(gate, drifting) > 0


def test_merging_joins_the_most_similar_pair():
    # Token 0 is CLS, and likest to token 1 of all; 2 and 5 come next.
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-9.0, 3.0], [0.6, -0.8], [0.1, 1.0]])
    tokens = torch.arange(6.0)[:, None]
    sizes = torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0, 1.0])[:, None]
    found, counts = merge(tokens, sizes, keys, 1)
    assert found[:, 0].tolist() == [0, 4, 1, 3, (3 * 2 + 5) / 4]
    assert counts[:, 0].tolist() == [1, 1, 1, 1, 4]


@pytest.mark.parametrize("r", [0, 1, 7, 24, 40])
def test_merging_takes_r_tokens_and_loses_no_patch(r, generator):
    tokens = torch.randn(PATCHES + 1, 8, generator=generator)
    sizes = torch.randint(1, 5, (PATCHES + 1, 1), generator=generator).float()
    found, counts = merge(tokens, sizes, torch.randn(PATCHES + 1, 4, generator=generator), r)
    assert len(found) == PATCHES + 1 - min(r, PATCHES // 2)
    assert counts.sum() == sizes.sum() and torch.equal(found[0], tokens[0])
    assert torch.allclose((found * counts).sum(0), (tokens * sizes).sum(0), atol=1e-4)


@pytest.mark.parametrize("r", [5, 24])
def test_merging_identical_patches_is_exact(r):
    model = tiny("vit")
    with torch.no_grad():
        model.embeddings.position_embeddings.zero_()
    # Patches of two kinds, so that there is something to attend to.
    pixels = torch.full((1, 3, *SIZE), 0.3)
    pixels[..., : 2 * PATCH, :] = -0.5
    merging = TokenMerging(model, r)
    assert relative(merging(pixels), embeddings(model, pixels)) < 1e-5
    tokens, blocks = PATCHES + 1, 0
    for _ in range(SIZES["num_hidden_layers"]):
        left = tokens - min(r, (tokens - 1) // 2)
        hidden = 4 * SIZES["hidden_size"] * SIZES["intermediate_size"]
        blocks += linear_flops(tokens) + attention_flops(tokens, tokens) - (tokens - left) * hidden
        tokens = left
    merging.flops = 0
    assert flops_of(merging, pixels) == PROJECTION + blocks


def test_dropping_keeps_what_cls_attends_to(generator):
    tokens = torch.randn(1, 6, 4, generator=generator)
    attention = torch.tensor([0.1, 0.3, 0.05, 0.2, 0.15])
    found = drop(tokens, attention, 0.5)  # 3 of 5
    fused = (2 * tokens[0, 1] + tokens[0, 3]) / 3
    assert torch.equal(found[0, :4], tokens[0, [0, 2, 4, 5]]) and torch.allclose(found[0, 4], fused)
    assert drop(tokens, attention, 1) is tokens


def test_dropping_reads_the_attention_of_the_model():
    model, pixels = tiny("vit"), frames(1)[0]
    tower = Tower(model)
    with torch.inference_mode():
        block = tower.blocks[0]
        query, key, _ = block.qkv(block.norm1(tower.embed(pixels)))
        found = cls_attention(block.split(query)[0], block.split(key)[0])
    model.set_attn_implementation("eager")
    expected = model(pixels, interpolate_pos_encoding=True, output_attentions=True).attentions[0][0, :, 0, 1:].mean(0)
    assert torch.allclose(found, expected, atol=1e-6)


def test_dropping_leaves_a_share_after_each_quarter():
    dropping = AttentionDropping(tiny("vit"), share=0.5)
    assert dropping.drops == [1, 2, 3]
    blocks, tokens = linear_flops(49) + attention_flops(49, 49), 49
    for left in (1 + 24 + 1, 1 + 13 + 1, 1 + 7 + 1):
        hidden = 4 * SIZES["hidden_size"] * SIZES["intermediate_size"]
        blocks += linear_flops(tokens) + attention_flops(tokens, tokens) - (tokens - left) * hidden
        tokens = left
    assert flops_of(dropping, frames(1)[0]) == PROJECTION + blocks


@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_stc_updates_the_tokens_with_the_least_similar_keys(family):
    stc = STC(tiny(family), share=0.25, period=3)
    first, second = frames(2, changed=24)
    stc(first)
    block, kept = stc.blocks[0], stc.kept[0]
    with torch.inference_mode():
        tokens = stc.embed(second)
        likeness = torch.cosine_similarity(block.key(block.norm1(tokens))[0], kept[0][0], dim=-1)
        increment = (stc.partial(block, kept, tokens) - tokens)[0]
    served = (increment - (kept[2] + kept[3])[0]).norm(dim=1) < 1e-5
    count = round(0.25 * len(likeness))
    updated = served.logical_not().nonzero()[:, 0]
    expected = likeness[stc.prefix :].argsort()[: count - stc.prefix] + stc.prefix
    assert updated.tolist() == sorted([*range(stc.prefix), *expected.tolist()])


def test_stc_is_whole_every_period():
    model, shots = tiny("vit"), frames(5)
    stc = STC(model, share=0.25, period=3)
    found, spent = [], []
    for pixels in shots:
        before = stc.flops
        found.append(stc(pixels))
        spent.append(stc.flops - before)
    same = [relative(one, embeddings(model, pixels)) < 1e-5 for one, pixels in zip(found, shots, strict=True)]
    assert same == [True, False, False, True, False]
    # Of 49 tokens 12 are updated, and all are projected to keys.
    keys = 2 * (49 - 12) * SIZES["hidden_size"] ** 2
    partial = PROJECTION + SIZES["num_hidden_layers"] * (linear_flops(12) + attention_flops(12, 49) + keys)
    assert spent[1] == spent[2] == spent[4] == partial < spent[0] == spent[3]


@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_eventful_spends_nothing_on_a_still_clip(family):
    model, still = tiny(family), frames(1)[0]
    eventful = Eventful(model, count=10)
    first = eventful(still)
    tokens = PATCHES + eventful.prefix
    assert flops_of(eventful, still) == PROJECTION + SIZES["num_hidden_layers"] * attention_flops(tokens, tokens)
    assert torch.equal(eventful(still), first) and relative(first, embeddings(model, still)) < 1e-5


def test_eventful_recomputes_the_tokens_that_moved_most():
    eventful = Eventful(tiny("vit"), count=3)
    first, second = frames(2, changed=5)
    eventful(first)
    spent = flops_of(eventful, second)
    gate = eventful.stages[0][0]
    assert gate.prefix == 1
    block = eventful.blocks[0]
    with torch.inference_mode():
        before, now = (block.norm1(eventful.embed(pixels)) for pixels in (first, second))
        patches = (now - before)[0, 1:].norm(dim=1).topk(3).indices + 1
    followed = (gate.reference == now)[0].all(1)
    followed &= (before != now)[0].any(1)
    assert followed.nonzero()[:, 0].tolist() == sorted(patches.tolist())
    assert spent == PROJECTION + SIZES["num_hidden_layers"] * (linear_flops(3) + attention_flops(49, 49))


def test_eventful_gates_let_cls_through_first():
    gate = Gated(lambda tokens: 2 * tokens, count=2, prefix=1)
    tokens = torch.zeros(1, 5, 3)
    gate(tokens)
    moved = torch.tensor([0.1, 1.0, 5.0, 3.0, 0.0]).view(1, 5, 1).expand(1, 5, 3)
    assert gate(moved)[0, :, 0].tolist() == pytest.approx([0.2, 0, 10, 0, 0])
    # CLS holds still now, and the others wait no longer.
    assert gate(moved)[0, :, 0].tolist() == pytest.approx([0.2, 2, 10, 6, 0])


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("first", [0, 1, 4, 6, 7])
def test_cheapest_setting_that_reaches(first, start):
    ladder = list(range(7))
    assert peers.cheapest(ladder, lambda setting: setting >= first, start) == max(first, start)


def test_a_target_out_of_reach_is_given_up():
    dense, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    answers = [other, dense, other, dense, dense]
    expected, pixels = torch.cat([dense] * 5), torch.zeros(5, 1)
    # One of the four frames that count is lost; the first does not.
    for target, taken in ((0.75, 5), (0.76, 3)):
        left = list(answers)
        assert peers.reaches(lambda pixels, left=left: left.pop(0), pixels, expected, target) == (target == 0.75)
        assert len(left) == 5 - taken


def test_flops_of_neuroflow_are_those_of_its_active_tokens():
    model, shots = tiny("vit"), frames(4)
    ours, dense, counted = peers.NeuroFlow(model, 0.5), peers.Dense(model), FrameSkipping(model, every=1)
    everything = peers.NeuroFlow(model, 0)
    expected = 0
    for pixels in shots:
        for contestant in (ours, everything, dense, counted):
            contestant(pixels)
        tokens = 1 + int(neuroflow.summary(ours.model).streams["default"].active.sum())
        expected += PROJECTION + SIZES["num_hidden_layers"] * (linear_flops(tokens) + attention_flops(tokens, 49))
    assert dense.flops == counted.flops == everything.flops
    assert ours.flops == pytest.approx(expected) and expected < dense.flops


class Recorder:
    """A contestant whose embeddings and FLOPs are the frame's number and its square."""

    def __init__(self, name, log):
        self.name, self.log, self.flops = name, log, 0

    def reset(self):
        self.log.append((self.name, "reset"))

    def __call__(self, pixels):
        self.log.append((self.name, int(pixels)))
        self.flops += int(pixels) ** 2
        return pixels


def test_contestants_take_turns(monkeypatch):
    monkeypatch.setattr(peers, "TURN", 2)
    log, pixels = [], torch.tensor([[5.0], [1.0], [2.0]])
    measured = peers.measure({name: Recorder(name, log) for name in "ab"}, pixels, passes=2)
    turns = [("a", 5), ("a", 1), ("b", 5), ("b", 1), ("b", 2), ("a", 2)]
    assert log == 2 * [("a", "reset"), ("b", "reset"), *turns]
    for found, seconds, each in measured.values():
        assert torch.equal(found, pixels) and seconds.shape == (2, 3) and (seconds > 0).all()
        assert each == (1 + 4) / 2


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=48, patch_size=PATCH, num_labels=5)).eval()


def test_search_and_comparison(classifier):
    shots = clip(frames=8, size=SIZE, changed=12)
    expected = embeddings(classifier, shots)
    periods = [{"every": every} for every in (4, 3, 2, 1)]
    methods = {
        peers.OURS: (peers.NeuroFlow, [[{"threshold": 9.0}, {"threshold": 0}]]),
        "frame skipping": (FrameSkipping, [periods]),
        "STC": (STC, [[{"share": share, "period": period} for share in (0.1, 1)] for period in (100, 1)]),
        "published C": (Published, [[{"threshold": 3.0}, {"threshold": 2.0}]]),
    }
    chosen = peers.search(classifier, methods, shots, expected)
    rows = peers.compare(classifier, methods, shots, chosen, passes=2)
    assert [row["peer"] for row in rows] == ["dense", *(name for name in methods for _ in peers.TARGETS)]
    dense = rows[0]
    assert dense["speed"] == 1 and dense["cosine_mean"] == pytest.approx(1) and dense["ours_is"] is None
    for row in rows[1:]:
        ours = next(one for one in rows if (one["peer"], one["target"]) == (peers.OURS, row["target"]))
        assert row["ours_is"] == row["ms"] / ours["ms"] and row["speed"] == pytest.approx(dense["ms"] / row["ms"])
        make, own = methods[row["peer"]]
        baseline = make(classifier, **row["setting"])
        found = torch.cat([baseline(pixels) for pixels in shots.split(1)])
        assert row["cosine_mean"] == pytest.approx(torch.cosine_similarity(found, expected)[1:].mean().item(), abs=1e-6)
        assert row["reached"] == (row["cosine_mean"] >= row["target"])
        assert row["reached"] or row["setting"] == own[0][-1]
        if row["reached"] and row["peer"] == "frame skipping":
            cheaper = periods[: periods.index(row["setting"])]
            assert not any(peers.reaches(make(classifier, **one), shots, expected, row["target"]) for one in cheaper)
    settings = {"size": 48, "frames": 8, "passes": 2, "targets": peers.TARGETS}
    text = peers.text_of([{"clip": "some"} | row for row in rows], settings)
    assert text.count("| published C | threshold 2, not reached |") == 2
    assert all(row["reached"] for row in rows if row["peer"] in (peers.OURS, "frame skipping", "STC"))


def test_positions_of_another_size(classifier):
    pixels = torch.rand(1, 3, 64, 64)
    expected = embeddings(classifier, pixels)
    resized = peers.resized(classifier, 64)
    assert relative(embeddings(resized, pixels), expected) < 1e-6
    assert resized.vit.embeddings.position_embeddings.shape[1] == 65


def test_settings_of_the_last_run(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=r"peers-224.json is not in .*; python -m bench.studies.peers --search"):
        peers.chosen_before("peers-224")
    rows = [
        {"clip": "some", "peer": "dense", "setting": {}, "target": None},
        {"clip": "some", "peer": "STC", "setting": {"share": 0.1, "period": 4}, "target": 0.98},
    ]
    (tmp_path / "peers-224.json").write_text(json.dumps({"rows": rows}))
    assert peers.chosen_before("peers-224") == {"some": {("STC", 0.98): {"share": 0.1, "period": 4}}}

"""What clips are named, and the laws of reuse, each by hand on a tiny model."""

import math

import neuroflow
import pytest
import torch
import torch.nn.functional as F
from models import clip, exact, tiny
from neuroflow import evaluation, laws
from neuroflow.adapters import describe
from neuroflow.classes import ClassHead
from neuroflow.evaluation import Answer
from neuroflow.weights import copy_sharing_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("YoYo", "yo yo"),
        ("playing_guitar", "playing guitar"),
        ("BBQGrill", "bbq grill"),
        ("Ride2Wheels", "ride2 wheels"),
        ("bus", "bus"),
    ],
)
def test_class_names_are_spoken_as_words(label, words):
    assert evaluation.spoken(label) == words


@pytest.mark.parametrize(("correct", "count"), [(0, 5), (4, 5), (5, 5), (7155, 10000), (1, 1)])
def test_wilson_bounds_lie_where_the_score_test_gives_up(correct, count):
    low, high = evaluation.wilson(correct, count)
    share = correct / count
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / count), rel=1e-6)


def test_the_table_counts_first_and_third_places():
    answers = [
        ("a", {"dense": Answer(["a", "b", "c"]), "C": Answer(["b", "c", "a"], [0, 0.5, 0.9], 0.8)}),
        ("b", {"dense": Answer(["a", "c", "d"]), "C": Answer(["b", "c", "a"], [0, 0.1], 0.6)}),
        ("c", {"dense": Answer(["c", "b", "a"]), "C": Answer(["a", "b", "d"], [0])}),
    ]
    dense, sparse = evaluation.tabulate(answers)
    assert (dense.system, dense.clips, dense.top1, dense.top3) == ("dense", 3, 2 / 3, 2 / 3)
    assert dense.skipped is None and dense.cosine is None
    assert (sparse.top1, sparse.top3) == (1 / 3, 2 / 3)
    assert sparse.skipped == pytest.approx(1.5 / 3) and sparse.cosine == pytest.approx(0.7)
    assert sparse.top1_interval == evaluation.wilson(1, 3) and sparse.top3_interval == evaluation.wilson(2, 3)


def patched(model, **settings):
    copy = copy_sharing_weights(model)
    neuroflow.enable_cache(copy, exact(**settings))
    return copy


def pooled(model, frames):
    with torch.inference_mode():
        return torch.cat([model(pixel_values=frame[None]).pooler_output for frame in frames])


def test_clips_do_not_see_one_another_and_answers_are_of_the_mean(monkeypatch):
    monkeypatch.setattr(evaluation, "CLIP", 2)
    model, frames = tiny("siglip"), clip(5, changed=6)
    systems = {"E": patched(model, threshold=0.01), "all": patched(model, threshold=0)}
    expected = pooled(model, frames)
    names = tuple("abcd")
    classes = ClassHead(names, torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), 1.0)
    evaluation.classify(frames.flip(0), model, systems, classes)  # which ends as the next begins
    found = evaluation.classify(frames, model, systems, classes)
    order = F.cosine_similarity(expected.mean(0), classes.embeddings, 1).argsort(descending=True)[:3]
    assert found["dense"] == Answer([names[index] for index in order])
    assert found["all"].top == found["dense"].top and found["all"].skipped == [0] * 5
    assert found["all"].cosine == pytest.approx(1, abs=1e-6)
    sparse = patched(model, threshold=0.01)
    cosine = F.cosine_similarity(pooled(sparse, frames), expected)[1:].mean().item()
    assert found["E"].cosine == pytest.approx(cosine, abs=1e-6) and cosine < 0.999
    assert found["E"].skipped == pytest.approx([0] + [1 - 6 / 36] * 4)
    assert evaluation.classify(frames[:1], model, systems, classes)["E"].cosine is None


def test_answers_go_through_the_projection():
    model, frames = tiny("siglip"), clip(2)
    turned = -pooled(model, frames).mean(0)
    classes = ClassHead(("as it is", "projected"), torch.stack((-turned, turned)), 1.0)
    assert evaluation.classify(frames, model, {}, classes)["dense"].top[0] == "as it is"
    assert evaluation.classify(frames, model, {}, classes, torch.neg)["dense"].top[0] == "projected"


def test_classes_of_another_size_are_an_error():
    classes = ClassHead(("a", "b"), torch.eye(2, 7), 1.0)
    with pytest.raises(ValueError, match=r"classes is \[2, 7\]; accepted is \[C, 64\]"):
        evaluation.classify(clip(2), tiny("siglip"), {}, classes)


FRAMES, CHANGED = 5, 6


@pytest.fixture(scope="module")
def siglip():
    return tiny("siglip")


@pytest.fixture(scope="module")
def frames():
    return clip(FRAMES, changed=CHANGED)


def activity(frames):
    """Which of the 36 patches of each frame differ from the frame before: [T - 1, 36]."""
    changed = (frames[1:] != frames[:-1]).any(1)
    return changed.unflatten(2, (6, 8)).unflatten(1, (6, 8)).any(4).any(2).flatten(1)


def distances(one, other):
    return 1 - (one * other).sum(-1) / one.norm(dim=-1) / other.norm(dim=-1)


def runs(model, frames, **settings):
    """Of the model and of a patched copy, the outputs of every frame."""
    with torch.inference_mode():
        return [
            [each(pixel_values=frame[None], output_hidden_states=True) for frame in frames]
            for each in (model, patched(model, **settings))
        ]


def test_saturation(siglip, frames):
    config = exact(arch="C")
    rows = laws.saturation(siglip, frames, config, [0, 0.01])
    expected, found = (
        torch.cat([o.pooler_output for o in each]) for each in runs(siglip, frames, arch="C", threshold=0.01)
    )
    assert rows[0] == ("dual", 0, 0, pytest.approx(0, abs=1e-6))
    gap = distances(expected, found)[1:].mean().item()
    assert rows[1] == ("dual", 0.01, pytest.approx(1 - CHANGED / 36), pytest.approx(gap, abs=1e-6)) and gap > 0.01


def test_degradation(siglip, frames):
    wide = clip(3, size=(48, 80), changed=5)
    rows = laws.degradation(siglip, [frames, wide], exact(threshold=0.01))
    expected, found = (torch.cat([o.pooler_output for o in each]) for each in runs(siglip, frames, threshold=0.01))
    fidelity = 1 - distances(expected, found)[1:].mean().item()
    assert rows[0] == ("context", 48, 48, 36, pytest.approx(1 - CHANGED / 36), pytest.approx(fidelity, abs=1e-6))
    assert rows[1][:5] == ("context", 80, 48, 60, pytest.approx(1 - 5 / 60)) and rows[1].fidelity < 0.9999


@pytest.mark.parametrize("arch", ["A", "B", "C", "D", "E"])
def test_active_shift(siglip, frames, arch):
    rows = laws.active_shift(siglip, frames, exact(arch=arch, threshold=0.01))
    expected, found = runs(siglip, frames, arch=arch, threshold=0.01)
    assert [row.frame for row in rows] == [1, 2, 3, 4]
    for row, active in zip(rows, activity(frames), strict=True):
        dense, sparse = (each[row.frame].last_hidden_state[0] for each in (expected, found))
        ours = sparse if arch == "B" else sparse[active]
        assert row.active == pytest.approx(distances(dense[active], ours).mean().item(), abs=1e-6)
        assert row.skipped == pytest.approx(1 - CHANGED / 36)
        if arch == "B":
            assert row.cached is None
        else:
            assert row.cached == pytest.approx(distances(dense[~active], sparse[~active]).mean().item(), abs=1e-6)
            assert row.cached > 1e-4


@pytest.mark.parametrize("arch", ["A", "C", "D"])
def test_representation_gap(siglip, frames, arch):
    rows = laws.representation_gap(siglip, frames, exact(arch=arch, threshold=0.01))
    expected, found = runs(siglip, frames, arch=arch, threshold=0.01)
    assert [row.block for row in rows] == [0, 1, 2, 3]
    for row in rows[:3]:  # what follows the last block is normed
        gaps = []
        for number, active in enumerate(activity(frames), 1):
            dense, sparse = (each[number].hidden_states[row.block + 1][0] for each in (expected, found))
            gaps.append(distances(dense[active], sparse[active]).mean())
        assert row.distance == pytest.approx(torch.stack(gaps).mean().item(), abs=1e-6)
    assert rows[2].distance > 1e-3


@pytest.mark.parametrize("arch", ["B", "C"])
def test_head_entropy(siglip, frames, arch):
    rows = laws.head_entropy(siglip, frames, exact(arch=arch, threshold=0.01))
    head = describe(siglip).pool[0]
    weight, bias = head.attention.in_proj_weight.detach(), head.attention.in_proj_bias.detach()
    query = (head.probe.detach()[0, 0] @ weight[:64].T + bias[:64]).view(4, 16)

    def entropy(output):
        key = (output.last_hidden_state[0] @ weight[64:128].T + bias[64:128]).view(-1, 4, 16)
        weights = (torch.einsum("hd,thd->ht", query, key) / 4).softmax(1)
        return -(weights * weights.log()).sum(1).mean().item()

    expected, found = runs(siglip, frames, arch=arch, threshold=0.01)
    assert [row.frame for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row.dense == pytest.approx(entropy(expected[row.frame]), abs=1e-5)
        assert row.sparse == pytest.approx(entropy(found[row.frame]), abs=1e-5)
        assert row.sparse <= math.log(CHANGED if arch == "B" else 36) + 1e-6


def test_a_model_without_such_a_head_has_no_entropy(frames):
    assert not laws.has_attention_head(tiny("vit"))
    with pytest.raises(ValueError, match="ViTModel has no pooling head of one probe"):
        laws.head_entropy(tiny("vit"), frames, exact())


def test_token_stability(siglip, frames):
    rows = laws.token_stability(siglip, frames, exact(threshold=0.01))
    dense = [output.last_hidden_state[0] for output in runs(siglip, frames)[0]]
    called = torch.zeros(36, dtype=torch.int64)  # the frame in which the gate last called for each patch
    for row, active in zip(rows, activity(frames), strict=True):
        cached = torch.stack([dense[number][patch] for patch, number in enumerate(called)])
        stability = 1 - distances(dense[row.frame], cached)
        assert row.active == pytest.approx(stability[active].mean().item(), abs=1e-6)
        assert row.inactive == pytest.approx(stability[~active].mean().item(), abs=1e-6)
        assert row.inactive > row.active
        called[active] = row.frame
    assert len(rows) == FRAMES - 1


@pytest.mark.parametrize("law", [laws.active_shift, laws.representation_gap, laws.head_entropy, laws.token_stability])
def test_laws_of_tokens_pass_key_frames_over(siglip, frames, law):
    assert law(siglip, frames, exact(threshold=0)) == []
    assert len(law(siglip, frames, exact(threshold=0.01, max_age=2))) == (4 if law is laws.representation_gap else 2)


@pytest.mark.parametrize("family", ["clip", "dinov3"])
def test_tokens_that_are_no_patches_are_left_out(frames, family):
    model = tiny(family)
    prefix = {"clip": 1, "dinov3": 3}[family]
    (row, *_) = laws.active_shift(model, frames, exact(threshold=0.01))
    sparse = patched(model, threshold=0.01)
    with torch.inference_mode():
        dense, _, found = (each(pixel_values=frames[k][None]) for each, k in ((model, 1), (sparse, 0), (sparse, 1)))
    active = activity(frames)[0]
    dense, found = (each.last_hidden_state[0, prefix:] for each in (dense, found))
    assert row.active == pytest.approx(distances(dense[active], found[active]).mean().item(), abs=1e-6)
    assert row.cached == pytest.approx(distances(dense[~active], found[~active]).mean().item(), abs=1e-6)


def test_a_law_leaves_the_model_as_it_was_and_needs_two_frames(siglip, frames):
    hooks = [len(module._forward_hooks) for module in siglip.modules()]
    for law in (laws.active_shift, laws.representation_gap, laws.head_entropy, laws.token_stability):
        law(siglip, frames, exact(threshold=0.01))
        with pytest.raises(ValueError, match=r"frames is \[1, 3, 48, 48\]; accepted is"):
            law(siglip, frames[:1], exact())
    with pytest.raises(ValueError, match="accepted is"):
        laws.saturation(siglip, frames[:1], exact(), [0.1])
    with pytest.raises(ValueError, match="accepted is"):
        laws.degradation(siglip, [frames[:1]], exact())
    assert not neuroflow.is_patched(siglip)
    assert [len(module._forward_hooks) for module in siglip.modules()] == hooks


def test_a_tower_whose_tokens_are_no_rows_is_an_error(frames):
    with pytest.raises(ValueError, match="VitDetModel does not give its tokens as rows"):
        laws.active_shift(tiny("vitdet"), frames, exact(threshold=0.01))

"""Motion, components, embeddings and tracks, on drawn squares and on models that the tests share."""

import re
import sys
import types
from pathlib import Path

import neuroflow
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import PATCH, clip, exact, tiny
from neuroflow.objects import (
    Component,
    Tracker,
    component_embeddings,
    components,
    motion,
    nearest,
    to_detections,
)

from bench.studies import highway

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = (12, 20)


def mask_of(*lines):
    return torch.tensor([[letter == "#" for letter in line] for line in lines])


def square(x, y, side=2):
    """A component of side x side patches whose middle is nearest to (x, y)."""
    left, top = round(x - side / 2), round(y - side / 2)
    return Component(np.array([(row, column) for row in range(top, top + side) for column in range(left, left + side)]))


def look(number, jitter=0.0, generator=None):
    """An embedding [1, 8] that is orthogonal to those of other numbers."""
    return F.one_hot(torch.tensor([number]), 8) + jitter * torch.randn(1, 8, generator=generator)


def test_components_are_8_connected():
    found = components(mask_of("#..#.", ".#..#", "...#.", "#....", "#...."))
    assert [component.patches.tolist() for component in found] == [
        [[0, 0], [1, 1]],
        [[0, 3], [1, 4], [2, 3]],
        [[3, 0], [4, 0]],
    ]
    assert found[1].box == (3, 0, 5, 3)
    assert found[1].centroid == pytest.approx((3 + 1 / 3 + 0.5, 1.5))


def test_components_have_a_least_size():
    mask = mask_of("#..##", ".....", "###..")
    assert [len(component.patches) for component in components(mask)] == [2, 3]
    assert [len(component.patches) for component in components(mask, 1)] == [1, 2, 3]
    assert components(torch.zeros(3, 4, dtype=torch.bool)) == []
    with pytest.raises(ValueError, match=r"mask has shape \[4\]; accepted is \[rows, columns\]"):
        components(torch.zeros(4, dtype=torch.bool))


def test_motion_weighs_the_patches_around():
    surprise = torch.zeros(5, 5)
    surprise[0, 0] = 0.5  # alone, in a corner of 4 patches
    surprise[3:, 2:] = 0.5
    moves = motion(surprise)
    assert moves[0, 0] == pytest.approx((0.5**0.5 + 0.8 * (0.5 / 4) ** 0.5) ** 2)
    assert moves[4, 3] == pytest.approx(0.5 * 1.8**2)
    assert moves[1, 1] == pytest.approx(0.64 * 0.5 / 9)
    assert motion(torch.full((2, 2), torch.nan)).tolist() == [[0, 0], [0, 0]]
    assert motion(torch.full((2, 2), torch.inf)).isfinite().all()


@pytest.mark.parametrize("family", ["siglip", "vit"])
def test_embeddings_go_through_the_pooling_head_or_are_means(family, generator):
    model = tiny(family)
    grid = (6, 6)
    pixels = torch.rand(1, 3, 6 * PATCH, 6 * PATCH, generator=generator)
    with torch.no_grad():
        expected = model(pixel_values=pixels)
    tokens = expected.last_hidden_state[0]
    found = [square(2, 2, 2), square(4, 3, 4), Component(np.argwhere(np.ones(grid)))]
    by_hand = [[7, 8, 13, 14], [8, 9, 10, 11, 14, 15, 16, 17, 20, 21, 22, 23, 26, 27, 28, 29], list(range(36))]
    for patched in (False, True):
        if patched:
            neuroflow.enable_cache(model)
        embeddings = component_embeddings(model, tokens, grid, found)
        for embedding, index in zip(embeddings, by_hand, strict=True):
            own = tokens[int(family == "vit") :][index]
            with torch.no_grad():
                direct = model.head(own[None])[0] if family == "siglip" else own.mean(0)
            assert torch.allclose(embedding, direct, atol=1e-6)
    if family == "siglip":
        assert torch.allclose(embeddings[2], expected.pooler_output[0], atol=1e-6)
    assert component_embeddings(model, tokens, grid, []).shape == (0, 64)
    with pytest.raises(ValueError, match=r"tokens have shape \[5, 64\]; accepted is \[3., D\], one for each patch"):
        component_embeddings(model, tokens[:5], grid, found)


def test_nearest_names_by_cosine():
    classes = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    named = nearest(torch.tensor([[1.0, 0.1], [0.1, 5.0]]), classes, ["car", "bus"])
    assert [name for name, _ in named] == ["car", "bus"]
    assert named[0][1] == pytest.approx(1 / 1.01**0.5)
    with pytest.raises(ValueError, match=r"classes have shape \[2, 2\]; accepted is \[3, 2\], one for each name"):
        nearest(torch.ones(1, 2), classes, ["car", "bus", "van"])


@pytest.mark.parametrize("alike", [False, True])
def test_ids_are_kept_when_objects_cross(generator, alike):
    """Two squares that pass through each other, one component for as long as they touch."""
    tracker = Tracker(GRID)
    for t in range(15):
        left, right = square(2 + t, 5), square(17 - t, 6)
        a, b = look(0, 0.05, generator), look(0 if alike else 1, 0.05, generator)
        touching = abs((2 + t) - (17 - t)) <= 3
        if touching:
            both = np.unique(np.concatenate([left.patches, right.patches]), axis=0)
            tracks = tracker.update([Component(both)], (a + b) / 2)
            assert len(tracks) == 1
        else:
            # In the order in which components come, row by row, which says nothing of who is who.
            tracks = tracker.update([left, right], torch.cat((a, b)))
            assert {track.id: track.component for track in tracks} == {1: left, 2: right}
    assert len(tracker.tracks) == 2


def test_a_merge_is_no_new_object_however_far_it_reaches():
    tracker = Tracker(GRID)
    apart = [square(3, 5), square(13, 5)]
    for _ in range(3):
        tracker.update(apart, torch.cat((look(0), look(1))))
    bridge = Component(np.array([(row, column) for row in (4, 5) for column in range(2, 14)]))
    (merged,) = tracker.update([bridge], look(2))
    assert merged.id in (1, 2) and merged.component is bridge
    assert {track.id: track.component for track in tracker.update(apart, torch.cat((look(0), look(1))))} == {
        1: apart[0],
        2: apart[1],
    }


def test_embeddings_decide_where_places_do_not():
    tracker = Tracker(GRID)
    for _ in range(4):
        tracker.update([square(5, 5), square(9, 5)], torch.cat((look(0), look(1))))
    above, below = square(7, 4), square(7, 6)
    tracks = tracker.update([above, below], torch.cat((look(1), look(0))))
    assert {track.id: track.component for track in tracks} == {2: above, 1: below}


def test_an_object_is_taken_up_again_after_occlusion():
    tracker = Tracker(GRID, patience=10)
    for t in range(5):
        tracker.update([square(2 + t, 5)], look(0))
    for _ in range(6):
        assert tracker.update([], torch.zeros(0, 8)) == []
    assert tracker.tracks[0].centroid.tolist() == pytest.approx([12.0, 5.0])
    other, same = square(11, 6), square(13, 5)
    tracks = tracker.update([other, same], torch.cat((look(3), look(0))))
    assert {track.id: track.component for track in tracks} == {1: same, 2: other}
    assert [track.seen for track in tracks] == [6, 1]


@pytest.mark.parametrize(
    ("missed", "x", "number"), [(11, 7, 0), (6, 18, 0), (6, 7, 1)], ids=["too late", "too far", "unlike"]
)
def test_another_object_is_not_taken_for_one_that_was_lost(missed, x, number):
    tracker = Tracker(GRID, patience=10)
    for t in range(5):
        tracker.update([square(2 + t / 2, 5)], look(0))
    for _ in range(missed):
        tracker.update([], torch.zeros(0, 8))
    assert [track.id for track in tracker.update([square(x, 5)], look(number))] == [2]


def test_what_was_lost_changes_its_velocity_by_what_it_gained_a_frame():
    tracker = Tracker(GRID, patience=10)
    for _ in range(5):
        tracker.update([square(4, 5)], look(0))
    for _ in range(3):
        tracker.update([], torch.zeros(0, 8))
    (track,) = tracker.update([square(6, 5)], look(0))
    assert track.id == 1 and track.centroid.tolist() == [6, 5]
    assert track.velocity.tolist() == [0.5 * 2 / 4, 0]


def test_what_left_the_picture_and_what_was_seen_by_accident_are_forgotten():
    tracker = Tracker(GRID)
    for t in range(5):
        tracker.update([square(13 + t, 5)], look(0))
    assert len(tracker.tracks) == 1
    for _ in range(4):
        tracker.update([], torch.zeros(0, 8))
    assert tracker.tracks == []
    tracker.update([square(5, 5)], look(0))
    tracker.update([], torch.zeros(0, 8))
    assert tracker.tracks == []


def test_tracker_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"embeddings have shape \[2, 8\]; accepted is \[1, D\]"):
        Tracker(GRID).update([square(5, 5)], torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"reach is 0; accepted is a number of patches above 0"):
        Tracker(GRID, reach=0)
    with pytest.raises(ValueError, match=r"patience is 0; accepted is a number of frames, 1 or more"):
        Tracker(GRID, patience=0)


@pytest.mark.parametrize(("reference", "kept"), [("dual", True), ("ema", False)])
def test_a_stopped_object_is_kept_by_the_dual_reference(reference, kept, generator):
    """A square drives in, stops at frame 10, and stands there until frame 40."""
    model, (rows, columns) = tiny("siglip"), (6, 6)
    decay = {"ema_decay": 0.2} if reference == "ema" else {"ema_decay": 0.01, "fast_decay": 0.2}
    config = neuroflow.NeuroFlowConfig(
        reference=reference, score="surprise", threshold=0.1, refresh="rolling", cut_share=None, **decay
    )
    neuroflow.enable_cache(model, config)
    background = torch.rand(1, 3, rows * PATCH, columns * PATCH, generator=generator)
    texture = torch.rand(1, 3, 2 * PATCH, 2 * PATCH, generator=generator)
    tracker, ids = Tracker((rows, columns)), []
    for t in range(41):
        frame = background.clone()
        if t:
            left = PATCH * min(t, 10) * 2 // 5  # no more than a patch in two frames
            frame[..., 2 * PATCH : 4 * PATCH, left : left + 2 * PATCH] = 1 - texture
        tokens = model(pixel_values=frame).last_hidden_state[0]
        stream = neuroflow.summary(model).streams["default"]
        found = components(motion(stream.surprise) > 0.2)
        tracks = tracker.update(found, component_embeddings(model, tokens, stream.grid, found))
        ids.append([track.id for track in tracks])
    assert ids[10] == [1]
    assert ids[40] == ([1] if kept else [])


def test_the_example_of_the_guide(monkeypatch, generator):
    guide = (Path(__file__).parents[1] / "python" / "guide" / "objects.md").read_text()
    example = re.search(r"```python\n(from neuroflow import objects.*?)```", guide, re.DOTALL)[1]
    monkeypatch.setitem(sys.modules, "supervision", types.SimpleNamespace(Detections=lambda **given: given))
    model = tiny("siglip", 96)
    neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(reference="dual", score="surprise", refresh="rolling"))
    names = {"neuroflow": neuroflow, "model": model, "tracker": Tracker((12, 12))}
    names |= {"text_embeddings": torch.eye(2, 64), "texts": ["box", "van"]}
    still = torch.rand(1, 3, 96, 96, generator=generator)
    for t in range(4):
        frame = still.clone()
        if t:
            frame[..., 24:48, 24 + 2 * t : 48 + 2 * t] = -1
        exec(example, names | {"frame": frame}, names)
        assert [track.id for track in names["tracks"]] == [1] * bool(t)
    assert names["names"][0][0] in ("box", "van")
    assert names["detections"]["tracker_id"].tolist() == [1]


def test_detections_need_supervision(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="to_detections needs supervision; install it"):
        to_detections([], (16, 16))


def test_detections_are_boxes_in_pixels_and_ids(monkeypatch):
    module = types.ModuleType("supervision")
    module.Detections = lambda **given: given
    monkeypatch.setitem(sys.modules, "supervision", module)
    tracks = Tracker(GRID).update([square(3, 4), square(9, 8, 4)], torch.cat((look(0), look(1))))
    given = to_detections(tracks, (10.0, 20.0))
    assert given["xyxy"].tolist() == [[40, 30, 80, 50], [140, 60, 220, 100]]
    assert given["tracker_id"].tolist() == [1, 2]
    assert to_detections([], (10.0, 20.0))["xyxy"].shape == (0, 4)


@pytest.mark.parametrize("signal", ["patch", "embedding", "pixel"])
@pytest.mark.parametrize("reference", ["refreshed", "previous", "ema", "dual"])
def test_the_benchmark_measures_the_engines_surprise(signal, reference):
    model, frames = tiny("siglip"), clip(frames=5, changed=9)
    settings = {"refreshed": {"threshold": 1e-4}, "previous": {}}.get(reference, {"ema_decay": 0.05})
    neuroflow.enable_cache(model, exact(signal=signal, reference=reference, **({"threshold": 1e-4} | settings)))
    signals, gate = highway.Signals(tiny("siglip")), highway.Gate(signal, reference, settings)
    for t, frame in enumerate(frames):
        model(pixel_values=frame[None])
        with torch.no_grad():
            surprise = gate(signals(frame[None]), None)
        if t:
            assert torch.allclose(surprise, neuroflow.summary(model).streams["default"].surprise, atol=1e-6)
            assert (surprise > 1e-4).sum() >= 9


def test_the_benchmark_scores_as_by_hand():
    patches = highway.Patches(4, 4, 2)
    assert patches(np.arange(16.0).reshape(4, 4)).tolist() == [[2.5, 4.5], [10.5, 12.5]]
    masks = np.zeros((2, 4, 4), np.uint8)
    masks[0, 0, 0] = 255  # a quarter of a patch
    masks[0, 0, 2:] = masks[0, 1, 2] = 170  # most of one
    masks[0, 2:, :2] = 50
    masks[1, 3, 2:] = 255
    inside = np.ones((4, 4), bool)
    inside[2:, :2] = False
    moving, scored = highway.truth(masks, inside, patches)
    assert moving.tolist() == [[[True, False], [False, False]], [[False, False], [False, True]]]
    assert scored.tolist() == [[[True, False], [False, True]], [[True, True], [False, True]]]
    found = torch.tensor([[True, True], [True, True]])
    assert highway.f1(found, moving[0], scored[0]) == pytest.approx((2 / 3, 1 / 2, 1))
    numbers = torch.tensor([[[0.9, 2.0], [2.0, 0.1]], [[0.0, 0.95], [2.0, 1.0]]])
    rated = highway.rate(numbers, moving, scored, 1)
    assert rated["f1_chosen_on"] == 1 and 0.1 < rated["threshold"] < 0.9
    assert (rated["f1"], rated["precision"], rated["recall"]) == pytest.approx((2 / 3, 1 / 2, 1))

"""The labelled scenes that the project draws, and the tower that it carries."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from neuroflow.cli.model import load_tower
from neuroflow.street import STREET, load_street
from neuroflow.street.scene import CAMERAS, CLASSES, TRAJECTORIES, Scene, Stage, draw_scene, scenes, write_scene
from neuroflow.street.sprites import KINDS, draw_subject, paste, random_look
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Source

SMALL = 64


def drawn(scene, frames=24, size=SMALL):
    """[T, size, size, 3] float32 and labels [T]."""
    images, labels = zip(*draw_scene(scene, frames, size), strict=True)
    return np.stack(images).astype(np.float32), np.array(labels)


def test_same_arguments_give_the_same_frames_and_another_seed_another_place():
    scene = Scene("dog", "local", "noise", 6)
    (first, labels), (again, _), (other, _) = drawn(scene), drawn(scene), drawn(dataclasses.replace(scene, seed=7))
    assert first.shape == (24, SMALL, SMALL, 3) and labels.tolist() == [CLASSES.index("dog")] * 24
    assert np.array_equal(first, again)
    assert np.abs(first.mean(0) - other.mean(0)).mean() > 20


def test_any_frame_is_drawn_as_in_its_turn():
    scene = Scene("bird", "arc", "cut", 3)
    images, labels = drawn(scene)
    stage = Stage(scene, 24, SMALL)
    for number in (20, 3):
        image, label = stage.draw(number)
        assert np.array_equal(image, images[number]) and label == labels[number]


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("camera", CAMERAS)
def test_every_class_is_drawn_on_every_trajectory_before_every_camera(trajectory, camera):
    for seed, subject in enumerate(CLASSES):
        images, labels = drawn(Scene(subject, trajectory, camera, seed), frames=6)
        assert images.std() > 10 and np.abs(np.diff(images, axis=0)).mean((1, 2, 3)).min() > 0
        seen = labels[labels >= 0]
        assert len(seen) > 0 and (camera == "cut" or set(seen.tolist()) == {CLASSES.index(subject)})


def test_label_is_none_where_less_than_half_of_the_subject_is_in_the_picture():
    for subject in ("bus", "person", "balloon"):
        scene = Scene(subject, "traversal", "static", 11)
        labels, stage = drawn(scene, frames=60)[1], Stage(scene, 60, SMALL)
        left, right = (np.array([stage.box(number)[edge] for number in range(60)]) for edge in (0, 2))
        inside = (np.minimum(right, SMALL) - np.maximum(left, 0)) / (right - left)
        clear = np.abs(inside - 0.5) > 0.2  # a subject's halves are not alike
        assert (labels[clear] >= 0).tolist() == (inside[clear] > 0.5).tolist()
        assert labels[0] == labels[-1] == -1 and labels[30] == CLASSES.index(subject)


def test_share_that_is_pasted_inside():
    square = np.ones((8, 8, 4), np.float32)
    picture = np.zeros((16, 16, 3), np.float32)
    assert [paste(picture.copy(), square, left, 4) for left in (4, -4, 13, 16, -9)] == [1, 0.5, 0.375, 0, 0]
    assert paste(picture, square, 4.5, -2.25) == pytest.approx(5.75 / 8)
    assert picture[2, 4:13, 0].tolist() == [0.5] + [1.0] * 7 + [0.5]
    assert picture[4:7, 8, 0].tolist() == [1, 0.75, 0]


def test_trajectories_move_as_they_say():
    def path(trajectory, seed, subject="car"):
        stage = Stage(Scene(subject, trajectory, "static", seed), 120, SMALL)
        boxes = np.array([stage.box(number) for number in range(120)]) / SMALL
        return (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2

    for seed in range(4):
        x, y = path("local", seed)
        assert 0.01 < np.ptp(x) < 0.1 and np.ptp(y) < 0.1
        x, _ = path("traversal", seed)
        steps = np.diff(x)
        assert np.ptp(x) > 1.2 and np.ptp(steps) < 1e-9
        x, y = path("arc", seed)
        assert np.ptp(x) > 0.45 and np.ptp(y) > 0.08 and x.min() > 0 and x.max() < 1
        x, _ = path("oscillation", seed)
        assert {*np.sign(np.diff(x))} >= {-1, 1} and 0.2 < np.ptp(x) < 0.5
        x, _ = path("stop-and-go", seed)
        halted = np.abs(np.diff(x)) < 1e-9
        assert np.ptp(x) > 1.2 and 0.05 < halted.mean() < 0.7


def test_cut_changes_the_place_and_the_label_follows():
    follows = set()
    for seed in range(8):
        images, labels = drawn(Scene("van", "local", "cut", seed))
        change = np.abs(np.diff(images, axis=0)).mean((1, 2, 3))
        cut = int(change.argmax()) + 1
        assert 8 <= cut <= 16 and change[cut - 1] > 4 * np.delete(change, cut - 1).max()
        before, after = set(labels[:cut].tolist()), set(labels[cut:].tolist())
        assert before == {CLASSES.index("van")} and len(after) == 1
        follows.add(after == before)
    assert follows == {True, False}


def test_cameras_do_as_they_say():
    def still(images):
        return np.abs(np.diff(images, axis=0)).mean((1, 2, 3)).mean()

    static, noise, exposure, pan = (
        drawn(Scene("ball", "local", camera, 4), frames=60)[0] for camera in ("static", "noise", "exposure", "pan")
    )
    assert still(noise) > 2 * still(static) and still(pan) > 1.3 * still(static)
    assert np.ptp(exposure.mean((1, 2, 3))) > 10 > 2 * np.ptp(static.mean((1, 2, 3)))


def test_scenes_are_balanced_and_held_out_ones_apart():
    training, held_out = scenes(600), scenes(600, held_out=True)
    assert scenes(600) == training and scenes(600, 1) != training
    assert not {scene.seed for scene in training + scenes(600, 1)} & {scene.seed for scene in held_out}
    assert len({scene.seed for scene in training + scenes(600, 1)}) == 1200
    every = set(itertools.product(CLASSES, TRAJECTORIES, CAMERAS))
    for some in (training, held_out):
        combinations = [(scene.subject, scene.trajectory, scene.camera) for scene in some]
        assert {*combinations[:300]} == {*combinations[300:]} == every
        assert len({scene.trajectory for scene in some[:5]}) == len({scene.camera for scene in some[:5]}) == 5
        assert len({scene.subject for scene in some[:12]}) == 12


def test_classes_differ_in_shape_and_members_in_looks():
    random = np.random.default_rng(0)
    assert set(CLASSES) == set(KINDS) and len(CLASSES) == 12
    for subject in CLASSES:
        one, other = (draw_subject(random_look(subject, random), 40, 0.1, 0, 1) for _ in range(2))
        assert one.shape == other.shape and np.abs(one - other).mean() > 1
        assert abs(one.shape[1] / one.shape[0] - KINDS[subject].aspect) < 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"subject": "tram"}, "subject is 'tram'; accepted is one of car, van"),
        ({"trajectory": "zigzag"}, "trajectory is 'zigzag'; accepted is one of local"),
        ({"camera": "drone"}, "camera is 'drone'; accepted is one of static"),
        ({"seed": -1}, "seed is -1; accepted is 0 or more"),
    ],
)
def test_bad_scene_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(Scene("car", "arc", "static", 0), **change)


def test_bad_arguments_are_refused():
    scene = Scene("car", "arc", "static", 0)
    with pytest.raises(ValueError, match="frames is 1; accepted is 2 or more"):
        draw_scene(scene, frames=1)
    for size in (62, 225):
        with pytest.raises(ValueError, match=f"size is {size}; accepted is an even number, 64 or more"):
            draw_scene(scene, size=size)
    for count in (0, 1_000_001):
        with pytest.raises(ValueError, match=f"count is {count}; accepted is 1 to 1000000"):
            scenes(count)
    with pytest.raises(ValueError, match="seed is -1; accepted is 0 or more"):
        scenes(5, -1)


def test_written_scene_reads_back(tmp_path):
    scene = Scene("sign", "arc", "static", 5)
    labels = write_scene(tmp_path / "scene.mp4", scene, 6, SMALL)
    images, expected = drawn(scene, 6)
    read = np.stack([frame.rgb(SMALL, SMALL) for frame in Source(str(tmp_path / "scene.mp4"))]).astype(np.float32)
    assert labels == expected.tolist() and read.shape == images.shape
    assert np.abs(read - images).mean() < 8


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Frames of 36 held-out scenes after H.264, [T, 3, 224, 224], and their labels [T]."""
    clip, preprocess = tmp_path_factory.mktemp("scenes") / "scene.mp4", Preprocessor(224, 224)
    pixels, labels = [], []
    for scene in scenes(36, held_out=True):
        found = write_scene(clip, scene, 12)
        for frame in Source(str(clip)):
            if frame.index % 4 == 2 and found[frame.index] >= 0:
                pixels.append(preprocess(frame))
                labels.append(found[frame.index])
    return torch.cat(pixels), torch.tensor(labels)


def test_tower_names_the_subjects_of_held_out_scenes(held_out):
    pixels, labels = held_out
    model, classes = load_street()
    assert classes.names == CLASSES and len(labels) > 72 and len(set(labels.tolist())) == 12
    with torch.inference_mode():
        scores = classes.scores(model(pixel_values=pixels).pooler_output)
    assert scores.shape == (len(labels), len(CLASSES)) and scores.abs().max() <= classes.temperature * (1 + 1e-5)
    assert (scores.argmax(1) == labels).float().mean() >= 0.9


def test_tower_is_small_and_loads_as_any_other():
    assert sum(file.stat().st_size for file in STREET.iterdir()) < 8_000_000
    tower = load_tower(str(STREET), torch.device("cpu"), torch.float32)
    model, _ = load_street()
    assert not tower.training and tower.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), model.parameters(), strict=True))
    assert Preprocessor.from_pretrained(str(STREET), Preprocessor(224, 224)) == Preprocessor(224, 224)

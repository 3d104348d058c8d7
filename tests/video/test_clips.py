"""Clips in class folders: which there are, and which of their frames are read."""

from fractions import Fraction

import numpy as np
import pytest
from neuroflow.video.clips import Clip, find_clips, read_clip
from neuroflow.video.encode import VideoWriter
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Source, SourceError


def write_clip(path, frames=8):
    """Frame k is of grey level 20 k."""
    with VideoWriter(path, Fraction(10)) as writer:
        for number in range(frames):
            writer.write(np.full((32, 32, 3), 20 * number, np.uint8))
    return path


@pytest.fixture
def folder(tmp_path):
    """Clips of two classes, a clip of images in a third, and things that are no clips, hidden ones among them."""
    root = tmp_path / "clips"
    for name in (
        "YoYo/b.mp4",
        "YoYo/a.AVI",
        "Archery/c.mkv",
        "TaiChi/d/0.png",
        "TaiChi/empty/notes.txt",
        "YoYo/x.txt",
        "YoYo/b10.mp4",
        "YoYo/b9.mp4",
        "YoYo/._a.avi",
        "YoYo/.trash/0.png",
        "TaiChi/empty/._0.png",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "readme.txt").touch()
    (root / ".hidden").mkdir()
    return root


def test_clips_are_those_in_class_folders(folder):
    labels, clips = find_clips(folder)
    assert labels == ["Archery", "TaiChi", "YoYo"]
    assert clips == [
        Clip(folder / name, name, name.split("/")[0])
        for name in ("Archery/c.mkv", "TaiChi/d", "YoYo/a.AVI", "YoYo/b9.mp4", "YoYo/b10.mp4", "YoYo/b.mp4")
    ]


def test_a_testlist_chooses_clips_and_leaves_the_classes(folder, tmp_path):
    testlist = tmp_path / "testlist01.txt"
    testlist.write_text("YoYo/b.mp4 101\n\nTaiChi/d\nYoYo/b.mp4 101\n")
    labels, clips = find_clips(folder, testlist)
    assert labels == ["Archery", "TaiChi", "YoYo"]
    assert [(clip.name, clip.label) for clip in clips] == [("YoYo/b.mp4", "YoYo"), ("TaiChi/d", "TaiChi")]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            "YoYo/b.mp4\nYoYo/gone.avi\nLost/lost.avi",
            "2 of the 3 clips it lists are not in .*, YoYo/gone.avi first",
        ),
        ("YoYo/b.mp4 1\nb.mp4 1", "line 2: 'b.mp4' has no class; give ClassName/clip.avi"),
        ("\n", "lists no clip"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_testlist_is_an_error(folder, tmp_path, lines, words):
    testlist = tmp_path / "testlist01.txt"
    if lines is not None:
        testlist.write_text(lines)
    with pytest.raises(ValueError, match=words):
        find_clips(folder, testlist)


def test_a_folder_without_classes_or_clips_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        find_clips(tmp_path / "missing")
    write_clip(tmp_path / "clip.mp4", 2)
    with pytest.raises(ValueError, match="holds no class folder"):
        find_clips(tmp_path)
    (tmp_path / "YoYo").mkdir()
    with pytest.raises(ValueError, match="no clip in its 1 class folders"):
        find_clips(tmp_path)


def test_frames_are_the_first_of_a_clip_and_a_stride_apart(tmp_path):
    path, preprocess = write_clip(tmp_path / "clip.mp4"), Preprocessor(16, 16, mean=(0, 0, 0), std=(1 / 255,) * 3)

    def levels(*options):
        return (read_clip(path, preprocess, *options).mean((1, 2, 3)) / 20).round().tolist()

    assert levels(3) == [0, 1, 2]
    assert levels(3, 3) == [0, 3, 6]
    assert levels() == list(range(8))
    with pytest.raises(SourceError, match="32x32 is over the ceiling of 1,000 pixels"):
        levels(3, 1, 1000)


def test_a_clip_that_is_damaged_before_the_last_frame_asked_for_is_an_error(tmp_path):
    first = next(iter(Source(str(write_clip(tmp_path / "clip.mp4"))))).picture.to_image()
    for number in range(3):
        first.save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_text("no picture")
    (tmp_path / "clip.mp4").unlink()
    assert len(read_clip(tmp_path, Preprocessor(16, 16), 3)) == 3
    with pytest.raises(SourceError, match=r"image 3.png cannot be read"):
        read_clip(tmp_path, Preprocessor(16, 16), 4)

"""The figures on README.md's first screen are those that were measured."""

import json
import re
from pathlib import Path

import pytest

from bench.run import sustained

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
README = (ROOT / "README.md").read_text()


def rows(path):
    return json.loads((RESULTS / path).read_text())["rows"]


def table(head):
    """The rows of the table whose head begins so."""
    text = README[README.index(f"| {head}") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def figures(cell):
    return [float(each) for each in re.findall(r"\d+(?:\.\d+)?", cell)]


def close(cell, *measured):
    """The figures of a cell are what was measured, rounded as they are."""
    said = re.findall(r"\d+(?:\.\d+)?", cell)
    assert len(said) == len(measured)
    for each, value in zip(said, measured, strict=True):
        digits = len(each.partition(".")[2])
        assert float(each) == pytest.approx(value, abs=0.51 * 10**-digits), cell


def test_speed():
    lines = table("Speed")
    assert len(lines) == 6
    for what, times, gain, with_key_frames in lines:
        share = figures(re.search(r"[\d.]+ %", what)[0])[0] / 100
        if "ViT-Ti" in what:
            frames = int(re.search(r"clips of (\d+)", what)[1])
            found = [row for row in rows("clip.json") if (row["model"], row["frames"]) == ("ViT-Ti, 224 px", frames)]
            (row,) = [row for row in found if (row["dtype"], row["skipped"]) == ("float32", share)]
            close(times, row["dense"], row["going_on"])
            close(gain, row["going_on_speedup"])
            close(with_key_frames, row["with_key_frame_speedup"])
            continue
        size, dtype = int(re.search(r"(\d+) px", what)[1]), "bfloat16" if "bfloat16" in what else "float32"
        here = [row for row in rows("run-cpu-epyc.json") if row["kind"] == "model" and row["shape"] == [size, size]]
        here = [row for row in here if row["dtype"] == dtype and not row["noise"]]
        (dense,) = [row for row in here if row["system"] == "dense"]
        (ours,) = [row for row in here if row["system"] == "E" and row["skip"] == share]
        close(times, dense["median_ms"], ours["median_ms"])
        close(gain, ours["speedup"])
        close(with_key_frames, sustained(ours))


def test_fidelity():
    clips = {
        "bottle": "intel_bottle-detection",
        "surveillance": "intel_one-by-one-person-detection",
        "Juggler": "sam2_05_default_juggle",
        "Motorway": "degirum_Traffic",
    }
    lines = table("Fidelity")
    assert len(lines) == 4
    for what, *cells in lines:
        clip = next(clip for word, clip in clips.items() if word in what)
        found = [row for row in rows("studies/clips-224.json") if row["variant"] == "E (default)"]
        (row,) = [row for row in found if row["clip"] == clip and row["asked"] is None]
        for cell, value in zip(cells, (100 * row["skipped"], row["cosine_mean"], row["cosine_p5"]), strict=True):
            close(cell, value)

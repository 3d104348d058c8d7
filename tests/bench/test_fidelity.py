"""What the fidelity tables are made of, on examples that are small enough to work out by hand."""

import dataclasses
import json
import math

import neuroflow
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import PATCH, SIZES, clip
from neuroflow.street.scene import Scene
from neuroflow.weights import copy_sharing_weights
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from bench import tables
from bench.studies import fidelity, protocol, street


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, image_size=48, patch_size=PATCH, num_labels=5)
    return ViTForImageClassification(config).eval()


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "0007_cock.png"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path, pixels


def turned(degrees):
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def test_score_of_a_hand_made_run():
    # Logits are the embeddings: dense answers 0, by little in frame 3. The first frame would spoil every figure.
    dense = torch.tensor([turned(0), turned(0), turned(0), turned(44)])
    found = torch.tensor([turned(180), turned(0), turned(60), turned(46)])
    run = protocol.Run(found, torch.tensor([0.0, 0.9, 0.8, 0.4]), 2)
    figures = protocol.score([dense], [run], lambda embeddings: embeddings)
    cosines = [1, 0.5, math.cos(math.radians(2))]
    # Of three sorted values the 5th percentile lies a tenth of the way from the lowest to the middle one.
    p5 = cosines[1] + 0.1 * (cosines[2] - cosines[1])
    assert figures["skipped"] == pytest.approx(0.7)
    assert figures["cosine_mean"] == pytest.approx(sum(cosines) / 3)
    assert figures["cosine_p5"] == pytest.approx(p5)
    assert figures["top1"] == pytest.approx(1 / 3)
    assert figures["top1_led"] == pytest.approx(1 / 2) and figures["led"] == pytest.approx(2 / 3)
    assert figures["key_frames"] == 2 and figures["frames"] == 3


def test_score_where_dense_never_leads():
    dense = torch.tensor([turned(0), turned(44)])
    figures = protocol.score([dense], [protocol.Run(dense, torch.zeros(2), 0)], lambda embeddings: embeddings)
    assert figures["top1_led"] is None and figures["top1"] == 1


@pytest.mark.parametrize("start", [1e-4, 0.03, 50.0])
def test_threshold_is_found_from_either_side(start):
    tried = []

    def skipped_at(threshold):
        tried.append(threshold)
        return min(max(0.84 + 0.2 * math.log10(threshold / 0.02), 0), 0.98)

    found = protocol.find_threshold(skipped_at, 0.84, start)
    assert abs(skipped_at(found) - 0.84) <= protocol.TOLERANCE and len(tried) <= protocol.TRIALS + 1


def test_nearest_threshold_where_none_reaches_the_skip_rate():
    assert protocol.find_threshold(lambda threshold: 0.3 if threshold < 10 else 0.6, 0.84, 0.1) > 10


def test_gate_alone_skips_as_the_whole_model_does(classifier):
    frames = clip(frames=8)
    gate = protocol.gate_of(classifier)
    assert len(neuroflow.adapters.describe(gate).layers) == 1
    assert len(neuroflow.adapters.describe(classifier).layers) == SIZES["num_hidden_layers"]
    config = neuroflow.NeuroFlowConfig.published(threshold=0.05)
    (whole,), (alone,) = protocol.run(classifier, [frames], config), protocol.run(gate, [frames], config)
    assert torch.equal(whole.skipped, alone.skipped) and 0.1 < whole.skipped[1:].mean() < 0.95


def test_clips_run_together_or_alone_give_the_same(classifier):
    clips = [clip(seed=seed) for seed in range(2)]
    config = neuroflow.NeuroFlowConfig()
    together = protocol.run(classifier, clips, config)
    alone = [protocol.run(classifier, [one], config)[0] for one in clips]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.skipped, other.skipped) and one.key_frames == other.key_frames
        torch.testing.assert_close(one.embeddings, other.embeddings)


def test_rows_of_a_clip(classifier):
    frames, dense = clip(frames=8, changed=1), copy_sharing_weights(classifier)
    variants = {name: fidelity.VARIANTS[name] for name in ("E (default)", "C, published", "budget")}
    rows = fidelity.measure_clip(classifier, dense, "clip", frames, variants, lambda _: (0.75,), {})
    assert [row["variant"] for row in rows] == ["E (default)", *variants]
    assert [row["asked"] for row in rows] == [None] + [0.75] * 3
    assert rows[0]["speed"] > 0 and rows[3]["budget"] == 0.25 and rows[3]["skipped"] == 0.75
    for row in rows[:3]:
        config = dataclasses.replace(variants[row["variant"]], threshold=row["threshold"])
        assert row["reached"] == (row["asked"] is None or abs(row["skipped"] - 0.75) <= protocol.TOLERANCE)
        neuroflow.enable_cache(classifier, config)
        with torch.inference_mode():
            found, expected = (
                torch.cat([model.vit(frame).last_hidden_state[:, 0] for frame in frames.split(1)])
                for model in (classifier, dense)
            )
        neuroflow.disable_cache(classifier)
        cosines = F.cosine_similarity(found[1:], expected[1:])
        assert row["cosine_mean"] == pytest.approx(cosines.mean().item(), abs=1e-6)


def test_means_are_of_the_clips_that_every_variant_matches():
    def row(name, variant, reached, value):
        figures = {key: value for key in fidelity.FIGURES}
        return {"clip": name, "variant": variant, "asked": fidelity.SKIP, "reached": reached} | figures

    rows = [row("a", "E", True, 0.9), row("a", "C", True, 0.5), row("b", "E", True, 0.1), row("b", "C", False, 0.3)]
    rows += [row("c", "E", True, 0.7), row("c", "C", True, 0.4)]
    means = {variant: mean for variant, mean in fidelity.mean_rows(rows)}
    assert fidelity.matched_clips(rows, fidelity.SKIP) == ["a", "c"]
    assert means["E"]["cosine_mean"] == pytest.approx(0.8) and means["C"]["clips"] == 2


@pytest.mark.parametrize("kind", fidelity.KINDS)
def test_photograph_clips(photograph, kind):
    path, pixels = photograph
    frames = fidelity.photograph_clip(path, kind, frames=6, side=48)
    assert torch.equal(frames, fidelity.photograph_clip(path, kind, frames=6, side=48))
    shots = ((frames + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    still = pixels[8:56, 11:59]
    assert shots.shape == (6, 48, 48, 3) and np.array_equal(shots[0], still)
    moved = np.abs(shots - still).max((1, 2, 3)) > 0
    assert moved.tolist() == [False] + [True] * 5
    if kind == "noise":
        inside = (still > 30) & (still < 225)
        assert 3 < (shots[1:] - still)[:, inside].std() < 5
    elif kind == "pan":
        steps = [(3, 0), (-3, 0), (0, 3), (0, -3)]
        assert any(np.array_equal(shots[3], pixels[8 + y : 56 + y, 11 + x : 59 + x]) for y, x in steps)
    else:
        hidden = (shots[3] != still).any(2)
        assert hidden.sum() <= 81 and (shots[3][hidden] == 128).all()


def test_results_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    rows = [{"skipped": 0.5, "cosine_mean": 0.9}, {"skipped": 0.8, "cosine_mean": 0.7}]
    tables.write("some", tables.machine(), {"frames": 3}, rows, tables.table(["a", "b"], [["1", "2"]]))
    written = json.loads((tmp_path / "results" / "some.json").read_text())
    assert written["rows"] == rows and written["settings"] == {"frames": 3}
    assert {"processor", "torch", "transformers", "commit"} <= set(written["machine"])
    assert (tmp_path / "results" / "some.md").read_text().startswith("| a | b |\n| --- | --- |\n| 1 | 2 |\n")


def test_street_rows():
    scenes = [Scene("car", "arc", "pan", 0), Scene("dog", "local", "static", 1)]
    key = ("E (default)", "84%")
    frames = [(scenes[0], 1.0, 1.0, 0.99, 0.8), (scenes[0], 1.0, 0.0, 0.9, 0.8), (scenes[1], 1.0, 1.0, 1.0, 0.9)]
    frames.append((scenes[1], 0.0, 1.0, 0.8, 0.9))  # what dense does not name cannot be retained
    rows = street.rows_of({key: frames}, {key: neuroflow.NeuroFlowConfig(threshold=0.3)})
    found = {(row["field"], row["name"]): row for row in rows}
    assert set(found) == {
        *[("trajectory", "arc"), ("trajectory", "local"), ("camera", "pan"), ("camera", "static")],
        *[("subject", "car"), ("subject", "dog"), ("all", "all")],
    }
    assert found["camera", "pan"]["retained"] == 0.5 and found["camera", "static"]["retained"] == 1
    assert found["camera", "static"]["dense_top1"] == 0.5 and found["camera", "static"]["top1"] == 1
    everything = found["all", "all"]
    assert everything["frames"] == 4 and everything["retained"] == pytest.approx(2 / 3)
    assert everything["skipped"] == pytest.approx(0.85)


def test_missing_data_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DATA", tmp_path)
    with pytest.raises(SystemExit, match=r"videos is not in .*; set NEUROFLOW_DATA"):
        tables.find("videos")

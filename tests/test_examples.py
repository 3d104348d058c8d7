"""The examples, on tiny models."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import neuroflow
import pytest
import torch
from models import exact

from bench.vllm_models import made

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(__file__).parents[1] / "python" / "examples"
GRID = [3, 8, 8]


def example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def video(model, seed=0):
    """Patches of a video of GRID, a few of which change with each step in time."""
    values = model.model.visual.patch_embed.proj.weight[0].numel()
    rows = torch.randn(1, 64, values, generator=torch.Generator().manual_seed(seed)).repeat(GRID[0], 1, 1)
    rows[1:, 5:9] *= -1
    rows[2:, 30:34] *= -1
    return rows.flatten(0, 1)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_the_plugin_for_sglang_gives_what_its_tower_gives(family):
    model, module = made(family), example("sglang_plugin")
    tower, grid = model.model.visual, torch.tensor([GRID])
    videos = [video(model, seed) for seed in range(3)]
    with torch.inference_mode():
        outputs = [tower(each, grid_thw=grid) for each in videos]
    dense = torch.cat(
        [torch.cat([output.pooler_output, *(output.get("deepstack_features") or [])], 1) for output in outputs]
    )
    items = [
        SimpleNamespace(feature=torch.cat(videos[:2]), video_grid_thw=grid.repeat(2, 1)),
        SimpleNamespace(feature=videos[2], video_grid_thw=grid),
    ]
    neuroflow.enable_cache(tower, exact(threshold=1e-4))
    ours = module.video_features(tower, items)
    assert ours.shape == dense.shape
    assert torch.cosine_similarity(ours, dense, dim=1).mean() > 0.95 and not torch.allclose(ours, dense, atol=1e-4)
    assert neuroflow.summary(tower).streams == {}
    neuroflow.disable_cache(tower)
    neuroflow.enable_cache(tower, exact(threshold=0))
    torch.testing.assert_close(module.video_features(tower, items), dense, rtol=0, atol=1e-5)


def inputs_of(model, family):
    """Qwen3-VL is told the time of each step, and so has its tokens apart."""
    config, (steps, rows, columns) = model.config, GRID
    runs = [steps * rows * columns // 4] if family == "qwen2.5-vl" else [rows * columns // 4] * steps
    start, end, token = config.vision_start_token_id, config.vision_end_token_id, config.video_token_id
    ids = torch.tensor([[each for run in runs for each in (70, start, *[token] * run, end)] + [50, 60]])
    kinds = {"mm_token_type_ids": 2 * (ids == token).int()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "video_grid_thw": torch.tensor([GRID])} | kinds


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_features_from_outside_give_the_answer_of_the_model(family):
    model, module = made(family), example("video_features")
    inputs, greedy = inputs_of(model, family), {"do_sample": False, "max_new_tokens": 6}
    expected = model.generate(**inputs, pixel_values_videos=video(model), **greedy)
    before = dict(vars(model.model.visual))
    tower = neuroflow.enable_cache(made(family).model.visual, exact(threshold=0))
    features = module.video_features(tower, video(model), inputs["video_grid_thw"], "camera")
    assert torch.equal(model.generate(**inputs, mm_encoder_outputs={"video": features}, **greedy), expected)
    assert vars(model.model.visual) == before
    other = module.video_features(tower, video(model, 1), inputs["video_grid_thw"], "camera")
    assert not torch.equal(model.generate(**inputs, mm_encoder_outputs={"video": other}, **greedy), expected)
    assert neuroflow.summary(tower).streams["camera"].frames == 2 * GRID[0]

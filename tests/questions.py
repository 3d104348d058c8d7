"""Questions about a video, as a processor of Qwen-VL would hand them to tiny models."""

import torch

GRID = [3, 8, 8]


def video(model, seed=0):
    """Patches of a video of GRID, a few of which change with each step in time."""
    values = model.model.visual.patch_embed.proj.weight[0].numel()
    rows = torch.randn(1, 64, values, generator=torch.Generator().manual_seed(seed)).repeat(GRID[0], 1, 1)
    rows[1:, 5:9] *= -1
    rows[2:, 30:34] *= -1
    return rows.flatten(0, 1)


def inputs_of(model, family):
    """Qwen3-VL is told the time of each step, and so has its tokens apart."""
    config, (steps, rows, columns) = model.config, GRID
    runs = [steps * rows * columns // 4] if family == "qwen2.5-vl" else [rows * columns // 4] * steps
    start, end, token = config.vision_start_token_id, config.vision_end_token_id, config.video_token_id
    ids = torch.tensor([[each for run in runs for each in (70, start, *[token] * run, end)] + [50, 60]])
    kinds = {"mm_token_type_ids": 2 * (ids == token).int()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "video_grid_thw": torch.tensor([GRID])} | kinds

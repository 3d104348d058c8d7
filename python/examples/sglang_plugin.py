"""SGLang's Qwen3-VL or Qwen2.5-VL, its videos encoded by transformers' tower, which NeuroFlow has patched.

A package of your own names it in pyproject.toml, under [project.entry-points."sglang.srt.plugins"], as
neuroflow = "sglang_plugin:register", and the server is told the model and its class:

    NEUROFLOW_MODEL=Qwen/Qwen3-VL-4B-Instruct NEUROFLOW_CLASS=qwen3_vl.Qwen3VLForConditionalGeneration \
        python -m sglang.launch_server --model-path Qwen/Qwen3-VL-4B-Instruct

The tower is loaded beside SGLang's own, which goes on to encode images.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import neuroflow
import torch
from torch import nn
from transformers import AutoModelForImageTextToText


@functools.cache
def patched_tower(path: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    return neuroflow.enable_cache(model.model.visual.to(device), os.environ.get("NEUROFLOW_CONFIG"))


@torch.inference_mode()
def video_features(tower: nn.Module, items: Sequence[Any]) -> torch.Tensor:
    """The tokens of videos [sum of N, D], those of the deepstack behind them along D, as `get_video_feature` has them.

    Each of `items` has `feature`, patches [sum of T * H * W, values], and `video_grid_thw` [videos, 3].
    """
    features = []
    for item in items:
        grids = item.video_grid_thw.to(tower.device)
        rows = item.feature.to(tower.device, tower.dtype).split(grids.prod(1).tolist())
        for pixels, grid in zip(rows, grids, strict=True):
            with neuroflow.cache_context(tower, "video"):  # a stream that ends with it
                output = tower(pixels, grid_thw=grid[None])
            neuroflow.reset_cache(tower, "video")
            features.append(torch.cat([output.pooler_output, *(output.get("deepstack_features") or [])], 1))
    return torch.cat(features)


def get_video_feature(original: Callable, model: nn.Module, items: Sequence[Any]) -> torch.Tensor:
    weight = next(model.visual.parameters())
    return video_features(patched_tower(os.environ["NEUROFLOW_MODEL"], weight.device, weight.dtype), items)


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = f"sglang.srt.models.{os.environ['NEUROFLOW_CLASS']}.get_video_feature"
    HookRegistry.register(target, get_video_feature, HookType.AROUND)

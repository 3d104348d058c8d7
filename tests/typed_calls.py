"""The public API as a type checker sees it: `make lint` reads this file, and nothing runs it.

Where a wrong call is not flagged, the comment that expects it is, as unused.
"""

from pathlib import Path
from typing import assert_type

import neuroflow
import torch
from neuroflow import NeuroFlowConfig, StreamCache
from torch import nn

import neuroflow_kernels


class Tower(nn.Module):
    pass


def patching(tower: Tower, frames: torch.Tensor) -> None:
    assert_type(neuroflow.enable_cache(tower, NeuroFlowConfig(threshold=0.2), StreamCache(max_streams=4)), Tower)
    assert_type(neuroflow.enable_cache(tower, weights=Path("weights.safetensors")), Tower)
    with neuroflow.cache_context(tower, "left", 7):
        tower(frames)
    neuroflow.encode(tower, frames, stream_ids=["left", 7], frame_ids=[0, 1])
    (report,) = neuroflow.last_pass(tower)
    assert_type(report.skipped, float)
    assert_type(neuroflow.summary(tower).streams["left"].active, torch.Tensor)
    neuroflow.reset_cache(tower, "left")
    neuroflow.disable_cache(tower)
    assert_type(neuroflow.__version__, str)


def wrong_patching(tower: Tower, frames: torch.Tensor) -> None:
    neuroflow.enable_cache(frames)  # type: ignore[type-var]
    neuroflow.enable_cache(tower, 0.2)  # type: ignore[arg-type]
    neuroflow.enable_cache(tower, threshold=0.2)  # type: ignore[call-arg]
    NeuroFlowConfig(score="stale")  # type: ignore[arg-type]
    NeuroFlowConfig(budgets=0.5)  # type: ignore[call-arg]
    neuroflow.encode(tower, frames, "left", frame_ids="0")  # type: ignore[arg-type]
    neuroflow.summary(tower).streams["left"].frames = 0  # type: ignore[misc]


def ops(tokens: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    surprise = neuroflow_kernels.ema_surprise_(tokens, reference, decay=0.01)
    index, cu_seqlens = neuroflow_kernels.compact(surprise, threshold=0.02, floor=4)
    packed = neuroflow_kernels.gather_rows(tokens, index, cu_seqlens)
    assert_type(packed, torch.Tensor)
    with neuroflow_kernels.use_backend("reference"):
        return neuroflow_kernels.scatter_rows_(tokens, packed, index, cu_seqlens, blend=0.5)


def wrong_ops(surprise: torch.Tensor) -> None:
    neuroflow_kernels.compact(surprise, threshold="0.02")  # type: ignore[arg-type]
    neuroflow_kernels.gather_rows(surprise, surprise)  # type: ignore[call-arg]
    neuroflow_kernels.compact(surprise, budget=4).sum()  # type: ignore[attr-defined]

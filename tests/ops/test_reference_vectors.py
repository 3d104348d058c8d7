"""The published method on real clips through a tiny tower, computed elsewhere in float64."""

import json
import os

import neuroflow
import numpy as np
import pytest
import torch
from models import exact
from transformers import SiglipVisionConfig, SiglipVisionModel

import neuroflow_kernels as kernels

CLIPS = ("bottle_96", "idle_96", "traffic_192")
EMULATED = "TRITON_INTERPRET" in os.environ or "NEUROFLOW_CUDA_ON_HOST" in os.environ


@pytest.fixture(params=CLIPS)
def vectors(request, data):
    return np.load(data(f"reference/{request.param}.npz"))


def tower(vectors, dtype):
    model = SiglipVisionModel(SiglipVisionConfig(**json.loads(str(vectors["config"]))))
    state = {k.removeprefix("state."): torch.from_numpy(vectors[k]) for k in vectors.files if k.startswith("state.")}
    neuroflow.adapters.describe(model).tower.load_state_dict(state)
    return model.eval().to(dtype)


def frames(vectors, dtype):
    return torch.from_numpy(vectors["pixels"]).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1


@pytest.mark.parametrize("vectors", ["idle_96"] if EMULATED else CLIPS, indirect=True)
def test_gate_ops(vectors, backend):
    """Every backend's gate, fused and in steps: the active sets exactly, the surprise to 1e-6.

    Of kernels that are interpreted or emulated, on the clip that takes them the least time.
    """
    model, decay, threshold = tower(vectors, torch.float32), float(vectors["alpha"]), float(vectors["tau"])
    with torch.no_grad():
        embeddings = neuroflow.adapters.describe(model).tower.embeddings(frames(vectors, torch.float32))
    fused, stepped = embeddings[:1].clone(), embeddings[:1].clone()
    floor = int(vectors["floor"])
    with kernels.use_backend(backend):
        for h, surprise, active in zip(embeddings[1:], vectors["surprise"][1:], vectors["active"][1:], strict=True):
            ours, index, cu_seqlens, packed = kernels.ema_gate_(
                h[None], fused, decay=decay, threshold=threshold, floor=floor
            )
            expected = torch.from_numpy(active).nonzero()[:, 0].int()
            assert torch.equal(index[: int(cu_seqlens[-1])], expected)
            assert torch.equal(packed, h[expected])
            torch.testing.assert_close(ours[0].double(), torch.from_numpy(surprise), rtol=0, atol=1e-6)
            by_steps = kernels.ema_surprise_(h[None], stepped, decay)
            assert torch.equal(kernels.compact(by_steps, threshold, floor=floor)[0], index)


@pytest.mark.parametrize("arch", ["A", "B", "C", "D", "E"])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"), [("auto", torch.float32, 2e-5), ("reference", torch.float64, 1e-9)]
)
def test_architectures(vectors, arch, backend, dtype, tolerance):
    model = tower(vectors, dtype)
    config = exact(
        arch=arch,
        threshold=float(vectors["tau"]),
        ema_decay=float(vectors["alpha"]),
        floor=int(vectors["floor"]),
        signal="embedding",
        reference="ema",
        mid_layer=int(vectors["mid"]),
    )
    neuroflow.enable_cache(model, config)
    with kernels.use_backend(backend):
        for pixels, active, expected in zip(frames(vectors, dtype), vectors["active"], vectors[arch], strict=True):
            pooled = model(pixel_values=pixels[None]).pooler_output[0].double().numpy()
            assert (neuroflow.summary(model).streams["default"].active.numpy().ravel() == active).all()
            assert np.abs(pooled - expected).max() <= tolerance * np.abs(expected).max()

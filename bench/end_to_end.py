"""A SigLIP tower of base size, dense against NeuroFlow, in one run: `python -m bench.end_to_end --size 896 --arch C`.

Frames differ from each other in a fixed share of random patches. Weights are random, so this is about time alone; that
the sparse frame is the right one is checked here all the same, by encoding every patch and comparing with dense.
"""

import argparse
import statistics
import subprocess
import time

import neuroflow
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from neuroflow_kernels.env import describe

PATCH = 16


def frames(size, changed, count, dtype):
    """`count` frames [1, 3, size, size]; each differs from the one before in `changed` patches."""
    generator = torch.Generator().manual_seed(0)
    side = size // PATCH
    still = torch.rand(1, 3, size, size, generator=generator) * 2 - 1
    for _ in range(count):
        still = still.clone()
        for patch in torch.randperm(side * side, generator=generator)[:changed].tolist():
            row, column = (PATCH * place for place in divmod(patch, side))
            window = still[..., row : row + PATCH, column : column + PATCH]
            window.copy_(torch.rand(window.shape, generator=generator) * 2 - 1)
        yield still.to(dtype)


def timed(function):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


class BlockTimer:
    """Seconds from the first block's first norm, after the gate and the packing, to the end of the last block."""

    def __init__(self, model):
        layers = neuroflow.adapters.describe(model).layers
        layers[0].layer_norm1.register_forward_pre_hook(self.start)
        layers[-1].register_forward_hook(self.stop)
        self.seconds = 0.0

    def start(self, *_):
        self.began = time.perf_counter()

    def stop(self, *_):
        self.seconds = time.perf_counter() - self.began


def quantiles(seconds):
    p20, p80 = (torch.tensor(seconds).quantile(q).item() * 1e3 for q in (0.2, 0.8))
    return f"{statistics.median(seconds) * 1e3:8.1f} ms (p20 {p20:.1f}, p80 {p80:.1f})"


@torch.inference_mode()
def measure(size, arch, dtype, skip, dense_frames, sparse_frames):
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(image_size=size, patch_size=PATCH)).eval().to(dtype)
    patches = (size // PATCH) ** 2
    active = max(round(patches * (1 - skip)), 1)
    clip = list(frames(size, active, 1 + dense_frames * sparse_frames, dtype))

    neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(arch=arch, threshold=0))
    everything = model(pixel_values=clip[0]).pooler_output
    neuroflow.disable_cache(model)
    expected = model(pixel_values=clip[0]).pooler_output
    error = ((everything - expected).norm() / expected.norm()).item()
    if error > (1e-5 if dtype == torch.float32 else 3e-2):
        raise SystemExit(f"{arch} at {size} px differs from dense by {error:.1e} with nothing skipped: not measured")

    # Dense frames between groups of sparse ones, so that a machine that changes its pace changes both.
    timer, dense, sparse, blocks = BlockTimer(model), [], [], []
    for group in range(dense_frames):
        dense.append(timed(lambda: model(pixel_values=clip[0]))[1])
        neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(arch=arch, budget=active, floor=0))
        model(pixel_values=clip[group * sparse_frames])
        for frame in clip[group * sparse_frames + 1 : (group + 1) * sparse_frames + 1]:
            sparse.append(timed(lambda frame=frame: model(pixel_values=frame))[1])
            blocks.append(timer.seconds)
        state_bytes = neuroflow.summary(model).state_bytes
        neuroflow.disable_cache(model)
    ratio = statistics.median(dense) / statistics.median(sparse)
    outside = 1 - statistics.median(b / s for b, s in zip(blocks, sparse, strict=True))
    print(
        f"{arch}  {size} px  {str(dtype).removeprefix('torch.')}  {active} of {patches} patches  dense "
        f"{quantiles(dense)}  NeuroFlow {quantiles(sparse)}  {ratio:.1f}x  outside the blocks {outside:.1%}  "
        f"state {state_bytes / 2**20:.1f} MiB  (dense against nothing skipped: {error:.1e})",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=[224, 448, 896])
    parser.add_argument("--arch", nargs="+", default=["C", "E"])
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--skip", type=float, nargs="+", default=[0.97])
    parser.add_argument("--dense-frames", type=int, default=3)
    parser.add_argument("--sparse-frames", type=int, default=7, help="for each dense frame")
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    facts = describe()
    print("  ".join(f"{name} {facts[name]}" for name in ("processor", "threads", "torch", "transformers")), commit)
    for size in arguments.size:
        for dtype in arguments.dtype:
            for skip in arguments.skip:
                for arch in arguments.arch:
                    counts = arguments.dense_frames, arguments.sparse_frames
                    measure(size, arch, getattr(torch, dtype), skip, *counts)


if __name__ == "__main__":
    main()

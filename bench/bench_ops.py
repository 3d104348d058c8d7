"""Every op against its reference, and the fused gate against the eager lines it replaces and against bare memory speed.

`make bench` runs this. Nothing is timed that has not first agreed with the reference. The two ratios of the gate come
from runs taken in turns, so that a machine that slows down slows all sides.
"""

import statistics
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from neuroflow_kernels import compact, ema_gate_, ema_surprise_, gather_rows, scatter_rows_, unavailable, use_backend
from neuroflow_kernels.env import describe
from neuroflow_kernels.reference.ema_gate import ema_gate_ as reference_gate

STREAMS, TOKENS, DIM = 1, 12544, 768  # 1792 px in patches of 16, a ViT-B
ACTIVE, THRESHOLD, DECAY, ROUNDS = 0.03, 0.1, 0.01, 60
DTYPES = [torch.float32, torch.bfloat16]


def scene(dtype):
    """A frame and its reference: a little noise everywhere, and a share of tokens that show something new."""
    generator = torch.Generator().manual_seed(0)
    ema = torch.randn(STREAMS, TOKENS, DIM, generator=generator)
    h = ema + 0.05 * torch.randn(ema.shape, generator=generator)
    new = torch.rand(STREAMS, TOKENS, generator=generator) < ACTIVE
    h[new] = torch.randn(int(new.sum()), DIM, generator=generator)
    return h.to(dtype), ema.to(dtype)


def eager_gate(h, ema):
    surprise = 1 - F.cosine_similarity(h, ema, dim=-1)
    active = (surprise > THRESHOLD)[0].nonzero()[:, 0]
    ema.mul_(1 - DECAY).add_(h, alpha=DECAY)
    return h[0].index_select(0, active)


def fused_gate(h, ema):
    return ema_gate_(h, ema, decay=DECAY, threshold=THRESHOLD)[3]


def streaming(h, ema):
    """Reads h and ema and writes ema, as the gate must, and does nothing else."""
    return ema.add_(h, alpha=DECAY)


def check_gate(h, ema):
    moved, expected = ema.clone(), ema.double()
    threshold = torch.full((STREAMS,), THRESHOLD)
    surprise, index, _, _ = reference_gate(h.double(), expected, DECAY, threshold, None, 4, None)
    measured, found, _, packed = ema_gate_(h, moved, decay=DECAY, threshold=THRESHOLD)
    torch.testing.assert_close(measured, surprise, rtol=0, atol=1e-5)
    torch.testing.assert_close(moved, expected.to(moved.dtype), rtol=torch.finfo(moved.dtype).eps, atol=1e-6)
    assert torch.equal(found, index)
    assert torch.equal(packed, eager_gate(h, ema.clone()))
    return len(packed)


@pytest.fixture(scope="module", autouse=True)
def machine(request):
    root = Path(__file__).parent
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    facts = describe()
    facts = {name: facts[name] for name in ("processor", "threads", "python", "torch")}
    facts["commit"] = described.stdout.strip() or "unknown"
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + "  ".join(f"{name} {value}" for name, value in facts.items()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_ratios(dtype, capsys):
    h, ema = scene(dtype)
    active = check_gate(h, ema)
    kernels = {"eager": eager_gate, "ema_gate_": fused_gate, "streaming": streaming}
    references = {name: ema.clone() for name in kernels}
    times = {name: [] for name in kernels}
    for _ in range(ROUNDS):
        for name, kernel in kernels.items():
            references[name].copy_(ema)  # so that every round has the same work
            start = time.perf_counter()
            kernel(h, references[name])
            times[name].append(1e3 * (time.perf_counter() - start))
    median = {name: statistics.median(values) for name, values in times.items()}
    with capsys.disabled():
        print(f"\nema_gate_ cpu {dtype} S={STREAMS} N={TOKENS} D={DIM} active={active}, correct; ms of {ROUNDS} rounds")
        for name, values in times.items():
            deciles = statistics.quantiles(values, n=10)
            print(f"  {name:10} median {median[name]:8.3f}  p20 {deciles[1]:8.3f}  p80 {deciles[7]:8.3f}")
        print(f"  eager / ema_gate_      {median['eager'] / median['ema_gate_']:6.2f}")
        print(f"  ema_gate_ / streaming  {median['ema_gate_'] / median['streaming']:6.2f}")


def op_calls(h, ema):
    surprise = ema_surprise_(h, ema.clone(), 0)
    index, cu_seqlens = compact(surprise, THRESHOLD)
    rows = int(cu_seqlens[-1])
    packed, cache, norm = gather_rows(h, index, cu_seqlens), ema.clone(), torch.ones(DIM, dtype=h.dtype)
    few = torch.tensor([0, 6], dtype=torch.int32)
    return {
        "ema_surprise_": lambda: ema_surprise_(h, ema, DECAY),
        "compact": lambda: compact(surprise, THRESHOLD),
        "compact, budget": lambda: compact(surprise, budget=rows),
        "gather_rows": lambda: gather_rows(h, index, cu_seqlens, rows),
        "gather_rows, norm": lambda: gather_rows(h, index, cu_seqlens, rows, norm_weight=norm, norm_bias=norm),
        "gather_rows, 6": lambda: gather_rows(h, index, few, 6),
        "scatter_rows_": lambda: scatter_rows_(cache, packed, index, cu_seqlens),
        "scatter_rows_, blend": lambda: scatter_rows_(cache, packed, index, cu_seqlens, 0.5),
        "scatter_rows_, 6": lambda: scatter_rows_(cache, packed, index, few),
        "ema_gate_": lambda: ema_gate_(h, ema, decay=DECAY, threshold=THRESHOLD),
    }


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", op_calls(*(torch.ones(1, 6, DIM) for _ in range(2))))
def test_op(benchmark, op, dtype, backend):
    reason = unavailable(backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    benchmark.group = f"{op} {dtype}"
    results = []
    for name in ("reference", backend):
        with use_backend(name):
            call = op_calls(*scene(dtype))[op]
            results.append(call())
    torch.testing.assert_close(*results, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    with use_backend(backend):
        benchmark.pedantic(call, rounds=20, iterations=5 if "6" in op else 1, warmup_rounds=2)

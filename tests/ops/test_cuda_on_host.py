"""The CUDA kernels without a GPU: built for the host by a C++ compiler, and run against the op tests, under ASan and
UBSan.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rows import GATE_DTYPES, assert_moved, expect, frame
from sanitized import CUDA, ROOT, build, environment

from neuroflow_kernels import compact, ema_gate_, ema_surprise_, use_backend
from neuroflow_kernels.reference.compact import compact as reference

ON_HOST = "NEUROFLOW_CUDA_ON_HOST" in os.environ

outside = pytest.mark.skipif(ON_HOST, reason="it is what runs these tests")
inside = pytest.mark.skipif(not ON_HOST, reason="run by test_op_tests_pass_on_the_host")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fibers and shared memory are done Linux's way")


@outside
def test_op_tests_pass_on_the_host():
    tests = Path(__file__).parent
    run = subprocess.run(
        # What names another backend is left out; ASan speaks past pytest, to the process's own output.
        [sys.executable, "-m", "pytest", "--capture=sys", "-m", "not slow and not fuzz"]
        + ["-k", "cuda or (opcheck or compile) and not float64"]
        + [__file__, f"{tests}/test_reference_vectors.py::test_gate_ops", f"{tests}/test_hostile.py"]
        + [tests / f"test_{source.stem}.py" for source in CUDA],
        env=environment(NEUROFLOW_CUDA_ON_HOST=str(build("cuda.so"))),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@outside
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("none", "right"),
        ("missing barrier", "wrong"),
        ("missing thread", "thread 0 waits at __syncthreads for ever, thread 3 has returned"),
        ("divergent warp", "thread 0 waits at __syncthreads for ever, thread 70 at __syncwarp"),
        ("unwritten shared memory", "wrong"),
        ("write past the end", "heap-buffer-overflow"),
        ("misaligned vector", "runtime error: reference binding to misaligned address"),
        ("look-back without waiting", "wrong"),
        ("wait for a later block", "all blocks wait for each other"),
    ],
)
def test_faults_are_found(fault, found):
    run = subprocess.run(
        [build("faults"), fault], env=environment(LD_PRELOAD=""), capture_output=True, text=True, timeout=120
    )
    assert found in run.stdout + run.stderr


@inside
def test_every_kernel_is_registered():
    for source in CUDA:
        name = f"neuroflow::{source.stem}"
        found = torch._C._dispatch_dump(name) + torch._C._dispatch_dump(f"{name}_")
        assert f"csrc/cuda/{source.name}" in found


@inside
@pytest.mark.parametrize("dtypes", [GATE_DTYPES[0], GATE_DTYPES[1], GATE_DTYPES[4]], ids=str)
@pytest.mark.parametrize("dim", [512, 768, 1024, 1152, 2048, 2056, 4128, 2500])
def test_rows_over_one_warp_and_several(backend, generator, dim, dtypes):
    h, ema = frame(generator, (1, 6, dim), *dtypes)
    h[0, 3, dim - 1] = torch.nan
    surprise, moved = expect(h, ema, 0.1)
    torch.testing.assert_close(ema_surprise_(h, ema, 0.1), surprise, rtol=0, atol=1e-6)
    assert_moved(ema, moved)


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [8, 768])
def test_alignment_does_not_show(backend, generator, dtype, dim):
    h, ema = frame(generator, (1, 5, dim), dtype, dtype)
    shifted, moved = (torch.empty(value.numel() + 1, dtype=dtype)[1:].view(value.shape) for value in (h, ema))
    shifted.copy_(h), moved.copy_(ema)
    for actual, expected in zip(
        ema_gate_(shifted, moved, decay=0.1, threshold=0.1), ema_gate_(h, ema, decay=0.1, threshold=0.1), strict=True
    ):
        assert torch.equal(actual, expected)
    assert torch.equal(moved, ema)


@inside
@pytest.mark.parametrize(
    ("shape", "floor", "rows"),
    [
        ((1, 300, 8), 0, 37),
        ((1, 300, 8), 250, 400),
        ((3, 150, 8), 90, 5000),
        ((3, 150, 8), 1000, 37),
        ((40, 10, 8), 3, 0),
        ((40, 10, 8), 8, 350),
        ((1, 4200, 8), 1000, 900),  # two rounds of rows to a tile
        ((1, 1100, 1028), 0, 10),  # and several warps to a row
    ],
)
def test_gate_of_many_tiles(backend, generator, shape, floor, rows):
    """Streams above the floor and below it, where a tile waits for others, and more than a warp sees at once."""
    h, ema = frame(generator, shape)
    threshold = torch.rand(shape[0], generator=generator).mul(0.3)
    threshold[::3], threshold[1::5] = 1.9, 0.0
    rule = {"threshold": threshold, "floor": floor, "rows": rows}
    with use_backend("reference"):
        expected = ema_gate_(h, ema.clone(), decay=0.1, **rule)
    actual = ema_gate_(h, ema, decay=0.1, **rule)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-6)
    for one, other in zip(actual[1:], expected[1:], strict=True):
        assert torch.equal(one, other)


@inside
@pytest.mark.parametrize("rule", [{"threshold": 0.5}, {"threshold": 2.0}, {"budget": 5000}, {"budget": 9000}], ids=str)
@pytest.mark.parametrize("levels", [0, 8, 2**20])
def test_compact_of_long_streams(backend, generator, levels, rule):
    """Of all equal surprises, of many equal ones, and of few."""
    surprise = torch.rand((2, 9000), generator=generator).mul_(levels).round_().div_(max(levels, 1))
    with use_backend("reference"):
        expected = compact(surprise, **rule, floor=3000)
    for one, other in zip(compact(surprise, **rule, floor=3000), expected, strict=True):
        assert torch.equal(one, other)


@inside
def test_compact_of_many_streams(backend, generator):
    surprise = torch.rand((100, 40), generator=generator)
    threshold = torch.rand(100, generator=generator)
    for one, other in zip(compact(surprise, threshold), reference(surprise, threshold, None, 4), strict=True):
        assert torch.equal(one, other)

"""The ops under arguments drawn at random: odd ones against the reference, wrong ones past Python's checks.

`make test` runs some cases on every backend, those of CUDA under ASan and UBSan. `make fuzz` goes on for as long as it
is told, with the C++ kernels under them.
"""

import copy
import itertools
import math
import os
import subprocess
import sys
import time

import hostile
import pytest
import torch
from hostile import DECIDED, SELECTING, WRITTEN
from sanitized import ROOT, build, environment

import neuroflow_kernels as kernels
from neuroflow_kernels import use_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CASES = 8 if INTERPRETED else 40
REFUSED = (ValueError, IndexError, RuntimeError)
OPS = [op for op in DECIDED if not (INTERPRETED and op == "linear_rows")]  # which has no kernel in Triton
COMPILED = [op for op in OPS if op != "attend_versions"]  # which has one only there
# A sum is as exact as the largest of these allow.
FACTORS = {
    "linear_rows": ("x", "weight"),
    "attend_rows": ("value",),
    "attend_versions": ("value",),
    "gather_rows": ("x",),
}


def call(op, case):
    if op == "attend_rows" and case["cu_seqlens"] is None:
        case = case | {name: case[name][0] for name in ("key", "value")}
    result = getattr(kernels, op)(**case)
    return result if isinstance(result, tuple) else (result,)


def memory(tensor):
    """All of the storage that a tensor lies in."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def largest(tensor):
    return max(1.0, tensor.double().nan_to_num(0, 0, 0).abs().amax().item()) if tensor.numel() else 1.0


def check_odd(op, seed):
    case = hostile.odd(op, seed)
    other = copy.deepcopy(case)
    with use_backend("reference"):
        expected = call(op, other)
    results = call(op, case)
    written = WRITTEN.get(op, ())
    scale = math.prod(largest(case[name]) for name in FACTORS.get(op, ()))
    for result, wanted in (
        *zip(results, expected, strict=True),
        *((memory(case[name]), memory(other[name])) for name in written),
    ):
        tolerance = {}
        if result.is_floating_point():
            eps = max(torch.finfo(result.dtype).eps, 1e-9)
            tolerance = {"rtol": 4 * eps, "atol": max(4 * eps, 5e-5) * scale}
        torch.testing.assert_close(result, wanted, equal_nan=True, check_stride=False, **tolerance)


def check_wrong(op, seed):
    case, fault = hostile.wrong(op, seed)
    before = {name: memory(case[name]).clone() for name in WRITTEN.get(op, ())}
    with pytest.raises(REFUSED):
        getattr(torch.ops.neuroflow, op)(*case.values())
        pytest.fail(f"{fault} was taken")
    for name, bits in before.items():
        torch.testing.assert_close(memory(case[name]), bits, rtol=0, atol=0, equal_nan=True)


def check_selection(op, seed):
    """Rows that lie anywhere: refused, or passed over."""
    case = hostile.selecting(op, seed)
    written = [case[name] for name in WRITTEN.get(op, ())]
    before = [memory(cache).clone() for cache in written]
    refused = False
    try:
        result = getattr(torch.ops.neuroflow, op)(*case.values())
    except IndexError:
        refused = True
    for cache, was in zip(written, before, strict=True):
        now = memory(cache)
        if not refused:
            start = cache.storage_offset()
            now[start : start + cache.numel()] = was[start : start + cache.numel()]
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)
    if op == "gather_rows" and not refused:
        assert result.isfinite().all()  # as x is, and nothing around it


def check(function, op, seed):
    try:
        function(op, seed)
    except BaseException as error:
        error.add_note(f"{function.__name__}({op!r}, {seed})")
        raise


def skip_without_kernel(backend, op):
    if backend == "cpp" and op not in COMPILED:
        pytest.skip(f"{op} has no C++ kernel")


@pytest.mark.parametrize("op", OPS)
def test_odd_arguments(backend, op):
    skip_without_kernel(backend, op)
    for seed in range(CASES):
        check(check_odd, op, seed)


@pytest.mark.parametrize("op", OPS)
def test_freed_memory_is_refused(backend, op):
    """As sharding and offloading leave it, in whatever strides."""
    skip_without_kernel(backend, op)
    for seed in range(CASES):
        case = hostile.odd(op, seed)
        for name, value in case.items():
            if isinstance(value, torch.Tensor) and value.numel():
                broken = copy.deepcopy(case)
                broken[name].untyped_storage().resize_(0)
                with pytest.raises(REFUSED):
                    call(op, broken)
                    pytest.fail(f"case {seed}: {name} was taken")


@pytest.mark.parametrize("direct", [False, True], ids=["public", "torch.ops"])
@pytest.mark.parametrize("op", WRITTEN)
def test_autograd_knows_what_is_written(backend, op, direct):
    case = next(
        case
        for case in map(hostile.plain, itertools.repeat(op), itertools.count())
        if case["h" if "h" in case else "index"].numel() > 3
    )
    run = (lambda case: getattr(torch.ops.neuroflow, op)(*case.values())) if direct else (lambda case: call(op, case))
    for name in WRITTEN[op]:
        saved = case[name]
        loss = (saved * torch.ones_like(saved).requires_grad_()).sum()
        run(case)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        leaf = saved.clone().requires_grad_()
        for wanted in (leaf,) if op == "scatter_rows_" and not direct else (leaf, leaf * 1):
            with pytest.raises(RuntimeError, match=r"leaf|no gradient"):
                run(case | {name: wanted})
        assert torch.equal(leaf, saved)
        with torch.no_grad():
            run(case | {name: leaf})
        with torch.inference_mode():
            run(case | {name: saved.clone()})


@pytest.mark.skipif(INTERPRETED, reason="torch.ops calls the C++ or CUDA kernels")
@pytest.mark.parametrize("op", COMPILED)
def test_cuda_and_cpp_refuse_wrong_arguments(op):
    for seed in range(2 * CASES):
        check(check_wrong, op, seed)


@pytest.mark.skipif(INTERPRETED, reason="torch.ops calls the C++ or CUDA kernels")
@pytest.mark.parametrize("op", SELECTING)
def test_cuda_and_cpp_touch_no_row_outside(op):
    for seed in range(2 * CASES):
        check(check_selection, op, seed)


@pytest.mark.fuzz
def test_fuzz():
    """In a process of its own, with the C++ kernels under ASan and UBSan."""
    seconds = float(os.environ.get("FUZZ_SECONDS", 60))
    if "NEUROFLOW_SANITIZED" not in os.environ:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "--capture=no", "-m", "fuzz", __file__],
            env=environment(NEUROFLOW_SANITIZED=str(build("cpp.so"))),
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        print(run.stdout)
        return
    end = time.monotonic() + seconds
    for seed in itertools.count(int(time.time()) << 20):
        if time.monotonic() > end:
            print(f"{seed % (1 << 20)} seeds, each for every op")
            return
        for op in OPS:
            check(check_odd, op, seed)
            if op in COMPILED:
                check(check_wrong, op, seed)
            if op in SELECTING:
                check(check_selection, op, seed)

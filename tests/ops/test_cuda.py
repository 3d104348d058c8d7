"""The CUDA kernels as nvcc sees them, without a GPU; the ops' tests on the GPU, where there is one.

What the kernels compute is tested without a GPU by test_cuda_on_host.py.
"""

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

from neuroflow_kernels import unavailable

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CAPABILITIES = ("75", "80", "90a", "100")
OPS = ("ema_surprise", "compact", "gather_rows", "scatter_rows", "scatter_kv", "ema_gate")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
USAGE = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


class Kernel(NamedTuple):
    """Bytes of local memory, registers of a thread, and whether memory is read and written 16 bytes at a time."""

    stack: int
    spill_stores: int
    spill_loads: int
    registers: int
    wide_loads: bool
    wide_stores: bool


def compile_for(capability, flags, folder):
    """All bindings in one translation unit, as most of its time goes into torch's headers."""
    folder.mkdir()
    unit = folder / "all.cu"
    unit.write_text("".join(f'#include "{path.name}"\n' for path in sorted((CSRC / "cuda").glob("*.cu"))))
    target = f"-gencode=arch=compute_{capability},code=sm_{capability}"
    output = "-c" if capability == CAPABILITIES[0] else "-cubin"  # what runs on the host is the same for all
    command = [NVCC, output, *flags, target, "-Xptxas=-v", "--keep", f"--keep-dir={folder}", unit, "-o", folder / "all"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    entries = re.split(r"\.entry (\w+)", (folder / "all.ptx").read_text())
    ptx = dict(zip(entries[1::2], entries[2::2], strict=True))
    wide = {
        name: [bool(re.search(rf"{access}\.global\S*\.v4\.\w32", ptx[name])) for access in ("ld", "st")] for name in ptx
    }
    return {
        f"{name} for sm_{capability}": Kernel(*map(int, numbers), *wide[name])
        for name, *numbers in USAGE.findall(run.stdout + run.stderr)
    }


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """All kernels by name and capability; kept under build/ until a source, a flag or nvcc changes."""
    if NVCC is None:
        pytest.skip("there is no nvcc (set CUDA_HOME, or put it on PATH)")
    flags = [*COMMON_NVCC_FLAGS, *runpy.run_path(str(ROOT / "setup.py"))["NVCC_FLAGS"], "-Xcompiler=-fPIC"]
    flags += [f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}", *(f"-isystem={path}" for path in include_paths())]
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    sources = sorted(path for suffix in ("h", "cuh", "cu") for path in CSRC.rglob(f"*.{suffix}"))
    seen = [version, torch.__version__, *flags, Path(__file__).read_text(), *(path.read_text() for path in sources)]
    kept = ROOT / "build" / "kernels" / f"{hashlib.sha256(''.join(seen).encode()).hexdigest()}.json"
    if not kept.exists():
        folder = tmp_path_factory.mktemp("nvcc")
        with ThreadPoolExecutor(2) as pool:
            reports = list(
                pool.map(lambda capability: compile_for(capability, flags, folder / capability), CAPABILITIES)
            )
        shutil.rmtree(kept.parent, ignore_errors=True)
        kept.parent.mkdir(parents=True)
        kept.write_text(json.dumps({name: kernel for report in reports for name, kernel in report.items()}, indent=1))
    return {name: Kernel(*kernel) for name, kernel in json.loads(kept.read_text()).items()}


def test_every_op_has_kernels_for_every_capability(kernels):
    for capability in CAPABILITIES:
        names = [name for name in kernels if name.endswith(f" for sm_{capability}")]
        assert len(names) == len(kernels) / len(CAPABILITIES)
        for op in OPS:
            assert any(f"{op}_kernel" in name for name in names), op


def test_kernels_keep_to_their_registers(kernels):
    """Nothing in local memory, be it spilled or indexed; four blocks of 128 threads, or two of a LayerNorm, to a
    multiprocessor's 65,536 registers."""
    for name, kernel in kernels.items():
        assert (kernel.stack, kernel.spill_stores, kernel.spill_loads) == (0, 0, 0), name
        assert 0 < kernel.registers <= (200 if "gather_rows_normalized" in name else 128), (name, kernel.registers)


def test_kernels_of_aligned_rows_access_16_bytes_at_a_time(kernels):
    """By their template arguments: a number of elements or vectors that is held at once, or a word of 16 bytes."""
    aligned = {name: kernel for name, kernel in kernels.items() if re.search(r"I.*(Li[1-9]\d*E|5uint4)", name)}
    assert all(any(f"{op}_" in name for name in aligned) for op in OPS if op != "compact")
    for name, kernel in aligned.items():
        assert kernel.wide_loads and kernel.wide_stores, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_op_tests_pass_on_the_gpu():
    assert unavailable("cuda", "cuda") is None, unavailable("cuda", "cuda")
    tests = [f"{ROOT}/tests/ops/test_{op}.py" for op in (*OPS, "attend_rows")]
    command = [sys.executable, "-m", "pytest", "-m", "not slow", *tests]
    run = subprocess.run(
        command, env={**os.environ, "NEUROFLOW_TEST_DEVICE": "cuda"}, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr

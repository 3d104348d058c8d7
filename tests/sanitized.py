"""Kernels built for the CPU under ASan and UBSan: those of C++, and those of CUDA, of which tests/ops/cuda_on_host has
as much as they use.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]
CPP = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
CUDA = sorted((ROOT / "csrc/cuda").glob("*.cu"))
SHIM = ROOT / "tests/ops/cuda_on_host"
BUILD = ROOT / "build/sanitized"
COMPILER = os.environ.get("CXX", "c++")
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-fopenmp-simd",
    "-fvisibility=hidden",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-DNEUROFLOW_KEY=CPU",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


def shared_library(name):
    """A library of the compiler's own, to be loaded before everything else."""
    command = [*COMPILER.split(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def environment(**variables):
    """For a process whose memory is watched from its start."""
    return {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",  # a block that was given up leaves what it had
        "LD_PRELOAD": f"{shared_library('libasan.so')} {shared_library('libstdc++.so')}",
        "OMP_NUM_THREADS": "1",  # tiny tensors gain nothing from more
        **variables,
    }


def build(target):
    """Compile what changed of "cpp.so", "cuda.so" or "faults"; what a library defines of torch's symbols it uses
    itself.
    """
    if shutil.which(COMPILER.split()[0]) is None:
        pytest.skip(f"no C++ compiler: {COMPILER!r} is not on PATH (set CXX)")
    if not os.path.isabs(shared_library("libasan.so")):
        pytest.skip(f"{COMPILER} has no libasan.so")
    torch_libraries = Path(torch.__file__).parent / "lib"
    includes = [f"-I{SHIM}", f"-I{ROOT / 'csrc/include'}", *(f"-isystem {path}" for path in include_paths())]
    scheduler, faults, kernels = SHIM / "cuda_on_host.cpp", SHIM / "faults.cu", BUILD / "kernels.cu"
    libraries = f"  libraries = -shared -Wl,-Bsymbolic -L{torch_libraries} -ltorch -ltorch_cpu -lc10"
    rules = [
        f"flags = {' '.join(FLAGS)}",
        "rule compile",
        f"  command = {COMPILER} $flags {' '.join(includes)} -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {COMPILER} $flags $in $libraries -o $out",
        *(f"build {source.name}.o: compile {source}" for source in (*CPP, kernels, scheduler, faults)),
        f"build cpp.so: link {' '.join(f'{source.name}.o' for source in CPP)}",
        libraries,
        f"build cuda.so: link {kernels.name}.o {scheduler.name}.o",
        libraries,
        f"build faults: link {faults.name}.o {scheduler.name}.o",
    ]
    BUILD.mkdir(parents=True, exist_ok=True)
    # One translation unit, as half of their time goes into torch's headers; in the opposite order of test_cuda.py's, so
    # that one of the two misses what a source left another to include.
    unit = "".join(f'#include "{source}"\n' for source in reversed(CUDA))
    if not kernels.exists() or kernels.read_text() != unit:
        kernels.write_text(unit)
    (BUILD / "build.ninja").write_text("\n".join(rules) + "\n")
    run = subprocess.run([sys.executable, "-m", "ninja", "-C", BUILD, target], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return BUILD / target

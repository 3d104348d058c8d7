"""What setup.py decides to build: never by a GPU, which a machine that builds need not have. What a release needs."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
SETUP = ROOT / "setup.py"
NVCC = """#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-arch) printf 'compute_70\\ncompute_75\\ncompute_80\\ncompute_86\\ncompute_90\\n' ;;
esac
"""


@pytest.fixture
def setup():
    return runpy.run_path(str(SETUP))


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A torch built for CUDA 13.0, and the nvcc of CUDA 13.2 for GPUs up to Hopper."""
    for file, text in {"bin/nvcc": NVCC.format(release="13.2"), "include/cuda_runtime.h": ""}.items():
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(text)
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    for name in ("NEUROFLOW_BUILD", "NEUROFLOW_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_cuda_is_built_where_nvcc_and_torch_for_cuda_are(setup, toolkit):
    assert setup["cpp_missing"]() is None and setup["cuda_missing"]() is None
    cpp, cuda = setup["extensions"]()["ext_modules"]
    assert (cpp.name, cuda.name) == ("neuroflow_kernels._cpu", "neuroflow_kernels._cuda")
    assert cpp.py_limited_api and cuda.py_limited_api
    assert cuda.sources and all(source.startswith("csrc/cuda/") for source in cuda.sources)
    assert [flag for flag in cuda.extra_compile_args["nvcc"] if "gencode" in flag] == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_torch_cuda_arch_list_is_left_to_torch(setup, toolkit, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    cuda = setup["extensions"]()["ext_modules"][1]
    assert not [flag for flag in cuda.extra_compile_args["nvcc"] if "arch" in flag]


def test_cuda_is_left_out_with_its_reason(setup, toolkit, monkeypatch, capsys):
    def left_out():
        assert [extension.name for extension in setup["extensions"]()["ext_modules"]] == ["neuroflow_kernels._cpu"]
        said = capsys.readouterr().err
        assert said.startswith("neuroflow: building without CUDA kernels, Triton serves GPUs instead: ")
        return said

    (toolkit / "bin" / "nvcc").write_text(NVCC.format(release="12.8"))
    assert "nvcc is of CUDA 12.8 and torch of 13.0" in left_out()
    (toolkit / "include" / "cuda_runtime.h").unlink()
    assert "has no include/cuda_runtime.h" in left_out()
    (toolkit / "bin" / "nvcc").unlink()
    assert "there is no nvcc" in left_out()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert "there is no nvcc" in left_out()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert f"torch {torch.__version__} is built without CUDA" in left_out()
    monkeypatch.setenv("NEUROFLOW_CUDA", "0")
    assert "NEUROFLOW_CUDA=0" in left_out()
    monkeypatch.setenv("NEUROFLOW_BUILD", "0")
    assert setup["extensions"]() == {} and "NEUROFLOW_BUILD=0" in capsys.readouterr().err


def test_nothing_but_python_is_needed_to_look(tmp_path):
    """As a build in isolation, which has no torch, and should say so instead of failing."""
    code = f"import runpy; print(runpy.run_path({str(SETUP)!r})['extensions']())"
    (tmp_path / "torch.py").write_text("raise ImportError")
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout == "{}\n" and "torch is not importable here (install torch first" in run.stderr


def test_the_cpp_kernels_compile_for_aarch64(setup, tmp_path):
    if shutil.which("aarch64-linux-gnu-g++"):
        compiler = ["aarch64-linux-gnu-g++"]
    elif importlib.util.find_spec("ziglang"):
        compiler = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]
    else:
        pytest.skip("there is no compiler for it: no aarch64-linux-gnu-g++ on PATH, and ziglang is not installed")
    csrc, cpp = SETUP.parent / "csrc", setup["extensions"]()["ext_modules"][0]
    without_torch = tmp_path / "headers.cpp"
    headers = sorted(csrc.glob("include/neuroflow/*.h"))
    without_torch.write_text("".join(f'#include "neuroflow/{header.name}"\n' for header in headers))
    flags = [*cpp.extra_compile_args, *(f"-I{path}" for path in cpp.include_dirs), "-O2"]
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(tmp_path / "cache")}
    built = tmp_path / "built.o"
    for source in (*sorted(csrc.glob("cpu/*.cpp")), without_torch):
        subprocess.run([*compiler, *flags, "-c", source, "-o", built], env=environment, check=True)
        assert int.from_bytes(built.read_bytes()[18:20], "little") == 183, source  # EM_AARCH64


def test_an_sdist_has_every_source_wherever_it_is_made(tmp_path):
    make = [sys.executable, SETUP, "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run(make, cwd=ROOT, env=os.environ | {"NEUROFLOW_BUILD": "0"}, check=True)
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(
        ["git", "ls-files", "csrc", "python/neuroflow", "neuroflow_kernels"], cwd=ROOT, capture_output=True
    )
    sources = set(listed.stdout.decode().split())
    assert sources and sources <= names, sources - names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names


def test_pre_commit_runs_what_lint_runs():
    pinned = set(re.findall(r"\[(.+==.+)\]", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert len(pinned) == 2 and pinned <= set((ROOT / ".ci" / "constraints.txt").read_text().splitlines())


def test_workflows_name_targets_and_files_that_exist():
    text = "".join(workflow.read_text() for workflow in (ROOT / ".github" / "workflows").glob("*.yml"))
    text = re.sub(r"\$\{\{.*?\}\}", "", text)
    called = {word for words in re.findall(r"run: make (.+)", text) for word in words.split() if "=" not in word}
    assert {"lint", "test", "wheel", "test-wheel"} <= called
    assert called <= set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:\.ci|\.github|neuroflow_kernels)/[\w./-]+", text))
    assert len(named) > 3 and not [path for path in named if not (ROOT / path).exists()]

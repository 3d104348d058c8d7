"""Builds the C++ kernels where torch and a C++ compiler are at hand, and the CUDA kernels where torch is built for CUDA
and nvcc is at hand too. Says what it leaves out, and why; without either the package is pure Python."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CAPABILITIES = ("75", "80", "90", "100")  # later GPUs of a generation run its code; those after the last, PTX
NVCC_FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", STABLE_ABI, "-Xcompiler=-fvisibility=hidden,-Wall,-Wextra,-g0"]


def cpp_missing() -> str | None:
    """Why the C++ extension cannot be built here, or None when it can."""
    if os.environ.get("NEUROFLOW_BUILD", "1") == "0":
        return "NEUROFLOW_BUILD=0"
    try:
        from torch.utils import cpp_extension  # noqa: F401
    except ImportError:
        return "torch is not importable here (install torch first, then `pip install --no-build-isolation .`)"
    compiler = os.environ.get("CXX", "cl" if sys.platform == "win32" else "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler: {compiler!r} is not on PATH (set CXX)"
    return None


def cuda_missing() -> str | None:
    """Why the CUDA extension cannot be built here, where the C++ one can, or None when it can."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if os.environ.get("NEUROFLOW_CUDA", "1") == "0":
        return "NEUROFLOW_CUDA=0"
    if sys.platform == "win32":
        return "it has never been built on Windows"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    nvcc = CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin")
    if not nvcc:
        return "there is no nvcc (set CUDA_HOME, or put it on PATH)"
    if not Path(CUDA_HOME, "include", "cuda_runtime.h").exists():
        return f"{CUDA_HOME} has no include/cuda_runtime.h (set CUDA_HOME to the CUDA toolkit)"
    version = re.search(r"release (\S+),", output(nvcc, "--version"))[1]
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {version} and torch of {torch.version.cuda}; the major versions have to be the same"
    return None


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def targets(nvcc: str) -> list[str]:
    """nvcc's flags for CAPABILITIES, as far as it knows them; none where TORCH_CUDA_ARCH_LIST has torch add its own."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    known = output(nvcc, "--list-gpu-arch").split()
    found = [capability for capability in CAPABILITIES if f"compute_{capability}" in known]
    codes = [(capability, f"sm_{capability}") for capability in found] + [(found[-1], f"compute_{found[-1]}")]
    return [f"-gencode=arch=compute_{capability},code={code}" for capability, code in codes]


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def shared() -> dict:
    return {
        "include_dirs": [str(ROOT / "csrc/include")],  # torch adds its own to this list
        "depends": files("**/*.h", "**/*.cuh"),
        "py_limited_api": True,
    }


def extensions() -> dict:
    reason = cpp_missing()
    if reason is not None:
        print(f"neuroflow: building without C++ kernels, ops will run through plain torch: {reason}", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths

    if sys.platform == "win32":
        flags = ["/O2", "/std:c++20"]
    else:
        # errno and the exception flags, which nothing here reads, would keep loops from being vectorised.
        flags = ["-O3", "-std=c++20", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
        flags += ["-Wall", "-Wextra", "-g0"]
        flags += [f"-isystem{path}" for path in include_paths()]  # no warnings from torch's headers
    cpp = {"extra_compile_args": [*flags, STABLE_ABI]}
    built = [CppExtension("neuroflow_kernels._cpu", files("cpu/*.cpp"), **cpp, **shared())]
    reason = cuda_missing()
    if reason is None:
        system = [f"-isystem={path}" for path in include_paths()]
        nvcc = [*NVCC_FLAGS, *system, *targets(f"{CUDA_HOME}/bin/nvcc"), "--threads=4"]
        cuda = {"extra_compile_args": {"cxx": [], "nvcc": nvcc}}
        built.append(CUDAExtension("neuroflow_kernels._cuda", files("cuda/*.cu"), **cuda, **shared()))
    else:
        print(f"neuroflow: building without CUDA kernels, Triton serves GPUs instead: {reason}", file=sys.stderr)
    return {
        "ext_modules": built,
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


class SourceDistribution(sdist):
    """With what setuptools leaves out: the kernels' sources, where they cannot be built, and what is no package's."""

    def make_release_tree(self, base_dir: str, files_found: list[str]) -> None:
        package = ROOT / "neuroflow_kernels"
        beside = {str(path.relative_to(ROOT)) for path in (*package.glob("*.md"), *package.glob("hub/*.*"))}
        super().make_release_tree(base_dir, sorted({*files_found, *files("**/*.*"), *beside}))


if __name__ == "__main__":
    arguments = extensions()
    arguments["cmdclass"] = {"sdist": SourceDistribution, **arguments.get("cmdclass", {})}
    setup(**arguments)

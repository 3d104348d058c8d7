"""Builds the C++ kernels where torch and a C++ compiler are at hand; installs pure Python otherwise, and says so."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def missing() -> str | None:
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


def extensions() -> dict:
    reason = missing()
    if reason is not None:
        print(f"neuroflow: building without C++ kernels, ops will run through plain torch: {reason}", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    if sys.platform == "win32":
        flags = ["/O2", "/std:c++20"]
    else:
        # errno and the exception flags, which nothing here reads, would keep loops from being vectorised.
        flags = ["-O3", "-std=c++20", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
        flags += ["-Wall", "-Wextra", "-g0"]
        flags += [f"-isystem{path}" for path in include_paths()]  # no warnings from torch's headers
    cpu = CppExtension(
        "neuroflow_kernels._cpu",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp")),
        include_dirs=[str(ROOT / "csrc/include")],
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
        extra_compile_args=[*flags, "-DTORCH_TARGET_VERSION=0x020a000000000000"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [cpu],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extensions())

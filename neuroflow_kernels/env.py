"""`python -m neuroflow_kernels.env`: what a bug report needs, to be pasted as it is."""

import itertools
import math
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from . import __version__
from .cores import own_cores, quota
from .dispatch import BACKENDS, unavailable, without_row_kernels
from .ways import LINEAR, Choice, LinearWeights, linear_ways

PACKAGES = ("torch", "triton", "transformers", "timm", "vllm", "numpy")
SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "sve", "bf16", "i8mm")
VARIABLES = ("NEUROFLOW_", "TRITON_", "TORCH_", "ATEN_", "TORCHINDUCTOR_", "OMP_", "MKL_", "CUDA_VISIBLE_DEVICES")
SECRET = "NEUROFLOW_TOKEN"  # what clients of the server send

LAYERS = 4  # per shape, so that weights do not all come from the cache
ROWS = (7, 32, 128)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> tuple[str, str]:
    """The processor's name, and which of SETS it has."""
    cpuinfo, first = Path("/proc/cpuinfo"), {}
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        first.setdefault(name.strip(), value.strip())
    flags = first.get("flags", first.get("Features", "")).split()
    sets = ", ".join(name for name in SETS if name in flags)
    return first.get("model name") or platform.processor() or platform.machine(), sets or "unknown"


def _cores() -> str:
    granted = quota()
    return f"{len(own_cores())} by affinity, " + ("no quota" if granted == math.inf else f"a quota of {granted:g}")


def _devices() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"cuda": "none"}
    properties = [torch.cuda.get_device_properties(device) for device in range(torch.cuda.device_count())]
    return {
        f"cuda:{device}": f"{found.name}, compute capability {found.major}.{found.minor}"
        for device, found in enumerate(properties)
    }


def describe() -> dict[str, str]:
    """Versions, processor, devices, the state of every backend on CPU and GPU, and the relevant environment variables.

    Returns:
        The facts by name, in the order in which they are printed.

    Example:
        >>> from neuroflow_kernels.env import describe
        >>> describe()["reference on cpu"]
        'available'
    """
    facts = {"neuroflow": __version__, "python": sys.version.split()[0], "platform": platform.platform()}
    facts |= {package: _version(package) for package in PACKAGES} | {"torch's cuda": torch.version.cuda or "none"}
    processor, sets = _processor()
    facts |= {"processor": f"{processor}, {torch.backends.cpu.get_cpu_capability()}", "instruction sets": sets}
    facts |= {"threads": f"{torch.get_num_threads()} of {os.cpu_count()}", "cores": _cores()} | _devices()
    for backend in BACKENDS:
        for device in ("cpu", "cuda"):
            facts[f"{backend} on {device}"] = unavailable(backend, device) or "available"
    facts["row kernels"] = without_row_kernels() or "available"
    variables = sorted(name for name in os.environ if name.startswith(VARIABLES))
    return facts | {name: "set" if name == SECRET else os.environ[name] for name in variables}


@torch.no_grad()
def measure_linear() -> dict[str, str]:
    """Times in ms of the ways through the linear layers of a ViT-B on this machine, by dtype, layer and rows."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for width, inner in ((768, 768), (3072, 768), (768, 3072)):
            layers = [LinearWeights(torch.ones(width, inner, dtype=dtype), None) for _ in range(LAYERS)]
            for layer in layers if "packed" in linear_ways(dtype) else ():
                layer.pack()
            for rows in ROWS:
                choice, tokens = Choice(linear_ways(dtype)), torch.ones(rows, inner, dtype=dtype)
                for layer in itertools.cycle(layers):
                    way, start = choice.turn(), time.perf_counter()
                    LINEAR[way](tokens, layer)
                    choice.note(way, time.perf_counter() - start)
                    if choice.fastest is not None:
                        break
                taken = (f"{way} {1e3 * seconds:.3f}" for way, seconds in choice.medians().items())
                name = f"{inner} -> {width}, {str(dtype).removeprefix('torch.')}, {rows} rows"
                found[name] = ", ".join(taken)
    return found


def _print(facts: dict[str, str]) -> None:
    width = max(map(len, facts)) + 1
    for name, value in facts.items():
        print(f"{name + ':':{width}} {value}")


if __name__ == "__main__":
    _print(describe())
    print("\nMilliseconds through a linear layer, each way:", flush=True)
    _print(measure_linear())

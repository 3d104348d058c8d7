"""Everything that needs a GPU, in one call of less than ten minutes: `make gpu`, which runs `python -m bench.gpu`.

Builds the CUDA extension for the GPU at hand, tests the ops and the engine on it, runs the ops under compute-sanitizer,
and measures. Each step has a time limit and a log, and a step that fails does not stop the next; `gpu.json` says which
ones did, how long they took, and on what machine. Nothing is installed: it uses the Python that runs it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.tables import machine

ROOT = Path(__file__).parents[1]
OPS = (
    "ema_surprise",
    "compact",
    "gather_rows",
    "scatter_rows",
    "scatter_kv",
    "attend_rows",
    "attend_versions",
    "ema_gate",
)


def steps(out):
    """(name, seconds, command) of each step; 530 seconds in all."""
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
    small = [*python, "-m", "bench.small", "--device", "cuda"]
    run = [*python, "-m", "bench.run", "--device", "cuda"]
    models = ["--compiled", "--dtype", "bfloat16", "--size", "224", "448", "896", "1792", "--skip", "0.97", "0.84"]
    streams = ["--device", "cuda", "--dtype", "bfloat16", "--model", "SigLIP base", "--size", "448", "--streams", "16"]
    return [
        ("build", 110, [*python, "setup.py", "-q", "build_ext", "--inplace"]),
        ("environment", 20, [*python, "-m", "neuroflow_kernels.env"]),
        ("ops", 80, ["env", "NEUROFLOW_TEST_DEVICE=cuda", *pytest, *(f"tests/ops/test_{op}.py" for op in OPS)]),
        ("engine", 60, [*pytest, "tests/engine/test_gpu.py"]),
        ("ops measured", 40, [*run, "ops", "--out", f"{out}/run-cuda-ops.json"]),
        ("models", 120, [*run, "models", *models, "--seconds", "4", "--out", f"{out}/run-cuda-models.json"]),
        ("streams", 30, [*python, "-m", "bench.streams", *streams, "--skip", "0.97", "--out", f"{out}/streams-cuda"]),
        ("memcheck", 40, [*sanitizer, "memcheck", *small]),
        ("racecheck", 30, [*sanitizer, "racecheck", *small]),
    ]


def environment():
    """This one, with the extension built for the GPU at hand alone."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"make gpu: torch {torch.__version__} finds no CUDA device here")
    major, minor = torch.cuda.get_device_capability()
    toolkit = Path("/usr/local/cuda")  # where nvcc on PATH may be a script that is not in it
    home = {"CUDA_HOME": str(toolkit)} if (toolkit / "include/cuda_runtime.h").exists() else {}
    return {
        **home,
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}"),
    }


def perform(name, limit, command, out, variables):
    """Run one step; what it printed goes to a log, the end of which is shown."""
    if shutil.which(command[0]) is None:
        return {"step": name, "outcome": f"not run, there is no {command[0]}", "seconds": 0}
    start, log = time.perf_counter(), out / f"{name.replace(' ', '-')}.log"
    with log.open("w") as printed:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=variables, stdout=printed, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
            outcome = "passed" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit} s"
    print(*log.read_text(errors="replace").splitlines()[-12:], sep="\n", flush=True)
    return {"step": name, "outcome": outcome, "seconds": round(time.perf_counter() - start, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".benchmarks" / "gpu")
    parser.add_argument("--step", nargs="+", help="these alone; all by default")
    arguments = parser.parse_args()
    names = [name for name, *_ in steps(arguments.out)]
    for name in arguments.step or ():
        if name not in names:
            parser.error(f"--step is {name!r}; accepted are {', '.join(map(repr, names))}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    variables, done = environment(), []
    for name, limit, command in steps(out):
        if arguments.step and name not in arguments.step:
            continue
        print(f"--- {name}", flush=True)
        done.append(perform(name, limit, command, out, variables))
        (out / "gpu.json").write_text(json.dumps({"machine": machine(), "steps": done}, indent=1) + "\n")
    print("---", *(f"{step['step']:14} {step['outcome']}, {step['seconds']} s" for step in done), sep="\n")
    raise SystemExit(any(step["outcome"] != "passed" for step in done))


if __name__ == "__main__":
    main()

import importlib
import math
import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from neuroflow_kernels import BackendUnavailable, dispatch, unavailable, use_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # tests/ops/test_triton.py runs the ops' tests again like this
CUDA_ON_HOST = os.environ.get("NEUROFLOW_CUDA_ON_HOST")  # and tests/ops/test_cuda_on_host.py with this library
SANITIZED = os.environ.get("NEUROFLOW_SANITIZED")  # and tests/ops/test_hostile.py with this one
DEVICE = os.environ.get("NEUROFLOW_TEST_DEVICE", "cpu")  # and tests/ops/test_cuda.py on cuda, where there is a GPU
BACKENDS = ["triton"] if INTERPRETED else ["cuda"] if CUDA_ON_HOST else ["reference", "cpp"]
if DEVICE != "cpu":
    BACKENDS = ["reference", "cuda", "triton"]
    torch.set_default_device(DEVICE)
DATA = Path(os.environ.get("NEUROFLOW_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

if find_spec("torchvision"):
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # Built for CUDA, it has none of its ops beside a CPU build of torch, and cannot be imported without these two.
        for op in ("nms", "qnms"):
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

if SANITIZED:
    torch.ops.load_library(SANITIZED)

if CUDA_ON_HOST:
    # Tensors on the CPU now go where tensors on a GPU go, where there is no Triton.
    torch.ops.load_library(CUDA_ON_HOST)
    dispatch._EXTENSION_DEVICES["cuda"] = "cpu"
    dispatch._extension_errors["cuda"] = None
    dispatch._without_cuda_kernel = lambda op: "reference"
    for op in dispatch.Operator.registry.values():
        op.cuda = "csrc/cuda/" in torch._C._dispatch_dump(f"neuroflow::{op.name}")


@pytest.fixture(autouse=True)
def never_dense(monkeypatch):
    """Which frames run dense does not depend on how fast they are."""
    if not (INTERPRETED or CUDA_ON_HOST):
        monkeypatch.setattr("neuroflow.engine.crossover.measure", lambda *_: 1.0)


@pytest.fixture(autouse=True)
def any_release(monkeypatch):
    """What is warned of does not depend on how new the installed releases are."""
    if not (INTERPRETED or CUDA_ON_HOST):
        monkeypatch.setattr("neuroflow.releases.TESTED", {})


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """On how many threads frames run, and with that their rounding, does not depend on how busy the machine is."""
    if not (INTERPRETED or CUDA_ON_HOST):
        from neuroflow.engine import threads

        everything = threads.Cores(own=2**10, quota=math.inf, others=0.0)
        monkeypatch.setattr(threads, "meter", SimpleNamespace(read=lambda: everything))


@pytest.fixture
def poison():
    """What nobody wrote is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    yield
    torch.use_deterministic_algorithms(False)


def served_by(name):
    reason = unavailable(name, DEVICE)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    with use_backend("auto" if name == "cuda" else name):  # float64 goes past it
        yield name


@pytest.fixture(params=BACKENDS)
def backend(request, poison):
    """Every op called in the test runs on this backend, in poisoned memory."""
    yield from served_by(request.param)


@pytest.fixture(params=["reference", "cpp"])
def cpu_backend(request, poison):
    """As `backend`, of the ops that have no Triton kernel."""
    yield from served_by(request.param)


@pytest.fixture(params=[name for name in BACKENDS if name in ("cuda", "triton")])
def gpu_backend(request, poison):
    """As `backend`, for what only kernels that cannot look at an index before they start have to promise."""
    yield from served_by(request.param)


@pytest.fixture
def on_cpu():
    if DEVICE != "cpu":
        pytest.skip("what it tests is promised on the CPU")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Tests of the C++ kernels are skipped on a GPU."""
    try:
        return (yield)
    except BackendUnavailable as error:
        if DEVICE == "cpu" or "backend 'cpp'" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture
def one_thread():
    """Tiny models gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator():
    return torch.Generator(DEVICE).manual_seed(0)


@pytest.fixture
def neuroflow_with_warnings(capsys):
    """neuroflow_with_warnings(command, *arguments) -> exit code, stdout, stderr."""

    from neuroflow_cli import main

    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def neuroflow(neuroflow_with_warnings):
    """neuroflow(command, *arguments) -> exit code, stdout, stderr without its warnings."""

    def call(*arguments):
        code, table, message = neuroflow_with_warnings(*arguments)
        return code, table, "".join(line for line in message.splitlines(True) if not line.startswith("warning: "))

    return call


@pytest.fixture(scope="session")
def data():
    """data(name) -> the path of a file that the project does not carry; skips the test where it is absent."""

    def find(name):
        path = DATA / name
        if not path.exists():
            pytest.skip(f"{name} is not in {DATA} (NEUROFLOW_DATA names another directory)")
        return path

    return find

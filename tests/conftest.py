import importlib
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from neuroflow_kernels import unavailable, use_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # tests/test_triton.py runs the ops' tests again like this
DATA = Path(os.environ.get("NEUROFLOW_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

if find_spec("torchvision"):
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # Built for CUDA, it has none of its ops beside a CPU build of torch, and cannot be imported without these two.
        for op in ("nms", "qnms"):
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture
def poison():
    """What nobody wrote is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def served_by(name):
    reason = unavailable(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    with use_backend(name):
        yield name


@pytest.fixture(params=["triton"] if INTERPRETED else ["reference", "cpp"])
def backend(request, poison):
    """Every op called in the test runs on this backend, in poisoned memory."""
    yield from served_by(request.param)


@pytest.fixture(params=["reference", "cpp"])
def cpu_backend(request, poison):
    """As `backend`, of the ops that have no Triton kernel."""
    yield from served_by(request.param)


@pytest.fixture
def one_thread():
    """Tiny models gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def neuroflow(capsys):
    """neuroflow(command, *arguments) -> exit code, stdout, stderr without its warnings."""

    from neuroflow.cli.main import main

    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        table, message = capsys.readouterr()
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

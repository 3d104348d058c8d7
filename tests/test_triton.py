"""The Triton kernels without a GPU: interpreted against the op tests, compiled for the GPUs they are meant for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import neuroflow_kernels
from neuroflow_kernels import dispatch

triton = pytest.importorskip("triton", reason="triton is not installed (`pip install triton`)")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from neuroflow_kernels.triton.compact import compact  # noqa: E402
from neuroflow_kernels.triton.ema_surprise import ema_surprise_  # noqa: E402
from neuroflow_kernels.triton.gather_rows import gather_rows  # noqa: E402
from neuroflow_kernels.triton.scatter_rows import scatter_rows_  # noqa: E402

OPS = ("ema_surprise", "compact", "gather_rows", "scatter_rows", "ema_gate")
OLD_INTERPRETER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: the kernels are not compiled")
interprets = pytest.mark.skipif(not INTERPRETED, reason="run by test_op_tests_pass_interpreted")


@compiles
@pytest.mark.skipif(OLD_INTERPRETER, reason="before triton 3.7 the interpreter cannot count in a loop, under NumPy 2.4")
def test_op_tests_pass_interpreted():
    tests = Path(__file__).parent
    vectors = f"{tests}/test_reference_vectors.py::test_gate_ops"
    # Triton decides on import whether kernels are interpreted: hence a process of its own.
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "not slow", __file__, vectors, *(tests / f"test_{op}.py" for op in OPS)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=tests.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


class DevicelessDriver:
    """Lets kernels be compiled for a compute capability through the launches of the ops themselves."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # what Triton keeps compiled kernels apart by

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def kernels(monkeypatch, tmp_path, capability):
    """The kernels that launches compiled; nothing is run."""
    launch, compiled = JITFunction.run, []

    def compile_only(self, *args, **options):
        compiled.append(launch(self, *args, **{**options, "warmup": True}))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", DevicelessDriver(capability))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    return compiled


def resources(kernel, folder):
    """Registers a thread, and bytes of stack and local memory, which is where spilled registers go."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(rf"Function {kernel.name}:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    return [int(number) for number in usage.groups()]


def launch_row_ops(dtype, streams, tokens, dim):
    x, weight = torch.zeros((streams, tokens, dim), dtype=dtype), torch.zeros(dim, dtype=dtype)
    index, cu_seqlens = torch.zeros(streams * tokens, dtype=torch.int32), torch.zeros(streams + 1, dtype=torch.int32)
    ema_surprise_(x, x.clone(), 0.01)
    if dtype.itemsize == 2:
        ema_surprise_(x, x.float(), 0.01)
    gather_rows(x, index, cu_seqlens, tokens, None, None, 0.0)
    gather_rows(x, index, cu_seqlens, tokens, weight, weight, 1e-6)
    scatter_rows_(x, x[0], index, cu_seqlens, 1.0)
    scatter_rows_(x, x[0], index, cu_seqlens, 0.5)


@compiles
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        (torch.float32, 768),
        (torch.float32, 1152),
        (torch.bfloat16, 768),
        (torch.bfloat16, 1152),
        (torch.float16, 768),
        (torch.float64, 768),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_row_kernels_compile_without_spills(kernels, tmp_path, capability, dtype, dim):
    launch_row_ops(dtype, 2, 196, dim)
    for kernel in kernels:
        registers, stack, local = resources(kernel, tmp_path)
        assert 0 < registers <= 128, (kernel.name, registers)
        assert (stack, local) == (0, 0), kernel.name
        assert re.search(r"ld\.global\S*\.(v4\.b32|v2\.b64)", kernel.asm["ptx"]), f"{kernel.name} has no 16-byte load"


@compiles
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize("tokens", [196, 3136, 65536])
def test_compaction_compiles_without_spills(kernels, tmp_path, capability, tokens):
    compact(torch.zeros((2, tokens)), torch.zeros(2), None, 4)
    compact(torch.zeros((2, tokens)), None, torch.zeros(2, dtype=torch.int32), 4)
    assert len(kernels) == 4
    for kernel in kernels:
        registers, stack, local = resources(kernel, tmp_path)
        assert 0 < registers <= 128, (kernel.name, registers)
        assert (stack, local) == (0, 0), kernel.name
        # Flushed subnormals would tie with zero, and the order would change.
        assert ".ftz" not in kernel.asm["ptx"], kernel.name


@compiles
@pytest.mark.parametrize("capability", [80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sizes_of_one_compile(kernels, capability, dtype):
    # Triton makes a constant of every integer argument that is 1; the interpreter does not.
    launch_row_ops(dtype, 1, 1, 1)
    compact(torch.zeros((1, 1)), torch.zeros(1), None, 1)
    compact(torch.zeros((1, 1)), None, torch.zeros(1, dtype=torch.int32), 1)


@compiles
@pytest.mark.parametrize("capability", [80])
def test_empty_inputs_launch_nothing(kernels, capability):
    none = torch.zeros(0, dtype=torch.int32)
    for shape in ((0, 4, 8), (2, 0, 8)):
        h = torch.zeros(shape)
        assert ema_surprise_(h, h.clone(), 0.1).shape == shape[:2]
        index, cu_seqlens = compact(h[..., 0], torch.zeros(shape[0]), None, 4)
        assert index.shape == (0,) and cu_seqlens.tolist() == [0] * (shape[0] + 1)
        scatter_rows_(h, torch.zeros((3, 8)), none, cu_seqlens, 1.0)
    h = torch.zeros((1, 2, 8))
    assert gather_rows(h, none, none.new_zeros(2), 0, None, None, 0.0).shape == (0, 8)
    scatter_rows_(h, torch.zeros((0, 8)), none, none.new_zeros(2), 1.0)
    assert not kernels


@interprets
@pytest.mark.parametrize("blend", [1.0, 0.5])
def test_rows_outside_the_tensor_are_neither_read_nor_written(blend):
    index = torch.tensor([-1, 1, 4, 2**31 - 1], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    guarded = torch.arange(18.0).reshape(6, 3)
    before, x = guarded.clone(), guarded[1:5].unsqueeze(0)
    packed = gather_rows(x, index, cu_seqlens, 4, None, None, 0.0)
    assert packed.tolist() == [[0, 0, 0], before[2].tolist(), [0, 0, 0], [0, 0, 0]]
    scatter_rows_(x, torch.full((4, 3), 2.0), index, cu_seqlens, blend)
    before[2] = (1 - blend) * before[2] + blend * 2
    assert guarded.equal(before)


@interprets
@pytest.mark.parametrize(("total", "length"), [(1, 2), (9, 1)], ids=["past the count", "past the index"])
def test_index_is_read_up_to_the_count_and_its_end(total, length):
    index = torch.tensor([1, 0], dtype=torch.int32)[:length]
    cu_seqlens = torch.tensor([0, total], dtype=torch.int32)
    x = torch.ones((1, 2, 3))
    assert gather_rows(x, index, cu_seqlens, 2, None, None, 0.0).tolist() == [[1, 1, 1], [0, 0, 0]]
    scatter_rows_(x, torch.full((2, 3), 2.0), index, cu_seqlens, 1.0)
    assert x.tolist() == [[[1, 1, 1], [2, 2, 2]]]


@interprets
def test_float64_keeps_its_digits():
    """In the scalars too, which a launch passes in float32 unless told otherwise."""
    generator = torch.Generator().manual_seed(0)
    x, y, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(1, 4, 33), (1, 4, 33), (33,), (33,)]
    )
    index, cu_seqlens = torch.arange(4, dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    results = {}
    for name in ("reference", "triton"):
        with neuroflow_kernels.use_backend(name):
            moved, blended = x.clone(), x.clone()
            neuroflow_kernels.ema_surprise_(y, moved, 0.1)
            neuroflow_kernels.scatter_rows_(blended, y[0], index, cu_seqlens, 0.1)
            norm = {"norm_weight": weight, "norm_bias": bias, "eps": 0.1}
            packed = neuroflow_kernels.gather_rows(x, index, cu_seqlens, 4, **norm)
            results[name] = torch.cat([moved[0], blended[0], packed])
    torch.testing.assert_close(results["triton"], results["reference"], rtol=1e-13, atol=1e-13)


@interprets
@pytest.mark.parametrize("rule", [{"threshold": 0.5}, {"threshold": 2.0}, {"budget": 5000}, {"budget": 8200}])
def test_streams_longer_than_a_block(rule):
    """Of 8,200 tokens with many ties, at the threshold too, which both kernels take in more than one block."""
    surprise = torch.rand((2, 8200), generator=torch.Generator().manual_seed(0)).mul_(8).round_().div_(8)
    with neuroflow_kernels.use_backend("reference"):
        expected = neuroflow_kernels.compact(surprise, **rule, floor=3000)
    with neuroflow_kernels.use_backend("triton"):
        index, cu_seqlens = neuroflow_kernels.compact(surprise, **rule, floor=3000)
    assert index.equal(expected[0]) and cu_seqlens.equal(expected[1])


@pytest.fixture
def served(monkeypatch):
    """The backends that `dispatch` turns to."""
    implementation, backends = dispatch._implementation, []

    def recorded(backend, *names):
        backends.append(backend)
        return implementation(backend, *names)

    monkeypatch.setattr(dispatch, "_implementation", recorded)
    return backends


def compact_on_gpu_key():
    arguments = torch.tensor([[0.1, 0.9]]), torch.tensor([0.5]), None, 0
    index, cu_seqlens = dispatch._triton_or_reference(dispatch.Operator.registry["compact"], *arguments)
    assert index.tolist() == [1, -1] and cu_seqlens.tolist() == [0, 1]


@interprets
def test_gpu_tensors_go_to_triton(served):
    compact_on_gpu_key()
    assert served == ["triton"]


def test_gpu_tensors_go_to_the_reference_without_triton(served, monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    dispatch._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="triton is not installed"):
        compact_on_gpu_key()
    assert served == ["reference"]


@compiles
def test_triton_declines_cpu_tensors():
    with (
        neuroflow_kernels.use_backend("triton"),
        pytest.raises(neuroflow_kernels.BackendUnavailable, match=r"compact on cpu: .*TRITON_INTERPRET=1"),
    ):
        neuroflow_kernels.compact(torch.zeros((1, 2)), 0.5)

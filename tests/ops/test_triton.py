"""The Triton kernels without a GPU: interpreted against the op tests, compiled for the GPUs they are meant for."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import neuroflow_kernels
from neuroflow_kernels import dispatch

triton = pytest.importorskip("triton", reason="triton is not installed (`pip install triton`)")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from neuroflow_kernels.triton import attend_rows as attention  # noqa: E402
from neuroflow_kernels.triton.attend_rows import attend_rows  # noqa: E402
from neuroflow_kernels.triton.attend_versions import attend_versions  # noqa: E402
from neuroflow_kernels.triton.compact import compact  # noqa: E402
from neuroflow_kernels.triton.ema_surprise import ema_surprise_  # noqa: E402
from neuroflow_kernels.triton.gather_rows import gather_rows  # noqa: E402
from neuroflow_kernels.triton.scatter_kv import scatter_kv_  # noqa: E402
from neuroflow_kernels.triton.scatter_rows import scatter_rows_  # noqa: E402

OPS = (
    "ema_surprise",
    "compact",
    "gather_rows",
    "scatter_rows",
    "ema_gate",
    "attend_rows",
    "attend_versions",
    "scatter_kv",
)
HEADS = {768: 12, 1152: 16}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
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
        [sys.executable, "-m", "pytest", "-m", "not slow and not fuzz", __file__, vectors, tests / "test_hostile.py"]
        + [tests / f"test_{op}.py" for op in OPS],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=tests.parents[1],
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
    rows = x[0].unflatten(1, (HEADS.get(dim, 1), -1))  # [M, heads, head_dim]
    scatter_kv_(x, x.clone(), rows, rows.transpose(0, 1).contiguous().transpose(0, 1), index, cu_seqlens)


@compiles
@pytest.mark.parametrize(
    ("capability", "dtype", "dim"),
    [
        (75, torch.float32, 768),
        (80, torch.float32, 1152),
        (90, torch.float32, 1152),
        (100, torch.float32, 768),
        (75, torch.bfloat16, 1152),
        (80, torch.bfloat16, 768),
        (90, torch.bfloat16, 768),
        (100, torch.bfloat16, 1152),
        (75, torch.float16, 768),
        (100, torch.float16, 768),
        (75, torch.float64, 768),
        (80, torch.float64, 768),
        (90, torch.float64, 768),
        (100, torch.float64, 768),
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
@pytest.mark.parametrize(
    ("capability", "tokens"), [(80, 196), (100, 196), (80, 3136), (100, 3136), (75, 65536), (90, 65536)]
)
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


def launch_attention(dtype, streams, queries, tokens, heads, dim, tabled=False):
    if tabled:
        query, key = torch.zeros((queries, heads, dim), dtype=dtype), torch.zeros((tokens, heads, dim), dtype=dtype)
        table = torch.zeros((streams, tokens), dtype=torch.int32)
        return attend_versions(query, key, key, table, torch.zeros(streams + 1, dtype=torch.int32), 0.1)
    query, key = (
        torch.zeros((queries, heads, dim), dtype=dtype),
        torch.zeros((streams, tokens, heads, dim), dtype=dtype),
    )
    attend_rows(query, key, key, torch.zeros(streams + 1, dtype=torch.int32) if streams > 1 else None, 0.1)


@compiles
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize(
    ("dtype", "streams", "queries", "tokens", "dim"),
    [
        (torch.bfloat16, 1, 64, 196, 64),
        (torch.bfloat16, 1, 94, 3136, 64),
        (torch.float16, 2, 16, 3136, 72),
        (torch.bfloat16, 2, 128, 784, 256),
        (torch.float32, 2, 94, 784, 256),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_attention_compiles_without_spills(kernels, tmp_path, capability, dtype, streams, queries, tokens, dim):
    """Keys in order or by a table: of each case and capability, as a rule what takes more registers."""
    tabled = (capability == 75) == (tokens != 3136)
    launch_attention(dtype, streams, queries, tokens, 12, dim, tabled)
    assert len(kernels) == 2 or tokens < 3136  # long enough to be split
    for kernel in kernels:
        registers, stack, local = resources(kernel, tmp_path)
        # Of 8 warps, one block fits a multiprocessor either way; Triton 3.9 takes 208 and 3.7 214 for float32.
        assert 0 < registers <= (255 if kernel.metadata.num_warps == 4 else 216), (kernel.name, registers)
        assert (stack, local) == (0, 0), kernel.name
        # Of the GPUs that run code for sm_80 and up, those for desktops have 99 KiB.
        assert kernel.metadata.shared <= (64 if capability == 75 else 99) * 1024, kernel.name
    ptx = kernels[0].asm["ptx"]
    copies = Counter(re.findall(r"cp\.async\.c\w\.\S+ .*?, (0x\w+),", ptx))
    if tabled:
        assert copies.pop("0x4", 0) <= copies["0x10"], "the table's own entries are the fewest"
    if capability >= 80:
        assert set(copies) == {"0x10"}, f"keys and values are not copied by 16 bytes: {copies}"
    if capability >= 80 and dtype != torch.float32:
        assert TENSOR_CORES[80 if queries <= 16 * streams else capability] in ptx


@compiles
@pytest.mark.parametrize("capability", [80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sizes_of_one_compile(kernels, capability, dtype):
    # Triton makes a constant of every integer argument that is 1; the interpreter does not.
    launch_row_ops(dtype, 1, 1, 1)
    compact(torch.zeros((1, 1)), torch.zeros(1), None, 1)
    compact(torch.zeros((1, 1)), None, torch.zeros(1, dtype=torch.int32), 1)
    launch_attention(dtype, 1, 1, 1, 1, 1)


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
        scatter_kv_(h, h.clone(), torch.zeros((3, 2, 4)), torch.zeros((3, 2, 4)), none, cu_seqlens)
    h = torch.zeros((1, 2, 8))
    assert gather_rows(h, none, none.new_zeros(2), 0, None, None, 0.0).shape == (0, 8)
    scatter_rows_(h, torch.zeros((0, 8)), none, none.new_zeros(2), 1.0)
    scatter_kv_(h, h.clone(), torch.zeros((0, 2, 4)), torch.zeros((0, 2, 4)), none, none.new_zeros(2))
    for queries, streams in ((0, 1), (3, 0)):
        query, key = torch.zeros(queries, 2, 4), torch.zeros(streams, 5, 2, 4)
        assert attend_rows(query, key, key, none.new_zeros(streams + 1), 0.5).eq(0).all()
    assert not kernels


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


@pytest.mark.parametrize(
    ("tokens", "programs", "splits"),
    [
        (196, 12, 1),
        (511, 12, 1),
        (512, 12, 2),
        (3136, 12, 10),  # of the 11 that fill 132 multiprocessors, in whole blocks
        (12544, 36, 7),  # twice round; four splits would go round twice as well
        (784, 192, 2),
        (784, 132, 1),
        (784, 1320, 1),
    ],
)
def test_splits_fill_the_gpu_in_whole_blocks(tokens, programs, splits):
    span = attention._span(tokens, 64, programs, 132)
    assert triton.cdiv(tokens, span) == splits and span % 64 == 0


@pytest.fixture
def split(monkeypatch):
    """split(multiplies): keys are split as often as they may be, in tiles as tensor cores want them or not."""
    tile = attention._tile

    def choose(multiplies):
        monkeypatch.setattr(attention, "_tile", lambda rows, dim, _: tile(rows, dim, multiplies))

    monkeypatch.setattr(attention, "WARPS", 10**6)
    return choose


@interprets
@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("counts", [[130], [0, 7, 0, 30]], ids=str)
def test_splits_are_weighed_together(split, counts, multiplies):
    split(multiplies)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn((sum(counts) + 2, 1, 20), generator=generator)
    key, value = (torch.randn((len(counts), 800, 1, 20), generator=generator) for _ in range(2))
    key *= torch.linspace(0.5, 4, 800)[:, None, None]
    cu_seqlens = torch.tensor([0, *counts]).cumsum(0).int()
    found, expected = (of(query, key, value, cu_seqlens, 0.3) for of in (attend_rows, attention.reference))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found[-2:].eq(0).all()


@interprets
def test_a_split_of_scores_of_minus_infinity_counts_nothing(split):
    split(False)
    key, value = torch.zeros(1, 600, 1, 4), torch.randn(1, 600, 1, 4, generator=torch.Generator().manual_seed(0))
    key[:, :500] = -torch.inf
    found = attend_rows(torch.ones(2, 1, 4), key, value, None, 0.5)
    torch.testing.assert_close(found, value[:, 500:].mean(1).expand(2, 1, 4))


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

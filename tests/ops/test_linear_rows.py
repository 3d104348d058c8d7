import os
import subprocess
import sys

import pytest
import torch

from neuroflow_kernels import linear_rows, use_backend
from neuroflow_kernels.reference.linear_rows import linear_rows as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (M, K, N): tiles are of 6 rows and 4 columns, vectors of 16 floats or 32 bfloat16
CASES = [(1, 1, 1), (6, 32, 4), (5, 33, 7), (7, 64, 8), (13, 100, 30), (4, 15, 3), (94, 768, 66)]
EMPTY = [(0, 5, 3), (3, 0, 4), (2, 5, 0)]


def layer(generator, shape, dtype):
    rows, inner, width = shape
    x, weight = torch.randn(rows, inner, generator=generator), torch.randn(width, inner, generator=generator)
    return x.to(dtype), weight.to(dtype), torch.randn(width, generator=generator).to(dtype)


def test_reference_is_the_definition():
    x, weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([0.5, -1.0])
    assert reference(x, weight, bias).tolist() == [[11.5, 16.0]]
    assert reference(x, weight, None).tolist() == [[11.0, 17.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", CASES + EMPTY, ids=str)
def test_against_float64(cpu_backend, generator, shape, bias, dtype):
    x, weight, shift = layer(generator, shape, dtype)
    result = linear_rows(x, weight, shift if bias else None)
    expected = reference(x.double(), weight.double(), shift.double() if bias else None)
    assert result.dtype == dtype
    # K sums of about sqrt(K) in size, each rounded; then one rounding to dtype.
    wide = torch.promote_types(dtype, torch.float32)
    absolute = torch.finfo(wide).eps * max(shape[1], 8)
    torch.testing.assert_close(result.double(), expected, rtol=torch.finfo(dtype).eps, atol=absolute)


def test_rounding_to_bfloat16(cpu_backend, generator):
    """To nearest, ties to even: a sum of two terms is exact in float32, and every other one here is a tie."""
    x = (1 + torch.arange(128)[:, None] / 128).bfloat16()
    bias = torch.arange(128) / 256 + 2
    result = linear_rows(x, torch.ones(128, 1).bfloat16(), bias.bfloat16())
    assert torch.equal(result, (x.float() + bias.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_others(generator, dtype):
    x, weight, bias = layer(generator, (40, 200, 50), dtype)
    with use_backend("cpp"):
        together = linear_rows(x, weight, bias)
        for start, stop in ((0, 1), (3, 9), (7, 40), (39, 40)):
            assert torch.equal(linear_rows(x[start:stop], weight, bias), together[start:stop])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_stay_in_their_row_and_column(cpu_backend, generator, dtype):
    x, weight, bias = layer(generator, (7, 40, 9), dtype)
    clean = linear_rows(x, weight, bias)
    x[2, 3], weight[5, 39], bias[8] = torch.nan, torch.inf, torch.nan
    result = linear_rows(x, weight, bias)
    assert result[2].isnan().all() and result[:, 8].isnan().all()
    assert not result[[0, 1, 3, 4, 5, 6], 5].isfinite().any()
    others = [0, 1, 2, 3, 4, 6, 7]
    assert torch.equal(result[[0, 1, 3, 4, 5, 6]][:, others], clean[[0, 1, 3, 4, 5, 6]][:, others])


def test_arguments_need_not_be_contiguous(cpu_backend, generator):
    x, weight, bias = layer(generator, (6, 20, 8), torch.float32)
    strided = linear_rows(x.T.contiguous().T, weight.T.contiguous().T, bias.repeat(2)[::1][:8])
    assert torch.equal(strided, linear_rows(x, weight, bias))


CHILD = """
import torch
from neuroflow_kernels import linear_rows, attend_rows, use_backend, without_row_kernels
assert "AVX512" in without_row_kernels(), without_row_kernels()
generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    x, weight = (torch.randn(rows, 70, generator=generator).to(dtype) for rows in (7, 9))
    query, key, value = (torch.randn(rows, 3, 20, generator=generator).to(dtype) for rows in (7, 90, 90))
    for op, arguments in ((linear_rows, (x, weight)), (attend_rows, (query, key, value))):
        with use_backend("cpp"):
            ours = op(*arguments)
        with use_backend("reference"):
            theirs = op(*(argument.double() for argument in arguments))
        torch.testing.assert_close(ours.double(), theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
"""


def test_processors_without_avx512():
    """The plain loops, which torch's own variable asks for here."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_opcheck(generator):
    x, weight, bias = layer(generator, (5, 12, 7), torch.float32)
    for shift in (bias, None):
        torch.library.opcheck(torch.ops.neuroflow.linear_rows.default, (x, weight, shift))


def test_compile(generator):
    arguments = layer(generator, (5, 12, 7), torch.float32)
    compiled = torch.compile(linear_rows, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), linear_rows(*arguments))


@pytest.mark.parametrize(
    "name, change",
    [
        ("x", {"x": torch.zeros(3)}),
        ("x", {"x": torch.zeros(3, 4).int()}),
        ("weight", {"weight": torch.zeros(5, 3)}),
        ("weight", {"weight": torch.zeros(5, 4).double()}),
        ("bias", {"bias": torch.zeros(4)}),
        ("bias", {"bias": torch.zeros(5).half()}),
    ],
)
def test_errors_name_the_argument(name, change):
    arguments = {"x": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "bias": torch.zeros(5)}
    with pytest.raises(ValueError, match=rf"^{name} is .*; accepted is"):
        linear_rows(**arguments | change)

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from neuroflow_kernels import attend_rows, use_backend
from neuroflow_kernels.reference.attend_rows import attend_rows as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (M, heads, T, head_dim): on a CPU tiles are of 6 queries and 64 keys, chunks of 96 queries
CASES = [
    (1, 1, 1, 1),
    (6, 2, 64, 64),
    (5, 3, 65, 33),
    (7, 2, 130, 80),
    (13, 1, 3, 16),
    (100, 2, 90, 64),
    (2, 5, 50, 7),
]
# queries of each stream, rows of padding
STREAMS = [([3], 2), ([0, 5, 0, 1], 0), ([100, 0, 7], 30), ([0, 0], 4), ([], 3)]


def tokens(generator, shape, dtype, spread=1.0):
    active, heads, all_, dim = shape
    drawn = [torch.randn(rows, heads, dim, generator=generator) for rows in (active, all_, all_)]
    return [(spread * drawn[0]).to(dtype), drawn[1].to(dtype), drawn[2].to(dtype)]


def by_hand(query, key, value, scale):
    scores = torch.einsum("mhd,thd->hmt", query.double(), key.double()) * scale
    return torch.einsum("hmt,thd->mhd", scores.softmax(2), value.double())


def streams(generator, counts, padding, dtype, tokens=70, heads=2, dim=16):
    """query, NaN where it is padding, key, value, cu_seqlens."""
    total = sum(counts)
    query = torch.randn(total + padding, heads, dim, generator=generator).to(dtype)
    query[total:] = torch.nan
    key, value = (torch.randn(len(counts), tokens, heads, dim, generator=generator).to(dtype) for _ in range(2))
    return query, key, value, torch.tensor([0, *counts]).cumsum(0).int()


def tolerance_of(dtype, spread=1.0):
    """16 bits: the weights are rounded once, and the output once. float32: what exp makes of a large score's error."""
    return 1e-12 if dtype == torch.float64 else max(2 * torch.finfo(dtype).eps, 1e-6 * max(spread, 2))


def test_reference_is_the_definition(generator):
    query, key, value = tokens(generator, (3, 2, 5, 4), torch.float64)
    result = reference(query, key[None], value[None], None, 0.3)
    torch.testing.assert_close(result, by_hand(query, key, value, 0.3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1.0, 12.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_against_float64(backend, generator, shape, spread, dtype):
    query, key, value = tokens(generator, shape, dtype, spread)
    scale = shape[3] ** -0.5
    result = attend_rows(query, key, value)
    assert result.dtype == dtype and result.is_contiguous()
    tolerance = tolerance_of(dtype, spread)
    torch.testing.assert_close(result.double(), by_hand(query, key, value, scale), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_maximum_that_comes_late_or_lies_low(backend, generator, dtype):
    """The running maximum moves with every block, and scores far below zero still sum to one."""
    query, key, value = tokens(generator, (6, 2, 256, 16), dtype)
    query, key = query.abs(), key.abs() * torch.linspace(0.1, 40, 256)[:, None, None].to(dtype)
    for sign in (1, -1):
        result, expected = attend_rows(query, sign * key, value), by_hand(query, sign * key, value, 0.25)
        tolerance = 4 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scores_far_below_zero(backend, dtype):
    key, value = torch.tensor([-1.0, -1.0, -2.0])[:, None, None], torch.tensor([2.0, 4.0, 9.0])[:, None, None]
    result = attend_rows(torch.full((1, 1, 1), 1e32, dtype=dtype), key.to(dtype), value.to(dtype), 1.0)
    assert result.item() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_does_not_depend_on_the_others(generator, dtype):
    query, key, value = tokens(generator, (120, 2, 70, 64), dtype)
    with use_backend("cpp"):
        together = attend_rows(query, key, value)
        for start, stop in ((0, 1), (3, 10), (90, 120)):
            assert torch.equal(attend_rows(query[start:stop], key, value), together[start:stop])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_with_its_query_and_its_head(backend, generator, dtype):
    query, key, value = tokens(generator, (7, 3, 70, 16), dtype)
    clean = attend_rows(query, key, value)
    query[2, 0, 1] = torch.nan
    key[69, 2, 0] = torch.nan
    result = attend_rows(query, key, value)
    assert result[2, 0].isnan().all() and result[:, 2].isnan().all()
    assert torch.equal(result[:, 1], clean[:, 1])
    assert torch.equal(result[[0, 1, 3, 4, 5, 6], 0], clean[[0, 1, 3, 4, 5, 6], 0])


def test_a_score_of_minus_infinity_counts_nothing(backend):
    query, key, value = torch.ones(2, 1, 2), torch.zeros(3, 1, 2), torch.tensor([1.0, 2.0, 4.0]).repeat(2, 1).T[:, None]
    key[1] = -torch.inf
    torch.testing.assert_close(attend_rows(query, key, value.contiguous()), torch.full((2, 1, 2), 2.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts, padding", STREAMS, ids=str)
def test_streams_see_their_own_keys(backend, generator, counts, padding, dtype):
    query, key, value, cu_seqlens = streams(generator, counts, padding, dtype)
    result = attend_rows(query, key, value, 0.3, cu_seqlens)
    assert result.dtype == dtype and result.is_contiguous()
    tolerance = tolerance_of(dtype)
    for stream, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        expected = by_hand(query[start:stop], key[stream], value[stream], 0.3)
        torch.testing.assert_close(result[start:stop].double(), expected, rtol=tolerance, atol=tolerance)
    assert result[sum(counts) :].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stream_does_not_depend_on_the_others(generator, dtype):
    query, key, value, cu_seqlens = streams(generator, [100, 1, 7], 5, dtype)
    with use_backend("cpp"):
        together = attend_rows(query, key, value, cu_seqlens=cu_seqlens)
        for stream, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            assert torch.equal(attend_rows(query[start:stop], key[stream], value[stream]), together[start:stop])


def test_nan_stays_with_its_stream(backend, generator):
    query, key, value, cu_seqlens = streams(generator, [4, 3], 2, torch.float32)
    clean = attend_rows(query, key, value, cu_seqlens=cu_seqlens)
    key[0, 69], value[0, 3] = torch.nan, torch.inf
    result = attend_rows(query, key, value, cu_seqlens=cu_seqlens)
    assert result[:4].isnan().all() and torch.equal(result[4:], clean[4:])


def test_more_rows_in_the_streams_than_there_are(backend, generator):
    """A bucket that is too small drops the last."""
    query, key, value, cu_seqlens = streams(generator, [4, 3, 0, 60, 1], 0, torch.float32)
    whole = attend_rows(query, key, value, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(attend_rows(query[:5], key, value, cu_seqlens=cu_seqlens), whole[:5])


def test_reference_never_asks_for_the_lengths(generator):
    arguments = streams(generator, [4, 3], 2, torch.float32)
    with FakeTensorMode() as mode:
        result = reference(*(mode.from_tensor(argument) for argument in arguments), 0.3)
    assert result.shape == arguments[0].shape


@pytest.mark.parametrize("rows, dim", [(0, 8), (4, 0)])
def test_nothing(backend, rows, dim):
    key, value = torch.zeros(3, 2, dim), torch.zeros(3, 2, dim)
    assert attend_rows(torch.zeros(rows, 2, dim), key, value).shape == (rows, 2, dim)


def test_arguments_need_not_be_contiguous(backend, generator):
    query, key, value = tokens(generator, (6, 2, 70, 16), torch.float32)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (query, key, value)]
    expected = attend_rows(query, key, value)
    assert torch.equal(attend_rows(*strided), expected)
    assert torch.equal(attend_rows(query.repeat(1, 3, 1).unflatten(1, (3, 2))[:, 1], key, value), expected)
    assert torch.equal(attend_rows(query.mT.contiguous().mT, key, value), expected)
    overlapping = query.flatten()[:21].as_strided((6, 2, 16), (0, 1, 1))
    expected = attend_rows(overlapping.contiguous(), key, value)
    torch.testing.assert_close(attend_rows(overlapping, key, value), expected, rtol=0, atol=1e-6)


def test_opcheck(generator):
    query, key, value = tokens(generator, (5, 2, 9, 8), torch.float32)
    op = torch.ops.neuroflow.attend_rows.default
    torch.library.opcheck(op, (query, key[None], value[None], None, 0.5))
    torch.library.opcheck(op, (*streams(generator, [4, 3], 2, torch.float32), 0.5))


def test_compile(generator):
    query, key, value, cu_seqlens = streams(generator, [4, 3], 2, torch.float32)
    compiled = torch.compile(attend_rows, fullgraph=True, backend="aot_eager")
    for arguments in ((query, key[0], value[0]), (query, key, value, None, cu_seqlens)):
        expected = attend_rows(*arguments)
        torch.testing.assert_close(compiled(*arguments), expected, rtol=0, atol=0, equal_nan=True)


STREAM = {"key": torch.zeros(1, 5, 2, 4), "value": torch.zeros(1, 5, 2, 4), "cu_seqlens": torch.zeros(2).int()}


@pytest.mark.parametrize(
    "name, change",
    [
        ("query", {"query": torch.zeros(3, 4)}),
        ("query", {"query": torch.zeros(3, 2, 4).int()}),
        ("key", {"key": torch.zeros(5, 2, 3)}),
        ("key", {"key": torch.zeros(0, 2, 4)}),
        ("key", {"key": torch.zeros(5, 2, 4).double()}),
        ("value", {"value": torch.zeros(6, 2, 4)}),
        ("key", {"cu_seqlens": torch.zeros(2).int()}),
        ("cu_seqlens", STREAM | {"cu_seqlens": torch.zeros(3).int()}),
        ("cu_seqlens", STREAM | {"cu_seqlens": torch.zeros(2).long()}),
        ("value", STREAM | {"value": torch.zeros(2, 5, 2, 4)}),
    ],
)
def test_errors_name_the_argument(name, change):
    arguments = {"query": torch.zeros(3, 2, 4), "key": torch.zeros(5, 2, 4), "value": torch.zeros(5, 2, 4)}
    with pytest.raises(ValueError, match=rf"^{name} is .*; accepted is"):
        attend_rows(**arguments | change)

import itertools

import pytest
import torch

from neuroflow_kernels import BackendUnavailable, attend_rows, attend_versions, use_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# queries of each frame, rows of padding, T, heads, head_dim
CASES = [
    ([3], 2, 1, 1, 1),
    ([0, 5, 0, 1], 0, 70, 2, 16),
    ([100, 0, 7], 30, 130, 2, 33),
    ([2, 2], 0, 600, 1, 64),  # long enough to be split
    ([0, 0], 4, 5, 2, 16),
    ([], 3, 5, 2, 16),
]


@pytest.fixture
def served(backend):
    if backend == "cpp":
        pytest.skip("a CPU attends to one frame after the other, by attend_rows")


def versions(generator, counts, padding, tokens, heads, dim, dtype):
    """query, NaN where it is padding, key, value, table, cu_seqlens."""
    total, held = sum(counts), 2 * tokens + 3
    query = torch.randn(total + padding, heads, dim, generator=generator).to(dtype)
    query[total:] = torch.nan
    key, value = (torch.randn(held, heads, dim, generator=generator).to(dtype) for _ in range(2))
    table = torch.randint(held, (len(counts), tokens), generator=generator).int()
    return query, key, value, table, torch.tensor([0, *counts]).cumsum(0).int()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_frames_see_their_versions(served, generator, case, dtype):
    query, key, value, table, cu_seqlens = versions(generator, *case, dtype)
    result = attend_versions(query, key, value, table, cu_seqlens, 0.3)
    assert result.dtype == dtype and result.is_contiguous()
    tolerance = 1e-12 if dtype == torch.float64 else max(2 * torch.finfo(dtype).eps, 2e-6)
    for frame, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        rows = table[frame].long()
        scores = torch.einsum("mhd,thd->hmt", query[start:stop].double(), key[rows].double()) * 0.3
        expected = torch.einsum("hmt,thd->mhd", scores.softmax(2), value[rows].double())
        torch.testing.assert_close(result[start:stop].double(), expected, rtol=tolerance, atol=tolerance)
    assert result[sum(case[0]) :].eq(0).all()


def test_a_version_that_is_not_seen_does_not_matter(served, generator):
    query, key, value, table, cu_seqlens = versions(generator, [4, 3], 2, 70, 2, 16, torch.float32)
    table[0].clamp_(max=140)
    table[1, 5] = 141
    clean = attend_versions(query, key, value, table, cu_seqlens)
    key[141:], value[141:] = torch.nan, torch.inf
    result = attend_versions(query, key, value, table, cu_seqlens)
    assert result[4:7].isnan().all() and torch.equal(result[:4], clean[:4])


def test_a_row_out_of_range_is_not_read(gpu_backend, generator):
    query, key, value, table, cu_seqlens = versions(generator, [4, 3], 2, 70, 2, 16, torch.float32)
    clean = attend_versions(query, key, value, table, cu_seqlens)
    table[0, ::7] = torch.tensor([-(2**31), -1, len(key), 2**31 - 1, -5] * 2).int()
    result = attend_versions(query, key, value, table, cu_seqlens)
    assert result.isfinite().all() and torch.equal(result[4:], clean[4:])


def test_one_table_for_all_is_attend_rows(served, generator):
    query, key, value, table, cu_seqlens = versions(generator, [4, 3], 2, 70, 2, 16, torch.float32)
    rows = table.long()
    expected = attend_rows(query, key[rows], value[rows], cu_seqlens=cu_seqlens)
    assert torch.equal(attend_versions(query, key, value, table, cu_seqlens), expected)
    strided = (each.transpose(0, 1).contiguous().transpose(0, 1) for each in (query, key, value))
    assert torch.equal(attend_versions(*strided, table.T.contiguous().T, cu_seqlens), expected)


@pytest.mark.usefixtures("on_cpu")
def test_a_row_out_of_range_is_an_error():
    query = torch.zeros(1, 1, 2)
    with use_backend("reference"), pytest.raises(IndexError):
        attend_versions(query, query, query, torch.tensor([[1]]).int(), torch.tensor([0, 1]).int())


@pytest.mark.usefixtures("on_cpu")
def test_the_extension_has_no_kernel():
    query = torch.zeros(1, 1, 2)
    with use_backend("cpp"), pytest.raises(BackendUnavailable, match=r"the C\+\+ extension has no kernel"):
        attend_versions(query, query, query, torch.tensor([[0]]).int(), torch.tensor([0, 1]).int())


def test_opcheck(generator):
    arguments = versions(generator, [4, 3], 2, 9, 2, 8, torch.float32)
    torch.library.opcheck(torch.ops.neuroflow.attend_versions.default, (*arguments, 0.5))


GIVEN = {
    "query": torch.zeros(3, 2, 4),
    "key": torch.zeros(5, 2, 4),
    "value": torch.zeros(5, 2, 4),
    "table": torch.zeros(1, 6).int(),
    "cu_seqlens": torch.zeros(2).int(),
}


@pytest.mark.parametrize(
    "name, change",
    [
        ("query", {"query": torch.zeros(3, 4)}),
        ("key", {"key": torch.zeros(5, 2, 3)}),
        ("key", {"key": torch.zeros(5, 2, 4).double()}),
        ("value", {"value": torch.zeros(6, 2, 4)}),
        ("table", {"table": torch.zeros(6).int()}),
        ("table", {"table": torch.zeros(1, 6).long()}),
        ("table", {"table": torch.zeros(1, 0).int()}),
        ("cu_seqlens", {"cu_seqlens": torch.zeros(3).int()}),
    ],
)
def test_errors_name_the_argument(name, change):
    with pytest.raises(ValueError, match=rf"^{name} is .*; accepted is"):
        attend_versions(**GIVEN | change)

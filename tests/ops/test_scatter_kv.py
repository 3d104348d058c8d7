import pytest
import torch
import torch.nn.functional as F
from rows import DTYPES, misaligned, select
from torch._subclasses.fake_tensor import FakeTensorMode

from neuroflow_kernels import scatter_kv_, use_backend
from neuroflow_kernels.reference.scatter_kv import scatter_kv_ as reference

# (S, N, heads, head_dim), rows per stream
CASES = [
    ((1, 1, 1, 1), [1]),
    ((1, 5, 2, 7), [3]),
    ((3, 4, 3, 11), [2, 0, 4]),
    ((2, 9, 12, 64), [5, 1]),
    ((2, 3, 2, 4), [0, 0]),
    ((0, 4, 2, 4), []),
    ((2, 0, 2, 4), [0, 0]),
]
# What lies in memory -> [M, heads, head_dim]
LAYOUTS = {
    "rows": lambda fresh: fresh.clone(),
    "heads": lambda fresh: fresh.transpose(0, 1).contiguous().transpose(0, 1),
    "part of qkv": lambda fresh: torch.stack((fresh + 1, fresh, fresh + 2), 1)[:, 1],
    "padded heads": lambda fresh: F.pad(fresh, (0, 1))[..., :-1],
    "interleaved": lambda fresh: torch.stack((fresh, fresh + 1), 3)[..., 0],
}


def draw(generator, shape, counts, dtype=torch.float32, padding=0):
    streams, tokens, heads, dim = shape
    caches = [torch.randn(streams, tokens, heads * dim, generator=generator).to(dtype) for _ in range(2)]
    fresh = [torch.randn(sum(counts) + padding, heads, dim, generator=generator).to(dtype) for _ in range(2)]
    return *caches, *fresh, *select(generator, (streams, tokens, heads * dim), counts)


def written(cache, fresh, index, cu_seqlens):
    """What the cache must hold."""
    result = cache.clone().flatten(0, 1)
    for row, source in zip(index[: cu_seqlens[-1]].tolist(), fresh, strict=False):
        result[row] = source.flatten()
    return result.view(cache.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, counts", CASES, ids=str)
def test_rows_are_written_bit_for_bit(backend, generator, shape, counts, dtype, layout):
    key_cache, value_cache, key, value, *selected = draw(generator, shape, counts, dtype, padding=3)
    key[sum(counts) :] = value[sum(counts) :] = torch.nan
    expected = written(key_cache, key, *selected), written(value_cache, value, *selected)
    rows = LAYOUTS[layout](key), LAYOUTS[layout](value)
    returned = scatter_kv_(key_cache, value_cache, *rows, *selected)
    assert returned[0] is key_cache and returned[1] is value_cache
    assert torch.equal(key_cache, expected[0]) and torch.equal(value_cache, expected[1])


def test_keys_and_values_may_lie_differently(backend, generator):
    key_cache, value_cache, key, value, *selected = draw(generator, (2, 5, 3, 8), [2, 3])
    expected = written(key_cache, key, *selected), written(value_cache, value, *selected)
    scatter_kv_(key_cache, value_cache, LAYOUTS["heads"](key), LAYOUTS["part of qkv"](value), *selected)
    assert torch.equal(key_cache, expected[0]) and torch.equal(value_cache, expected[1])


@pytest.mark.parametrize("moved", range(4))
def test_memory_may_begin_anywhere(backend, generator, moved):
    *tensors, index, cu_seqlens = draw(generator, (2, 5, 3, 8), [2, 3])
    expected = [written(cache, fresh, index, cu_seqlens) for cache, fresh in zip(tensors[:2], tensors[2:], strict=True)]
    tensors[moved] = misaligned(tensors[moved])
    for cache, result in zip(expected, scatter_kv_(*tensors, index, cu_seqlens), strict=True):
        assert torch.equal(result, cache)


def test_nan_and_inf_are_written_and_overwritten(backend):
    cache = torch.tensor([[[torch.nan, torch.inf], [1.0, 2.0]]])
    index, cu_seqlens = torch.tensor([0, -1]).int(), torch.tensor([0, 1]).int()
    scatter_kv_(
        cache, other := cache.clone(), torch.zeros(1, 1, 2), torch.full((1, 1, 2), torch.nan), index, cu_seqlens
    )
    assert cache.tolist() == [[[0, 0], [1, 2]]]
    assert other[0, 0].isnan().all() and other[0, 1].tolist() == [1, 2]


def test_fewer_rows_than_active(backend, generator):
    key_cache, value_cache, key, value, index, cu_seqlens = draw(generator, (1, 6, 2, 4), [5])
    expected = written(key_cache, key[:2], index, cu_seqlens)
    scatter_kv_(key_cache, value_cache, key[:2], value[:2], index, cu_seqlens)
    assert torch.equal(key_cache, expected)


def test_many_rows_on_many_threads(generator):
    key_cache, value_cache, key, value, *selected = draw(generator, (2, 800, 10, 100), [500, 300])
    expected = written(key_cache, key, *selected), written(value_cache, value, *selected)
    with use_backend("cpp"):
        scatter_kv_(key_cache, value_cache, key, value, *selected)
    assert torch.equal(key_cache, expected[0]) and torch.equal(value_cache, expected[1])


@pytest.mark.parametrize("dim", [3, 8])
def test_rows_outside_the_caches_are_not_written(gpu_backend, generator, dim):
    guarded, fresh = torch.randn(2, 6, dim, generator=generator), torch.randn(2, 4, 1, dim, generator=generator)
    expected = guarded.clone()
    expected[:, 2] = fresh[:, 1, 0]
    index, cu_seqlens = torch.tensor([-1, 1, 4, 2**31 - 1]).int(), torch.tensor([0, 4]).int()
    scatter_kv_(guarded[:1, 1:5], guarded[1:, 1:5], *fresh, index, cu_seqlens)
    assert torch.equal(guarded, expected)


@pytest.mark.parametrize(("total", "length"), [(1, 2), (9, 1)], ids=["past the count", "past the index"])
def test_index_is_read_up_to_the_count_and_its_end(gpu_backend, total, length):
    index, cu_seqlens = torch.tensor([1, 0])[:length].int(), torch.tensor([0, total]).int()
    caches, fresh = (torch.ones(1, 2, 3), torch.ones(1, 2, 3)), torch.full((2, 1, 3), 2.0)
    for cache in scatter_kv_(*caches, fresh, fresh, index, cu_seqlens):
        assert cache.tolist() == [[[1, 1, 1], [2, 2, 2]]]


@pytest.mark.parametrize("value", [10, -1])
@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_index_out_of_range(on_cpu, name, value):
    caches, fresh = (torch.ones(2, 5, 3), torch.ones(2, 5, 3)), torch.zeros(2, 1, 3)
    with use_backend(name), pytest.raises(IndexError, match="index"):
        scatter_kv_(*caches, fresh, fresh, torch.tensor([0, value]).int(), torch.tensor([0, 1, 2]).int())
    assert name == "reference" or torch.equal(caches[0], caches[1])  # refused before the first row


def test_reference_never_asks_for_the_count(generator):
    arguments = draw(generator, (2, 5, 3, 8), [2, 3], padding=2)
    with FakeTensorMode() as mode:
        reference(*(mode.from_tensor(argument) for argument in arguments))


def test_opcheck(generator):
    arguments = draw(generator, (2, 5, 3, 8), [2, 3])
    torch.library.opcheck(torch.ops.neuroflow.scatter_kv_.default, arguments)


def test_compile(generator):
    key_cache, value_cache, *fresh = draw(generator, (2, 5, 3, 8), [2, 3])
    expected = scatter_kv_(key_cache.clone(), value_cache.clone(), *fresh)
    result = torch.compile(scatter_kv_, fullgraph=True, backend="aot_eager")(key_cache, value_cache, *fresh)
    for found in (result, (key_cache, value_cache)):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    "name, change",
    [
        ("key_cache", {"key_cache": torch.zeros(3, 4)}),
        ("key_cache", {"key_cache": torch.zeros(2, 4, 3).transpose(1, 2)}),
        ("value_cache", {"value_cache": torch.zeros(2, 3, 2)}),
        ("value_cache", {"value_cache": torch.zeros(2, 4, 3).transpose(1, 2)}),
        ("key", {"key": torch.zeros(2, 4)}),
        ("key", {"key": torch.zeros(2, 2, 3)}),
        ("key", {"key": torch.zeros(2, 2, 2).double()}),
        ("value", {"value": torch.zeros(3, 2, 2)}),
        ("index", {"index": torch.zeros(6).long()}),
        ("cu_seqlens", {"cu_seqlens": torch.zeros(3)}),
    ],
)
def test_errors_name_the_argument(name, change):
    arguments = {"key_cache": torch.zeros(2, 3, 4), "value_cache": torch.zeros(2, 3, 4)}
    arguments |= {"key": torch.zeros(2, 2, 2), "value": torch.zeros(2, 2, 2)}
    arguments |= {"index": torch.zeros(6).int(), "cu_seqlens": torch.zeros(3).int()}
    with pytest.raises(ValueError, match=rf"^{name} is .*; accepted is"):
        scatter_kv_(**arguments | change)

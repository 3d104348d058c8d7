import pytest
import torch
from rows import CASES, DTYPES, EMPTY, misaligned, select

from neuroflow_kernels import gather_rows, scatter_rows_, use_backend
from neuroflow_kernels.reference.scatter_rows import scatter_rows_ as reference

BLENDS = [1.0, 0.0, 0.3]


def draw(generator, shape, counts, dtype=torch.float32, padding=0):
    cache = torch.randn(shape, generator=generator).to(dtype)
    packed = torch.randn(sum(counts) + padding, shape[2], generator=generator).to(dtype)
    return cache, packed, *select(generator, shape, counts)


def test_reference_is_the_definition(generator):
    cache, packed, index, cu_seqlens = draw(generator, (2, 3, 4), [1, 2], torch.float64)
    expected = cache.view(6, 4).tolist()
    for row, fresh in zip(index[:3].tolist(), packed.tolist(), strict=True):
        expected[row] = [0.75 * old + 0.25 * new for old, new in zip(expected[row], fresh, strict=True)]
    reference(cache, packed, index, cu_seqlens, 0.25)
    for row, values in zip(cache.view(6, 4).tolist(), expected, strict=True):
        assert row == pytest.approx(values)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, counts", CASES + EMPTY, ids=str)
def test_values(backend, generator, shape, counts, dtype, blend):
    cache, packed, index, cu_seqlens = draw(generator, shape, counts, dtype, padding=3)
    before, expected = cache.clone(), cache.to(torch.float64, copy=True)
    packed[sum(counts) :] = torch.nan
    reference(expected, packed.double(), index, cu_seqlens, blend)
    assert scatter_rows_(cache, packed, index, cu_seqlens, blend) is cache
    torch.testing.assert_close(cache, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    untouched = torch.ones(shape[0] * shape[1], dtype=torch.bool)
    untouched[index[: sum(counts)].long()] = False
    assert torch.equal(cache.view(-1, shape[2])[untouched], before.view(-1, shape[2])[untouched])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_puts_back_what_gather_took(backend, generator, dtype):
    x, _, index, cu_seqlens = draw(generator, (2, 7, 5), [4, 3], dtype)
    cache = torch.zeros_like(x)
    scatter_rows_(cache, gather_rows(x, index, cu_seqlens, 10), index, cu_seqlens)
    assert torch.equal(gather_rows(cache, index, cu_seqlens), gather_rows(x, index, cu_seqlens))


def test_blend_of_one_reads_nothing_of_the_old_row(backend):
    cache = torch.tensor([[[torch.nan, torch.inf, 1.0], [1.0, 2.0, 3.0]]])
    packed = torch.tensor([[4.0, 5.0, 6.0]])
    scatter_rows_(cache, packed, torch.tensor([0, -1]).int(), torch.tensor([0, 1]).int(), 1)
    assert cache.tolist() == [[[4, 5, 6], [1, 2, 3]]]


def test_nan_row_is_written_too(backend):
    cache = torch.zeros(1, 2, 3)
    scatter_rows_(cache, torch.full((1, 3), torch.nan), torch.tensor([1, -1]).int(), torch.tensor([0, 1]).int(), 0.5)
    assert cache[0, 0].tolist() == [0, 0, 0]
    assert cache[0, 1].isnan().all()


def test_fewer_rows_than_active(backend, generator):
    cache, packed, index, cu_seqlens = draw(generator, (1, 6, 4), [5])
    expected = cache.clone()
    expected[0, index[:2].long()] = packed[:2]
    scatter_rows_(cache, packed[:2], index, cu_seqlens)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("moved", [0, 1])
@pytest.mark.parametrize("blend", BLENDS)
def test_memory_may_begin_anywhere(backend, generator, blend, moved):
    *tensors, index, cu_seqlens = draw(generator, (2, 5, 8), [2, 3])
    expected = scatter_rows_(tensors[0].clone(), tensors[1], index, cu_seqlens, blend)
    tensors[moved] = misaligned(tensors[moved])
    torch.testing.assert_close(scatter_rows_(*tensors, index, cu_seqlens, blend), expected)


def test_packed_need_not_be_contiguous(backend, generator):
    cache, packed, index, cu_seqlens = draw(generator, (2, 5, 6), [2, 3])
    expected = scatter_rows_(cache.clone(), packed, index, cu_seqlens, 0.5)
    assert torch.equal(scatter_rows_(cache, packed.T.contiguous().T, index, cu_seqlens, 0.5), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("odd", [0, 1])
def test_every_16_bit_value_is_widened_and_rounded(generator, dtype, odd):
    """The mean of any two values; neighbours tie. An odd row ends where no pair is left."""
    everything = torch.arange(-(2**15), 2**15 - odd).to(torch.int16).view(dtype)
    row, ends = torch.zeros(1).int(), torch.tensor([0, 1]).int()
    shuffled = everything[torch.randperm(len(everything), generator=generator)]
    for other in (shuffled, *(everything.roll(shift) for shift in (0, 1, 3, 257, 32768))):
        expected = (everything.float() * 0.5 + other.float() * 0.5).to(dtype)
        with use_backend("cpp"):
            mean = scatter_rows_(everything.clone().view(1, 1, -1), other[None], row, ends, 0.5)[0, 0]
        assert torch.equal(mean.isnan(), expected.isnan())
        known = ~expected.isnan()
        assert torch.equal(mean[known], expected[known])


@pytest.mark.parametrize("blend", BLENDS)
def test_many_rows_on_many_threads(generator, blend):
    cache, packed, index, cu_seqlens = draw(generator, (2, 800, 1000), [500, 300])
    expected = cache.clone()
    reference(expected, packed, index, cu_seqlens, blend)
    with use_backend("cpp"):
        scatter_rows_(cache, packed, index, cu_seqlens, blend)
    torch.testing.assert_close(cache, expected)


@pytest.mark.parametrize("dim", [3, 8])
@pytest.mark.parametrize("blend", BLENDS)
def test_rows_outside_the_cache_are_not_written(gpu_backend, generator, blend, dim):
    guarded, packed = torch.randn(6, dim, generator=generator), torch.randn(4, dim, generator=generator)
    expected = guarded.clone()
    expected[2] = (1 - blend) * guarded[2] + blend * packed[1]
    index, cu_seqlens = torch.tensor([-1, 1, 4, 2**31 - 1]).int(), torch.tensor([0, 4]).int()
    scatter_rows_(guarded[1:5][None], packed, index, cu_seqlens, blend)
    torch.testing.assert_close(guarded, expected)


@pytest.mark.parametrize(("total", "length"), [(1, 2), (9, 1)], ids=["past the count", "past the index"])
def test_index_is_read_up_to_the_count_and_its_end(gpu_backend, total, length):
    index, cu_seqlens = torch.tensor([1, 0])[:length].int(), torch.tensor([0, total]).int()
    cache = scatter_rows_(torch.ones(1, 2, 3), torch.full((2, 3), 2.0), index, cu_seqlens)
    assert cache.tolist() == [[[1, 1, 1], [2, 2, 2]]]


@pytest.mark.parametrize("blend", [1.0, 0.5])
@pytest.mark.parametrize("value", [10, -1])
@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_index_out_of_range(on_cpu, name, value, blend):
    cache = torch.ones(2, 5, 3)
    with use_backend(name), pytest.raises(IndexError, match="index"):
        scatter_rows_(cache, torch.zeros(2, 3), torch.tensor([0, value]).int(), torch.tensor([0, 1, 2]).int(), blend)
    assert name == "reference" or torch.equal(cache, torch.ones(2, 5, 3))  # refused before the first row


def test_an_index_in_the_memory_that_is_written(on_cpu):
    """Of which the first row would change the others, once they were found to be in range."""
    cache = torch.zeros(1, 4, 4)
    with use_backend("cpp"), pytest.raises(ValueError, match="index shares memory"):
        scatter_rows_(cache, torch.ones(4, 4), cache.view(torch.int32).flatten()[:4], torch.tensor([0, 4]).int())


@pytest.mark.parametrize("rows", [3, 2, 4])
@pytest.mark.parametrize("blend", BLENDS)
def test_gradients(backend, generator, blend, rows):
    torch.use_deterministic_algorithms(False)  # of poisoned memory, gradcheck's own too
    cache, _, index, cu_seqlens = draw(generator, (2, 3, 2), [1, 2], torch.float64)
    packed = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    inputs = cache.requires_grad_(), packed.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, fresh: scatter_rows_(x.clone(), fresh, index, cu_seqlens, blend), inputs)


def test_gradients_through_an_update_in_place(backend, generator):
    """What was computed from the cache before keeps its own gradient, and a leaf is refused as torch refuses it."""
    cache, packed, index, cu_seqlens = draw(generator, (1, 4, 3), [2])
    leaf = cache.requires_grad_()
    own = leaf * 2
    before = own.sum()
    assert scatter_rows_(own, packed, index, cu_seqlens) is own
    (before + 10 * own.sum()).backward()
    written = torch.zeros(4, dtype=torch.bool)
    written[index[:2].long()] = True
    assert leaf.grad[0, written].eq(2).all() and leaf.grad[0, ~written].eq(22).all()
    with pytest.raises(RuntimeError, match="leaf"):
        scatter_rows_(leaf, packed, index, cu_seqlens)
    with torch.no_grad():
        assert scatter_rows_(leaf, packed, index, cu_seqlens) is leaf


@pytest.mark.parametrize("blend", [1.0, 0.5])
def test_opcheck(generator, blend):
    torch.library.opcheck(torch.ops.neuroflow.scatter_rows_.default, (*draw(generator, (2, 5, 7), [2, 3]), blend))


def test_compile(generator):
    cache, *selected = draw(generator, (2, 5, 7), [2, 3])
    expected = scatter_rows_(cache.clone(), *selected, 0.5)
    result = torch.compile(scatter_rows_, fullgraph=True, backend="aot_eager")(cache, *selected, 0.5)
    assert torch.equal(result, expected)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize(
    "name, change",
    [
        ("cache", {"cache": torch.zeros(3, 4)}),
        ("cache", {"cache": torch.zeros(2, 4, 3).transpose(1, 2)}),
        ("packed", {"packed": torch.zeros(2, 5)}),
        ("packed", {"packed": torch.zeros(2, 4).double()}),
        ("index", {"index": torch.zeros(6).long()}),
        ("cu_seqlens", {"cu_seqlens": torch.zeros(3)}),
        ("blend", {"blend": 2}),
    ],
)
def test_errors_name_the_argument(name, change):
    arguments = {"cache": torch.zeros(2, 3, 4), "packed": torch.zeros(2, 4)}
    arguments |= {"index": torch.zeros(6).int(), "cu_seqlens": torch.zeros(3).int()}
    with pytest.raises(ValueError, match=rf"^{name} is .*; accepted is"):
        scatter_rows_(**arguments | change)

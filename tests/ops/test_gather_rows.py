import pytest
import torch
import torch.nn.functional as F
from rows import CASES, DTYPES, EMPTY, misaligned, select

from neuroflow_kernels import gather_rows, use_backend
from neuroflow_kernels.reference.gather_rows import gather_rows as reference


def layer_norm(generator, dim, dtype):
    return {
        "norm_weight": torch.randn(dim, generator=generator).to(dtype),
        "norm_bias": torch.randn(dim, generator=generator).to(dtype),
        "eps": 1e-5,
    }


def test_reference_is_the_definition(generator):
    x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    index, cu_seqlens = torch.tensor([1, 3, 5, -1, -1, -1]).int(), torch.tensor([0, 1, 3]).int()
    packed = reference(x, index, cu_seqlens, 4, None, None, 0.0)
    assert packed.tolist() == [x[0, 1].tolist(), x[1, 0].tolist(), x[1, 2].tolist(), [0.0] * 4]
    norm = layer_norm(generator, 4, torch.float64)
    row = x[0, 1].tolist()
    mean = sum(row) / 4
    variance = sum((value - mean) ** 2 for value in row) / 4
    scaled = [(value - mean) / (variance + 1e-5) ** 0.5 for value in row]
    weight, bias = norm["norm_weight"].tolist(), norm["norm_bias"].tolist()
    expected = [value * w + b for value, w, b in zip(scaled, weight, bias, strict=True)]
    assert reference(x, index, cu_seqlens, 4, *norm.values())[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, counts", CASES + EMPTY, ids=str)
def test_rows_are_copied_bit_for_bit(backend, generator, shape, counts, dtype):
    x = torch.randn(shape, generator=generator).to(dtype)
    index, cu_seqlens = select(generator, shape, counts)
    packed = gather_rows(x, index, cu_seqlens)
    assert packed.dtype == dtype
    assert torch.equal(packed, x.view(-1, shape[2])[index[: sum(counts)].long()])


def test_nan_and_inf_are_copied_too(backend):
    x = torch.tensor([[[torch.nan, 1.0], [2.0, -torch.inf]]])
    packed = gather_rows(x, torch.tensor([0, 1]).int(), torch.tensor([0, 2]).int())
    assert torch.equal(packed.view(torch.int32), x[0].view(torch.int32))


@pytest.mark.parametrize("norm", [False, True])
def test_rows_pad_and_truncate(backend, generator, norm):
    shape = (2, 6, 9)
    x = torch.randn(shape, generator=generator)
    index, cu_seqlens = select(generator, shape, [3, 2])
    norm = layer_norm(generator, 9, x.dtype) if norm else {}
    exact = gather_rows(x, index, cu_seqlens, **norm)
    padded = gather_rows(x, index, cu_seqlens, 20, **norm)
    assert torch.equal(padded[:5], exact)
    assert torch.equal(padded[5:], torch.zeros(15, 9))
    assert torch.equal(gather_rows(x, index, cu_seqlens, 2, **norm), exact[:2])
    assert gather_rows(x, index, cu_seqlens, 0, **norm).shape == (0, 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, counts", CASES, ids=str)
def test_layer_norm(backend, generator, shape, counts, dtype):
    x = (3 + 2 * torch.randn(shape, generator=generator)).to(dtype)
    index, cu_seqlens = select(generator, shape, counts)
    norm = layer_norm(generator, shape[2], dtype)
    packed = gather_rows(x, index, cu_seqlens, **norm)
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in norm.values()]
    expected = reference(x.double(), index, cu_seqlens, sum(counts), *wide)
    torch.testing.assert_close(packed, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_layer_norm_of_a_large_mean(backend, generator):
    """Where mean(x^2) - mean(x)^2 would have no digit left."""
    x = 4096 + torch.randn(1, 1, 512, generator=generator)
    norm = {"norm_weight": torch.ones(512), "norm_bias": torch.zeros(512), "eps": 1e-6}
    packed = gather_rows(x, torch.zeros(1).int(), torch.tensor([0, 1]).int(), **norm)
    expected = F.layer_norm(x[0].double(), (512,), eps=1e-6).float()
    torch.testing.assert_close(packed, expected, rtol=0, atol=2e-3)


def test_x_need_not_be_contiguous(backend, generator):
    x = torch.randn(5, 2, 7, generator=generator).transpose(0, 1)
    index, cu_seqlens = select(generator, (2, 5, 7), [2, 3])
    assert torch.equal(gather_rows(x, index, cu_seqlens), x.reshape(-1, 7)[index[:5].long()])


@pytest.mark.parametrize("moved", ["x", "x, normalised", "norm_weight", "norm_bias"])
def test_memory_may_begin_anywhere(backend, generator, moved):
    x = torch.randn(2, 5, 8, generator=generator)
    selected = select(generator, x.shape, [2, 3])
    norm = {} if moved == "x" else layer_norm(generator, 8, x.dtype)
    expected = gather_rows(x, *selected, **norm)
    if moved in norm:
        norm[moved] = misaligned(norm[moved])
    else:
        x = misaligned(x)
    torch.testing.assert_close(gather_rows(x, *selected, **norm), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_16_bits(generator, dtype):
    """Sums of any two 16-bit values, Inf, NaN, overflow and ties included: a row of +-1 is its own LayerNorm."""
    everything = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = torch.ones(1, 1, 2**16, dtype=dtype)
    x[0, 0, 1::2] = -1
    shuffled = everything[torch.randperm(2**16, generator=generator)]
    for bias in (shuffled, *(everything.roll(shift) for shift in (0, 1, 2, 3, 257, 4096, 32768, 32769))):
        with use_backend("cpp"):
            norm = {"norm_weight": everything, "norm_bias": bias, "eps": 0.0}
            packed = gather_rows(x, torch.zeros(1).int(), torch.tensor([0, 1]).int(), **norm)[0]
        expected = (x[0, 0].float() * everything.float() + bias.float()).to(dtype)
        assert torch.equal(packed.isnan(), expected.isnan())
        known = ~expected.isnan()
        assert torch.equal(packed[known], expected[known])


@pytest.mark.parametrize("norm", [False, True])
def test_many_rows_on_many_threads(generator, norm):
    shape = (2, 800, 1000)
    x = torch.randn(shape, generator=generator)
    index, cu_seqlens = select(generator, shape, [500, 300])
    norm = layer_norm(generator, 1000, x.dtype) if norm else {}
    with use_backend("cpp"):
        packed = gather_rows(x, index, cu_seqlens, 900, **norm)
    expected = reference(x, index, cu_seqlens, 900, norm.get("norm_weight"), norm.get("norm_bias"), 1e-5)
    torch.testing.assert_close(packed, expected)


@pytest.mark.parametrize("dim", [3, 8])
@pytest.mark.parametrize("norm", [False, True])
def test_rows_outside_the_tensor_are_not_read(gpu_backend, generator, norm, dim):
    guarded = torch.randn(6, dim, generator=generator)
    guarded[0] = guarded[5] = torch.nan
    norm = layer_norm(generator, dim, guarded.dtype) if norm else {}
    index, cu_seqlens = torch.tensor([-1, 1, 4, 2**31 - 1, 0]).int(), torch.tensor([0, 5]).int()
    packed = gather_rows(guarded[1:5][None], index, cu_seqlens, 5, **norm)
    inside = gather_rows(guarded[1:5][None], index[[1, 4]], cu_seqlens.clamp(max=2), 2, **norm)
    assert torch.equal(packed[[1, 4]], inside) and packed[[0, 2, 3]].eq(0).all()


@pytest.mark.parametrize(("total", "length"), [(1, 2), (9, 1)], ids=["past the count", "past the index"])
def test_index_is_read_up_to_the_count_and_its_end(gpu_backend, total, length):
    index, cu_seqlens = torch.tensor([1, 0])[:length].int(), torch.tensor([0, total]).int()
    assert gather_rows(torch.ones(1, 2, 3), index, cu_seqlens, 2).tolist() == [[1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("value", [10, -1, 2**31 - 1])
@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_index_out_of_range(on_cpu, name, value):
    index = torch.tensor([0, value]).int()
    with use_backend(name), pytest.raises(IndexError, match="index"):
        gather_rows(torch.zeros(2, 5, 3), index, torch.tensor([0, 1, 2]).int())


def test_cu_seqlens_out_of_range():
    with use_backend("cpp"), pytest.raises(IndexError, match="cu_seqlens ends in 3"):
        gather_rows(torch.zeros(2, 5, 3), torch.zeros(2).int(), torch.tensor([0, 1, 3]).int(), 3)


@pytest.mark.parametrize("rows", [3, 2, 4, 8])
@pytest.mark.parametrize("norm", [False, True])
def test_gradients(backend, generator, norm, rows):
    """Rows that are cut off or are padding have none; 8 are more than the index holds."""
    torch.use_deterministic_algorithms(False)  # of poisoned memory, gradcheck's own too
    x = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    index, cu_seqlens = select(generator, (2, 3, 3), [1, 2])
    weights = layer_norm(generator, 3, torch.float64) if norm else {}
    eps = {"eps": weights.pop("eps")} if norm else {}
    inputs = x, *(value.requires_grad_() for value in weights.values())

    def gathered(x, *values):
        return gather_rows(x, index, cu_seqlens, rows, **dict(zip(weights, values, strict=True)), **eps)

    assert torch.autograd.gradcheck(gathered, inputs)


@pytest.mark.parametrize("norm", [False, True])
def test_gradients_of_padding_stay_finite(backend, generator, norm):
    """Where x begins with NaN and nothing is added to the variance."""
    x = torch.randn(1, 3, 4, generator=generator)
    x[0, 0] = torch.nan
    x.requires_grad_()
    norm = {"norm_weight": torch.ones(4), "norm_bias": torch.zeros(4), "eps": 0.0} if norm else {}
    index, cu_seqlens = torch.tensor([2, -1, -1]).int(), torch.tensor([0, 1]).int()
    gather_rows(x, index, cu_seqlens, 5, **norm).square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[0, :2].eq(0).all() and (norm or x.grad[0, 2].ne(0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_16_bits(backend, generator, dtype):
    x = torch.randn(2, 9, 64, generator=generator).to(dtype).requires_grad_()
    index, cu_seqlens = select(generator, (2, 9, 64), [5, 1])
    norm = layer_norm(generator, 64, dtype)
    above = torch.randn(6, 64, generator=generator).to(dtype)
    gather_rows(x, index, cu_seqlens, **norm).backward(above)
    wide = x.detach().double().requires_grad_()
    norm = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in norm.items()}
    gather_rows(wide, index, cu_seqlens, **norm).backward(above.double())
    torch.testing.assert_close(x.grad, wide.grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(generator, norm, gradient):
    x = torch.randn(2, 5, 7, generator=generator, requires_grad=gradient)
    index, cu_seqlens = select(generator, (2, 5, 7), [2, 3])
    weights = (torch.ones(7, requires_grad=gradient), torch.zeros(7)) if norm else (None, None)
    torch.library.opcheck(torch.ops.neuroflow.gather_rows.default, (x, index, cu_seqlens, 6, *weights, 1e-5))


def test_compile(generator):
    x = torch.randn(2, 5, 7, generator=generator)
    index, cu_seqlens = select(generator, (2, 5, 7), [2, 3])
    compiled = torch.compile(gather_rows, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, index, cu_seqlens, 6), gather_rows(x, index, cu_seqlens, 6))
    assert torch.equal(compiled(x, index, cu_seqlens), gather_rows(x, index, cu_seqlens))


@pytest.mark.parametrize(
    "name, change",
    [
        ("x", {"x": torch.zeros(3, 4)}),
        ("x", {"x": torch.zeros(2, 3, 4, dtype=torch.int32)}),
        ("index", {"index": torch.zeros(6)}),
        ("index", {"index": torch.zeros(12).int()[::2]}),
        ("cu_seqlens", {"cu_seqlens": torch.zeros(3).long()}),
        ("cu_seqlens", {"cu_seqlens": torch.zeros(0).int()}),
        ("rows", {"rows": -1}),
        ("norm_weight", {"norm_weight": torch.ones(3), "norm_bias": torch.ones(4)}),
        ("norm_bias", {"norm_weight": torch.ones(4), "norm_bias": torch.ones(4).double()}),
    ],
)
def test_errors_name_the_argument(name, change):
    arguments = {
        "x": torch.zeros(2, 3, 4),
        "index": torch.zeros(6).int(),
        "cu_seqlens": torch.zeros(3).int(),
        "rows": 2,
    }
    with pytest.raises(ValueError, match=rf"^{name} is .*; accepted is"):
        gather_rows(**arguments | change)


def test_norm_weight_and_bias_go_together():
    with pytest.raises(ValueError, match="norm_weight and norm_bias go together"):
        gather_rows(torch.zeros(1, 3, 4), torch.zeros(3).int(), torch.zeros(2).int(), 2, norm_weight=torch.ones(4))

import pytest
import torch
from rows import GATE_DTYPES, assert_moved, expect, frame

from neuroflow_kernels import ema_surprise_, use_backend
from neuroflow_kernels.reference.ema_surprise import ema_surprise_ as reference

# (S, N, D): one element, odd, just around a vector's width, several streams, nothing at all.
SHAPES = [(1, 1, 1), (1, 3, 2), (2, 5, 7), (1, 4, 16), (3, 2, 33), (2, 9, 129), (1, 2, 768), (0, 4, 8), (2, 0, 8)]


def test_reference_is_the_definition(generator):
    h, ema = frame(generator, (2, 3, 5), torch.float64, torch.float64)
    before = ema.clone()
    surprise = reference(h, ema, 0.25)
    for stream in range(2):
        for token in range(3):
            row, old = h[stream, token].tolist(), before[stream, token].tolist()
            dot = sum(x * y for x, y in zip(row, old, strict=True))
            norms = sum(x * x for x in row) ** 0.5 * sum(y * y for y in old) ** 0.5
            assert surprise[stream, token].item() == pytest.approx(1 - dot / norms, abs=1e-7)
            moved = [0.75 * y + 0.25 * x for x, y in zip(row, old, strict=True)]
            assert ema[stream, token].tolist() == pytest.approx(moved)


@pytest.mark.parametrize("dtypes", GATE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(backend, generator, shape, dtypes):
    h, ema = frame(generator, shape, *dtypes)
    before = h.clone()
    surprise, moved = expect(h, ema, 0.1)
    actual = ema_surprise_(h, ema, 0.1)
    torch.testing.assert_close(actual, surprise, rtol=0, atol=1e-6)
    assert_moved(ema, moved)
    assert torch.equal(h, before)


@pytest.mark.parametrize("decay", [0, 1, 1e-3])
def test_decay(backend, generator, decay):
    h, ema = frame(generator, (2, 6, 31))
    before, (surprise, moved) = ema.clone(), expect(h, ema, decay)
    torch.testing.assert_close(ema_surprise_(h, ema, decay), surprise, rtol=0, atol=1e-6)
    assert_moved(ema, moved)
    if decay != 1e-3:
        assert torch.equal(ema, before if decay == 0 else h)


def test_decay_zero_writes_nothing(backend, generator):
    h, ema = frame(generator, (1, 4, 9), torch.bfloat16, torch.bfloat16)
    ema[0, 1] = torch.nan
    ema[0, 2] = torch.inf
    ema[0, 3] = -0.0  # 1 * -0 + 0 * h would be 0
    before = ema.clone()
    ema_surprise_(h, ema, 0)
    assert torch.equal(ema.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("dtypes", GATE_DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 5, 64, 65])
@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_row_that_is_not_finite(backend, generator, dtypes, dim, fault):
    h, ema = frame(generator, (2, 4, dim), *dtypes)
    h[0, 2, dim - 1] = fault
    h[1, 0, 0] = fault
    broken = torch.zeros(2, 4, dtype=torch.bool)
    broken[0, 2] = broken[1, 0] = True
    before, (surprise, moved) = ema.clone(), expect(h, ema, 0.1)
    actual = ema_surprise_(h, ema, 0.1)
    assert actual[broken].tolist() == [torch.inf] * 2
    assert torch.equal(ema[broken], before[broken])
    torch.testing.assert_close(actual[~broken], surprise[~broken], rtol=0, atol=1e-6)
    assert_moved(ema[~broken], moved[~broken])


@pytest.mark.parametrize(
    "dtype, value", [(torch.float32, 1e20), (torch.bfloat16, 1e30), (torch.float64, 1e200)], ids=str
)
def test_row_whose_square_overflows(backend, dtype, value):
    h, ema = torch.full((1, 2, 5), value, dtype=dtype), torch.ones(1, 2, 5, dtype=dtype)
    h[0, 1] = 1
    assert ema_surprise_(h, ema, 0.5).tolist() == [[torch.inf, pytest.approx(0, abs=1e-6)]]
    assert torch.equal(ema, torch.ones_like(ema))


def test_reference_that_is_not_finite(backend, generator):
    h, ema = frame(generator, (1, 4, 6))
    ema[0, 0, 3] = torch.nan
    ema[0, 1, 3] = torch.inf
    ema[0, 2, 3] = 1e30  # finite, but not its square: the cosine is 0
    surprise = ema_surprise_(h, ema, 1)
    assert surprise[0, :3].tolist() == [torch.inf, torch.inf, 1]
    assert torch.equal(ema[0, 2], h[0, 2])


def test_zero_rows(backend):
    surprise = ema_surprise_(torch.zeros(1, 2, 8), torch.tensor([0.0, 1.0])[None, :, None].repeat(1, 1, 8), 0.5)
    assert surprise.tolist() == [[1, 1]]


def test_small_decay_survives_in_a_wide_reference(backend):
    h, wide = torch.full((1, 1, 4), 2, dtype=torch.bfloat16), torch.ones(1, 1, 4)
    narrow = wide.bfloat16()
    for _ in range(10):
        ema_surprise_(h, wide, 1e-3)
        ema_surprise_(h, narrow, 1e-3)
    torch.testing.assert_close(wide, torch.full_like(wide, 2 - 0.999**10))
    assert torch.equal(narrow, torch.ones_like(narrow))


def test_h_need_not_be_contiguous(backend, generator):
    h, ema = frame(generator, (2, 7, 5))
    surprise, moved = expect(h, ema, 0.1)
    strided = h.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(ema_surprise_(strided, ema, 0.1), surprise, rtol=0, atol=1e-6)
    assert_moved(ema, moved)


@pytest.mark.parametrize("dtypes", GATE_DTYPES, ids=str)
@pytest.mark.parametrize("dim", [5, 33, 100])
def test_a_row_does_not_depend_on_its_place(backend, generator, dtypes, dim):
    """Bit for bit: alone or in a batch, at any alignment."""
    h, ema = frame(generator, (3, 7, dim), *dtypes)
    alone = ema.clone()
    together = ema_surprise_(h, ema, 0.1)
    for stream in range(3):
        for token in range(7):
            row = alone[stream : stream + 1, token : token + 1].clone()
            surprise = ema_surprise_(h[stream : stream + 1, token : token + 1], row, 0.1)
            assert surprise.item() == together[stream, token].item()
            assert torch.equal(row[0, 0], ema[stream, token])


def test_many_rows_on_many_threads(generator):
    h, ema = frame(generator, (2, 700, 96))
    surprise, moved = expect(h, ema, 0.1)
    with use_backend("cpp"):
        torch.testing.assert_close(ema_surprise_(h, ema, 0.1), surprise, rtol=0, atol=1e-6)
    assert_moved(ema, moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_is_widened(dtype):
    h = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, -1, 1)
    ema = torch.zeros(h.shape)
    with use_backend("cpp"):
        ema_surprise_(h, ema, 1)
    expected = h.float()
    expected[~expected.square().isfinite()] = 0  # left as it was
    assert torch.equal(ema, expected)


@pytest.mark.parametrize("dtypes", GATE_DTYPES, ids=str)
def test_opcheck(generator, dtypes):
    h, ema = frame(generator, (2, 3, 5), *dtypes)
    torch.library.opcheck(torch.ops.neuroflow.ema_surprise_.default, (h, ema, 0.1))


def test_compile(generator):
    h, ema = frame(generator, (2, 3, 5))
    compiled_ema = ema.clone()
    surprise = ema_surprise_(h, ema, 0.1)
    compiled = torch.compile(ema_surprise_, fullgraph=True, backend="aot_eager")(h, compiled_ema, 0.1)
    assert torch.equal(compiled, surprise)
    assert torch.equal(compiled_ema, ema)


@pytest.mark.parametrize(
    "name, change",
    [
        ("h", {"h": torch.zeros(3, 4)}),
        ("h", {"h": torch.zeros(2, 3, 4, dtype=torch.int32)}),
        ("h", {"h": [1.0]}),
        ("ema", {"ema": torch.zeros(2, 3, 5)}),
        ("ema", {"ema": torch.zeros(2, 3, 4, dtype=torch.bfloat16)}),
        ("ema", {"ema": torch.zeros(2, 4, 3).transpose(1, 2)}),
        ("decay", {"decay": 1.5}),
        ("decay", {"decay": -0.1}),
        ("decay", {"decay": "fast"}),
    ],
)
def test_errors_name_the_argument(name, change):
    arguments = {"h": torch.zeros(2, 3, 4), "ema": torch.zeros(2, 3, 4), "decay": 0.1} | change
    with pytest.raises(ValueError, match=rf"^{name} is .*; accepted is"):
        ema_surprise_(**arguments)


def test_kernel_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="h is Int; accepted is"):
        torch.ops.neuroflow.ema_surprise_(torch.zeros(1, 2, 3).int(), torch.zeros(1, 2, 3), 0.1)
    with pytest.raises(ValueError, match="ema is neither"):
        torch.ops.neuroflow.ema_surprise_(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3).bfloat16(), 0.1)
    with pytest.raises(ValueError, match="h is not contiguous"):
        torch.ops.neuroflow.ema_surprise_(torch.zeros(1, 3, 2).mT, torch.zeros(1, 2, 3), 0.1)

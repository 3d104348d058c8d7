import pytest
import torch

from neuroflow_kernels import use_backend, ways
from neuroflow_kernels.reference.attend_rows import attend_rows
from neuroflow_kernels.ways import ATTENTION, LINEAR, LinearWeights

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 5, 33, 7), (3, 4, 64, 50), (1, 94, 768, 66)], ids=str)
@pytest.mark.parametrize("way", LINEAR)
def test_every_way_through_a_linear_layer(generator, way, shape, bias, dtype):
    """Tokens [S, M, K], which need not be contiguous."""
    streams, rows, inner, width = shape
    tokens = torch.randn(streams, inner, rows, generator=generator).to(dtype).mT
    weight = (torch.randn(width, inner, generator=generator) / inner**0.5).to(dtype)
    shift = torch.randn(width, generator=generator).to(dtype) if bias else None
    if way not in ways.linear_ways(dtype):
        pytest.skip(f"{way} is none here")
    layer = LinearWeights(weight, shift)
    layer.pack()
    found = LINEAR[way](tokens, layer)
    expected = tokens.double() @ weight.double().mT + (shift.double() if bias else 0)
    assert found.dtype == dtype and found.shape == (streams, rows, width)
    epsilon = torch.finfo(dtype).eps
    # Torch rounds before it adds a bias.
    absolute = max(2 * epsilon, 32 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(found.double(), expected, rtol=epsilon, atol=absolute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 33, 3, 7), (94, 196, 12, 64)], ids=str)
@pytest.mark.parametrize("way", ATTENTION)
def test_every_way_of_attention(generator, way, shape, scale, dtype):
    """Heads as a projection leaves them, and as rotary positions do."""
    rows, tokens, heads, width = shape
    query = torch.randn(rows, heads, width, generator=generator).to(dtype)
    key, value = (torch.randn(heads, tokens, width, generator=generator).to(dtype).transpose(0, 1) for _ in range(2))
    if way not in ways.attention_ways(dtype, rows * tokens * heads):
        pytest.skip(f"{way} is none here")
    found = ATTENTION[way](query, key, value, scale)
    wide = (each.double() for each in (query, key[None], value[None]))
    expected = attend_rows(*wide, None, width**-0.5 if scale is None else scale)
    assert found.dtype == dtype and found.shape == query.shape
    tolerance = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_two_products_are_of_float32_and_of_few_scores():
    assert "products" in ways.attention_ways(torch.float32, ways.LARGEST_SCORES)
    assert "products" not in ways.attention_ways(torch.float32, ways.LARGEST_SCORES + 1)
    assert "products" not in ways.attention_ways(torch.bfloat16, 1)


def test_without_its_extension_torch_serves():
    with use_backend("reference"):
        assert ways.linear_ways(torch.float32)[0] == ways.attention_ways(torch.float32, 1)[0] == "torch"


def settled(times, counts=lambda way, call: True):
    """A choice among ways whose calls take these seconds in turn, over and over; and the ways of its calls."""
    choice, calls = ways.Choice(list(times)), []
    while choice.fastest is None:
        way = choice.turn()
        call = calls.count(way)
        choice.note(way, times[way][call % len(times[way])], counts(way, call))
        calls.append(way)
        assert len(calls) < 100
    return choice, calls


def test_ways_take_turns_and_the_first_call_of_each_does_not_count():
    choice, calls = settled({"one": [0.1e-3] + 20 * [2e-3], "other": [9.0] + 20 * [1.5e-3]})
    assert choice.fastest == "other" and calls == (1 + ways.COUNTED) * ["one", "other"]
    assert choice.medians() == {"one": 2e-3, "other": 1.5e-3}


def test_one_disturbed_call_decides_nothing():
    assert settled({"one": [1.0, 1e-3, 5.0, 1e-3, 1e-3, 1e-3], "other": [1.4e-3]})[0].fastest == "one"


def test_a_way_without_hope_has_no_more_calls():
    calls = settled({"one": [1e-3], "other": [3e-3], "third": [1.1e-3]})[1]
    assert calls.count("other") == 1 + ways.COUNTED // 2 < calls.count("one") == calls.count("third")


def test_long_calls_are_few():
    calls = settled({"one": [1.0], "other": [1.1]})[1]
    assert calls == ["one", "other", "one", "other"]


def test_packed_weights_must_be_faster_by_what_they_are_worth():
    assert settled({"torch": [1.1e-3], "packed": [1e-3]})[0].fastest == "torch"
    assert settled({"torch": [1.2e-3], "packed": [1e-3]})[0].fastest == "packed"


def test_calls_that_prepared_something_do_not_count():
    choice, calls = settled({"torch": [1e-3], "packed": [9.0, 9.0, 9.0] + 50 * [0.5e-3]}, lambda way, call: call > 2)
    assert choice.fastest == "packed" and calls.count("packed") == 3 + ways.COUNTED


def test_of_one_way_nothing_is_asked():
    assert ways.Choice(["torch"]).fastest == "torch"

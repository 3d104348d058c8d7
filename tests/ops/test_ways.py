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


def test_ways_take_turns():
    turns = {"one": [], "other": []}
    seconds = ways.seconds_of({way: taken.append for way, taken in turns.items()})
    assert turns["one"] == turns["other"] == list(range(4 * ways.ROUNDS))  # the first warms up
    assert seconds.keys() == turns.keys() and all(0 <= least < 1 for least in seconds.values())

"""SigLIP's pooling head, folded, beside the head itself."""

import pytest
import torch
from models import tiny
from neuroflow.adapters import describe
from neuroflow.engine.pooling import attention_pool, fold_head


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
@pytest.mark.parametrize("tokens", [1, 7, 36])
def test_attention_pool_is_the_head(family, tokens):
    head = describe(tiny(family)).pool[0].double()
    x = 3 * torch.randn(2, tokens, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(attention_pool(head, fold_head(head), x)[0], head(x), rtol=0, atol=1e-12)


def test_attention_pool_over_ragged_streams():
    head = describe(tiny("siglip")).pool[0].double()
    x = torch.randn(3, 9, 64, dtype=torch.float64)
    with torch.no_grad():
        ours = attention_pool(head, fold_head(head), x, [4, 9, 1])[0]
        for row, tokens, length in zip(ours, x, [4, 9, 1], strict=True):
            torch.testing.assert_close(row, head(tokens[None, :length])[0], rtol=0, atol=1e-12)


def test_attention_pool_loses_less_than_the_head_in_bfloat16():
    head, x = describe(tiny("siglip")).pool[0].bfloat16(), (40 * torch.randn(4, 36, 64)).bfloat16()
    with torch.no_grad():
        theirs, ours = head(x), attention_pool(head, fold_head(head), x)[0]
        exact = head.double()(x.double())
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 0.5 * (theirs - exact).norm()

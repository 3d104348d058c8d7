import pytest
import torch
from models import tiny
from neuroflow.adapters import describe
from neuroflow.rewrites import attention_pool, fold_head, is_patch_projection, patch_windows, project_windows
from torch import nn


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (8, 8), (19, 30)])
@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_projected_as_the_convolution_does(size, bias):
    convolution = nn.Conv2d(3, 10, 8, stride=8, bias=bias).double()
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    ours = project_windows(convolution, patch_windows(convolution, pixels))
    theirs = convolution(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_patch_windows_refuses_other_channels():
    with pytest.raises(ValueError, match=r"pixel_values .* accepted is 3 channels"):
        patch_windows(nn.Conv2d(3, 4, 8, stride=8), torch.randn(1, 4, 16, 16))


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(3, 4, 8, stride=4),
        nn.Conv2d(3, 4, 8, stride=8, padding=1),
        nn.Conv2d(3, 4, 8, stride=8, dilation=2),
        nn.Conv2d(4, 4, 8, stride=8, groups=2),
        nn.Linear(3, 4),
    ],
)
def test_other_projections_are_left_alone(convolution):
    assert not is_patch_projection(convolution)
    assert is_patch_projection(nn.Conv2d(3, 4, (8, 4), stride=(8, 4), padding="valid"))


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

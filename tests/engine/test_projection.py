"""Patches as windows of pixels, and their projection as a matrix product."""

import pytest
import torch
from neuroflow.adapters.anatomy import is_patch_projection
from neuroflow.engine.projection import changed, patch_windows, project_windows
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("values", [3, 4, 48])
def test_changed_looks_at_every_bit(values, dtype):
    before = torch.zeros(1, 5, values, dtype=dtype)
    before[0, 1] = torch.nan
    windows = before.clone()
    windows[0, 0, 0], windows[0, 2, -1], windows[0, 4, 1] = -0.0, torch.finfo(dtype).tiny, torch.nan
    found = changed(before, windows)
    assert found.dtype == torch.int32 and found.tolist() == [0, 2, 4]
    assert changed(before, before.clone()).numel() == 0

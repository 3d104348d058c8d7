"""VideoMAE, ViViT and V-JEPA 2, whose streams are of clips: what is encoded, what is refused, and what is on top."""

import neuroflow
import pytest
import torch
from models import SIZES, OldRows, clip, clips, exact, smooth_clip, tiny
from neuroflow.adapters import describe
from neuroflow.adapters.anatomy import is_patch_projection
from neuroflow.engine.projection import patch_windows, project_windows
from torch import nn
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    VivitConfig,
    VivitForVideoClassification,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("videomae", "vivit", "vjepa2")


def encoded(model, *pixels):
    """(time, row, column) of the tubelets [times, 3, 3] that each clip [T, 3, 24, 24] of a stream encodes."""
    found = []
    with torch.inference_mode():
        for each in pixels:
            model(each[None])
            active = neuroflow.summary(model).streams["default"].active
            found.append(active.unflatten(0, (-1, 3)).nonzero().tolist())
    return found


@pytest.mark.parametrize("size", [(6, 16, 24), (7, 20, 30)])
def test_tubelets_are_projected_as_the_convolution_does(size):
    convolution = nn.Conv3d(3, 10, (2, 8, 6), stride=(2, 8, 6)).double()
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    assert is_patch_projection(convolution)
    ours = project_windows(convolution, patch_windows(convolution, pixels))
    torch.testing.assert_close(ours, convolution(pixels).flatten(2).transpose(1, 2), rtol=0, atol=1e-12)


def test_frames_are_no_clips_to_a_convolution_over_tubelets():
    with pytest.raises(ValueError, match=r"accepted is 3 channels, \[S, 3, T, H, W\]"):
        patch_windows(nn.Conv3d(3, 4, 8, stride=8), torch.randn(1, 3, 16, 16))
    assert not is_patch_projection(nn.Conv3d(3, 4, 8, stride=8, padding=(0, 0, 1)))
    assert not is_patch_projection(nn.Conv3d(3, 4, 8, stride=8, dilation=(2, 1, 1)))


@pytest.mark.parametrize("signal", ["patch", "embedding", "pixel"])
def test_the_tubelet_that_changed_is_encoded(signal):
    """Of a clip that is not square, and whose last frame is in no tubelet."""
    torch.manual_seed(0)
    config = VideoMAEConfig(**SIZES, image_size=(16, 24), patch_size=8, num_frames=7, tubelet_size=2)
    model = VideoMAEModel(config).eval()
    neuroflow.enable_cache(model, exact(threshold=1e-4, floor=1, signal=signal))
    pixels = clip(frames=7, size=(16, 24))
    changed = pixels.clone()
    changed[3, :, 8:, 16:] *= -1  # time 1, row 1, column 2
    with torch.inference_mode():
        model(pixels[None])
        model(changed[None])
    stream = neuroflow.summary(model).streams["default"]
    assert stream.grid == (3 * 2, 3)
    assert stream.active.nonzero().tolist() == [[1 * 2 + 1, 2]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clip_that_slides_encodes_what_its_time_index_has_not_seen(family):
    """A still, of which one patch changes in frame 10: where that is in the clip, the last one had what was before."""
    video = clip(frames=1, size=(24, 24)).repeat(20, 1, 1, 1)
    video[10:, :, 8:16, 16:] *= -1
    model = tiny(family)
    neuroflow.enable_cache(model, exact(threshold=1e-4, floor=1))
    first, *then = encoded(model, *(video[start : start + 8] for start in range(0, 14, 2)))
    assert len(first) == 36
    assert then[1:5] == [[[time, 1, 2]] for time in (3, 2, 1, 0)]
    assert [len(each) for each in then] == [1] * 6  # the floor, where nothing changed


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_no_clip_is_refused(family):
    model = tiny(family)
    neuroflow.enable_cache(model)
    for shape in ((8, 3, 24, 24), (1, 3, 8, 24, 24), (1, 8, 3, 24)):
        with pytest.raises(ValueError, match=r"pixel_values\w* has shape .*; accepted is \[S, T, 3, H, W\]"):
            model(torch.zeros(shape))


def test_a_mask_is_refused_unless_it_masks_nothing():
    model, (frame,) = tiny("videomae"), clip(frames=1)
    pixels = clips(frame[None])["pixel_values"]
    mask = torch.zeros(1, 36, dtype=torch.bool)
    neuroflow.enable_cache(model)
    with torch.inference_mode():
        whole = model(pixels).last_hidden_state
        neuroflow.reset_cache(model)
        assert torch.equal(model(pixels, mask).last_hidden_state, whole)
        mask[0, 5] = True
        with pytest.raises(ValueError, match="bool_masked_pos masks 1 tubelets; accepted is None or one that masks no"):
            model(pixels, mask)


def test_pretraining_with_masks_is_refused():
    config = VideoMAEConfig(**SIZES, image_size=24, patch_size=8, num_frames=8)
    model = VideoMAEForPreTraining(config).eval()
    neuroflow.enable_cache(model)
    mask = torch.arange(36)[None] % 2 == 0
    with pytest.raises(ValueError, match="bool_masked_pos masks 18 tubelets"):
        model(torch.zeros(1, 8, 3, 24, 24), mask)


def of_videomae(mean):
    config = VideoMAEConfig(
        **SIZES, image_size=24, patch_size=8, num_frames=8, use_mean_pooling=mean, initializer_range=0.08
    )
    return VideoMAEForVideoClassification(config)


def of_vivit():
    config = VivitConfig(**SIZES, image_size=24, tubelet_size=[2, 8, 8], num_frames=8, initializer_range=0.08)
    return VivitForVideoClassification(config)


def of_vjepa2():
    sizes = {"crop_size": 24, "patch_size": 8, "frames_per_clip": 8, "mlp_ratio": 2, "pred_num_hidden_layers": 1}
    return VJEPA2ForVideoClassification(VJEPA2Config(**SIZES, **sizes, num_labels=10, initializer_range=0.08))


@pytest.mark.parametrize(
    ("make", "tower"),
    [
        (lambda: of_videomae(True), "videomae"),
        (lambda: of_videomae(False), "videomae"),
        (of_vivit, "vivit"),
        (of_vjepa2, "vjepa2.encoder"),
    ],
    ids=["videomae, mean", "videomae, first token", "vivit", "vjepa2"],
)
def test_a_classifier_reads_all_tubelets(make, tower):
    torch.manual_seed(0)
    model = make().eval()
    assert describe(model).tower is model.get_submodule(tower)
    frames = smooth_clip()

    def logits():
        with torch.inference_mode():
            return torch.cat([model(clips(frame[None])["pixel_values"]).logits for frame in frames])

    dense = logits()
    for arch in "ACDE":
        neuroflow.enable_cache(model, exact(arch=arch, threshold=0))
        torch.testing.assert_close(logits(), dense, rtol=0, atol=1e-5 * dense.abs().max().item())
        neuroflow.disable_cache(model)
    neuroflow.enable_cache(model, exact(budget=0.5))
    sparse = logits()
    assert int(neuroflow.summary(model).streams["default"].active.sum()) == 18
    assert torch.cosine_similarity(sparse, dense).min() >= 0.98
    assert not torch.equal(sparse, dense)


@pytest.mark.parametrize("size", [(1, 24, 24), (6, 16, 40)])
def test_v_jepa_s_predictor_reads_old_tokens_where_tubelets_are_inactive(size):
    """Of an image, which is repeated, and of a clip of another size than the model's, in whose grid it counts."""
    times, *size = size
    model = tiny("vjepa2").double()
    frames = clip(frames=4 * times, size=size, changed=2).double().split(times)

    def run(pixels):
        with torch.inference_mode():
            output = model(pixels[None])
        return output.last_hidden_state, output.predictor_output.last_hidden_state

    neuroflow.enable_cache(model, exact(arch="E", threshold=1e-4))
    sparse, active = [], []
    for frame in frames:
        sparse.append(run(frame))
        active.append(neuroflow.summary(model).streams["default"].active)
    neuroflow.disable_cache(model)
    reference = OldRows(describe(model))
    for frame, ours, reference.active in zip(frames, sparse, active, strict=True):
        for mine, other in zip(ours, run(frame), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    assert 0 < active[-1].sum() < active[-1].numel()

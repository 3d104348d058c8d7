"""EoMT and VidEoMT, whose last blocks take queries and all patches: masks and classes, and what is refused."""

import itertools
from unittest import mock

import neuroflow
import pytest
import torch
from models import OldRows, clip, exact, inputs, of_eomt, plain, tiny
from neuroflow.adapters import describe

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("eomt", "eomt with dinov3", "videomt")
LOGITS = ("masks_queries_logits", "class_queries_logits")


def segmented(model, family, frame):
    with torch.inference_mode():
        output = model(**inputs(family, frame[None]))
    return [output[name] for name in LOGITS]


@pytest.mark.parametrize("masked", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_and_classes_are_those_of_old_tokens_where_patches_are_inactive(family, masked):
    """With the masked attention that EoMT is trained by, and without, as its checkpoints have it."""
    model, frames = tiny(family).double(), clip(frames=4).double()
    model.attn_mask_probs.fill_(masked)
    dense = [segmented(model, family, frame) for frame in frames]

    def check(sparse, expected):
        for pairs in itertools.starmap(zip, zip(sparse, expected, strict=True)):
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * theirs.abs().max().item())

    for arch in "ACDE":
        neuroflow.enable_cache(model, exact(arch=arch, threshold=0))
        check([segmented(model, family, frame) for frame in frames], dense)
        neuroflow.disable_cache(model)
    neuroflow.enable_cache(model, exact(arch="E", threshold=1e-4))
    sparse, active = [], []
    for frame in frames:
        sparse.append(segmented(model, family, frame))
        active.append(neuroflow.summary(model).streams["default"].active)
    neuroflow.disable_cache(model)
    assert 0 < active[-1].sum() < active[-1].numel()
    reference, expected = OldRows(describe(model)), []
    for frame, reference.active in zip(frames, active, strict=True):
        expected.append(segmented(model, family, frame))
    check(sparse, expected)
    assert not torch.allclose(sparse[-1][0], dense[-1][0], rtol=0, atol=1e-3)


def test_the_frames_of_a_clip_are_frames_of_one_stream():
    """Queries go from frame to frame, over the patches that each frame alone shows behind the last sparse block."""
    model, clips = (
        tiny("videomt").double(),
        {name: clip(frames=5, seed=seed).double() for seed, name in enumerate("ab")},
    )
    last, shown = describe(model).last, []
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    hook = last.register_forward_hook(lambda module, args, tokens: shown.append(tokens))
    for name, frames in clips.items():
        with neuroflow.cache_context(model, name):
            for frame in frames:
                segmented(model, "videomt", frame)
    hook.remove()
    neuroflow.reset_cache(model)
    both = torch.stack([*clips.values()])
    with torch.inference_mode():
        with neuroflow.cache_context(model, *clips):
            sparse = model(both)
        assert [report.stream for report in neuroflow.last_pass(model)] == [*"aaaaabbbbb"]
        neuroflow.disable_cache(model)
        with mock.patch.object(last, "forward", lambda tokens: torch.cat(shown)):
            expected = model(both)
    for name in LOGITS:
        torch.testing.assert_close(sparse[name], expected[name], rtol=0, atol=1e-10)


def test_hidden_states_that_are_counted_from_the_last_are_of_all_patches():
    """The first block's output is the last but three of five; the block with queries counts too."""
    model, frames = tiny("eomt"), clip(frames=2)

    def shapes():
        with torch.inference_mode():
            found = [model(frame[None], output_hidden_states=[-4]).hidden_states for frame in frames]
        return [None if state is None else state.shape for state in found[-1]]

    dense = shapes()
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    assert shapes() == dense


def test_what_a_sparse_frame_has_no_place_for_is_refused():
    model, (frame,) = tiny("eomt"), clip(frames=1)
    neuroflow.enable_cache(model)
    with pytest.raises(ValueError, match="mask_labels is given; accepted is None"):
        model(frame[None], mask_labels=[torch.zeros(1, 48, 48)], class_labels=[torch.zeros(1, dtype=torch.long)])
    model = tiny("videomt")
    neuroflow.enable_cache(model)
    with pytest.raises(ValueError, match=r"pixel_values_videos has shape .*; accepted is \[S, T, 3, H, W\]"):
        model(frame[None])
    with pytest.raises(ValueError, match="num_blocks is 4; accepted is less than 4"):
        neuroflow.enable_cache(of_eomt("Eomt", plain, mlp_ratio=2, num_blocks=4).make(48))

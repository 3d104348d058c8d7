"""Whole models, as they are called: what they make of frames and clips is compared, dense against patched."""

import contextlib
import copy

import neuroflow
import pytest
import torch
from models import SIZES, OldRows, clip, exact, installed
from neuroflow.adapters import describe, towers
from transformers import GenerationMixin
from whole_models import IMAGE, WHOLE, assert_close, generate, made, run

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = clip(frames=4, changed=18)  # half of the picture


@pytest.fixture(scope="module", params=WHOLE)
def built(request):
    return WHOLE[request.param], made(request.param)


@pytest.fixture
def case(built):
    return built[0]


@pytest.fixture
def model(built):
    yield built[1]
    neuroflow.disable_cache(built[1])


def patch(model, **settings):
    for name in towers(model):
        neuroflow.enable_cache(model, exact(**settings), tower=name)


def active_patches(model):
    """Of each tower that ran, bool [frames, rows, columns] of its last pass."""
    passes = {name: neuroflow.last_pass(tower) for name, (tower, _) in towers(model).items()}
    return {name: torch.stack([report.active for report in reports]) for name, reports in passes.items() if reports}


def inputs(case):
    """A frame, and a clip if the model takes one."""
    return [FRAMES[0]] if case.video is None else [FRAMES[0], FRAMES]


def test_nothing_skipped_is_dense(case, model):
    """Neither its outputs nor the tokens with which a language model answers."""
    answers = isinstance(model, GenerationMixin)
    dense = [run(case, model, given) for given in inputs(case)]
    dense_answers = [generate(case, model, given) for given in inputs(case) if answers]
    patch(model, threshold=0)
    for named in (False, True):
        for number, given in enumerate(inputs(case)):
            names = ["clip"] if number else [f"view {view}" for view in range(case.streams)]
            with neuroflow.cache_context(model, *names) if named else contextlib.nullcontext():
                assert_close(run(case, model, given), dense[number], 1e-6)
                assert all(active.all() for active in active_patches(model).values())
                if answers:
                    (tokens, logits), (dense_tokens, dense_logits) = generate(case, model, given), dense_answers[number]
                    assert tokens == dense_tokens
                    assert_close([logits], [dense_logits], 1e-6)


@pytest.mark.parametrize("arch", "AE")
def test_the_same_frame_again_is_dense(case, model, arch):
    """With one patch active at most, so that every layer's tokens are those of the first time."""
    dense = run(case, model, FRAMES[0])
    patch(model, arch=arch, floor=0, threshold=1e-4)
    with neuroflow.cache_context(model, *range(case.streams)):
        again = [run(case, model, FRAMES[0]) for _ in range(2)]
    assert all(active.sum((1, 2)).max() <= 1 for active in active_patches(model).values())
    for ours in again:
        assert_close(ours, dense, 1e-6)


def assert_keeps_old_rows(case, model, given, still, streams):
    """Patched, the model makes of each of `given` what one does whose blocks keep their old tokens.

    What differs is little beside what is new since `still`.
    """
    dense = run(case, model, given[-1])
    changes = [(new - old).abs().max() for new, old in zip(dense, run(case, model, still), strict=True)]
    reference = copy.deepcopy(model)
    blocks = {name: OldRows(describe(reference, name), streams) for name in towers(model)}
    patch(model, threshold=1e-4)
    sparse, active = [], []
    with neuroflow.cache_context(model, *range(streams)):
        for each in given:
            sparse.append(run(case, model, each))
            active.append(active_patches(model))
    neuroflow.disable_cache(model)
    for each, ours, now in zip(given, sparse, active, strict=True):
        for name in now:
            blocks[name].active = now[name]
        for mine, theirs, change in zip(ours, run(case, reference, each), changes, strict=True):
            assert mine.shape == theirs.shape
            assert (mine - theirs).abs().max() <= 1e-5 * change
    assert all(0 < frame.sum() < frame.numel() for patches in now.values() for frame in patches[-streams:])
    old = [(mine - other).abs().max() for mine, other in zip(ours, dense, strict=True)]
    assert any(each > 1e-3 * change for each, change in zip(old, changes, strict=True))


def test_partial_frames_keep_the_old_rows_of_each_block(case, model):
    """Those of a frame in each call, and those of a clip in one."""
    assert_keeps_old_rows(case, model, [*FRAMES], FRAMES[0], case.streams)
    if case.video is not None:
        assert_keeps_old_rows(case, model, [FRAMES], FRAMES[:1].expand_as(FRAMES), 1)


def test_disabling_leaves_the_model_as_it_was(case, model):
    dense = run(case, model, FRAMES[0])
    modules = list(model.modules())
    attributes = [set(vars(module)) for module in modules]
    configs = [vars(module).get("config") for module in modules]
    patch(model)
    assert_close(run(case, model, FRAMES[0]), dense, 1e-6)
    neuroflow.disable_cache(model)
    assert not neuroflow.is_patched(model)
    assert all(ours is theirs for ours, theirs in zip(model.modules(), modules, strict=True))
    assert [set(vars(module)) for module in modules] == attributes
    assert all(vars(module).get("config") is config for module, config in zip(modules, configs, strict=True))
    assert_close(run(case, model, FRAMES[0]), dense, 0)


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2", "DINOv3ViT", "InternVLVision", "Beit"])
def test_masked_patches_are_refused(name):
    """As they are put in place of patches that the caches hold."""
    config = installed(f"{name}Config")(**SIZES, **IMAGE)
    model = installed(f"{name}Model")(config, **{"use_mask_token": True} if name in ("ViT", "DeiT") else {}).eval()
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    with torch.inference_mode():
        whole = model(FRAMES[:1]).last_hidden_state
        with pytest.raises(ValueError, match="bool_masked_pos is given; accepted is None"):
            model(FRAMES[1:2], bool_masked_pos=torch.arange(36)[None] < 5)
        assert_close([model(FRAMES[:1]).last_hidden_state], [whole], 1e-5)

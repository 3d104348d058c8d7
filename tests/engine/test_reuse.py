"""Clips without a name: patches that are not encoded are served by their nearest version, before or after."""

import neuroflow
import pytest
import torch
from models import exact, inputs, tiny, values
from neuroflow.adapters import describe
from neuroflow.engine import reuse
from neuroflow.engine.gate import Gate

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:neuroflow")]

FAMILIES = ("siglip", "vit", "dinov2 with registers", "dinov3", "sam", "qwen2.5-vl", "qwen3-vl")


def fading(frames=12, cut=7, broken=None):
    """A clip [T, 3, H, W] of patches that each fade into another at a time of its own; a cut, and a NaN."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.rand(3, 3, 48, 48, generator=generator, dtype=torch.float64) * 2 - 1
    starts = torch.randint(-4, frames, (6, 6), generator=generator)
    share = ((torch.arange(frames)[:, None, None] - starts) / 5).clamp(0, 1).double()
    share = share.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    shown = ends[0] * (1 - share) + ends[1] * share
    shown += 0.01 * torch.rand(shown.shape, generator=generator)  # no two versions are equally near
    shown[cut:, ..., 8:] = shown[cut:, ..., 8:].flip(-1)  # what is left of it could go on
    if broken is not None:
        shown[broken, 0, 0, 0] = torch.nan
    return shown


def versions_of(signals, reports):
    """The frame whose version serves each patch of each frame, [T, N], patch by patch."""
    active = torch.stack([report.active.flatten() for report in reports])
    opaque = [report.key_frame == "cut" or not h.isfinite().all() for report, h in zip(reports, signals, strict=True)]

    def distance(frame, other, patch):
        return 1 - torch.cosine_similarity(signals[frame][patch], signals[other][patch], 0)

    served = torch.zeros(active.shape, dtype=torch.int64)
    for patch in range(active.shape[1]):
        last = served_by = 0
        for frame in range(len(reports)):
            if active[frame, patch]:
                last = served_by = frame
            elif served_by == last:
                ahead = next((t for t in range(frame + 1, len(reports)) if active[t, patch] or opaque[t]), None)
                if ahead is not None and not opaque[ahead]:
                    nearer = distance(frame, ahead, patch) < distance(frame, last, patch)
                    served_by = ahead if nearer else last
            served[frame, patch] = served_by
    return served


@pytest.mark.parametrize("broken", [None, 4], ids=["finite", "with NaN"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_shows_the_nearer_of_its_versions(family, broken, monkeypatch):
    """Beside an unpatched tower whose blocks take the versions for what they would see."""
    model, frames, signals, turns = tiny(family).double(), fading(broken=broken), [], []
    anatomy = describe(model)
    neuroflow.enable_cache(model, exact(threshold=0.2, cut_share=0.7))
    gated = Gate.signals
    monkeypatch.setattr(Gate, "signals", lambda *args: signals.append(gated(*args)) or signals[-1])
    nearest = reuse.nearest
    monkeypatch.setattr(reuse, "nearest", lambda *args: turns.extend(nearest(*args)) or turns)
    with torch.inference_mode():
        found = values(model(**inputs(family, frames)))
    versions = torch.cat([turn[1] for turn in turns if turn is not None])
    assert len(versions.unique()) == len(versions)  # each is brought into the caches early once
    reports = neuroflow.last_pass(model)
    neuroflow.disable_cache(model)
    served = versions_of([h[0] for h in signals[0]], reports)
    ahead = served > torch.arange(len(frames))[:, None]
    assert ahead.sum() > 10 and sum(report.key_frame is None for report in reports) > 5
    if anatomy.order is not None:
        order = anatomy.order(inputs(family, frames))
        served = torch.stack([own[each] for own, each in zip(served, order, strict=True)])
    own = torch.arange(len(frames))[:, None].expand(-1, anatomy.prefix)
    served = torch.cat((own, served), 1)

    def of_versions(tokens):
        rows = tokens.reshape(*served.shape, -1)
        return rows[served, torch.arange(served.shape[1])].view_as(tokens)

    def behind(module, args, output):
        return (of_versions(output[0]), *output[1:]) if isinstance(output, tuple) else of_versions(output)

    hooks = [layer.register_forward_hook(behind) for layer in anatomy.layers]
    hooks.append(anatomy.layers[0].register_forward_pre_hook(lambda module, args: (of_versions(args[0]), *args[1:])))
    with torch.inference_mode():
        expected = values(model(**inputs(family, frames)))
    for hook in hooks:
        hook.remove()
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        torch.testing.assert_close(found[name], theirs, rtol=0, atol=1e-10, equal_nan=True, msg=name)


def test_streams_that_go_on_are_served_by_the_past():
    model, frames = tiny("siglip").double(), fading()
    neuroflow.enable_cache(model, exact(threshold=0.2, cut_share=0.7))
    with torch.inference_mode():
        with neuroflow.cache_context(model, "cam-7"):
            named = values(model(pixel_values=frames))
        nameless = values(model(pixel_values=frames))
        neuroflow.disable_cache(model)
        neuroflow.enable_cache(model, exact(threshold=0.2, cut_share=0.7, reuse="last"))
        last = values(model(pixel_values=frames))
    for name, theirs in named.items():
        torch.testing.assert_close(last[name], theirs, rtol=0, atol=1e-12)
        assert not torch.allclose(nameless[name], theirs, atol=1e-3)

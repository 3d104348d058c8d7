"""What holds for every family of models: promises 1 and 2, fidelity, and patching without a trace."""

import re
from pathlib import Path

import neuroflow
import pytest
import torch
from models import (
    FAMILIES,
    PATCH,
    OldRows,
    assert_close,
    clip,
    exact,
    inputs,
    outputs,
    redrawn,
    smooth_clip,
    tiny,
    values,
)
from neuroflow.adapters import describe

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = [(family, arch) for family, known in FAMILIES.items() for arch in known.architectures]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_one_that_neuroflow_lists(family):
    tower = describe(tiny(family)).tower
    assert any(known.adapter(tower).tower is tower for known in neuroflow.supported_models() if known.knows(tower))


def test_the_guide_lists_every_cell_and_every_cell_is_tested_here():
    guide = (Path(__file__).parents[2] / "python" / "guide" / "models.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (\w+) " + r"\| (yes|no) " * 5 + r"\|$", guide, re.MULTILINE)
    listed = {
        (name, library): {arch for arch, cell in zip("ABCDE", cells, strict=True) if cell == "yes"}
        for name, library, *cells in rows
    }
    known = neuroflow.supported_models()
    assert listed == {(family.name, family.library): set(family.architectures) for family in known}
    tested = {}
    for name in FAMILIES:
        tower = describe(tiny(name)).tower
        family = next(family for family in known if family.knows(tower))
        tested.setdefault((family.name, family.library), set()).update(FAMILIES[name].architectures)
    installed = {library for _, library in tested}  # timm is tested in a process of its own
    assert tested == {family: cells for family, cells in listed.items() if family[1] in installed}


@pytest.mark.parametrize(
    ("family", "arch", "size"),
    [(*cell, (48, 48)) for cell in CELLS]
    + [(family, arch, (32, 64)) for family, arch in CELLS if arch == "E" and FAMILIES[family].sizes],
)
def test_threshold_zero_is_the_unpatched_model(family, arch, size):
    model, frames = tiny(family), clip(frames=3, size=size)
    dense = outputs(model, family, frames)
    neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(arch=arch, threshold=0))
    for ours, theirs in zip(outputs(model, family, frames), dense, strict=True):
        assert type(ours) is type(theirs)
        assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_a_smooth_clip_is_enough(family):
    model, frames = redrawn(tiny(family)), smooth_clip()
    embedding = describe(model).embedding
    dense = [embedding(output) for output in outputs(model, family, frames)]
    neuroflow.enable_cache(model, exact(arch="E", budget=0.5))
    sparse = [embedding(output) for output in outputs(model, family, frames)]
    stream = neuroflow.summary(model).streams["default"]
    patches = stream.grid[0] * stream.grid[1]
    assert patches == 48 * 48 // PATCH**2
    assert int(stream.active.sum()) == patches // 2
    distance = max(1 - torch.cosine_similarity(*pair).min() for pair in zip(sparse, dense, strict=True))
    repeated = max(1 - torch.cosine_similarity(dense[0], later).min() for later in dense)
    assert distance <= 0.02
    assert distance <= 0.5 * repeated


PARTS = [
    ("clip", "pre_layrnorm"),
    ("dinov2", "layer_scale1"),
    ("dinov2", "layer_scale2"),
    ("dinov2 with registers", "register_tokens"),
    ("dinov2 with registers", "layer_scale1"),
    ("dinov3", "register_tokens"),
    ("dinov3", "layer_scale2"),
    ("internvl", "lambda_1"),
]


@pytest.mark.parametrize(("family", "part"), PARTS)
def test_a_part_left_out_would_be_seen(family, part, monkeypatch):
    """What the comparison above rests on: these parts decide over the output of a partial frame."""
    model, frames = tiny(family), clip(frames=3)

    def sparse():
        neuroflow.enable_cache(model, exact(arch="E", threshold=1e-4))
        found = outputs(model, family, frames)[-1].last_hidden_state
        neuroflow.disable_cache(model)
        return found

    whole = sparse()
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(part):
                monkeypatch.setattr(module, "forward", lambda tokens: tokens)
        for name, parameter in model.named_parameters():
            if name.endswith(part):
                parameter.zero_()
    assert (sparse() - whole).norm() > 0.01 * whole.norm()


@pytest.mark.parametrize(("family", "arch"), CELLS)
def test_hidden_states_have_the_shape_of_the_unpatched_model_s(family, arch):
    """And its values where every patch is encoded; in a partial frame C, D and E keep those of the others."""
    if family == "vit_mae":
        pytest.skip("shuffles its patches")
    model, frames = tiny(family), clip(frames=2)
    with torch.inference_mode():
        try:
            dense = model(**inputs(family, frames[:1]), output_hidden_states=True).hidden_states
        except (AttributeError, TypeError):
            pytest.skip(f"{family} captures no hidden states in this release")
        neuroflow.enable_cache(model, exact(arch=arch, threshold=1e-4))
        first, second = (
            model(**inputs(family, frame[None]), output_hidden_states=True).hidden_states for frame in frames
        )
    anatomy, stream = describe(model), neuroflow.summary(model).streams["default"]
    assert len(first) == len(second) == len(dense)
    assert len(dense) == len(anatomy.layers) + 1 or family in ("eomt", "eomt with dinov3", "videomt")  # more blocks
    for ours, theirs in zip(first, dense, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert 0 < stream.active.sum() < stream.active.numel()
    if arch == "B":
        tokens = anatomy.prefix + int(stream.active.sum())
        assert [state.shape[1] for state in second[1:]] == [tokens] * len(anatomy.layers)
    else:
        assert [state.shape for state in second] == [state.shape for state in dense]
    if arch in "CDE" and anatomy.order is None and dense[-1].ndim == 3:
        first_packed = len(anatomy.layers) // 2 + 1 if arch == "D" else 1  # D runs on all before
        packed = slice(first_packed, len(anatomy.layers) + 1)
        for before, after in zip(first[packed], second[packed], strict=True):
            same = (before == after).all(2)[0, anatomy.prefix :][: stream.active.numel()]
            assert torch.equal(same, ~stream.active.flatten())


@pytest.mark.parametrize("family", ["siglip", "clip", "vit", "dinov2", "dinov3"])
def test_attention_weights_are_for_the_unpatched_model(family):
    """A patched one computes none, whatever its implementation was, and gets that back."""
    model, frames = tiny(family), clip(frames=2)
    model.set_attn_implementation("eager")

    def weights(frame):
        output = model(**inputs(family, frame[None]), output_attentions=True)
        return [each for each in output.attentions or () if each is not None]

    with torch.inference_mode():
        dense = weights(frames[0])
        neuroflow.enable_cache(model, exact(threshold=1e-4))
        assert [weights(frame) for frame in frames] == [[], []]
        neuroflow.disable_cache(model)
        again = weights(frames[0])
    assert len(dense) == len(describe(model).layers)
    assert all(torch.equal(*pair) for pair in zip(dense, again, strict=True))


@pytest.mark.parametrize(("family", "arch"), CELLS)
def test_disabling_leaves_no_trace(family, arch):
    model, frames = tiny(family), clip(frames=3)
    modules, attributes = list(model.modules()), [dict(vars(module)) for module in model.modules()]
    configs = [vars(module).get("config") for module in modules]
    implementations = [getattr(config, "_attn_implementation", None) for config in configs]
    before = outputs(model, family, frames)
    neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(arch=arch))
    outputs(model, family, frames)
    neuroflow.disable_cache(model)
    assert not neuroflow.is_patched(model)
    assert all(ours is theirs for ours, theirs in zip(model.modules(), modules, strict=True))
    assert [vars(module).keys() for module in model.modules()] == [kept.keys() for kept in attributes]
    assert all(vars(module).get("config") is config for module, config in zip(modules, configs, strict=True))
    assert [getattr(config, "_attn_implementation", None) for config in configs] == implementations
    for ours, theirs in zip(outputs(model, family, frames), before, strict=True):
        assert_close(ours, theirs, 0)


@pytest.mark.parametrize(("family", "arch"), CELLS)
def test_batched_streams_equal_streams_alone(family, arch):
    """Three streams that change by different amounts; one joins late, so key and partial frames share a batch."""
    clips = {name: clip(frames=3, seed=seed, changed=3 * seed + 1).double() for seed, name in enumerate("abc")}
    model = tiny(family).double()
    neuroflow.enable_cache(model, exact(arch=arch, threshold=1e-4, floor=2))

    def run(frames, names):
        with torch.inference_mode(), neuroflow.cache_context(model, *names):
            output = model(**inputs(family, frames))
        if arch == "B" and isinstance(output, torch.Tensor):
            return describe(model).embedding(output)
        if arch == "B":  # active tokens only, padded with zeros to the most that a stream has
            return output.last_hidden_state.sum(1)
        return torch.cat([value.reshape(len(names), -1) for value in values(output).values()], 1)

    alone = {name: [run(frame[None], [name]) for frame in frames[name == "c" :]] for name, frames in clips.items()}
    active = {name: stream.active for name, stream in neuroflow.summary(model).streams.items()}
    neuroflow.reset_cache(model)
    together = {name: [] for name in clips}
    for time in range(3):
        names = ["a", "b"] if time == 0 else ["c", "a", "b"]
        result = run(torch.stack([clips[name][time] for name in names]), names)
        for name, row in zip(names, result.split(1), strict=True):
            together[name].append(row)
    for name in clips:
        assert torch.equal(neuroflow.summary(model).streams[name].active, active[name])
        torch.testing.assert_close(torch.cat(together[name]), torch.cat(alone[name]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_context_is_the_model_that_sees_old_tokens_where_patches_are_inactive(family):
    """Its outputs and its hidden states, where the release captures any."""
    if family == "vit_mae":
        pytest.skip("shuffles its patches")
    model, frames = tiny(family), clip(frames=4)
    asked = {"output_hidden_states": True}
    try:
        model(**inputs(family, frames[:1]), **asked).hidden_states  # noqa: B018
    except (AttributeError, TypeError):
        asked = {}

    def run(frame):
        with torch.inference_mode():
            return model(**inputs(family, frame[None]), **asked)

    neuroflow.enable_cache(model, exact(arch="E", threshold=1e-4))
    sparse, active = [], []
    for frame in frames:
        sparse.append(run(frame))
        active.append(neuroflow.summary(model).streams["default"].active)
    neuroflow.disable_cache(model)

    reference = OldRows(describe(model))
    for frame, ours, now in zip(frames, sparse, active, strict=True):
        reference.active = now
        theirs = run(frame)
        assert_close(ours, theirs, 1e-5)
        for mine, other in zip(*(each.hidden_states[1:] for each in (ours, theirs)), strict=True) if asked else ():
            assert (mine - other).abs().max() <= 1e-5 * other.abs().max()
    assert 0 < now.sum() < now.numel()

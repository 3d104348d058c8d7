"""The architectures against a plain re-computation, and patching; what all families share is in test_families.py."""

from unittest import mock

import neuroflow
import pytest
import torch
from models import assert_close, clip, exact, outputs, tiny

from neuroflow_kernels import use_backend, ways, without_row_kernels

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("siglip", "siglip2", "vit")
ARCHITECTURES = ("A", "B", "C", "D", "E")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_threshold_zero_in_bfloat16(family, arch):
    """Against the float64 model: no further from it than twice what bfloat16 itself loses."""
    model, frames = tiny(family).to(torch.bfloat16), clip(frames=3)
    exact = outputs(tiny(family).to(torch.bfloat16).double(), family, frames.bfloat16().double())
    dense = outputs(model, family, frames.bfloat16())
    neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(arch=arch, threshold=0))
    for ours, theirs, truth in zip(outputs(model, family, frames.bfloat16()), dense, exact, strict=True):
        for name in ("last_hidden_state", "pooler_output"):
            if getattr(truth, name) is not None:
                lost = (getattr(theirs, name) - getattr(truth, name)).norm()
                assert (getattr(ours, name) - getattr(truth, name)).norm() <= 2 * lost


def plain_vit(model, frames, active, arch, mid_layer):
    """The architectures on a ViT, written down once more without packing tricks: tokens [1 + N, D] per frame."""

    anatomy = neuroflow.adapters.describe(model)

    def attend(i, queries, tokens):
        attention, layer = anatomy.attentions[i], anatomy.layers[i].attention
        names = ("q_proj", "k_proj", "v_proj") if hasattr(attention, "q_proj") else ("query", "key", "value")
        q, k, v = (
            getattr(attention, name)(x).unflatten(-1, (attention.num_attention_heads, -1)).transpose(0, 1)
            for name, x in zip(names, (queries, tokens, tokens), strict=True)
        )
        weights = (q @ k.transpose(1, 2) * attention.scaling).softmax(-1)
        project = layer.o_proj if hasattr(layer, "o_proj") else layer.output.dense
        return project((weights @ v).transpose(0, 1).flatten(1))

    def mlp(i, tokens):
        first, last = anatomy.mlps[i]
        return last(torch.nn.functional.gelu(first(tokens)))

    memory, pooled = {}, []
    for frame, chosen in zip(frames, active, strict=True):
        everything = torch.arange(1 + len(chosen))
        rows = torch.cat((torch.zeros(1, dtype=torch.long), 1 + chosen.nonzero()[:, 0]))
        x = model.embeddings(frame[None], interpolate_pos_encoding=True)[0]
        live = everything if arch in ("A", "D") else rows  # the tokens that x holds
        x = x[live]
        for i, layer in enumerate(anatomy.layers):
            if arch == "D" and i == mid_layer + 1:
                x, live = x[rows], rows
            normed = layer.layernorm_before(x)
            seen = normed
            if arch == "E":
                seen = memory[i] = memory.get(i, normed).index_copy(0, rows, normed)
            x = x + attend(i, normed, seen)
            increment = mlp(i, layer.layernorm_after(x))
            if arch == "A":
                increment = memory[i] = memory.get(i, increment).index_copy(0, rows, increment[rows])
            x = x + increment
        pooled.append(model.layernorm(x)[0])  # CLS is always fresh
    return torch.stack(pooled)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_vit_against_a_plain_one(arch):
    """The reference vectors are of a tower without CLS; this is one with."""
    model, frames = tiny("vit").double(), clip(changed=5).double()
    neuroflow.enable_cache(model, exact(arch=arch, threshold=1e-4, mid_layer=1))
    sparse, active = [], []
    for frame in frames:
        sparse += outputs(model, "vit", frame[None])
        active.append(neuroflow.summary(model).streams["default"].active.flatten())
    neuroflow.disable_cache(model)
    assert [int(chosen.sum()) for chosen in active] == [36, 5, 5, 5, 5, 5]
    with torch.no_grad():
        expected = plain_vit(model, frames, active, arch, mid_layer=1)
    torch.testing.assert_close(torch.cat([o.last_hidden_state[:, 0] for o in sparse]), expected, rtol=0, atol=1e-9)


def test_disabling_puts_back_a_forward_of_the_users_own():
    model = tiny("siglip")
    head = neuroflow.adapters.describe(model).pool[0]
    theirs = head.forward
    head.forward = own = lambda *args: theirs(*args) + 1
    neuroflow.enable_cache(model)
    neuroflow.disable_cache(model)
    assert head.forward is own


def test_enabling_twice():
    model, config = tiny("siglip"), exact(threshold=0.1)
    neuroflow.enable_cache(model, config)
    patched = neuroflow.adapters.describe(model).tower.forward
    neuroflow.enable_cache(model, exact(threshold=0.1))
    assert neuroflow.adapters.describe(model).tower.forward is patched
    assert neuroflow.is_patched(model)
    with pytest.raises(RuntimeError, match="disable_cache first"):
        neuroflow.enable_cache(model, exact(threshold=0.2))


def test_failing_to_enable_leaves_nothing_behind():
    model = tiny("siglip")
    kept = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match="mid_layer is 3"):
        neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(arch="D", mid_layer=3))
    assert [vars(module).keys() for module in model.modules()] == [state.keys() for state in kept]


def test_unknown_models_are_refused():
    with pytest.raises(TypeError, match="supported are SigLIP"):
        neuroflow.enable_cache(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"accepted is a torch\.nn\.Module"):
        neuroflow.enable_cache("google/siglip2-base-patch16-224")
    with pytest.raises(RuntimeError, match="enable_cache"):
        neuroflow.summary(tiny("vit"))


def test_the_midlayer_architecture_stands_between_dense_and_dual():
    """D runs the blocks up to mid_layer on everything: with the last block but one it is closer to dense than C."""
    model, frames = tiny("vit"), clip(changed=8)
    dense = outputs(model, "vit", frames)[-1].last_hidden_state[:, 0]
    distance = {}
    for arch, mid_layer in (("C", None), ("D", 0), ("D", 2)):
        config = exact(arch=arch, threshold=1e-4, mid_layer=mid_layer)
        neuroflow.enable_cache(model, config)
        distance[mid_layer] = (outputs(model, "vit", frames)[-1].last_hidden_state[:, 0] - dense).norm()
        neuroflow.disable_cache(model)
    assert distance[2] < distance[0] < distance[None]


def test_new_weights_take_effect_at_once():
    """Also the positional table, whose interpolation to another size is kept from frame to frame."""
    model, frame = tiny("siglip"), clip(frames=1, size=(32, 64))
    neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(threshold=0))
    outputs(model, "siglip", frame)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    ours = outputs(model, "siglip", frame)[0]
    neuroflow.disable_cache(model)
    assert_close(ours, outputs(model, "siglip", frame)[0], 1e-5)


def test_weights_that_torch_does_not_count_as_changed_take_effect_after_a_reset():
    model, frame = tiny("siglip"), clip(frames=1, size=(32, 64))
    neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(threshold=0))
    outputs(model, "siglip", frame)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    neuroflow.reset_cache(model)
    ours = outputs(model, "siglip", frame)[0]
    neuroflow.disable_cache(model)
    assert_close(ours, outputs(model, "siglip", frame)[0], 1e-5)


def test_layers_used_by_themselves_behave_as_before():
    model, tokens = tiny("siglip"), torch.randn(1, 5, 64)
    anatomy = neuroflow.adapters.describe(model)
    before = [anatomy.layers[0](tokens, None), anatomy.pool[0](tokens)]
    neuroflow.enable_cache(model)
    with pytest.warns(RuntimeWarning, match="accepted are calls of its forward; others run unpatched") as said:
        after = [anatomy.layers[0](tokens, None), anatomy.pool[0](tokens)]
        anatomy.layers[0](tokens, None)
    assert len(said) == 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, before, strict=True))


@pytest.mark.skipif(without_row_kernels() is not None, reason=f"no row kernels here: {without_row_kernels()}")
@pytest.mark.parametrize(
    "dtype, backend, autocast, served",
    [
        (torch.float32, "auto", False, True),
        (torch.bfloat16, "cpp", False, True),
        (torch.float64, "auto", False, False),
        (torch.float32, "reference", False, False),
        (torch.float32, "auto", True, False),
    ],
)
def test_partial_frames_go_through_the_row_kernels(monkeypatch, dtype, backend, autocast, served):
    """Where they are the faster ones, and autocast has no say; a key frame runs as the unpatched model does."""
    model, frames = tiny("siglip").to(dtype), clip(frames=2).to(dtype)
    linears, attentions = mock.Mock(wraps=ways.LINEAR["rows"]), mock.Mock(wraps=ways.ATTENTION["rows"])
    monkeypatch.setitem(ways.LINEAR, "rows", linears)
    monkeypatch.setitem(ways.ATTENTION, "rows", attentions)
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs(model, "siglip", frames[:1])
        assert (linears.call_count, attentions.call_count) == (0, 0)
        outputs(model, "siglip", frames[1:])
    # In each of 4 blocks queries, keys, values, their mix and the two of the MLP; the head's last three.
    assert (linears.call_count, attentions.call_count) == ((4 * 6 + 3, 4) if served else (0, 0))

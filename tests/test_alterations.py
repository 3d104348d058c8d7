"""What users do to models: adapters, hooks, offloading, new weights, wrappers, copies, before patching and after it."""

import contextlib
import copy
import functools
import io
import pickle
import warnings

import neuroflow
import pytest
import torch
import torch.nn.functional as F
from models import SIZES, clip, exact, tiny
from neuroflow.adapters import describe
from neuroflow.patch import engine_of
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import ViTConfig, ViTModel

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:neuroflow", "ignore:.*weight_norm"),
]
SCALE = 1.25


def run(model, frames, stream="a"):
    """The last hidden state of each frame, and why it was a key frame."""
    outputs, reasons = [], []
    with neuroflow.cache_context(model, stream), torch.no_grad():
        for frame in frames.split(1):
            outputs.append(model(pixel_values=frame).last_hidden_state)
            reasons += [report.key_frame for report in neuroflow.last_pass(model)]
    return outputs, reasons


def dense(model, frames):
    with torch.no_grad():
        return [model(pixel_values=frame).last_hidden_state for frame in frames.split(1)]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# Each changes a module, and another of the same weights so that this one, plain, computes the same.


def with_adapter(module, plain):
    """LoRA as kohya's and others' attach it."""
    added, forward = 0.05 * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0)), module.forward
    options = {} if isinstance(module, nn.Linear) else {"stride": module.stride}
    product = F.linear if isinstance(module, nn.Linear) else F.conv2d
    module.forward = lambda tokens: forward(tokens) + product(tokens, added, **options)
    plain.weight.data += added


def with_hooks(module, plain):
    module.register_forward_hook(lambda module, arguments, output: SCALE * output)
    module.register_forward_pre_hook(lambda module, arguments: (arguments[0] / 2,))
    plain.weight.data *= SCALE / 2
    plain.bias.data *= SCALE


def with_a_hook_in_place(module, plain):
    module.register_forward_hook(lambda module, arguments, output: output.mul_(SCALE).add_(0.1))
    plain.weight.data *= SCALE
    plain.bias.data.mul_(SCALE).add_(0.1)


def offloaded(module, plain):
    """As accelerate does: in memory only while the module runs."""
    forward, held = module.forward, {name: weight.data for name, weight in module.named_parameters()}

    def on(device):
        for name, weight in held.items():
            setattr(module, name, nn.Parameter(weight.clone() if device == "cpu" else weight.to(device)))

    def loaded(tokens):
        on("cpu")
        try:
            return forward(tokens)
        finally:
            on("meta")

    on("meta")
    module.forward = loaded


class Packed(torch.Tensor):
    """A tensor of another kind, which knows torch's own operators, as quantized ones do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace == "aten", f"{func} has no kernel for it"
        args, kwargs = tree_map_only(cls, lambda tensor: tensor.inner, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return cls(result) if func is torch.ops.aten.detach.default else result


def quantized(module, plain):
    module.weight = nn.Parameter(Packed(module.weight.detach()), requires_grad=False)


def normed(module, plain):
    nn.utils.weight_norm(module)


def parametrized(module, plain):
    nn.utils.parametrizations.weight_norm(module)


ALTERATIONS = [with_adapter, with_hooks, with_a_hook_in_place, offloaded, quantized, normed, parametrized]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("alter", ALTERATIONS)
@pytest.mark.parametrize(("family", "settings"), [("siglip", {}), ("vit", {"precision": "bfloat16"}), ("sam", {})])
def test_modules_that_are_not_plain_compute_what_they_would(family, settings, alter, when):
    model, merged, frames = tiny(family), tiny(family), clip(frames=4)
    config = exact(threshold=1e-3, **settings)
    if when == "after":
        neuroflow.enable_cache(model, config)
    twins = dict(merged.named_modules())
    for name, module in list(model.named_modules()):
        is_projection = isinstance(module, nn.Conv2d) and "patch_embed" in name
        if is_projection or (isinstance(module, nn.Linear) and "head.attention" not in name):
            alter(module, twins[name])
    expected = dense(merged, frames[:1])
    neuroflow.enable_cache(merged, config)
    if when == "before":
        close(dense(model, frames[:1]), expected)  # the alteration is what it is taken for
        neuroflow.enable_cache(model, config)
    ours, reasons = run(model, frames)
    theirs, _ = run(merged, frames)
    assert reasons == ["first", None, None, None]
    tolerance = 2e-2 if settings else 1e-4
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


class Hook:
    """As accelerate's: it brings a module's own weights for each call, or is only called along."""

    def __init__(self, module, offload):
        self.offload, self.held = offload, dict(module.named_parameters(recurse=False)) if offload else {}
        self.bring(module, "meta")

    def bring(self, module, device):
        for name, weight in self.held.items():
            setattr(
                module, name, nn.Parameter(weight.detach().clone() if device == "cpu" else weight.detach().to("meta"))
            )


def imitated(model, offload):
    """Give every module a hook in the way that accelerate does."""

    def forward(module, *args, **kwargs):
        module._hf_hook.bring(module, "cpu")
        result = module._old_forward(*args, **kwargs)
        module._hf_hook.bring(module, "meta")
        return result

    for module in model.modules():
        module._old_forward, module._hf_hook = module.forward, Hook(module, offload)
        module.forward = functools.update_wrapper(functools.partial(forward, module), module._old_forward)


def imitated_end(model):
    for module in model.modules():
        module._hf_hook.bring(module, "cpu")
        module.forward = module._old_forward
        del module._old_forward, module._hf_hook


def accelerated(model, offload):
    accelerate = pytest.importorskip("accelerate", reason="its hooks are imitated beside this")
    if offload:
        accelerate.cpu_offload(model, execution_device="cpu")
    for module in [] if offload else model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))


def accelerated_end(model):
    pytest.importorskip("accelerate").hooks.remove_hook_from_submodules(model)


def in_front(model):
    """What is left of the engine on the modules of a model."""
    return [name for name, part in model.named_modules() for own in vars(part).values() if "_InFront" in str(type(own))]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("begin", [imitated, accelerated])
@pytest.mark.parametrize("family", ["clip", "sam"])
def test_hooks_of_accelerate_are_called_around_the_engine(family, begin, offload, when, tmp_path):
    """They bring weights that lie elsewhere in every frame; SAM's tower and attention have some of their own."""
    model, plain, frames = tiny(family), tiny(family), clip(frames=4)
    neuroflow.enable_cache(plain, exact(threshold=1e-3))
    expected, _ = run(plain, frames)
    if when == "before":
        begin(model, offload)
    neuroflow.enable_cache(model, exact(threshold=1e-3))
    if when == "after":
        begin(model, offload)
    outputs, reasons = run(model, frames)
    close(outputs, expected)
    assert reasons == ["first", None, None, None]
    assert any(engine_of(model).kernels._layers.values()) != offload  # nothing is kept of what is taken away
    if offload:
        with pytest.raises(RuntimeError, match="is offloaded, so its weights"):
            neuroflow.save_state(model, tmp_path / "state")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        neuroflow.disable_cache(model)
    assert not in_front(model)
    neuroflow.enable_cache(model, exact(threshold=1e-3))
    {imitated: imitated_end, accelerated: accelerated_end}[begin](model)
    close(run(model, frames)[0], expected)
    neuroflow.disable_cache(model)
    assert not in_front(model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_of_peft(when):
    peft = pytest.importorskip("peft", reason="its layers are imitated elsewhere in this file")
    model, merged, frames = tiny("siglip"), tiny("siglip"), clip(frames=4)

    def with_lora(model):
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "fc1"]))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        return wrapped.eval()

    merged = neuroflow.enable_cache(with_lora(merged).merge_and_unload(), exact(threshold=1e-3))
    if when == "after":
        neuroflow.enable_cache(model, exact(threshold=1e-3))
    wrapped = with_lora(model)
    neuroflow.enable_cache(wrapped, exact(threshold=1e-3))
    outputs, reasons = run(wrapped, frames)
    close(outputs, run(merged, frames)[0])
    assert reasons == ["first", None, None, None]
    with wrapped.disable_adapter():
        assert run(wrapped, frames)[1] == ["weights", None, None, None]


def test_a_pipeline_is_refused_with_what_to_patch():
    pipeline = type("Pipeline", (), {"model": vit()})()
    with pytest.raises(TypeError, match=r"is a Pipeline; accepted is a torch\.nn\.Module, as its attribute model is"):
        neuroflow.enable_cache(pipeline)


def listened_to(head):
    head.attention.register_forward_hook(lambda module, arguments, output: (SCALE * output[0], output[1]))


def with_a_method(head):
    forward = head.attention.forward
    head.attention.forward = lambda *args, **kwargs: (SCALE * forward(*args, **kwargs)[0], None)


def with_a_method_of_all(head):
    forward = head.forward
    head.forward = lambda tokens: SCALE * forward(tokens)


def with_an_adapter_that_torch_ignores(head):
    with_adapter(head.attention.out_proj, copy.deepcopy(head.attention.out_proj))


HEADS = [listened_to, with_a_method, with_a_method_of_all, with_an_adapter_that_torch_ignores]


@pytest.mark.parametrize("alter", HEADS)
@torch.no_grad()
def test_a_pooling_head_that_is_not_plain_is_called(alter):
    model, frame = tiny("siglip"), clip(frames=1)
    alter(model.head if hasattr(model, "head") else model.vision_model.head)
    expected = model(pixel_values=frame).pooler_output
    neuroflow.enable_cache(model)
    close(model(pixel_values=frame).pooler_output, expected)


def test_a_method_that_would_not_be_called_is_refused():
    model = tiny("sam")
    attention = describe(model).attentions[0]
    attention.forward = attention.forward
    with pytest.raises(TypeError, match=r"layers\.0\.attn has its own forward"):
        neuroflow.enable_cache(model)
    assert not neuroflow.is_patched(model)


def vit(config=None):
    settings = SIZES | {"image_size": 48, "patch_size": 8, "initializer_range": 0.2}
    return ViTModel(ViTConfig(**settings) if config is None else config, add_pooling_layer=False).eval()


def test_models_of_the_same_configuration_stay_as_they_are():
    model, frames = vit(), clip(frames=3)
    other, name = vit(model.config), model.config._attn_implementation
    expected = dense(other, frames)
    neuroflow.enable_cache(model, exact(threshold=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(torch.cat(dense(other, frames)), torch.cat(expected))
        # Nor does a part of the patched one patch a model that it is put into.
        other.layers[1] = copy.deepcopy(model.layers[1])
        dense(other, frames)
    assert not neuroflow.is_patched(other) and model.config._attn_implementation == name


def test_attention_that_was_switched_is_noticed():
    model, frames = vit(), clip(frames=2)
    expected = dense(model, frames)
    neuroflow.enable_cache(model, exact(threshold=0.1))
    run(model, frames)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError, match=r"switched to 'sdpa' .* call neuroflow\.disable_cache"):
        run(model, frames)
    neuroflow.disable_cache(model)
    close(dense(model, frames), expected)


class Forwarding(nn.Module):
    """As PEFT's models, torch.compile's and FSDP's: it answers for what it wraps."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("first", ["wrapped", "patched"])
@pytest.mark.parametrize("wrap", [Forwarding, compiled, nn.DataParallel])
def test_a_wrapper_that_answers_for_the_tower_is_not_taken_for_it(wrap, first):
    model, frames = vit(), clip(frames=2)
    expected = dense(model, frames)
    wrapper = wrap(model) if first == "wrapped" else wrap(neuroflow.enable_cache(model, exact(threshold=0)))
    neuroflow.enable_cache(wrapper, exact(threshold=0))
    assert neuroflow.is_patched(wrapper) and neuroflow.is_patched(model)
    close(run(wrapper, frames)[0], expected)
    assert neuroflow.summary(model).streams["a"].frames == 2
    neuroflow.disable_cache(wrapper)
    assert not neuroflow.is_patched(model) and not any("forward" in vars(part) for part in model.modules())


def test_no_message_shows_a_tensor():
    model, tensor = neuroflow.enable_cache(tiny("vit")), torch.zeros(1, 3, 48, 48)
    calls = [
        lambda: neuroflow.enable_cache(tensor),
        lambda: neuroflow.enable_cache(model, tensor),
        lambda: neuroflow.register_adapter(tensor, describe),
        lambda: neuroflow.encode(model, tensor, tensor[0, 0, 0, :1]),
        lambda: neuroflow.stream(model, tensor),
        lambda: model(pixel_values=[tensor]),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        assert "tensor(" not in str(caught.value) and len(str(caught.value)) < 200


class Adapter(nn.Module):
    """LoRA as PEFT attaches it: around a linear layer, one of several, also not trained."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.active, self.calls = base_layer, ["one"], 0
        self.others = nn.ModuleDict({name: nn.Linear(base_layer.in_features, base_layer.out_features) for name in "AB"})

    def forward(self, tokens):
        self.calls += 1
        active = [self.others[name](tokens) for name in self.active if name in self.others]
        return self.base_layer(tokens) + sum(active)


def adapted(model):
    mlp = model.layers[1].mlp
    mlp.fc1 = Adapter(mlp.fc1)


def replaced(model):
    model.layers[1].mlp.fc1 = nn.Linear(*reversed(model.layers[1].mlp.fc1.weight.shape))


def another_block(model):
    model.layers[1] = copy.deepcopy(vit().layers[1])


def wrapped(model):
    for module in list(model.modules()):
        forward = module.forward
        module.forward = lambda *args, forward=forward, **kwargs: forward(*args, **kwargs)


def put_back(model):
    for module in model.modules():
        vars(module).pop("forward", None)


@pytest.mark.parametrize("change", [adapted, replaced, another_block, wrapped, put_back])
def test_disabling_always_works_and_leaves_what_others_did(change):
    model, frames = vit(), clip(frames=2)
    plain = copy.deepcopy(model)
    neuroflow.enable_cache(model, exact(threshold=0.1))
    run(model, frames)
    torch.manual_seed(0)
    change(model)
    torch.manual_seed(0)
    change(plain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        neuroflow.disable_cache(model)
    told = [str(each.message) for each in caught]
    if change is wrapped:
        assert len(told) == 1 and "forward stays wrapped by " in told[0] and "wrapped.<locals>.<lambda>" in told[0]
    else:
        assert not told
    assert not neuroflow.is_patched(model)
    close(dense(model, frames), dense(plain, frames))
    ours, theirs = ({name for name, part in each.named_modules() if "forward" in vars(part)} for each in (model, plain))
    assert ours == theirs


def test_a_replaced_block_is_noticed_and_nothing_is_lost():
    model, frames = vit(), clip(frames=2)
    neuroflow.enable_cache(model, exact(threshold=0.1))
    run(model, frames)
    block = model.layers[1]
    another_block(model)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"layers\.1.* of ViTModel was replaced or wrapped .* enable_cache again"
        ):
            run(model, frames)
    model.layers[1] = block
    assert run(model, frames)[1] == [None, None]


def loaded(model):
    model.load_state_dict({name: SCALE * weight for name, weight in model.state_dict().items()})


def trained(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def one_bias(model):
    with torch.no_grad():
        model.layers[2].mlp.fc2.bias.add_(1)


def other_data(model):
    weight = model.layers[0].attention.o_proj.weight if hasattr(model.layers[0].attention, "o_proj") else None
    weight = model.layers[0].mlp.fc1.weight if weight is None else weight
    weight.data = SCALE * weight.data


def switched(model):
    model.layers[1].mlp.fc1.active = ["B"]


def widened(model):
    model.double()


@pytest.mark.parametrize("change", [loaded, trained, one_bias, other_data, switched, adapted, widened])
def test_caches_do_not_outlive_the_weights_that_made_them(change):
    """In any stream; and a module that notes something at each call is none that has changed."""
    model, frames = vit(), clip(frames=3, changed=3)
    if change is switched:
        adapted(model)
    neuroflow.enable_cache(model, exact(threshold=0.1))
    for name in "ab":
        assert run(model, frames, name)[1] == ["first", None, None]
    change(model)
    frames = frames.to(model.dtype)
    for name in "ab":
        outputs, reasons = run(model, frames[[2, 0, 1]], name)
        assert reasons == ["weights", None, None]
        with torch.no_grad():
            fresh = neuroflow.encode(model, frames[2:], [f"{name}, new"]).last_hidden_state
        assert torch.equal(outputs[0], fresh)


def test_a_loaded_stream_does_not_outlive_its_weights(tmp_path):
    model, frames = vit(), clip(frames=3)
    neuroflow.enable_cache(model, exact(threshold=0.1))
    run(model, frames[:2])
    neuroflow.save_state(model, tmp_path / "state")
    neuroflow.reset_cache(model)
    neuroflow.load_state(model, tmp_path / "state")
    assert run(model, frames[2:])[1] == [None]
    neuroflow.load_state(model, tmp_path / "state")
    one_bias(model)
    assert run(model, frames[2:])[1] == ["weights"]


def through(model, name, frames):
    with neuroflow.cache_context(model, name):
        for frame in frames.split(1):
            yield model(pixel_values=frame)


@contextlib.contextmanager
def camera(model, name):
    with neuroflow.cache_context(model, name):
        yield


def frames_of(model):
    return {name: stream.frames for name, stream in neuroflow.summary(model).streams.items()}


def test_a_context_held_over_a_yield_is_noticed():
    model, frames = neuroflow.enable_cache(vit()), clip(frames=3)
    with pytest.raises(RuntimeError, match=r"\('a',\) was held over a yield.* call neuroflow.stream"):
        list(zip(through(model, "a", frames), through(model, "b", frames), strict=True))
    neuroflow.reset_cache(model)
    model(pixel_values=frames[:1])
    assert frames_of(model) == {"default": 1}  # no name is left in force
    with pytest.raises(RuntimeError, match="held over a yield"):
        for _ in through(model, "a", frames):
            model(pixel_values=frames[:1])  # meant for the stream "default"
    for _ in through(model, "c", frames):
        break
    neuroflow.reset_cache(model)
    model(pixel_values=frames[:1])
    assert frames_of(model) == {"default": 1}


def test_contexts_that_are_left_in_order_are_not():
    model, frames = neuroflow.enable_cache(vit()), clip(frames=3)
    assert len(list(through(model, "a", frames))) == 3
    with camera(model, "b"):
        model(pixel_values=frames[:1])
        with neuroflow.cache_context(model, "c"):
            model(pixel_values=frames[:1])
        model(pixel_values=frames[:1])
    assert frames_of(model) == {"a": 3, "b": 2, "c": 1}


def test_a_stream_is_called_as_the_model():
    model, frames = neuroflow.enable_cache(vit(), exact(threshold=0.1)), clip(frames=3)
    with torch.no_grad():
        cameras = [neuroflow.stream(model, name) for name in "ab"]
        for frame in frames.split(1):
            assert torch.equal(*(camera(pixel_values=frame).last_hidden_state for camera in cameras))
        cameras[0](frames, output_hidden_states=False)
    assert frames_of(model) == {"a": 6, "b": 3}
    with pytest.raises(TypeError, match="name is a list"):
        neuroflow.stream(model, ["a"])
    neuroflow.disable_cache(model)
    for call in (lambda: neuroflow.stream(model, "a"), lambda: cameras[0](frames[:1])):
        with pytest.raises(RuntimeError, match="not patched"):
            call()


@pytest.mark.parametrize("arch", "AE")
@pytest.mark.parametrize("family", ["siglip", "vit"])
def test_autocast_for_some_frames(family, arch):
    model, frames = tiny(family), clip(frames=4)
    contexts = [contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", torch.float16)]
    expected = []
    for context in contexts:
        with context:
            expected.append(dense(model, frames[:1])[0])
    neuroflow.enable_cache(model, exact(arch=arch, threshold=1e-3))
    for context, first, why in zip(contexts, expected, ("first", "size", "size"), strict=True):
        with context:
            outputs, reasons = run(model, frames)
        assert reasons == [why, None, None, None]
        assert {output.dtype for output in outputs} == {first.dtype}
        torch.testing.assert_close(outputs[0], first, rtol=0.05, atol=0.05)
    outputs, reasons = run(model, frames)
    assert reasons == ["size", None, None, None]
    close(outputs[:1], expected[:1])


def test_another_default_dtype():
    model, frames = tiny("siglip"), clip(frames=4)
    neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig().reproducible())
    expected = run(model, frames)
    neuroflow.reset_cache(model)
    torch.set_default_dtype(torch.float64)
    try:
        found = run(model, frames)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[1] == expected[1] and torch.equal(torch.cat(found[0]), torch.cat(expected[0]))


@pytest.mark.parametrize("family", ["siglip", "clip", "sam", "qwen2.5-vl"])
def test_a_copy_is_patched_with_streams_of_its_own(family):
    model, outer = tiny(family), nn.Module()
    outer.tower, outer.same = model, model
    streams = neuroflow.StreamCache(max_streams=3)
    neuroflow.enable_cache(outer, exact(arch="A", threshold=1e-3), streams)
    twin = copy.deepcopy(outer)
    assert twin.same is twin.tower is not model
    assert neuroflow.is_patched(twin) and neuroflow.summary(twin).limit_bytes == 0
    neuroflow.disable_cache(twin)
    assert neuroflow.is_patched(outer)
    theirs = tiny(family)
    for (name, ours), other in zip(twin.tower.named_modules(), theirs.modules(), strict=True):
        assert vars(ours).keys() == vars(other).keys(), name


@pytest.mark.parametrize("arch", "ABE")
def test_a_copy_does_what_its_model_does(arch):
    model, frames = tiny("siglip"), clip(frames=4)
    neuroflow.enable_cache(model, exact(arch=arch, threshold=1e-3))
    run(model, frames[:2])
    twin = copy.deepcopy(model)
    assert not neuroflow.summary(twin).streams
    expected, reasons = run(model, frames, "b")
    found, theirs = run(twin, frames)
    assert torch.equal(torch.cat(found, 1), torch.cat(expected, 1)) and theirs == reasons
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(torch.cat(run(model, frames, "c")[0], 1), torch.cat(expected, 1))
    assert frames_of(model) == {"a": 2, "b": 4, "c": 4}


@pytest.mark.parametrize("save", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_a_patched_model_says_that_it_cannot_be_pickled(save):
    model = neuroflow.enable_cache(tiny("siglip"))
    with pytest.raises(TypeError, match="disable_cache first, or save its state_dict"):
        save(model)
    neuroflow.disable_cache(model)
    save(model)

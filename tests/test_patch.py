"""Patching in place, and what is left of it afterwards."""

import functools

import neuroflow
import pytest
import torch
from models import clip, tiny
from neuroflow.adapters import describe
from neuroflow.llm import BypassConfig, disable_bypass, enable_bypass
from transformers import LlamaConfig, LlamaForCausalLM


def attributes(model):
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def vision(model):
    return describe(model).tower, describe(model).layers[1].mlp.fc1


def language(model):
    return model.model, model.model.layers[1].self_attn.o_proj


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50)).eval()


PATCHES = {
    "vision": (lambda: tiny("siglip"), neuroflow.enable_cache, neuroflow.disable_cache, vision),
    "language": (llama, lambda model: enable_bypass(model, BypassConfig(0, (1,), 0.5)), disable_bypass, language),
}


def run(model):
    if isinstance(model, LlamaForCausalLM):
        ids = torch.arange(6)[None]
        return torch.cat([model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)])
    with torch.inference_mode():
        return torch.cat([model(pixel_values=frame).pooler_output for frame in clip(frames=3).split(1)])


def test_enable_cache_returns_the_model():
    model = tiny("siglip")
    assert neuroflow.enable_cache(model) is model and neuroflow.enable_cache(model) is model


@pytest.mark.parametrize("kind", PATCHES)
def test_nothing_is_left(kind):
    make, enable, disable, _ = PATCHES[kind]
    model = make()
    before = attributes(model)
    enable(model)
    run(model)
    disable(model)
    after = attributes(model)
    assert before.keys() == after.keys()
    for name, own in before.items():
        assert own.keys() == after[name].keys() and all(after[name][key] is value for key, value in own.items())


@pytest.mark.parametrize("kind", PATCHES)
def test_what_something_else_wrapped_in_between_stays_wrapped(kind):
    """As of a library that moves layers to a device and back; and the next one who patches finds nothing odd."""
    make, enable, disable, parts = PATCHES[kind]
    model, calls = make(), []
    expected = run(model)
    enable(model)
    for module in parts(model):
        inner = module.forward

        @functools.wraps(inner)
        def wrapper(*args, inner=inner, **kwargs):
            calls.append(1)
            return inner(*args, **kwargs)

        module.forward = wrapper
    disable(model)
    assert torch.equal(run(model), expected) and calls
    enable(model)
    patched = run(model)
    disable(model)
    assert patched.shape == expected.shape and torch.equal(run(model), expected)


@pytest.mark.parametrize("kind", PATCHES)
def test_what_was_put_back_in_between_stays(kind):
    """As by a library whose wrapper was there before, and which takes it away while the model is patched."""
    make, enable, disable, parts = PATCHES[kind]
    model = make()
    expected = run(model)
    originals = [module.forward for module in parts(model)]
    enable(model)
    for module, original in zip(parts(model), originals, strict=True):
        module.forward = original
    disable(model)
    assert torch.equal(run(model), expected)

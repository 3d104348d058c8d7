"""The bypass of language models, on tiny random ones of every family."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
import transformers
from neuroflow.llm import DECODERS, BypassConfig, bypass_summary, cache_argument, disable_bypass, enable_bypass
from transformers import DynamicCache, GPT2Config, LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, VOCABULARY, PADDING = 4, 48, 0
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": PADDING,
    "eos_token_id": None,
    "bos_token_id": None,
}
GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
GPT2 |= {"pad_token_id": PADDING, "eos_token_id": None, "bos_token_id": None}
CONFIGS = {
    "phi3": lambda: Phi3Config(**SIZES),
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "gpt2": lambda: GPT2Config(**GPT2),
    "gpt2 upcast": lambda: GPT2Config(**GPT2, reorder_and_upcast_attn=True, attn_implementation="eager"),
}
CLASSES = dict(zip(("phi3", "llama", "qwen2", "qwen3", "gpt2"), DECODERS, strict=True))
NEVER, ALWAYS = 2.0, -2.0


def tiny(family, dtype=torch.float32):
    model = getattr(transformers, CLASSES[family.split()[0]])(CONFIGS[family]())
    # Freshly made models have zero biases and unit norms, attention that hardly differs from step to step, and other
    # weights with every release.
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_(parameter.ndim == 1 and name.endswith("weight"))
    return model.eval().to(dtype)


@pytest.fixture(params=CONFIGS)
def model(request):
    # In 32 bits attention that is computed in float32 shows no difference.
    return tiny(request.param, torch.bfloat16 if "upcast" in request.param else torch.float32)


def layers_of(model):
    family = DECODERS[type(model).__name__]
    return getattr(getattr(model, family.decoder), family.layers), family


def ids_of(rows=1, tokens=12, seed=1):
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forced(model, ids, prompt=3):
    """Logits [B, N - prompt + 1, V] of given tokens, one by one after the prompt, and the cache."""
    cache = DynamicCache(config=model.config)
    given = {cache_argument(model): cache}
    logits = [model(ids[:, :prompt], **given).logits[:, -1:]]
    logits += [model(step, **given).logits for step in ids[:, prompt:].split(1, 1)]
    return torch.cat(logits, 1), cache


def generated(model, ids, mask=None, **options):
    """Tokens and logits of a greedy generation."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {
        "do_sample": False,
        "max_new_tokens": 8,
        "return_dict_in_generate": True,
        "output_logits": True,
    } | options
    found = model.generate(ids, attention_mask=mask, **options)
    return found.sequences, torch.stack(found.logits)


class Seen:
    """What a module gave in every pass since, [passes, B, D] of the last position."""

    def __init__(self, module):
        self.outputs = []
        module.register_forward_hook(self.note)

    def note(self, module, inputs, output):
        self.outputs.append((output[0] if isinstance(output, tuple) else output)[:, -1].clone())

    def __getitem__(self, number):
        return self.outputs[number]


def cosines(outputs):
    """Of each pass with the one before, [passes - 1, B], in numpy."""
    found = np.stack([output.double().numpy() for output in outputs])
    norms = np.linalg.norm(found, axis=-1)
    return (found[1:] * found[:-1]).sum(-1) / (norms[1:] * norms[:-1])


def middle(model, ids, gate):
    """A threshold among the gate's cosines."""
    enable_bypass(model, BypassConfig(gate, ((gate + 1) % LAYERS,), NEVER))
    forced(model, ids)
    found = bypass_summary(model).p50
    disable_bypass(model)
    return found + 1e-4


@pytest.mark.parametrize("target", ["attention", "mlp"])
def test_a_threshold_above_every_similarity_is_the_plain_model_bit_for_bit(model, target):
    ids = ids_of(rows=3, tokens=6)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :1] = 0
    ids = ids.masked_fill(mask == 0, PADDING)
    expected = generated(model, ids[1:2]), generated(model, ids, mask), forced(model, ids)[0]
    enable_bypass(model, BypassConfig(2, (0, 3), NEVER, target))
    found = generated(model, ids[1:2]), generated(model, ids, mask), forced(model, ids)[0]
    assert bypass_summary(model).rate == 0 and bypass_summary(model).steps == 7 + 3 * 7 + 3 * 3
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("target", ["attention", "mlp"])
def test_the_cache_has_no_hole(model, target):
    ids = ids_of(rows=2)
    _, plain = forced(model, ids)
    enable_bypass(model, BypassConfig(1, (0, 3), ALWAYS, target))
    cache = DynamicCache(config=model.config)
    given = {cache_argument(model): cache}
    with torch.no_grad():
        model(ids[:, :3], **given)
        for seen in range(3, 12):
            model(ids[:, seen : seen + 1], **given)
            assert [layer.get_seq_length() for layer in cache.layers] == [seen + 1] * LAYERS
    assert bypass_summary(model).rate == (9 + 8) / (2 * 9)  # the first decision comes too late for layer 0
    # Those of the first layer follow from the tokens alone.
    assert torch.equal(cache.layers[0].keys, plain.layers[0].keys)
    assert torch.equal(cache.layers[0].values, plain.layers[0].values)


@pytest.mark.parametrize(("gate", "cached"), [(1, 3), (2, 0)])
@pytest.mark.parametrize("target", ["attention", "mlp"])
def test_each_row_repeats_its_own_last_output_where_the_gate_says_so(model, gate, cached, target):
    ids = ids_of(rows=3)
    threshold = middle(model, ids, gate)
    enable_bypass(model, BypassConfig(gate, (cached,), threshold, target))
    layers, family = layers_of(model)
    of_gate = Seen(getattr(layers[gate], family.attention))
    repeated = Seen(layers[cached].mlp if target == "mlp" else getattr(layers[cached], family.attention))
    forced(model, ids)
    similarities = cosines(of_gate.outputs)
    decided = similarities >= threshold
    if cached < gate:
        decided = np.concatenate([np.zeros((1, 3), bool), decided[:-1]])
    assert 0 < decided.mean() < 1 and decided.any(1).sum() > decided.all(1).sum()
    same = [torch.eq(repeated[step], repeated[step - 1]).all(1).tolist() for step in range(1, 10)]
    assert same == decided.tolist()
    summary = bypass_summary(model)
    assert (summary.steps, summary.rate) == (27, decided.mean())
    np.testing.assert_allclose((summary.p10, summary.p50, summary.p90), np.percentile(similarities, (10, 50, 90)), 1e-5)
    assert f"27 decode steps, {decided.mean():.1%} repeated, similarity P10 {summary.p10:.3f}" in str(summary)


def test_an_mlp_that_is_bypassed_does_not_run_and_adds_its_last_increment():
    model = tiny("llama")
    layer = model.model.layers[3]
    enable_bypass(model, BypassConfig(1, (3,), ALWAYS, "mlp"))
    runs, attention, mlp, out = Seen(layer.mlp.down_proj), Seen(layer.self_attn), Seen(layer.mlp), Seen(layer)
    into = Seen(model.model.layers[2])
    forced(model, ids_of(rows=2))
    assert len(runs.outputs) == 1 and len(mlp.outputs) == 10
    for step in range(10):
        assert torch.equal(out[step], into[step] + attention[step] + runs[0])


def test_attention_that_is_bypassed_does_not_run(monkeypatch):
    model = tiny("qwen3")
    enable_bypass(model, BypassConfig(1, (3,), ALWAYS))
    ran = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    count = lambda *arguments, **options: ran.append(1) or sdpa(*arguments, **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    projected = Seen(model.model.layers[3].self_attn.o_proj)
    forced(model, ids_of())
    assert len(ran) == LAYERS + 9 * (LAYERS - 1)
    assert all(torch.equal(output, projected[0]) for output in projected.outputs)


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
@pytest.mark.parametrize(("gate", "cached"), [(1, 2), (2, 0)])
@pytest.mark.parametrize("target", ["attention", "mlp"])
def test_a_batch_of_two_rows_is_each_alone(family, gate, cached, target):
    model = tiny(family, torch.float64)
    ids = ids_of(rows=2)
    config = BypassConfig(gate, (cached,), middle(model, ids, gate), target)
    counted, alone = [], []
    for row in ids.split(1):
        enable_bypass(model, config)
        alone.append(forced(model, row)[0])
        counted.append(bypass_summary(model).rate)
        disable_bypass(model)
    assert counted[0] != counted[1]
    enable_bypass(model, config)
    torch.testing.assert_close(forced(model, ids)[0], torch.cat(alone), rtol=1e-11, atol=1e-11)
    assert bypass_summary(model).rate == pytest.approx(np.mean(counted))


def test_left_padding_changes_no_row():
    model = tiny("llama", torch.float64)
    ids = ids_of(tokens=6)
    config = BypassConfig(1, (2,), middle(model, ids_of(), 1))
    enable_bypass(model, config)
    alone = generated(model, ids)[1][:, 0]
    summary = bypass_summary(model)
    assert 0 < summary.rate < 1
    padded = torch.cat([torch.full((1, 4), PADDING), ids], 1)
    mask = torch.tensor([[0] * 4 + [1] * 6, [1] * 10])
    disable_bypass(model)
    enable_bypass(model, config)
    generated(model, padded, mask[:1])
    assert dataclasses.astuple(bypass_summary(model)) == pytest.approx(dataclasses.astuple(summary), rel=1e-11)
    together = generated(model, torch.cat([padded, ids_of(tokens=10, seed=3)]), mask)[1][:, 0]
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)


def test_every_prompt_another_batch_and_another_cache_start_over():
    model = tiny("phi3")
    ids = ids_of(rows=2)
    plain = forced(model, ids)[0]
    enable_bypass(model, BypassConfig(1, (0, 2), ALWAYS))
    first, _ = forced(model, ids)
    assert not torch.equal(first, plain)
    assert torch.equal(forced(model, ids)[0], first)  # its prompt is dense

    def step_of(cache, rows):
        with torch.no_grad():
            return model(ids[:rows, -1:], **{cache_argument(model): cache}).logits

    # Caches that only the plain model has written to, so that a step over them is the plain model's if it is dense.
    disable_bypass(model)
    _, cache = forced(model, ids[:, :-1])
    enable_bypass(model, BypassConfig(1, (0, 2), ALWAYS))
    forced(model, ids[:, :-1], prompt=10)  # as long as the other
    assert torch.equal(step_of(cache, 2), plain[:, -1:])
    cache.crop(-1)
    assert torch.equal(step_of(cache, 2), plain[:, -1:])
    step_of(cache, 2)
    assert bypass_summary(model).steps == 4
    cache.batch_select_indices(torch.tensor([0]))
    step_of(cache, 1)
    assert bypass_summary(model).steps == 4


def test_what_is_added_to_a_conversation_is_a_prompt():
    model = tiny("phi3")
    ids = ids_of(rows=2)
    plain = forced(model, ids)[0]
    _, cache = forced(model, ids[:, :9])
    enable_bypass(model, BypassConfig(1, (0, 2), ALWAYS))
    with torch.no_grad():
        given = {cache_argument(model): cache}
        found = [model(part, **given).logits for part in (ids[:, 9:10], ids[:, 10:])]
    torch.testing.assert_close(torch.cat(found, 1), plain[:, -3:])
    assert bypass_summary(model).steps == 0


def test_a_prompt_of_one_token_is_a_prompt():
    model = tiny("llama")
    ids = ids_of(tokens=5)
    enable_bypass(model, BypassConfig(1, (2,), ALWAYS))
    for _ in range(2):
        forced(model, ids, prompt=1)
    assert bypass_summary(model).steps == 2 * 4


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"do_sample": True}])
def test_generation_repeats(options):
    model = tiny("phi3")
    enable_bypass(model, BypassConfig(1, (3,), ALWAYS))
    generated(model, ids_of(rows=2), **options)
    assert (bypass_summary(model).steps, bypass_summary(model).rate) == (2 * 7, 1)


def test_embeddings_are_taken_instead_of_ids():
    model = tiny("qwen2")
    ids = ids_of()
    enable_bypass(model, BypassConfig(1, (3,), ALWAYS))
    expected = forced(model, ids)[0]
    cache = {cache_argument(model): DynamicCache(config=model.config)}
    embedded = model.get_input_embeddings()(ids)
    with torch.no_grad():
        parts = [embedded[:, :3], *embedded[:, 3:].split(1, 1)]
        found = [model(inputs_embeds=part, **cache).logits[:, -1:] for part in parts]
    assert torch.equal(torch.cat(found, 1), expected)


@pytest.mark.parametrize("way", ["own name", "old name", "position", "output", "tuple"])
def test_the_cache_is_found_however_it_is_handed_on(model, way):
    """By the name that the decoder's signature has or had before transformers 5.24, and in what a prompt gives."""
    ids = ids_of()
    decoder, names = layers_of(model)[1].decoder, list(inspect.signature(model.base_model.forward).parameters)
    decoder, place = getattr(model, decoder), names.index(cache_argument(model))
    cache = DynamicCache(config=model.config)
    enable_bypass(model, BypassConfig(1, (3,), ALWAYS))
    with torch.no_grad():
        for number, step in enumerate(ids.split(1, 1)):
            if way == "position":
                decoder(step, *[None] * (place - 1), cache)
            elif number or way in ("own name", "old name"):
                decoder(step, **{"past_key_values" if way == "old name" else cache_argument(model): cache})
            else:
                output = decoder(step, return_dict=way == "output")
                cache = next(
                    each for each in (output if way == "tuple" else output.values()) if type(each) is type(cache)
                )
    assert (bypass_summary(model).steps, bypass_summary(model).rate) == (11, 1)


@pytest.mark.parametrize("held", [None, "pages", "nothing"])
def test_a_pass_without_a_cache_repeats_nothing_and_says_so_once(model, held):
    """Nor does one whose cache has no keys of one sequence, or none that the layers wrote."""
    ids = ids_of()
    expected = model(ids).logits
    decoder = getattr(model, layers_of(model)[1].decoder)
    forward = decoder.forward
    options = {"use_cache": False}
    if held is not None:
        cache = object() if held == "pages" else DynamicCache(config=model.config)
        decoder.forward = lambda *args, **kwargs: forward(*args, **kwargs | {cache_argument(model): None})
        decoder.forward.__signature__ = inspect.signature(forward)
        options[cache_argument(model)] = cache
    enable_bypass(model, BypassConfig(1, (3,), ALWAYS))
    assert cache_argument(decoder) == cache_argument(model)
    with pytest.warns(
        RuntimeWarning, match="ran without a cache, so nothing is repeated; accepted is use_cache"
    ) as said:
        for _ in range(2):
            assert torch.equal(model(ids, **options).logits, expected)
            model(ids[:, :1], **options)
    assert len([each for each in said if "without a cache" in str(each.message)]) == 1
    assert bypass_summary(model).steps == 0


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_beam_search_is_refused(options):
    model = tiny("llama")
    enable_bypass(model, BypassConfig(1, (3,), ALWAYS))
    with pytest.raises(RuntimeError, match=r"as beam search does; accepted are greedy decoding and sampling"):
        generated(model, ids_of(), num_beams=3, **options)


def test_disabling_gives_back_the_identical_objects(model):
    hooked = layers_of(model)[0][3].mlp
    hooked.forward = type(hooked).forward.__get__(hooked)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    expected = generated(model, ids_of())
    for target in ("attention", "mlp"):
        enable_bypass(model, BypassConfig(1, (0, 3), ALWAYS, target))
        assert not torch.equal(generated(model, ids_of())[1], expected[1])
        disable_bypass(model)
        after = {name: dict(vars(module)) for name, module in model.named_modules()}
        assert after.keys() == before.keys()
        for name, attributes in before.items():
            assert after[name].keys() == attributes.keys()
            assert all(after[name][key] is value for key, value in attributes.items())
    assert torch.equal(generated(model, ids_of())[1], expected[1])
    disable_bypass(model)


def test_enabling_twice():
    model = tiny("llama")
    enable_bypass(model, BypassConfig(1, (3,), 0.5))
    forced(model, ids_of())
    enable_bypass(model, BypassConfig(1, [3], 0.5))
    assert bypass_summary(model).steps == 9
    with pytest.raises(RuntimeError, match=r"already patched, with BypassConfig\(gate_layer=1.*disable_bypass first"):
        enable_bypass(model, BypassConfig(1, (3,), 0.6))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gate_layer": -1}, "gate_layer is -1; accepted is the number of a layer"),
        ({"gate_layer": True}, "gate_layer is True; accepted"),
        ({"cache_layers": ()}, r"cache_layers is \(\); accepted is numbers of layers, at least one"),
        ({"cache_layers": 3}, "cache_layers is 3; accepted"),
        ({"cache_layers": (2, 2)}, r"cache_layers is \(2, 2\); accepted"),
        ({"cache_layers": (1, 2)}, "accepted is layers other than the gate's, 1"),
        ({"threshold": float("nan")}, "threshold is nan; accepted is a finite number"),
        ({"threshold": "0.5"}, "threshold is '0.5'; accepted"),
        ({"target": "both"}, "target is 'both'; accepted is one of 'attention', 'mlp'"),
    ],
)
def test_values_out_of_range_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        BypassConfig(**{"gate_layer": 1, "cache_layers": (2,), "threshold": 0.5} | changed)


def test_an_mlp_may_follow_its_own_layers_gate():
    model = tiny("llama")
    enable_bypass(model, BypassConfig(1, (1,), ALWAYS, "mlp"))
    forced(model, ids_of())
    assert bypass_summary(model).rate == 1


def test_what_does_not_fit_the_model_is_named_and_leaves_it_as_it_was():
    model = tiny("llama")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"gate_layer is 4; accepted is layers of the model, 0 to 3"):
        enable_bypass(model, BypassConfig(4, (1,), 0.5))
    with pytest.raises(ValueError, match=r"cache_layers is \(2, 7\); accepted is layers of the model, 0 to 3"):
        enable_bypass(model, BypassConfig(1, (2, 7), 0.5))
    with pytest.raises(TypeError, match=r"config is 0\.5"):
        enable_bypass(model, 0.5)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    with pytest.raises(RuntimeError, match=r"is not patched; call neuroflow\.llm\.enable_bypass first"):
        bypass_summary(model)
    other = torch.nn.Linear(2, 2)
    for call in (lambda: enable_bypass(other, BypassConfig(1, (2,), 0.5)), lambda: disable_bypass(other)):
        with pytest.raises(TypeError, match="Linear is not of a known family; accepted are Phi3ForCausalLM, Llama"):
            call()


def test_before_the_first_step_there_are_no_percentiles():
    model = tiny("llama")
    enable_bypass(model, BypassConfig(1, (3,), 0.5))
    summary = bypass_summary(model)
    assert (summary.steps, summary.rate) == (0, 0) and np.isnan([summary.p10, summary.p50, summary.p90]).all()

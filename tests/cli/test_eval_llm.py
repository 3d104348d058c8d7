"""`neuroflow eval llm`, on a tiny random Phi-3 over bytes."""

import json

import pytest
import torch
import torch.nn.functional as F
from neuroflow import llm_evaluation
from neuroflow.llm import BypassConfig, bypass_summary, cache_argument, enable_bypass
from neuroflow_cli import main
from transformers import BertConfig, DynamicCache, Phi3Config, Phi3ForCausalLM, Phi3Model, ViTConfig

from bench.studies.train_llm import byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, TOKENS, NEW = 4, 24, 6
TEXTS = {"code": "def f(x):\n    return x + 1\n" * 4, "prose": "It rains, and nobody is in the street. " * 4}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**TINY)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("models") / "phi3"
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def texts(tmp_path):
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return [tmp_path / f"{name}.txt" for name in TEXTS]


@pytest.fixture
def call(capsys):
    """call(*arguments) of `eval llm` -> exit code, stdout, stderr."""

    def run(*arguments):
        try:
            code = main(["eval", "llm", *(str(argument) for argument in arguments)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def evaluated(call, directory, texts, tmp_path):
    """evaluated(*options) -> exit code, stdout, stderr, and what is in the file by name."""
    out = tmp_path / "result.json"

    def run(*options):
        lengths = ("--tokens", TOKENS, "--windows", 2, "--new-tokens", NEW)
        code, table, message = call("--model", directory, "--text", *texts, *lengths, "--out", out, *options)
        return code, table, message, json.loads(out.read_text())["found"] if out.exists() else None

    return run


def windows_of(text):
    ids = torch.tensor([byte + 3 for byte in text.encode()])
    return torch.stack([ids[:TOKENS], ids[len(ids) - TOKENS :]])


@torch.no_grad()
def by_hand(model, ids, config=None):
    """Perplexity token by token, the bypass's summary, and a greedy continuation of the first half."""
    found = None
    if config is not None:
        model = Phi3ForCausalLM.from_pretrained(model) if isinstance(model, str) else model
        enable_bypass(model, config)
    cache, losses = {cache_argument(model): DynamicCache(config=model.config)}, []
    for place in range(TOKENS - 1):
        logits = model(ids[:, place : place + 1], **cache).logits[:, 0]
        losses.append(F.cross_entropy(logits, ids[:, place + 1]))
    if config is not None:
        found = bypass_summary(model)
    half = ids[:, : TOKENS // 2]
    continued = model.generate(
        half, attention_mask=torch.ones_like(half), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW
    )
    return torch.stack(losses).mean().exp().item(), found, continued[:, TOKENS // 2 :]


def test_the_file_and_the_table_hold_what_a_loop_by_hand_finds(evaluated, model, directory):
    code, table, message, found = evaluated("--pairs", "1:3", "2:0", "--thresholds", 0.95, 2)
    assert code == 0, message
    assert "2>0 at 2: 100%" in message
    assert list(found) == ["1>3 at 0.95", "1>3 at 2", "2>0 at 0.95", "2>0 at 2"]
    for row in found.values():
        config = BypassConfig(row["gate_layer"], tuple(row["cache_layers"]), row["threshold"], row["target"])
        assert row["dense_ms"] > 0 and row["ms"] > 0
        for name, text in TEXTS.items():
            ids = windows_of(text)
            plain, _, expected = by_hand(model, ids)
            perplexity, summary, continued = by_hand(str(directory), ids, config)
            measured = row["texts"][name]
            assert measured["dense_perplexity"] == pytest.approx(plain, rel=1e-5)
            assert measured["perplexity"] == pytest.approx(perplexity, rel=1e-5)
            assert measured["drift"] == pytest.approx((continued != expected).float().mean().item())
            for figure in ("steps", "rate", "p10", "p50", "p90"):
                assert measured[figure] == pytest.approx(getattr(summary, figure))
            assert measured["steps"] == 2 * (TOKENS - 2)
            if row["threshold"] == 2:
                assert measured["divergence"] == [0] * LAYERS and measured["drift"] == 0
                assert measured["perplexity"] == measured["dense_perplexity"]
            else:
                assert 0 < measured["rate"] < 1
                unmoved = min(row["cache_layers"])
                assert measured["divergence"][:unmoved] == [0] * unmoved
                assert all(each > 0 for each in measured["divergence"][unmoved:])
    line = next(line for line in table.splitlines() if line.startswith("1>3") and "prose" in line).split()
    measured = found["1>3 at 0.95"]["texts"]["prose"]
    assert line[:4] == ["1>3", "0.95", "prose", f"{measured['rate']:.1%}"]
    assert line[7:9] == [f"{measured['dense_perplexity']:.3f}", f"{measured['perplexity']:.3f}"]
    assert line[9:] == [f"{measured['drift']:.1%}", f"{measured['divergence'][-1]:.4f}"]
    assert "Phi3ForCausalLM, 4 layers, float32" in table and "code              2 windows of 24 tokens" in table


def test_divergence_is_the_distance_to_dense_as_a_share_of_its_length():
    plain = [torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])] * 2  # [layers, W, D] of two steps
    found = [plain[0], torch.tensor([[[3.0, 5.0]], [[0.0, 0.0]]])]
    assert llm_evaluation._divergence(plain, found) == pytest.approx([0.1, 0.5])


def test_defaults_are_the_layer_at_three_quarters_and_the_last_and_mlps_can_be_the_target(evaluated):
    code, table, _, found = evaluated("--target", "mlp", "--thresholds", -2)
    assert code == 0 and list(found) == ["1>3 mlp at -2"] and "1>3 mlp" in table
    row = found["1>3 mlp at -2"]
    assert (row["target"], row["timed_rate"]) == ("mlp", 1)


def test_a_run_that_was_stopped_goes_on(evaluated, monkeypatch):
    real, followed = llm_evaluation.time_steps, []

    def stop_second(*arguments):
        if followed:
            raise KeyboardInterrupt
        followed.append(1)
        return real(*arguments)

    monkeypatch.setattr(llm_evaluation, "time_steps", stop_second)
    options = ("--pairs", "1:3", "1:2", "--thresholds", 0.5)
    code, _, message, found = evaluated(*options)
    assert code == 130 and found is None and "the same command with --resume continues it" in message
    monkeypatch.setattr(llm_evaluation, "time_steps", lambda *arguments: (7.0, 5.0))
    code, table, _, found = evaluated(*options, "--resume")
    assert code == 0 and list(found) == ["1>3 at 0.5", "1>2 at 0.5"]
    assert found["1>3 at 0.5"]["ms"] != 5.0 and found["1>2 at 0.5"]["ms"] == 5.0
    assert "1.400x" in table
    code, again, message, _ = evaluated(*options, "--resume")
    assert code == 0 and again == table
    code, _, message, _ = evaluated(*options, "--resume", "--windows", 1)
    assert code == 2 and "was made with windows 2, not 1" in message


def test_windows_lie_evenly_and_do_not_overlap():
    assert llm_evaluation.cut_windows(list(range(10)), 4, 9).tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert llm_evaluation.cut_windows(list(range(10)), 4, 1).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="ids has 10 tokens; accepted are 11 or more"):
        llm_evaluation.cut_windows(list(range(10)), 11, 1)


def test_bad_texts_are_named(call, directory, tmp_path, texts):
    def message_of(*paths, tokens=TOKENS):
        code, table, message = call("--model", directory, "--tokens", tokens, "--text", *paths)
        assert code == 2 and not table and message.count("\n") == 1
        return message

    empty, binary, other = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "other" / "code.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    other.parent.mkdir()
    other.write_text("x")
    assert f"{empty}: is empty; give a file that holds text" in message_of(*texts, empty)
    assert f"{binary}: cannot be read (it is not UTF-8)" in message_of(binary)
    assert "cannot be read (No such file or directory)" in message_of(tmp_path / "none.txt")
    assert f"{other}: {texts[0]} has that name too" in message_of(texts[0], other)
    assert f"{texts[0]}: gives {len(TEXTS['code'])} tokens; give a longer text, or fewer" in message_of(
        texts[0], tokens=500
    )
    code, _, message = call("--model", directory)
    assert code == 2 and "required: --text" in message


def test_bad_models_are_named(call, directory, tmp_path, texts):
    def message_of(path):
        code, _, message = call("--model", path, "--text", texts[0], "--tokens", TOKENS)
        assert code == 2 and message.count("\n") == 1
        return message

    assert "no such directory" in message_of(tmp_path / "none")
    for config in (ViTConfig(), BertConfig()):
        config.save_pretrained(tmp_path / config.model_type)
        message = message_of(tmp_path / config.model_type)
        assert f"its type is {config.model_type}; give a causal model of one of Phi3ForCausalLM" in message
    bare = tmp_path / "bare"
    Phi3Model(Phi3Config(**TINY)).save_pretrained(bare)
    byte_tokenizer().save_pretrained(bare)
    assert "1 weights are missing, lm_head.weight first; give a whole checkpoint" in message_of(bare)
    mute = tmp_path / "mute"
    Phi3ForCausalLM.from_pretrained(directory).save_pretrained(mute)
    message = message_of(mute)
    assert "cannot be loaded" in message and "with its tokenizer" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--pairs", "1:9"), "--pairs, --thresholds: cache_layers is (9,); accepted is layers of the model, 0 to 3"),
        (("--pairs", "1:1"), "accepted is layers other than the gate's, 1"),
        (("--pairs", "1-3"), "'1-3' is not a pair of layers; give 1:24 or 1:24,31"),
        (("--thresholds", "nan"), "threshold is nan; accepted is a finite number"),
        (("--tokens", "2"), "2 is not 4 or more"),
        (("--device", "cuda:99"), "--device cuda:99: cannot be used"),
        (("--resume",), "--resume: there is nothing to continue without --out"),
        (("--out", "no/such/result.json"), "cannot be written"),
    ],
)
def test_bad_options_are_named(call, directory, texts, options, expected):
    code, table, message = call("--model", directory, "--text", *texts, "--tokens", TOKENS, *options)
    assert code == 2 and not table and expected in message


def test_help(call):
    code, table, _ = call("--help")
    assert code == 0 and "Phi-3, Llama, Qwen2, Qwen3 or GPT-2" in table and "examples:" in table

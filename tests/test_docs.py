"""What the documentation shows: its code runs, its commands parse, its links lead somewhere, its messages exist."""

import argparse
import ast
import functools
import importlib
import re
import shlex
import sys
import types
from collections import Counter
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import neuroflow_cli
import numpy as np
import pytest
import torch
import transformers
from neuroflow import adapters
from neuroflow.files import to_json
from PIL import Image
from questions import inputs_of, video
from recordings import write_recording
from torch import nn

from bench.vllm_models import byte_tokenizer, made

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
FOLDERS = ("python", "neuroflow_kernels", "bench", "csrc", ".github")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
GUIDES = [page for page in PAGES if (ROOT / "bench" / "results") not in page.parents]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
SHELL = ("", "sh", "bash", "shell", "console")
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
SIDE = 224


def named(pages):
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


def blocks(page, *languages):
    """The fenced blocks of a page in these languages, and the line that each begins behind."""
    text = page.read_text()
    for fence in FENCE.finditer(text):
        indent, language, code = fence.groups()
        if language in languages:
            yield text[: fence.start(3)].count("\n"), re.sub(f"^{indent}", "", code, flags=re.MULTILINE)


def commands(page):
    """The lines that a page tells to type, without prompts and comments."""
    for _, block in blocks(page, *SHELL):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ").strip()
            if re.match(r"([A-Z_]+=\S+ )*(\S*/)?(neuroflow|make|python|pytest) ", line + " "):
                yield line


def spans(page):
    """What stands in backticks in a page's text."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))


def tiny_siglip():
    text = {"vocab_size": 300, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"image_size": SIDE, "patch_size": 16}
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=TINY | sizes, text_config=TINY | text))


def tiny_phi3():
    """As many layers as Phi-3-mini has, since pages name some of them."""
    tokens = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = TINY | {"num_key_value_heads": 4, "num_hidden_layers": 32}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, **tokens))


HUB = {
    "google/siglip2-base-patch16-224": tiny_siglip,
    "microsoft/Phi-3-mini-4k-instruct": tiny_phi3,
    "Qwen/Qwen3-VL-4B-Instruct": lambda: made("qwen3-vl"),
}


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A cache of the Hub in which tiny random models have the names of the real ones."""
    cache, revision = tmp_path_factory.mktemp("hub"), "0" * 40
    for name, make in HUB.items():
        torch.manual_seed(0)
        folder = cache / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / revision
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(revision)
        make().save_pretrained(snapshot)
        byte_tokenizer().save_pretrained(snapshot)
        (snapshot / "preprocessor_config.json").write_text(to_json({"size": {"height": SIDE, "width": SIDE}}))
    return cache


class VisionTransformer(nn.Module):
    """A tower that nobody knows, as your-own-model.md describes it."""

    def __init__(self, width=64, depth=2):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixel_values):
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.cls.expand(len(tokens), -1, -1), tokens), 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention, self.mlp = Attention(width), nn.Linear(width, width)

    def forward(self, tokens):
        tokens = tokens + self.attention(tokens)
        return tokens + self.mlp(tokens)


class Attention(nn.Module):
    def __init__(self, width, heads=4):
        super().__init__()
        self.heads, self.qkv, self.mix = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens):
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.mix(nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


@pytest.fixture
def desk(hub, tmp_path, monkeypatch):
    """Where a reader sits: a directory with a clip and a picture, models of the Hub, libraries that need a server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(adapters, "_registered", {})
    for library in ("openai", "supervision"):
        monkeypatch.setitem(sys.modules, library, MagicMock())
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(VisionTransformer=VisionTransformer))
    write_recording(tmp_path / "clip.mp4", 6)
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / "frame.jpg")


@functools.cache
def question():
    vlm = made("qwen3-vl")
    return inputs_of(vlm, "qwen3-vl") | {"pixel_values_videos": video(vlm)}


def given():
    """The names that a page may use without saying what they are: noisy footage of a camera that stands still."""
    generator = torch.Generator().manual_seed(0)
    still = torch.rand(1, 3, SIDE // 16, SIDE // 16, generator=generator) * 2 - 1
    clip = still.repeat_interleave(16, 2).repeat_interleave(16, 3).repeat(16, 1, 1, 1)
    for number, frame in enumerate(clip):
        frame[:, 64:112, 8 * number : 8 * number + 48] = 1
    clip += 0.02 * torch.randn(clip.shape, generator=generator)
    return {
        "clip": clip,
        "frame": clip[:1],
        "frames": clip.split(1),
        "pixels": torch.cat((clip[:1], clip[5:6].flip(3), clip[:1].flip(2))),
        "inputs": question(),
        "url": "file:///clip.mp4",
    }


@pytest.mark.parametrize("page", named(page for page in GUIDES if any(blocks(page, "python"))))
def test_the_code_of_a_page_runs_from_top_to_bottom(page, desk):
    names = given()
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, page, "exec"), names)


@pytest.mark.parametrize("page", named(page for page in GUIDES if any(commands(page))))
def test_the_commands_of_a_page_parse(page, capsys):
    for command in commands(page):
        words = shlex.split(command, comments=True)
        while "=" in words[0]:
            words.pop(0)
        if Path(words[0]).name == "neuroflow":
            try:
                neuroflow_cli._parser().parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"{command}: {capsys.readouterr().err}")


def options_of(words):
    """The options of the command that `words` begin with."""
    parser = neuroflow_cli._parser()
    while group := next((each for each in parser._actions if isinstance(each, argparse._SubParsersAction)), None):
        if not words or words[0] not in group.choices:
            break
        parser, words = group.choices[words[0]], words[1:]
        if parser._module is not None:
            importlib.import_module(parser._module).add_options(parser)
    return set(parser._option_string_actions)


@pytest.mark.parametrize("page", named(GUIDES))
def test_commands_in_the_text_have_these_options(page):
    for span in spans(page):
        if span.startswith("neuroflow "):
            words = span.split()[1:]
            assert {word for word in words if word.startswith("-")} <= options_of(words), span


@pytest.mark.parametrize("page", named(GUIDES))
def test_targets_and_modules_that_are_named_exist(page):
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    for code in [*commands(page), *spans(page)]:
        for target in re.findall(r"(?:^|\s)make ([a-z][\w-]*)", code):
            assert target in targets, code
        for module in re.findall(r"python -m ((?:bench|neuroflow|neuroflow_kernels)(?:\.\w+)+)", code):
            path = module.replace(".", "/")
            found = [ROOT / folder / f"{path}{end}" for folder in ("", "python") for end in (".py", "/__main__.py")]
            assert any(each.is_file() for each in found), code


def anchors(page):
    """What the headings of a page are linked by, as GitHub makes it of them."""
    counts = Counter()
    for heading in re.findall(r"^#+ +(.*?) *$", FENCE.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        yield f"{slug}-{counts[slug]}" if counts[slug] else slug
        counts[slug] += 1


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        to = page if not path else (page.parent / path).resolve()
        assert to.exists(), target
        assert to.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(to), target


def said():
    """Every string in the code, with a NUL where a value goes."""
    for file in [
        *ROOT.glob("python/neuroflow*.py"),
        *ROOT.glob("python/neuroflow/**/*.py"),
        *ROOT.glob("neuroflow_kernels/**/*.py"),
    ]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_of_the_guide_to_trouble_are_those_of_the_code():
    page = ROOT / "python" / "guide" / "troubleshooting.md"
    messages, code = [message for _, message in blocks(page, "text")], "\n".join(said())
    assert len(messages) > 20
    parts = [part.strip() for message in messages for part in " ".join(message.split()).split("...")]
    assert [part for part in parts if part not in code] == []

"""Towers that NeuroFlow does not know: the guide's adapter for one, and what is said of one without."""

import dataclasses
import re
import sys
import types
from pathlib import Path
from unittest import mock

import neuroflow
import pytest
import torch
import torch.nn.functional as F
import transformers
from models import clip, exact, smooth_clip, tiny
from neuroflow import adapters
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

GUIDE = (Path(__file__).parents[2] / "python" / "guide" / "your-own-model.md").read_text()
SIZE = (96, 96)  # 6 x 6 patches


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.mix = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens):
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.mix(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens):
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class VisionTransformer(nn.Module):
    def __init__(self, width=64, heads=4, depth=4):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(36, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixel_values):
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.positions
        tokens = torch.cat((self.cls.expand(len(tokens), -1, -1), tokens), 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


@pytest.fixture
def registry():
    """What is registered in the test is known in the test only."""
    with mock.patch.dict(adapters._registered):
        yield


@pytest.fixture
def own(registry, monkeypatch):
    """The patched model that the guide's example ends with."""
    example = next(code for code in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "def adapter" in code)
    assert example.count("\n") <= 40
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(VisionTransformer=VisionTransformer))
    names = {}
    torch.manual_seed(0)
    exec(example, names)
    return names["model"]


def outputs(model, frames):
    with torch.inference_mode():
        return torch.cat([model(frame[None]) for frame in frames])  # [T, 37, 64]


def repatch(model, config):
    neuroflow.disable_cache(model)
    neuroflow.enable_cache(model, config)


def test_the_example_of_the_guide_skips_and_is_undone(own):
    frames = clip(size=SIZE, changed=2)
    sparse = outputs(own, frames)
    assert neuroflow.summary(own).streams["default"].skipped > 0.5
    neuroflow.disable_cache(own)
    dense = outputs(own, frames)
    assert torch.cosine_similarity(sparse[:, 0], dense[:, 0]).min() >= 0.98
    assert not torch.equal(sparse, dense)
    assert all("forward" not in vars(module) for module in own.modules())


@pytest.mark.parametrize("arch", "ABCDE")
def test_threshold_zero_is_the_unpatched_model(own, arch):
    frames = clip(frames=3, size=SIZE)
    repatch(own, neuroflow.NeuroFlowConfig(arch=arch, threshold=0))
    patched = outputs(own, frames)
    neuroflow.disable_cache(own)
    torch.testing.assert_close(patched, outputs(own, frames), rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", "ACDE")
def test_half_of_a_smooth_clip_is_enough(own, arch):
    """A and E lose less than a third of what repeating the first frame does; without context C and D lose more."""
    frames = smooth_clip(size=SIZE)
    repatch(own, exact(arch=arch, budget=0.5))
    sparse = outputs(own, frames)[:, 0]
    assert int(neuroflow.summary(own).streams["default"].active.sum()) == 18
    neuroflow.disable_cache(own)
    dense = outputs(own, frames)[:, 0]
    lost, moved = (sparse - dense).norm(dim=1).max(), (dense[0] - dense).norm(dim=1).max()
    assert lost <= (moved / 3 if arch in "AE" else 0.2 * dense.norm(dim=1).min())


def test_active_patches_alone_are_what_the_blocks_see(own):
    """Architecture B, whose output is that of the tower on CLS and the active patches."""
    frames = clip(frames=2, size=SIZE, changed=3)
    repatch(own, exact(arch="B", threshold=1e-4))
    with torch.inference_mode():
        own(frames[:1])
        sparse = own(frames[1:])
    active = neuroflow.summary(own).streams["default"].active.flatten()
    assert int(active.sum()) == 4  # the floor
    neuroflow.disable_cache(own)
    chosen = torch.cat((torch.ones(1, dtype=torch.bool), active))
    first = own.blocks[0].forward
    with torch.inference_mode(), mock.patch.object(own.blocks[0], "forward", lambda tokens: first(tokens[:, chosen])):
        torch.testing.assert_close(sparse, own(frames[1:]), rtol=0, atol=1e-5)


def test_streams_do_not_mix(own):
    clips = {name: clip(frames=3, size=SIZE, seed=seed) for seed, name in enumerate("ab")}
    repatch(own, exact(threshold=1e-4))
    alone = {}
    for name, frames in clips.items():
        with neuroflow.cache_context(own, name):
            alone[name] = outputs(own, frames)
    neuroflow.reset_cache(own)
    for time in range(3):
        together = neuroflow.encode(own, torch.stack([clips["a"][time], clips["b"][time]]), ["a", "b"])
        for row, name in zip(together, "ab", strict=True):
            torch.testing.assert_close(row, alone[name][time], rtol=0, atol=1e-5)


def test_a_registered_tower_is_listed_and_comes_first(own):
    family = neuroflow.supported_models()[-1]
    assert (family.name, family.found_by) == ("VisionTransformer", ("VisionTransformer",))
    assert neuroflow.supported_models()[:-1] == (*adapters.FAMILIES, adapters.BY_STRUCTURE)
    siglip = type(adapters.describe(tiny("siglip")).tower)
    neuroflow.register_adapter(siglip, lambda tower: family.adapter(own))
    assert adapters.describe(tiny("siglip")).tower is own


def test_an_instance_is_no_tower_to_register(registry):
    with pytest.raises(TypeError, match=r"tower is a Identity; accepted is a subclass of torch.nn.Module"):
        neuroflow.register_adapter(nn.Identity(), lambda tower: None)
    assert neuroflow.supported_models() == (*adapters.FAMILIES, adapters.BY_STRUCTURE)


def test_supported_models_say_where_they_come_from():
    families = neuroflow.supported_models()
    assert len({family.name for family in families}) == len(families)
    assert all(family.library in ("transformers", "timm", "vllm", "torch") for family in families)
    assert all(family.found_by and set(family.architectures) <= set("ABCDE") for family in families)


@pytest.mark.parametrize(
    ("model", "found", "missing"),
    [
        (nn.Linear(2, 2), "nothing", "a convolution over patches, a list of blocks with attention, "),
        (nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)), r"a convolution over patches \(0\), a norm \(1\)", ""),
    ],
)
def test_a_model_without_an_adapter_is_told_what_was_found_in_it(model, found, missing):
    name = type(model).__name__
    message = f"^{name} has no .* supported are SigLIP, .*found: {found}; missing: {missing}"
    with pytest.raises(TypeError, match=message):
        neuroflow.enable_cache(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_tower_built_otherwise_than_its_adapter_expects(own):
    model = tiny("siglip")
    tower = adapters.describe(model).tower
    del tower.post_layernorm
    built = f"of transformers {re.escape(transformers.__version__)} is not built as the adapter of SigLIP expects"
    with pytest.raises(TypeError, match=f"{type(tower).__name__} {built}: .*'post_layernorm'"):
        neuroflow.enable_cache(model)
    neuroflow.disable_cache(own)
    del own.norm
    built = "is not built as the adapter of VisionTransformer expects: .*'norm'"
    with pytest.raises(TypeError, match=f"VisionTransformer of {__name__.partition('.')[0]} {built}"):
        neuroflow.enable_cache(own)


def test_an_adapter_that_names_what_is_not_there_leaves_nothing_behind(own):
    neuroflow.disable_cache(own)
    right = adapters.describe(own)
    wrong = dataclasses.replace(right, tables=((right.last, "interpolated"),))
    neuroflow.register_adapter(VisionTransformer, lambda tower: wrong)
    before = [vars(module).keys() for module in own.modules()]
    with pytest.raises(AttributeError, match="interpolated"):
        neuroflow.enable_cache(own)
    assert [vars(module).keys() for module in own.modules()] == before
    assert not any("forward" in vars(module) for module in own.modules())

"""Towers that no adapter knows by name: ViTs written by hand, and the proof that they are patched rightly."""

import dataclasses
import re
from unittest import mock

import neuroflow
import pytest
import torch
import torch.nn.functional as F
import transformers
from models import OldRows, clip, exact, installed
from neuroflow import adapters
from neuroflow.adapters.general import general
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


class Fused(nn.Module):
    """Attention by torch's function."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def projected(self, tokens):
        return self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, tokens, turn=None):
        query, key, value = self.projected(tokens)
        if turn is not None:
            query, key = turned(query, *turn), turned(key, *turn)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).flatten(2))


class Products(Fused):
    """By two products and a softmax."""

    def forward(self, tokens, turn=None):
        query, key, value = self.projected(tokens)
        weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class Batched(Fused):
    """By products of [S * heads, T, head_dim]."""

    def forward(self, tokens, turn=None):
        query, key, value = (each.flatten(0, 1) for each in self.projected(tokens))
        weights = torch.softmax(torch.bmm(query, key.mT) / query.shape[-1] ** 0.5, -1)
        attended = torch.bmm(weights, value).unflatten(0, (-1, self.heads))
        return self.out(attended.transpose(1, 2).flatten(2))


class Biased(Fused):
    """With something added to the scores, of every pair of tokens."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.bias = nn.Parameter(torch.randn(1, heads, 37, 37))

    def forward(self, tokens, turn=None):
        attended = F.scaled_dot_product_attention(*self.projected(tokens), attn_mask=self.bias)
        return self.out(attended.transpose(1, 2).flatten(2))


class Multihead(nn.Module):
    """By torch's own module, as open_clip does."""

    def __init__(self, width, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, tokens, turn=None):
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def turned(heads, cos, sin):
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat((-second, first), -1) * sin


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, tokens):
        return tokens * self.gamma


class Block(nn.Module):
    def __init__(self, width, heads, attention):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.scale = attention(width, heads), LayerScale(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens, turn=None):
        tokens = tokens + self.scale(self.attention(self.norm1(tokens), turn))
        return tokens + self.mlp(self.norm2(tokens))


class HandWritten(nn.Module):
    """A pre-norm ViT with a CLS token, of 6 x 6 patches; `turns` in its attention too.

    Args:
        looks_back: its last block takes what the second gives.
    """

    def __init__(self, attention=Fused, turns=False, looks_back=False, depth=4, width=64, heads=4):
        super().__init__()
        self.turns, self.looks_back = turns, looks_back
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.cls, self.places = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(37, width))
        self.blocks = nn.ModuleList(Block(width, heads, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, frames):
        tokens = self.patches(frames).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.cls.expand(len(tokens), -1, -1), tokens), 1) + self.places
        angles = torch.arange(37.0, dtype=tokens.dtype)[:, None] / torch.arange(1.0, 17.0)
        given = []
        for number, block in enumerate(self.blocks):
            given.append(tokens)
            if self.looks_back and number == 3:
                tokens = given[2]
            tokens = block(tokens, (angles.cos(), angles.sin()) if self.turns else None)
        return self.norm(tokens)


HAND_WRITTEN = {
    "torch's attention": {},
    "products": {"attention": Products},
    "batched products": {"attention": Batched},
    "relative positions": {"attention": Biased},
    "nn.MultiheadAttention": {"attention": Multihead},
    "rotary": {"turns": True},
}


def made(**settings):
    torch.manual_seed(0)
    return HandWritten(**settings).eval()


def outputs(model, frames):
    with torch.inference_mode():
        return torch.cat([model(frame[None]) for frame in frames])


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_a_vit_written_by_hand_needs_no_adapter(name):
    """Nothing skipped is the unpatched model; E is the one whose blocks keep their old tokens, alone and in a batch."""
    model, frames = made(**HAND_WRITTEN[name]).double(), clip(frames=4).double()
    dense = outputs(model, frames)
    for arch in "ACDE":
        neuroflow.enable_cache(model, exact(arch=arch, threshold=0))
        torch.testing.assert_close(outputs(model, frames), dense, rtol=0, atol=1e-9)
        neuroflow.disable_cache(model)
    assert torch.equal(outputs(model, frames), dense)

    neuroflow.enable_cache(model, exact(threshold=1e-4))
    sparse, active = [], []
    for frame in frames:
        sparse.append(outputs(model, frame[None]))
        active.append(neuroflow.summary(model).streams["default"].active)
    assert 0 < active[-1].sum() < 36
    with torch.inference_mode():
        both = [neuroflow.encode(model, torch.stack((frame, frame)), ["a", "b"]) for frame in frames]
    for alone, together in zip(sparse, both, strict=True):
        torch.testing.assert_close(together, alone.expand(2, -1, -1), rtol=0, atol=1e-9)
    neuroflow.disable_cache(model)
    reference = OldRows(adapters.describe(model))
    for frame, ours, now in zip(frames, sparse, active, strict=True):
        reference.active = now
        torch.testing.assert_close(ours, outputs(model, frame[None]), rtol=0, atol=1e-9)


def stem(model):
    """Its patches see each other before the first block."""
    model.patches = nn.Sequential(model.patches, nn.Conv2d(64, 64, 3, padding=1))


def causal(model):
    def forward(tokens, turn=None):
        query, key, value = model.blocks[1].attention.projected(tokens)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)

    model.blocks[1].attention.forward = forward


def pooled(model):
    forward = model.blocks[1].forward
    model.blocks[1].forward = lambda tokens, turn=None: forward(tokens, turn)[:, ::2]


def seventh(model):
    """A patch of the frame comes into two tokens."""
    forward = model.patches.forward
    model.patches.forward = lambda frames: forward(frames) + forward(frames)[:, :, :1, :1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (stem, "patch 0 of 36 moves the tokens"),
        (seventh, "patch 0 of 36 moves the tokens"),
        (causal, "block 1 attends to earlier tokens only"),
        (pooled, "block 1 gives another shape"),
        (lambda model: setattr(model, "looks_back", True), "block 3 does not take the output of block 2"),
    ],
)
def test_what_is_no_plain_vit_is_refused_and_said_why(change, reason):
    model = made()
    change(model)
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(TypeError, match=f"HandWritten was found by its structure, and cannot be patched: {reason}"):
        neuroflow.enable_cache(model)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert re.search(f"cannot be patched: .*{reason}", neuroflow.explain(model))


def of_swapped(anatomy):
    def attention(module, attend, *args, **kwargs):
        def swapped(query, key, *others, **more):
            return attend(key, query, *others, **more)

        return anatomy.attention(module, swapped, *args, **kwargs)

    return {"attention": attention}


def without_scale(anatomy):
    scales = [layer.scale for layer in anatomy.layers]
    return {"overrides": tuple((scale, "forward", lambda forward, tokens: tokens) for scale in scales)}


MISTAKES = {
    "queries and keys swapped": of_swapped,
    "a prefix of one too few": lambda anatomy: {"prefix": 0},
    "positions of all tokens for packed ones": lambda anatomy: {
        "positions": tuple((name, lambda value, take: value) for name, _ in anatomy.positions)
    },
    "positions of other tokens": lambda anatomy: {
        "positions": tuple(
            (name, lambda value, take, pack=pack: pack(value, lambda table, fill: take(table.flip(0), fill)))
            for name, pack in anatomy.positions
        )
    },
    "LayerScale left out": without_scale,
    "a block forgotten": lambda anatomy: {
        name: (*getattr(anatomy, name)[:2], *getattr(anatomy, name)[3:]) for name in ("layers", "attentions", "mlps")
    },
    "patches in another order": lambda anatomy: {
        "order": lambda arguments: [torch.arange(36).view(6, 6).T.flatten()] * len(arguments["frames"])
    },
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_proof_catches(mistake):
    """An anatomy that is wrong, as `register_adapter` takes it or a general adapter could make it."""
    model = made(turns=True)
    before = outputs(model, clip(frames=1))

    def wrong(tower):
        anatomy = general(tower)
        return dataclasses.replace(anatomy, **MISTAKES[mistake](anatomy))

    with mock.patch.dict(adapters._registered):
        neuroflow.register_adapter(HandWritten, wrong)
        with pytest.raises(TypeError, match="HandWritten was found by its structure, and is not patched, as it would"):
            neuroflow.enable_cache(model)
        assert not neuroflow.is_patched(model)
        assert torch.equal(outputs(model, clip(frames=1)), before)
        neuroflow.enable_cache(model, verify=False)
        assert neuroflow.is_patched(model)


def test_the_proof_leaves_no_trace():
    """Not in torch's random numbers, nor in what a module holds, nor in its mode."""
    model = made()
    model.blocks[2].train()
    modes = [module.training for module in model.modules()]
    before, state = [dict(vars(module)) for module in model.modules()], torch.get_rng_state()
    neuroflow.enable_cache(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not neuroflow.summary(model).streams
    neuroflow.disable_cache(model)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_weights_that_hold_nan_cannot_be_proven():
    model = made()
    with torch.no_grad():
        model.norm.bias[0] = torch.nan
    with pytest.raises(TypeError, match=r"holds NaN or Inf, so nothing can be compared.* verify=False skips this"):
        neuroflow.enable_cache(model)


def test_a_model_is_explained():
    model = nn.ModuleDict({"eyes": made(turns=True)})
    found = neuroflow.explain(model)
    assert found.splitlines()[0] == "eyes: HandWritten, found by its structure"
    for line in (
        "patches: Conv2d patches of 8 x 8",
        "blocks: 4 Block, blocks.0 to blocks.3",
        "attention: Fused attention, by a replacement for its own",
        "MLP: mlp",
        "per token, in the blocks: turn",
        "tokens before the patches: 1",
        "architectures: A, C, D, E",
    ):
        assert f"\n  {line}" in found


class Parallel(Block):
    """Whose MLP is no module."""

    def __init__(self, width, heads, attention):
        super().__init__(width, heads, attention)
        self.first, self.last = self.mlp[0], self.mlp[2]
        del self.mlp

    def forward(self, tokens, turn=None):
        normed = self.norm1(tokens)
        return tokens + self.scale(self.attention(normed, turn)) + self.last(F.gelu(self.first(normed)))


def test_without_an_mlp_that_can_be_told_there_is_no_a():
    with mock.patch(f"{__name__}.Block", Parallel):
        model = made()
    assert "architectures: C, D, E" in neuroflow.explain(model)
    with pytest.raises(ValueError, match=r"arch is 'mlp'; no MLP was found in HandWritten's blocks"):
        neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(arch="A"))
    neuroflow.enable_cache(model)


def test_a_corrected_anatomy_is_taken():
    """As when what reads a block's output was not seen."""
    model = made()
    with mock.patch.dict(adapters._registered):
        neuroflow.register_adapter(
            HandWritten, lambda tower: dataclasses.replace(general(tower), reads=lambda arguments: [1])
        )
        neuroflow.enable_cache(model, exact(threshold=1e-4))
        outputs(model, clip(frames=2))
        assert neuroflow.last_pass(model)[0].key_frame is None


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGE = {"image_size": 48, "patch_size": 8}
OF_TRANSFORMERS = {
    "AltCLIPVision": {},
    "BlipVision": {},
    "ChineseCLIPVision": {},
    "DPT": {"is_hybrid": False},
    "FlavaImage": {},
    "GitVision": {},
    "Idefics3Vision": {},
    "JanusVision": {"num_image_tokens": 36},
    "MetaClip2Vision": {},
    "MLCDVision": {},
    "Owlv2Vision": {},
    "Pixio": {},
    "SmolVLMVision": {},
    "Tipsv2Vision": {},
    "ViTMSN": {},
}


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_towers_of_transformers_are_found_and_proven(name):
    config = installed(f"{name}Config")(**SIZES | IMAGE | OF_TRANSFORMERS[name])
    kind = f"{name}Model" if hasattr(transformers, f"{name}Model") else f"{name}Transformer"
    model = installed(kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    outputs_of = [model(pixel_values=frame[None]) for frame in clip(frames=3)]
    assert all(output.last_hidden_state.isfinite().all() for output in outputs_of)
    (report,) = neuroflow.last_pass(model)
    assert report.key_frame is None and report.skipped > 0.5


def test_arguments_that_leave_patches_out_are_refused():
    model = installed("Data2VecVisionModel")(installed("Data2VecVisionConfig")(**SIZES, **IMAGE)).eval()
    neuroflow.enable_cache(model)
    frame = clip(frames=1)
    with pytest.raises(ValueError, match="bool_masked_pos is given; accepted is None"):
        model(pixel_values=frame, bool_masked_pos=torch.ones(1, 36, dtype=torch.bool))
    smol = installed("SmolVLMVisionTransformer")(installed("SmolVLMVisionConfig")(**SIZES, **IMAGE)).eval()
    neuroflow.enable_cache(smol)
    mask = torch.ones(1, 6, 6, dtype=torch.bool)
    smol(frame, patch_attention_mask=mask)
    mask[0, 5] = False
    with pytest.raises(ValueError, match="patch_attention_mask is given"):
        smol(frame, patch_attention_mask=mask)

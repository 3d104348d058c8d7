"""SAM and ViTDet: a partial frame against loops over windows and tokens; copies of SAM, and which models are taken."""

import importlib
import itertools
import operator
import re

import neuroflow
import pytest
import torch
from models import PATCH, SIZES, OldRows, clip, exact, inputs, sam, tiny
from neuroflow.adapters import describe
from torch.utils._pytree import tree_leaves
from transformers import (
    Sam2HieraDetConfig,
    Sam2VisionConfig,
    Sam2VisionModel,
    SamConfig,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    VitDetBackbone,
    VitDetConfig,
    VitDetModel,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 48 // PATCH  # rows and columns of patches
HEADS = SIZES["num_attention_heads"]
NAMES = {
    "sam": operator.attrgetter("window_size", "layer_norm1", "attn", "layer_norm2", "mlp"),
    "vitdet": operator.attrgetter("window_size", "norm1", "attention", "norm2", "mlp"),
}


def embedded(model, family, frame):
    """What goes into the first block, [rows, columns, D]."""
    if family == "vitdet":
        return model.embeddings(frame[None])[0].permute(1, 2, 0)
    return (model.vision_encoder.patch_embed(frame[None]) + model.vision_encoder.pos_embed)[0]


def mapped(model, family, tokens):
    """The model's output for the tokens [rows, columns, D] behind the last block."""
    return model.vision_encoder.neck(tokens[None]) if family == "sam" else tokens[None].permute(0, 3, 1, 2)


def attended(attention, query, row, column, size, keys, values, seen):
    """One token's attention, [D]; keys and values are [rows, columns, heads, head_dim]."""
    top, left, length = (row // size * size, column // size * size, size) if size else (0, 0, SIDE)
    _, key_of_padding, value_of_padding = attention.qkv.bias.view(3, HEADS, -1)
    scores, of = [], []
    for r, c in itertools.product(range(top, top + length), range(left, left + length)):
        if max(r, c) >= SIDE:
            key, value = key_of_padding, value_of_padding
        elif (r, c) in seen:
            key, value = keys[r, c], values[r, c]
        else:
            continue
        position = attention.rel_pos_h[row - r + length - 1] + attention.rel_pos_w[column - c + length - 1]
        scores.append((query * (key * attention.scale + position)).sum(1))  # [heads]
        of.append(value)
    weights = torch.stack(scores).softmax(0)
    return (weights[..., None] * torch.stack(of)).sum(0).flatten()


def recomputed(model, family, arch, frame, active, caches):
    """The output for a frame of which the patches (row, column) in `active` are encoded.

    Of the others, `caches` holds what each block last made of them.
    """
    tokens = embedded(model, family, frame)
    everything = set(itertools.product(range(SIDE), repeat=2))
    for number, layer in enumerate(describe(model).layers):
        size, norm1, attention, norm2, mlp = NAMES[family](layer)
        keys, values, outputs = caches.setdefault(
            number, (*tokens.new_zeros(2, SIDE, SIDE, HEADS, tokens.shape[2] // HEADS), torch.zeros_like(tokens))
        )
        queries = {}
        for place in active:
            queries[place], keys[place], values[place] = attention.qkv(norm1(tokens[place])).view(3, HEADS, -1)
        for place in active:
            seen = everything if arch == "E" else active
            heads = attended(attention, queries[place], *place, size, keys, values, seen)
            token = tokens[place] + attention.proj(heads)
            outputs[place] = token + mlp(norm2(token))
        tokens = outputs
    return mapped(model, family, tokens)


@pytest.mark.parametrize("arch", ["C", "E"])
@pytest.mark.parametrize("family", NAMES)
def test_partial_frame_is_attention_within_windows_to_what_was_kept(family, arch):
    model, plain, caches, counts = tiny(family).double(), tiny(family).double(), {}, []
    neuroflow.enable_cache(model, exact(arch=arch, threshold=1e-6))
    with torch.inference_mode():
        for frame in clip(frames=3, changed=7).double():
            output = model(**inputs(family, frame[None]))
            active = [tuple(place) for place in neuroflow.summary(model).streams["default"].active.nonzero().tolist()]
            counts.append(len(active))
            expected = recomputed(plain, family, arch, frame, active, caches)
            torch.testing.assert_close(output.last_hidden_state, expected, rtol=0, atol=1e-9)
            embedding = describe(model).embedding(output)
            torch.testing.assert_close(embedding, expected.flatten(2).mean(2), rtol=0, atol=1e-9)
    assert counts == [SIDE * SIDE, 7, 7]


@pytest.mark.parametrize("family", NAMES)
def test_attention_without_relative_positions_or_biases(family):
    model, frame = tiny(family), clip(frames=1)
    for attention in describe(model).attentions:
        del attention.rel_pos_h, attention.rel_pos_w
        attention.use_rel_pos = attention.use_relative_position_embeddings = False
        attention.qkv.bias = None
    with torch.inference_mode():
        dense = model(**inputs(family, frame)).last_hidden_state
        neuroflow.enable_cache(model, exact(budget=7))
        # What is encoded again from the same pixels, beside the keys and values of before, stays as it is.
        for active in (SIDE * SIDE, 7):
            ours = model(**inputs(family, frame)).last_hidden_state
            torch.testing.assert_close(ours, dense, rtol=0, atol=1e-5 * dense.abs().max().item())
            assert neuroflow.summary(model).streams["default"].active.sum() == active


@pytest.mark.parametrize("family", NAMES)
def test_architecture_b_is_refused(family):
    with pytest.raises(ValueError, match=r"arch is 'active'; .* makes a map of all patches"):
        neuroflow.enable_cache(tiny(family), neuroflow.NeuroFlowConfig(arch="B"))


def test_hidden_states_of_vitdet_are_maps_in_a_tuple_too():
    model, frames = tiny("vitdet"), clip(frames=2, changed=7)
    found = []
    with torch.inference_mode():
        for options in ({}, {"return_dict": False}):
            neuroflow.enable_cache(model, exact(threshold=1e-6))
            output = [model(frame[None], output_hidden_states=True, **options) for frame in frames][-1]
            found.append(output[1] if options else output.hidden_states)
            neuroflow.disable_cache(model)
    assert [state.shape for state in found[0]] == [(1, 64, SIDE, SIDE)] * 5
    assert all(map(torch.equal, *found))


def small(**settings):
    """A ViTDet's configuration for 48 x 48 pixels in 8-pixel patches."""
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    return VitDetConfig(
        **sizes, image_size=48, patch_size=PATCH, window_size=4, window_block_indices=[0, 2], **settings
    )


def test_vitdet_backbone_gives_its_last_map():
    backbone, frames = VitDetBackbone(small()).eval(), clip(frames=3)
    with torch.inference_mode():
        dense = [backbone(frame[None]).feature_maps[-1] for frame in frames]
        neuroflow.enable_cache(backbone, neuroflow.NeuroFlowConfig(threshold=0))
        for frame, theirs in zip(frames, dense, strict=True):
            output = backbone(frame[None])
            torch.testing.assert_close(output.feature_maps[-1], theirs, rtol=0, atol=1e-5)
            assert describe(backbone).embedding(output).shape == (1, 64)


def test_vitdet_with_convolutions_is_refused():
    with pytest.raises(ValueError, match=r"residual_block_indices is \[1, 3\]; accepted is \[\]"):
        neuroflow.enable_cache(VitDetModel(small(residual_block_indices=[1, 3])))


def test_sam_is_found_below_its_mask_decoder():
    vision = tiny("sam").config.to_dict() | {"num_pos_feats": 16}
    prompts = SamPromptEncoderConfig(hidden_size=32, image_size=48, patch_size=PATCH, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32)
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)).eval()
    assert describe(model).tower is model.vision_encoder
    frames, points = clip(frames=2), torch.full((1, 1, 1, 2), 20.0)
    with torch.inference_mode():
        dense = [model(frame[None], input_points=points).pred_masks for frame in frames]
        neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(threshold=0))
        for frame, masks in zip(frames, dense, strict=True):
            torch.testing.assert_close(model(frame[None], input_points=points).pred_masks, masks)


def test_sam_2_is_not_taken_for_sam():
    hiera = Sam2HieraDetConfig(hidden_size=16, blocks_per_stage=[1, 1, 1, 1], global_attention_blocks=[])
    with pytest.raises(TypeError, match="has no vision tower that NeuroFlow knows"):
        describe(Sam2VisionModel(Sam2VisionConfig(backbone_config=hiera)))


COPIES = {
    "sam_hq": "SamHQVisionEncoder",
    "got_ocr2": "GotOcr2VisionEncoder",
    "deepseek_ocr2": "DeepseekOcr2SamVisionEncoder",
    "unlimited_ocr": "UnlimitedOcrSamVisionEncoder",
    "pp_formulanet": "PPFormulaNetVisionModel",
    "slanext": "SLANeXtVisionEncoder",
}
ANY_SIZE = ("deepseek_ocr2", "unlimited_ocr")
SOFTMAX_IN_FLOAT32 = ("got_ocr2", "pp_formulanet", "slanext")


def copied(name):
    """A random tower of transformers that is SAM's under another name, float64, for 48 x 48 pixels."""
    try:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ModuleNotFoundError:
        pytest.skip(f"this release of transformers has no {name}")
    sizes = {"image_size": 48, "patch_size": PATCH, "mlp_dim": 128, "downsample_channels": [16, 16]}
    torch.manual_seed(0)
    config = getattr(module, re.sub("Encoder|Model", "Config", COPIES[name]))
    model = getattr(module, COPIES[name])(config(**SIZES, **sam, **sizes, post_conv_in_channels=sam["output_channels"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().double()


def tensors(output):
    return [value for value in tree_leaves(output) if value.is_floating_point()]


@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
@pytest.mark.parametrize("name", COPIES)
def test_copies_of_sam(name, size):
    """All that they give, as SAM-HQ's maps of blocks without windows."""
    if size != (48, 48) and name not in ANY_SIZE:
        pytest.skip(f"{name} takes its native size only")
    model, frames = copied(name), clip(frames=3, size=size).double()
    dense = [tensors(model(frame[None])) for frame in frames]
    sparse, active = [], []
    for settings in ({"threshold": 0}, {"threshold": 1e-4}):
        neuroflow.enable_cache(model, exact(**settings))
        for frame in frames:
            sparse.append(tensors(model(frame[None])))
            active.append(neuroflow.summary(model).streams["default"].active)
        neuroflow.disable_cache(model)
    assert [int(each.sum()) for each in active] == [*[active[0].numel()] * 4, 4, 4]
    reference = OldRows(describe(model))
    old = []
    for frame, now in zip(frames, active[3:], strict=True):
        reference.active = now
        old.append(tensors(model(frame[None])))
    for ours, theirs in zip(sparse, dense + old, strict=True):
        for each, expected in zip(ours, theirs, strict=True):
            tolerance = 1e-7 if name in SOFTMAX_IN_FLOAT32 else 1e-9
            torch.testing.assert_close(each, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    assert len(dense[0]) == {"sam_hq": 3, "pp_formulanet": 2}.get(name, 1)


class Mixing(torch.nn.Sequential):
    """An MLP that sees more than one token."""

    def forward(self, tokens):
        mixed = super().forward(tokens)
        return mixed + mixed.flatten(0, -2).mean(0)


def test_a_copy_of_sam_that_does_more_is_refused():
    model = copied("sam_hq")
    layer = describe(model).layers[2]
    layer.mlp = Mixing(layer.mlp)
    with pytest.raises(TypeError, match="it would not compute the same: a partial frame differs: last_hidden_state by"):
        neuroflow.enable_cache(model)
    assert not neuroflow.is_patched(model)

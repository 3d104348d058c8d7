"""Towers of images end to end that are found by their structure alone: tiny random ones of many model types."""

import importlib
from typing import NamedTuple

import neuroflow
import pytest
import torch
from models import OldRows, exact
from neuroflow.adapters import describe

pytestmark = pytest.mark.usefixtures("one_thread")

PATCH = 8
COMMON = {"hidden_size": 64, "intermediate_size": 128, "patch_size": PATCH, "spatial_merge_size": 2}
DEPTH = COMMON | {"depth": 4, "num_heads": 4, "out_hidden_size": 64}
LAYERS = COMMON | {"num_hidden_layers": 4, "num_attention_heads": 4}


class Kind(NamedTuple):
    """A model type of transformers with such a tower.

    Args:
        tower: its class there.
        config: what its configuration is made of.
        merge: of the blocks that its processor orders patches in.
        row: the shape of one patch.
        grid: the argument that holds the grids.
        batched: patches are [1, N, *].
        video: its steps in time are frames.
    """

    tower: str
    config: dict
    merge: int = 2
    row: tuple[int, ...] = (3 * 2 * PATCH * PATCH,)
    grid: str = "grid_thw"
    batched: bool = False
    video: bool = True

    def inputs(self, *pictures):
        """The tower's arguments for pictures [rows, columns, *row] of patches, or [times, rows, columns, *row]."""
        videos = [picture if picture.ndim == 3 + len(self.row) else picture[None] for picture in pictures]
        rows = []
        for video in videos:
            blocks = video.unflatten(2, (-1, self.merge)).unflatten(1, (-1, self.merge))  # [T, rows, m, columns, m, *]
            rows.append(blocks.transpose(2, 3).reshape(-1, *self.row))
        rows = torch.cat(rows)
        grids = torch.tensor([video.shape[:3] for video in videos])
        return (rows[None] if self.batched else rows,), {self.grid: grids}


flat = (3 * PATCH * PATCH,)
KINDS = {
    "qwen2_vl": Kind(
        "Qwen2VisionTransformerPretrainedModel",
        {"depth": 4, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": PATCH},
    ),
    "qwen3_5": Kind("Qwen3_5VisionModel", DEPTH | {"num_position_embeddings": 36}),
    "qwen3_5_moe": Kind("Qwen3_5MoeVisionModel", DEPTH | {"num_position_embeddings": 36}),
    "qwen3_omni_moe": Kind(
        "Qwen3OmniMoeVisionEncoder", DEPTH | {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]}
    ),
    "qwen2_5_omni": Kind("Qwen2_5OmniVisionEncoder", DEPTH | {"window_size": 32, "fullatt_block_indexes": [1, 3]}),
    "exaone4_5": Kind(
        "Exaone4_5_VisionModel",
        DEPTH | {"window_size": 32, "fullatt_block_indexes": [1, 3], "num_key_value_heads": 2},
    ),
    "glm4v": Kind("Glm4vVisionModel", DEPTH | {"image_size": 48}, video=False),
    "glm4v_moe": Kind("Glm4vMoeVisionModel", DEPTH | {"image_size": 48}, video=False),
    "glm_image": Kind("GlmImageVisionModel", DEPTH | {"image_size": 48}, row=flat, video=False),
    "glm_ocr": Kind("GlmOcrVisionModel", DEPTH),
    "ernie4_5_vl_moe": Kind("Ernie4_5_VLMoeVisionTransformerPretrainedModel", DEPTH, row=flat),
    "hunyuan_vl": Kind("HunYuanVLVisionTransformer", LAYERS | {"max_image_size": 64}, merge=1, row=flat, video=False),
    "kimi_k25": Kind("Kimi_K25VisionModel", LAYERS, merge=1, row=(3, PATCH, PATCH), video=False),
    "minimax_m3_vl": Kind("MiniMaxM3VLVisionModel", LAYERS | {"image_size": 48}, video=False),
    "muse_spark": Kind("MuseSparkVisionModel", LAYERS | {"pos_emb_height": 4, "pos_emb_width": 4}, merge=1),
    "paddleocr_vl": Kind(
        "PaddleOCRVisionModel", LAYERS | {"image_size": 48}, merge=1, row=(3, PATCH, PATCH), batched=True
    ),
    "cosmos3_edge": Kind("Cosmos3EdgeVisionModel", LAYERS | {"num_patches": 36}, row=flat),
}


def tower(name):
    kind = KINDS[name]
    try:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ImportError as error:
        pytest.skip(str(error))
    kind_of = getattr(module, kind.tower)
    torch.manual_seed(0)
    model = kind_of(kind_of.config_class(**kind.config))
    with torch.no_grad():  # zero biases and unit norms would hide a forgotten one
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return kind, model.double().eval()


def clip(kind, frames=3, size=(8, 12), changed=7, seed=0):
    """Pictures [T, rows, columns, *row] of which `changed` patches change from one to the next, and where they did."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randn(*size, *kind.row, generator=generator, dtype=torch.float64)
    pictures, where = [picture], [torch.ones(size, dtype=torch.bool)]
    for _ in range(frames - 1):
        chosen = torch.randperm(size[0] * size[1], generator=generator)[:changed]
        where.append(torch.zeros(size, dtype=torch.bool))
        where[-1].view(-1)[chosen] = True
        other = torch.randn(picture.shape, generator=generator, dtype=torch.float64)
        picture = torch.where(where[-1][(..., *[None] * len(kind.row))], other, picture)
        pictures.append(picture)
    return torch.stack(pictures), where


def tensors(output):
    """Every tensor that a tower gives, rows of tokens."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output if isinstance(output, tuple) else output.values()
    leaves = [leaf for value in values for leaf in (value if isinstance(value, list | tuple) else [value])]
    return [leaf.flatten(0, -2) for leaf in leaves if leaf is not None]


def encoded_unpatched(model, kind, *pictures):
    args, kwargs = kind.inputs(*pictures)
    with torch.inference_mode():
        return tensors(model(*args, **kwargs))


def encoded(model, kind, *pictures, streams=("a",)):
    with neuroflow.cache_context(model, *streams):
        return encoded_unpatched(model, kind, *pictures)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("arch", "ACDE")
@pytest.mark.parametrize("name", KINDS)
def test_nothing_skipped_is_the_unpatched_tower(name, arch):
    kind, model = tower(name)
    pictures, _ = clip(kind)
    expected = [encoded_unpatched(model, kind, picture) for picture in pictures]
    neuroflow.enable_cache(model, exact(arch=arch, threshold=0))
    for picture, theirs in zip(pictures, expected, strict=True):
        assert_same(encoded(model, kind, picture), theirs)


@pytest.mark.parametrize("name", KINDS)
def test_partial_frames_are_blocks_that_keep_old_tokens(name):
    kind, model = tower(name)
    pictures, where = clip(kind, frames=4)
    args, kwargs = kind.inputs(pictures[0])
    reference = tower(name)[1]
    anatomy = describe(reference)
    (order,) = anatomy.order({"hidden_states": args[0], "pixel_values": args[0], **kwargs})
    old = OldRows(anatomy)
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    for picture, changed in zip(pictures, where, strict=True):
        ours = encoded(model, kind, picture)
        assert torch.equal(neuroflow.summary(model).streams["a"].active, changed)
        old.active = changed.flatten()[order]
        assert_same(ours, encoded_unpatched(reference, kind, picture))

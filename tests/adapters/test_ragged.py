"""Towers of images end to end that are found by their structure alone: tiny random ones of many model types."""

import importlib
import inspect
from typing import NamedTuple

import neuroflow
import pytest
import torch
import transformers
from models import OldRows, exact, installed
from neuroflow.adapters import describe, towers
from torch import nn

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
        merge_sizes: it takes those beside the grids.
        first_token: what is pooled is the first token of a call.
    """

    tower: str
    config: dict
    merge: int = 2
    row: tuple[int, ...] = (3 * 2 * PATCH * PATCH,)
    grid: str = "grid_thw"
    batched: bool = False
    video: bool = True
    merge_sizes: bool = False
    first_token: bool = False

    def inputs(self, *pictures):
        """The tower's arguments for pictures [rows, columns, *row] of patches, or [times, rows, columns, *row]."""
        videos = [picture if picture.ndim == 3 + len(self.row) else picture[None] for picture in pictures]
        rows = []
        for video in videos:
            blocks = video.unflatten(2, (-1, self.merge)).unflatten(1, (-1, self.merge))  # [T, rows, m, columns, m, *]
            rows.append(blocks.transpose(2, 3).reshape(-1, *self.row))
        rows = torch.cat(rows)
        grids = torch.tensor([video.shape[:3] for video in videos])
        merges = {"merge_sizes": torch.tensor([self.merge] * len(grids))} if self.merge_sizes else {}
        return (rows[None] if self.batched else rows,), {self.grid: grids, **merges}


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
    "minimax_m3_vl": Kind("MiniMaxM3VLVisionModel", LAYERS | {"image_size": 48}, video=False, first_token=True),
    "muse_spark": Kind("MuseSparkVisionModel", LAYERS | {"pos_emb_height": 4, "pos_emb_width": 4}, merge=1),
    "paddleocr_vl": Kind(
        "PaddleOCRVisionModel", LAYERS | {"image_size": 48}, merge=1, row=(3, PATCH, PATCH), batched=True
    ),
    "video_llama_3": Kind("VideoLlama3VisionModel", LAYERS, row=flat, merge_sizes=True),
    "cosmos3_edge": Kind("Cosmos3EdgeVisionModel", LAYERS | {"num_patches": 36}, row=flat),
}
# E needs most of a tower; the others, the same of all.
CELLS = [(name, "E") for name in KINDS] + [(name, arch) for name in ("qwen3_5", "qwen2_5_omni") for arch in "ACD"]


def tower(name):
    kind = KINDS[name]
    try:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ImportError as error:
        pytest.skip(str(error))
    if "cu_seqlens" not in inspect.getsource(module):
        pytest.skip(f"{kind.tower} of transformers {transformers.__version__} takes no cu_seqlens")
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


@pytest.mark.parametrize(("name", "arch"), CELLS)
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
    reference = tower(name)[1]
    old = OldRows(describe(reference))
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    for picture, changed in zip(pictures, where, strict=True):
        ours = encoded(model, kind, picture)
        assert torch.equal(neuroflow.summary(model).streams["a"].active, changed)
        old.active = changed
        assert_same(ours, encoded_unpatched(reference, kind, picture))


@pytest.mark.parametrize(("name", "arch"), CELLS)
def test_images_of_different_sizes_in_one_call(name, arch):
    kind, model = tower(name)
    clips = {"a": clip(kind)[0], "b": clip(kind, size=(4, 8), changed=5)[0], "c": clip(kind, size=(8, 12), seed=1)[0]}
    neuroflow.enable_cache(model, exact(arch=arch, threshold=1e-4))
    alone = {name: [encoded(model, kind, picture, streams=name) for picture in own] for name, own in clips.items()}
    neuroflow.reset_cache(model)
    for number in range(3):
        together = encoded(model, kind, *(own[number] for own in clips.values()), streams=tuple(clips))
        expected = [torch.cat(parts) for parts in zip(*(alone[name][number] for name in clips), strict=True)]
        if kind.first_token:  # of the call, not of each image
            together, expected = together[:1], expected[:1]
        assert_same(together, expected)
    summaries = neuroflow.summary(model).streams
    assert [int(summaries[name].active.sum()) for name in clips] == [7, 5, 7]


@pytest.mark.parametrize("name", KINDS)
def test_the_steps_in_time_of_a_video_are_frames(name):
    kind, model = tower(name)
    pictures, _ = clip(kind)
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    if not kind.video:
        with pytest.raises(ValueError, match=rf"{kind.grid} holds \[3, 8, 12\]; accepted is one step in time"):
            encoded(model, kind, pictures)
        return
    frames = [encoded(model, kind, picture) for picture in pictures]
    neuroflow.reset_cache(model)
    video = encoded(model, kind, pictures)
    assert_same(video, [torch.cat(parts) for parts in zip(*frames, strict=True)])
    assert [int(report.active.sum()) for report in neuroflow.last_pass(model)] == [96, 7, 7]
    neuroflow.disable_cache(model)
    neuroflow.enable_cache(model, exact(threshold=1e-4, pass_patches=100))
    assert_same(encoded(model, kind, pictures), video)


@pytest.mark.parametrize("name", KINDS)
def test_the_example_differs_where_it_says(name):
    model = tower(name)[1]
    anatomy = describe(model)
    numbers = [0, 5, 11, 12, 15]
    first, other = anatomy.example([]), anatomy.example(numbers)
    ((rows, columns),) = anatomy.grids(first)
    for given in (first, other):
        neuroflow.enable_cache(model, exact(threshold=1e-4))
        with torch.inference_mode():
            model(**given)
    active = neuroflow.summary(model).streams["default"].active
    assert active.shape == (rows, columns)
    assert active.flatten().nonzero()[:, 0].tolist() == numbers


@pytest.mark.filterwarnings("ignore:neuroflow. .* has the attention implementation:RuntimeWarning")
def test_a_tower_that_is_loaded_with_the_implementation_is_patched():
    kind, model = tower("qwen2_vl")
    picture = clip(kind)[0][0]
    model.set_attn_implementation("neuroflow")
    frames = [encoded_unpatched(model, kind, picture) for _ in range(3)]
    (report,) = neuroflow.last_pass(model)
    assert (neuroflow.summary(model).streams["default"].frames, report.key_frame) == (2, None)
    assert_same(frames[2], frames[0])


TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 200, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MARKS = {"vision_start_token_id": 192, "vision_end_token_id": 193, "image_token_id": 190, "video_token_id": 191}
MARKS |= {
    "image_start_token_id": 192,
    "image_end_token_id": 193,
    "video_start_token_id": 194,
    "video_end_token_id": 195,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4, "partial_rotary_factor": 1.0}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16, "linear_value_head_dim": 16}
LINEAR |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
WHOLE = {  # of each model type, its name and what its text side is made of
    "qwen2_vl": ("Qwen2VL", {"rope_scaling": ROPE}),
    "qwen3_5": (
        "Qwen3_5",
        LINEAR | {"rope_parameters": ROPE | {"mrope_section": [1, 1, 0], "mrope_interleaved": True}},
    ),
    "glm4v": ("Glm4v", {"rope_scaling": ROPE, "rope_parameters": ROPE}),
    "glm_ocr": ("GlmOcr", {"rope_parameters": ROPE}),
    "paddleocr_vl": ("PaddleOCRVL", {"rope_parameters": ROPE}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_model_gives_the_same_tokens(name):
    kind, (prefix, text) = KINDS[name], WHOLE[name]
    config = installed(f"{prefix}Config")(text_config=TEXT | text, vision_config=kind.config, **MARKS)
    torch.manual_seed(0)
    model = installed(f"{prefix}ForConditionalGeneration")(config).eval()
    assert list(towers(model)) == ["model.visual"]
    (pixels,), grid = kind.inputs(clip(kind, size=(6, 6))[0][0].float())
    ids = torch.tensor([[1, 192, *[190] * 9, 193, 5, 6]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.view(36, *kind.row)}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # from transformers 5 on
        given["mm_token_type_ids"] = (ids == 190).int()

    def answer():
        with torch.inference_mode():
            return model.generate(
                **given, image_grid_thw=grid["grid_thw"], max_new_tokens=6, do_sample=False, pad_token_id=0
            )

    expected = answer()
    neuroflow.enable_cache(model, exact(threshold=0))
    for _ in range(2):
        assert torch.equal(answer(), expected)
    assert [report.active.all() for report in neuroflow.last_pass(model)] == [True]


def test_a_tower_of_sound_is_none():
    name = "Qwen2_5OmniThinkerForConditionalGeneration"
    sizes = {"num_hidden_layers": 2, "depth": 2, "encoder_layers": 2}
    config = installed("Qwen2_5OmniThinkerConfig")(text_config=sizes, vision_config=sizes, audio_config=sizes)
    with torch.device("meta"):
        model = installed(name)(config)
    assert [found.rpartition(".")[2] for found in towers(model)] == ["visual"]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("halved", "the number of tokens changes between its blocks"),
        ("mixed", "its patches do not reach the blocks one by one in a known order"),
        ("positional", "its blocks do not get cu_seqlens by name"),
        ("without", r"blocks \[1\] have no attention that needs cu_seqlens, or several"),
        ("segments", "the images of a call are not encoded independently"),
    ],
)
def test_towers_that_cannot_be_sparse_say_why(what, reason):
    model = tower("qwen2_vl")[1]

    def run(self, hidden_states, grid_thw):
        x = self.patch_embed(hidden_states)
        if what == "mixed":
            x = x + x.roll(1, 0)
        ends = torch.tensor([0, len(x)], dtype=torch.int32)
        if what != "segments":
            sizes = grid_thw[:, 1:].prod(1).repeat_interleave(grid_thw[:, 0])
            ends = nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
        for number, block in enumerate(self.blocks):
            if what == "halved" and number == 2:
                x, ends = x[::2], ends // 2
            x = block(x, ends) if what == "positional" else block(x, cu_seqlens=ends)
        return self.merger(x)

    model.__class__ = type("Tower", (type(model),), {"forward": run})
    if what == "without":
        model.blocks[1].attn = nn.Identity()
    with pytest.raises(TypeError, match=f"Tower cannot be sparse: {reason}"):
        neuroflow.enable_cache(model)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())

"""Whole models that are asked about a video: what they answer is what they answer unpatched."""

import contextlib
import inspect

import neuroflow
import pytest
import torch
from models import exact
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}
TEXT |= {"num_key_value_heads": 2}
VIDEO = 191


def qwen3_vl():
    """The model, and a prompt about a video of 8 frames, which are 4 steps in time."""
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        vision_config=vision,
        text_config=TEXT | {"head_dim": 8, "rope_scaling": rope},
        image_token_id=190,
        video_token_id=VIDEO,
        vision_start_token_id=192,
        vision_end_token_id=193,
    )
    of_steps = [token for step in range(4) for token in (5 + step, 192, *[VIDEO] * 9, 193)]
    ids = torch.tensor([[1, 2, *of_steps, 7, 8]])
    given = {"input_ids": ids, "pixel_values_videos": torch.randn(4 * 36, 3 * 2 * 8 * 8)}
    given |= {"video_grid_thw": torch.tensor([[4, 6, 6]])}
    model = Qwen3VLForConditionalGeneration(config)
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # from transformers 5 on
        given["mm_token_type_ids"] = (ids == VIDEO).int() * 2
    return model.eval(), given, 4


def llava_onevision():
    """The model, and a prompt about a video of 8 frames."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**sizes, image_size=32, patch_size=8, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        **{"image_token_index": 190, "video_token_index": VIDEO, "image_token_id": 190, "video_token_id": VIDEO},
    )
    ids = torch.tensor([[1, 2, *[VIDEO] * (8 * 4 + 1), 7, 8]])
    return (
        LlavaOnevisionForConditionalGeneration(config).eval(),
        {"input_ids": ids, "pixel_values_videos": torch.randn(1, 8, 3, 32, 32)},
        8,
    )


@pytest.mark.parametrize("named", [False, True], ids=["nameless", "named"])
@pytest.mark.parametrize("make", [qwen3_vl, llava_onevision])
def test_nothing_skipped_gives_the_same_tokens(make, named):
    torch.manual_seed(0)
    model, given, count = make()
    given["attention_mask"] = torch.ones_like(given["input_ids"])

    def generate():
        with torch.inference_mode():
            return model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0)

    expected = generate()
    neuroflow.enable_cache(model, exact(threshold=0))
    with neuroflow.cache_context(model, "video") if named else contextlib.nullcontext():
        found = generate()
        again = generate()
    assert torch.equal(found, expected) and torch.equal(again, expected)
    reports = neuroflow.last_pass(model)
    assert len(reports) == count and all(report.active.all() for report in reports)
    assert [*neuroflow.summary(model).streams] == ["video"] * named

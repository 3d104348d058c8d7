"""attn_implementation="neuroflow", for those who can choose nothing but that."""

import warnings

import neuroflow
import pytest
import torch
from models import clip, exact, tiny
from neuroflow.adapters import describe
from transformers import CLIPConfig, CLIPModel, SiglipVisionModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def saved(tmp_path):
    tiny("siglip").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_loaded_with_it_patches_itself(saved, tmp_path, monkeypatch):
    exact(threshold=1e-4).save(tmp_path / "config.json")
    monkeypatch.setenv("NEUROFLOW_CONFIG", str(tmp_path / "config.json"))
    dense = SiglipVisionModel.from_pretrained(saved).eval()
    model = SiglipVisionModel.from_pretrained(saved, attn_implementation="neuroflow").eval()
    frames = clip(frames=4, changed=1)
    with torch.inference_mode():
        with pytest.warns(RuntimeWarning, match=r"SiglipVisionModel has .* so it is patched .*config\.json"):
            first = model(pixel_values=frames[:1]).pooler_output
        assert torch.equal(first, dense(pixel_values=frames[:1]).pooler_output)
        for frame in frames[1:]:
            pooled = model(pixel_values=frame[None]).pooler_output
    stream = neuroflow.summary(model).streams["default"]
    assert (stream.frames, stream.key_frames) == (3, 1)
    assert stream.skipped > 0.5
    assert torch.cosine_similarity(pooled, dense(pixel_values=frames[3:]).pooler_output).item() > 0.9


def test_without_a_file_the_settings_are_the_default_ones(saved):
    model = SiglipVisionModel.from_pretrained(saved, attn_implementation="neuroflow").eval()
    with pytest.warns(RuntimeWarning, match="with the default settings"):
        model(pixel_values=clip(frames=1))
    assert describe(model).tower._neuroflow_engine.config == neuroflow.NeuroFlowConfig()


def test_batches_without_names_are_clips(saved):
    model = SiglipVisionModel.from_pretrained(saved, attn_implementation="neuroflow").eval()
    frames = clip(frames=3)
    with torch.inference_mode(), pytest.warns(RuntimeWarning, match="it is patched from its next frame on"):
        model(pixel_values=frames)
    with torch.inference_mode():
        first, second = (model(pixel_values=frames).pooler_output for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    assert not neuroflow.summary(model).streams
    assert [report.key_frame for report in neuroflow.last_pass(model)] == ["first", None, None]


def test_enabling_and_disabling_by_hand(saved):
    model = SiglipVisionModel.from_pretrained(saved, attn_implementation="neuroflow").eval()
    frames = clip(frames=2)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        neuroflow.enable_cache(model, exact(threshold=1e-4))
        for frame in frames:
            model(pixel_values=frame[None])
        assert int(neuroflow.summary(model).streams["default"].active.sum()) == 4
        neuroflow.disable_cache(model)
    with torch.inference_mode(), pytest.warns(RuntimeWarning, match="is patched"):
        model(pixel_values=frames[:1])
    neuroflow.disable_cache(model)
    model(pixel_values=frames[:1])
    assert not neuroflow.is_patched(model)
    assert model.config._attn_implementation == "neuroflow"


def test_a_text_tower_beside_it_stays_as_it_is():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": 50, "eos_token_id": 2},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(0)
    dense = CLIPModel(config).eval()
    model = CLIPModel._from_config(config, attn_implementation="neuroflow").eval()
    model.load_state_dict(dense.state_dict())
    words, pixels = torch.tensor([[5, 7, 9, 2]]), clip(frames=1, size=(32, 32))
    with torch.inference_mode():
        model.text_model(input_ids=words)
    assert not neuroflow.is_patched(model)
    with torch.inference_mode(), pytest.warns(RuntimeWarning, match="is patched"):
        ours = [model(input_ids=words, pixel_values=pixels) for _ in range(2)][-1]
        theirs = dense(input_ids=words, pixel_values=pixels)
    assert torch.allclose(ours.text_embeds, theirs.text_embeds, atol=1e-6)
    assert torch.allclose(ours.image_embeds, theirs.image_embeds, atol=1e-5)
    assert list(neuroflow.summary(model).streams) == ["default"]
    assert describe(model).tower is neuroflow.adapters.describe(model.vision_model).tower

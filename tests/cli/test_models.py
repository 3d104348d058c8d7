"""The command with every type of tower that it takes: how it is loaded, and what frames it is given."""

import functools
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from models import SIZES, tiny
from neuroflow import NeuroFlowConfig
from neuroflow.adapters import describe
from neuroflow.adapters.anatomy import interpolation
from neuroflow.cli import CommandError
from neuroflow.cli.model import SUPPORTED, TOWERS, load_tower
from neuroflow.video.encode import VideoWriter
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Source
from neuroflow_cli import main
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2VisionConfig,
    Aimv2VisionModel,
    BeitConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    SamConfig,
    SamModel,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)
from transformers.models.internvl import InternVLVisionConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE, FRAMES = 48, 5
CPU = torch.device("cpu"), torch.float32
# Type -> family in tests/models.py, and the mean of red that its checkpoints ask for: 0.5, ImageNet's or OpenAI's.
TYPES = {
    "siglip_vision_model": ("siglip", 0.5),
    "clip_vision_model": ("clip", 0.48145466),
    "vit": ("vit", 0.5),
    "deit": ("deit", 0.485),
    "ijepa": ("ijepa", 0.485),
    "vit_mae": ("vit_mae", 0.485),
    "dinov2": ("dinov2", 0.485),
    "dinov2_with_registers": ("dinov2 with registers", 0.485),
    "dinov3_vit": ("dinov3", 0.485),
    "aimv2_vision_model": ("aimv2", 0.48145466),
    "internvl_vision": ("internvl", 0.485),
    "sam_vision_model": ("sam", 0.485),
    "vitdet": ("vitdet", 0.485),
}
FIXED = ("aimv2_vision_model", "sam_vision_model")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """models(type) -> the directory of a tiny random tower of it, and the tower."""
    root = tmp_path_factory.mktemp("towers")

    @functools.cache
    def find(name):
        model = tiny(TYPES[name][0], SIDE)
        model.save_pretrained(root / name)
        return root / name, model

    return find


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A square that moves over a still texture."""
    path, random = tmp_path_factory.mktemp("clips") / "clip.mp4", np.random.default_rng(0)
    background = random.integers(0, 256, (12, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with VideoWriter(path, Fraction(10)) as writer:
        for number in range(FRAMES):
            image = background.copy()
            image[24:48, 8 * number : 8 * number + 24] = 255
            writer.write(image)
    return path


@pytest.fixture
def neuroflow(capsys):
    """neuroflow(command, *arguments) -> exit code, stdout, stderr."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def error(message):
    """The one line that is no warning."""
    (line,) = (line for line in message.splitlines() if not line.startswith("warning: "))
    assert line.startswith("neuroflow: error: ")
    return line


@pytest.mark.parametrize("name", TOWERS)
def test_every_type_runs_beside_its_unpatched_self(neuroflow, models, clip, tmp_path, name):
    (directory, model), out, overlay = models(name), tmp_path / "result.npz", tmp_path / "overlay.mp4"
    options = ("--compare", "--budget", 12, "--out", out, "--overlay", overlay)
    code, table, message = neuroflow("run", clip, "--model", directory, *options)
    assert code == 0, message
    assert f"{type(model).__name__}, 48x48, 36 patches, float32" in table
    assert len(list(Source(str(overlay)))) == FRAMES
    result = np.load(out)
    assert result["active"].tolist() == [36] + [12] * (FRAMES - 1)
    assert result["cosine"][0] > 0.99999 and result["cosine"].min() > 0.5
    mean, std = TOWERS[name].normalisation
    assert mean[0] == TYPES[name][1]
    pixels = Preprocessor(SIDE, SIDE, mean=mean, std=std)(next(iter(Source(str(clip)))))
    with torch.no_grad():
        expected = describe(model).embedding(model(pixel_values=pixels))[0]
    torch.testing.assert_close(torch.from_numpy(result["embedding"][0]), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in TOWERS if name not in FIXED])
def test_every_type_that_can_takes_another_size(neuroflow, models, clip, tmp_path, name):
    out = tmp_path / "result.npz"
    options = ("--compare", "--threshold", 0, "--size", "64x32", "--out", out)
    code, table, message = neuroflow("run", clip, "--model", models(name)[0], *options)
    assert code == 0, message
    assert "64x32, 32 patches" in table and np.load(out)["cosine"].min() > 0.9999


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("command", ["run", "calibrate"])
def test_a_size_that_the_tower_does_not_take_is_answered_before_the_first_frame(
    neuroflow, models, clip, tmp_path, monkeypatch, command, name
):
    monkeypatch.setattr(Source, "__iter__", lambda self: pytest.fail("a frame was decoded"))
    target = ("--target-skip", 0.5, "--out", tmp_path / "c.json") if command == "calibrate" else ()
    model = models(name)[0]
    code, table, message = neuroflow(command, clip, "--model", model, "--size", "64x32", *target)
    assert code == 2 and table == ""
    assert "--size 64x32: the model takes 48x48 only; give that or none" in error(message)


def test_native_aimv2_takes_another_size(neuroflow, clip, tmp_path):
    config = Aimv2VisionConfig(**SIZES, image_size=SIDE, patch_size=8, is_native=True)
    Aimv2VisionModel(config).save_pretrained(tmp_path / "native")
    options = ("--compare", "--threshold", 0, "--size", "64x32")
    code, table, _ = neuroflow("run", clip, "--model", tmp_path / "native", *options)
    assert code == 0 and "64x32, 32 patches" in table


def test_calibrate_finds_a_threshold_for_a_tower_without_the_argument(neuroflow, models, clip, tmp_path):
    model, out = models("dinov2_with_registers")[0], tmp_path / "config.json"
    options = ("--model", model, "--size", "64x32", "--floor", 1)
    code, _, message = neuroflow("calibrate", clip, *options, "--target-fidelity", 0.9, "--out", out)
    assert code == 0, message
    result = tmp_path / "result.npz"
    assert neuroflow("run", clip, *options, "--config", out, "--compare", "--out", result)[0] == 0
    assert np.load(result)["cosine"][1:].mean() >= 0.9


def test_positions_are_interpolated_for_another_size_only():
    frames = {size: torch.zeros(1, 3, *size) for size in ((48, 48), (32, 64))}
    for config in (ViTConfig(**SIZES, image_size=SIDE, patch_size=8), ViTConfig(**SIZES, image_size=(32, 64))):
        model = ViTModel(config)
        own = config.image_size if isinstance(config.image_size, tuple) else (SIDE, SIDE)
        for size, pixels in frames.items():
            assert interpolation(model, pixels) == {"interpolate_pos_encoding": size != own}
    assert interpolation(tiny("dinov2"), frames[(32, 64)]) == {}


def larger(kind):
    """A larger model with random weights."""
    vision = {**SIZES, "image_size": SIDE, "patch_size": 8}
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16}
    if kind == "siglip":
        return SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    if kind == "clip":
        return CLIPModel(CLIPConfig(vision_config=vision, text_config=text))
    if kind == "aimv2":
        return Aimv2Model(Aimv2Config(vision_config=vision, text_config=text))
    if kind == "llava":
        config = LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text))
        return LlavaForConditionalGeneration(config)
    if kind == "internvl":
        tower = InternVLVisionConfig(**SIZES, image_size=[SIDE] * 2, patch_size=[8] * 2)
        language = Qwen2Config(**text, num_key_value_heads=4)
        return InternVLForConditionalGeneration(InternVLConfig(vision_config=tower, text_config=language))
    if kind == "sam":
        decoder = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 4, "iou_head_hidden_dim": 32}
        prompts = {"hidden_size": 32, "image_size": SIDE, "patch_size": 8}
        tower = {**vision, "output_channels": 32, "global_attn_indexes": [1]}
        return SamModel(SamConfig(vision_config=tower, prompt_encoder_config=prompts, mask_decoder_config=decoder))
    if kind == "vit_mae":
        return ViTMAEForPreTraining(ViTMAEConfig(**vision, decoder_hidden_size=64, decoder_num_hidden_layers=1))
    model, config = {
        "vit": (ViTForImageClassification, ViTConfig),
        "deit": (DeiTForImageClassification, DeiTConfig),
        "dinov2": (Dinov2ForImageClassification, Dinov2Config),
    }[kind]
    return model(config(**vision))


@pytest.mark.filterwarnings("ignore:.*mask_ratio is 0")
@pytest.mark.parametrize(
    "kind", ["siglip", "clip", "aimv2", "llava", "internvl", "sam", "vit", "deit", "vit_mae", "dinov2"]
)
def test_the_tower_comes_out_of_a_larger_model(kind, tmp_path):
    torch.manual_seed(0)
    model = larger(kind)
    model.save_pretrained(tmp_path)
    loaded = load_tower(str(tmp_path), *CPU)
    expected = dict(describe(model).tower.named_parameters())
    assert loaded.config.model_type in TOWERS and not loaded.training
    found = dict(describe(loaded).tower.named_parameters())
    assert len(found) == len(list(loaded.parameters()))
    assert found.keys() == {name for name in expected if not name.startswith("pooler.")}
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("kind", ["clip_vision_model", "dinov3_vit"])
def test_a_tower_that_lacks_weights_is_refused(models, tmp_path, kind):
    model = models(kind)[1]
    kept = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    kept = {name: tensor for name, tensor in kept.items() if "layer.1.norm1" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(CommandError, match=r"\d weights are missing, .*; give a whole checkpoint"):
        load_tower(str(tmp_path), *CPU)


def test_vit_mae_sees_every_patch_and_says_so(neuroflow, models, clip, tmp_path):
    model = models("vit_mae")[1]
    model.config.mask_ratio = 0.75
    model.save_pretrained(tmp_path)
    model.config.mask_ratio = 0.0
    with pytest.warns(UserWarning, match="mask_ratio is 0 instead of 0.75, so it sees all patches"):
        assert load_tower(str(tmp_path), *CPU).config.mask_ratio == 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BeitConfig(), "its type is beit; supported"),
        (LlamaConfig(), "its type is llama; supported"),
        (Siglip2VisionConfig(), "its type, siglip2_vision_model, takes patches cut by its processor"),
        (Qwen2VLConfig(), "takes patches cut by its processor"),
    ],
)
def test_a_model_that_takes_no_frames_is_one_line_that_says_what_does(neuroflow, clip, tmp_path, config, words):
    config.save_pretrained(tmp_path / "model")
    code, table, message = neuroflow("run", clip, "--model", tmp_path / "model")
    assert code == 2 and table == ""
    assert words in error(message) and error(message).endswith(SUPPORTED)
    assert all(name in SUPPORTED for name in TOWERS)


def test_size_and_normalisation_are_the_checkpoints(neuroflow, models, clip, tmp_path):
    """As DINOv2's, whose positions are for 518 px and whose processor crops to 224."""
    model, out = models("dinov2")[1], tmp_path / "result.npz"
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 1 / 255}
    settings |= {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    code, table, message = neuroflow("run", clip, "--model", tmp_path / "model", "--threshold", 0, "--out", out)
    assert code == 0 and "32x32, 16 patches" in table and "warning" not in message
    pixels = Preprocessor(32, 32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), crop=True, resize=40)(
        next(iter(Source(str(clip))))
    )
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state[0, 0]
    torch.testing.assert_close(torch.from_numpy(np.load(out)["embedding"][0]), expected, rtol=1e-3, atol=1e-4)


def test_a_fixed_size_is_the_models_whatever_the_processor_says(neuroflow, models, clip, tmp_path):
    model = models("aimv2_vision_model")[1]
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 64}))
    code, table, _ = neuroflow("run", clip, "--model", tmp_path, "--size", SIDE)
    assert code == 0 and "48x48, 36 patches" in table


def test_settings_that_do_not_fit_the_model_are_one_line(neuroflow, models, clip, tmp_path):
    NeuroFlowConfig(arch="midlayer", mid_layer=30).save(tmp_path / "config.json")
    model = models("clip_vision_model")[0]
    code, table, message = neuroflow("run", clip, "--model", model, "--config", tmp_path / "config.json")
    assert code == 2 and table == "" and "mid_layer is 30; accepted is less than 3" in error(message)
    code, table, message = neuroflow("run", clip, "--model", models("sam_vision_model")[0], "--arch", "active")
    assert (
        code == 2 and table == "" and "arch is 'active'; SamVisionEncoder makes a map of all patches" in error(message)
    )

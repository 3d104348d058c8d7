"""Qwen2.5-VL and Qwen3-VL inside vLLM, in this process where a test looks into the model, and in others."""

import functools
import gc
import json
import logging
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import neuroflow
import pytest
import torch
import transformers
from neuroflow import NeuroFlowConfig
from neuroflow.patch import run_unpatched

from bench import vllm_models
from bench.vllm_models import clip, prompt

pytest.importorskip("vllm.plugins", reason="needs vLLM; run with `make test-vllm`")  # this folder has its name
pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_thread")]

FAMILIES = ("qwen2.5-vl", "qwen3-vl")
EXACT = {"score": "surprise", "threshold": 1e-3, "max_age": None, "dense_above": 1.0, "kernels": "torch"}
NEVER_CUT = {"cut_share": None, "cut_surprise": None, "cut_light": None}
CHUNK = 6  # frames


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp("models") / family
        vllm_models.save(family, found[family])
    return found


class Served:
    """An LLM in this process, and the features that its tower gave, one [N, D] a video or image."""

    def __init__(self, folder, **options):
        self.llm, self.features = vllm_models.load(folder, **options), []
        self.llm.apply_model(self._watch)
        (self.tower,) = self.llm.apply_model(lambda model: model.visual)

    def _watch(self, model):
        embed = model.embed_multimodal

        def watched(**kwargs):
            outputs = embed(**kwargs)
            self.features += [output.clone() for output in outputs]
            return outputs

        model.embed_multimodal = watched

    def ask(self, *prompts):
        """The features of each prompt's pictures, and the tokens."""
        from vllm import SamplingParams

        self.features.clear()
        outputs = self.llm.generate(list(prompts), SamplingParams(**vllm_models.GREEDY), use_tqdm=False)
        return list(self.features), [list(output.outputs[0].token_ids) for output in outputs]

    def forget(self):
        """What vLLM has cached of prompts and features."""
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.reset_prefix_cache()


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, folders):
    from vllm.distributed import cleanup_dist_env_and_memory

    overrides = {"neuroflow": EXACT | NEVER_CUT, "neuroflow_streams": {"max_streams": 3}}
    made = Served(folders[request.param], hf_overrides=overrides)
    made.family, made.folder = request.param, folders[request.param]
    made.vllm_module = type(made.tower).__module__
    yield made
    del made.llm
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture(autouse=True)
def no_streams(request):
    if "served" in request.fixturenames:
        neuroflow.reset_cache(request.getfixturevalue("served").tower)


@pytest.fixture
def caplog_vllm(caplog):
    """`caplog` for vLLM's loggers, which do not propagate."""
    logger = logging.getLogger("vllm.neuroflow")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def asked(folder, family, prompts, plugins="neuroflow", processes=False, **options):
    """The tokens that a process of its own gives, and all that it writes."""
    environment = os.environ | {"VLLM_PLUGINS": plugins, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes))}
    environment |= {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "PYTHONPATH": os.pathsep.join(sys.path)}
    given = json.dumps({"folder": str(folder), "family": family, "prompts": prompts} | options)
    command = [sys.executable, "-m", "bench.vllm_models", given]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (found,) = (line for line in ran.stdout.splitlines() if line.startswith("[["))
    return json.loads(found), ran.stdout + ran.stderr


PROMPTS = [
    {"videos": [[8, 4, 6]]},
    {"image": [4, 4], "videos": [[6, 6, 4, 1], [2, 3, 3, 2]]},
    {"videos": [[12, 3, 5, 3, 0]]},
    {"image": [5, 3]},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_threshold_zero_gives_the_tokens_of_plain_vllm(family, folders, tmp_path, monkeypatch):
    plain, said = asked(folders[family], family, PROMPTS, plugins="")
    assert "neuroflow" not in said.lower()
    NeuroFlowConfig(threshold=0).save(tmp_path / "all.json")
    monkeypatch.setenv("NEUROFLOW_CONFIG", str(tmp_path / "all.json"))
    ours, said = asked(folders[family], family, PROMPTS, processes=True)  # spawned, with settings from the environment
    assert ours == plain
    assert "NeuroFlow: videos are encoded by context, threshold 0" in said
    assert " 0.0 % of patches skipped" in said


def of_transformers(folder, family):
    kind = "Qwen2_5_VL" if family == "qwen2.5-vl" else "Qwen3VL"
    model = getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(folder).eval()
    return model.model.visual


def features_of(tower, rows, grid):
    """What transformers' tower gives, in vLLM's layout."""
    output = tower(rows, grid_thw=torch.tensor([grid]))
    return torch.cat([output.pooler_output, *(output.get("deepstack_features") or [])], 1)


@contextmanager
def repatched(served, config):
    """Its tower under another configuration, called by itself."""
    from neuroflow.serve.vllm import Videos

    (model,) = served.llm.apply_model(lambda model: model)
    tower, before = model.visual, model.neuroflow_videos
    with pytest.warns(RuntimeWarning, match=r"forward stays wrapped by neuroflow.serve.vllm.Videos.encode"):
        neuroflow.disable_cache(tower)
    del tower.forward
    try:
        neuroflow.enable_cache(tower, config)
        yield tower
    finally:
        neuroflow.disable_cache(tower)
        model.neuroflow_videos = Videos(tower, before.config, before.streams)


def patches(family, grid, changing=10):
    """Rows of patches of a video, values 0 to 255, of which a run of some changes from step to step."""
    times, count = grid[0], grid[1] * grid[2]
    values = 3 * 2 * (14 if family == "qwen2.5-vl" else 16) ** 2
    rows = 255 * torch.rand(1, count, values, generator=torch.Generator().manual_seed(0)).repeat(times, 1, 1)
    for step in range(1, times):
        start = step * 17 % (count - changing)
        rows[step:, start : start + changing] = 255 - rows[step:, start : start + changing]
    return rows.flatten(0, 1)


@pytest.mark.parametrize("arch", "ACDE")
def test_a_clip_is_encoded_as_by_the_patched_tower_of_transformers(served, arch):
    """Whose partial frames tests/adapters hold against the slow way."""
    grid = [4, 12, 8]
    rows, other = patches(served.family, grid), of_transformers(served.folder, served.family)
    config = NeuroFlowConfig(arch=arch, **EXACT | NEVER_CUT)
    neuroflow.enable_cache(other, config)
    with torch.inference_mode(), neuroflow.cache_context(other, "a"):
        expected = features_of(other, served.tower.input_norm(rows, torch.float32), grid)
    with repatched(served, config) as tower, torch.inference_mode(), neuroflow.cache_context(tower, "a"):
        ours = tower(rows, [grid])
        reports = neuroflow.last_pass(tower)
    assert [int(report.active.sum()) for report in reports] == [96, 10, 10, 10]
    theirs = neuroflow.last_pass(other)
    assert all(torch.equal(mine.active, its.active) for mine, its in zip(reports, theirs, strict=True))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_a_long_clip_goes_through_in_several_passes(served):
    grid = [6, 12, 8]
    rows = patches(served.family, grid)
    outputs = []
    for limit in (2**16, 200):
        config = NeuroFlowConfig(pass_patches=limit, reuse="last", **EXACT | NEVER_CUT)
        with repatched(served, config) as tower, torch.inference_mode():
            outputs.append(tower(rows, [grid]))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_a_static_clip_keeps_its_features(served):
    """At 84 % skipped. What time it saves on larger towers is in bench/results/vllm.md."""
    config, calls = NeuroFlowConfig(budget=0.104, max_age=None, dense_above=1.0), []
    with repatched(served, config) as tower, torch.inference_mode():
        hook = tower.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        ((ours,), _) = served.ask(prompt(clip(served.family, 32, 6, 8, moving=False)))
        hook.remove()
        skipped = [report.skipped for report in neuroflow.last_pass(tower)]
        ((args, kwargs),) = calls
        dense = run_unpatched(tower, tower, *args, **kwargs)
    cosine = torch.cosine_similarity(ours, dense, dim=1)
    print(f"{sum(skipped) / len(skipped):.1%} skipped, cosine {cosine.mean():.4f}, {cosine.min():.4f} at worst")
    assert sum(skipped) / len(skipped) >= 0.84
    assert cosine.mean() >= 0.99


def chunks(family, seed):
    frames = clip(family, 4 * CHUNK, 4, 6, seed)
    return [frames[start : start + CHUNK] for start in range(0, len(frames), CHUNK)]


def of_stream(name):
    return {"mm_processor_kwargs": {"stream": name}}


def test_interleaved_chunks_of_two_cameras_equal_each_alone(served):
    clips = {name: chunks(served.family, seed) for seed, name in enumerate(("cam-7", "cam:8"))}
    alone = {}
    for name, parts in clips.items():
        alone[name] = [served.ask(prompt(part, **of_stream(name)))[0][0] for part in parts]
        assert neuroflow.summary(served.tower).streams[name].key_frames == 1
    neuroflow.reset_cache(served.tower)
    for number, (mine, theirs) in enumerate(zip(*clips.values(), strict=True)):
        # In one batch, of which vLLM makes one call of the model; the second camera by its identifiers.
        features, _ = served.ask(
            prompt(mine, **of_stream("cam-7")),
            prompt(theirs, multi_modal_uuids={"video": [f"cam:8/{number:06}"]}),
        )
        for ours, name in zip(features, clips, strict=True):
            torch.testing.assert_close(ours, alone[name][number], rtol=0, atol=1e-5)
    streams = neuroflow.summary(served.tower).streams
    assert {name: (stream.frames, stream.key_frames) for name, stream in streams.items()} == dict.fromkeys(
        clips, (2 * CHUNK, 1)
    )


@pytest.mark.parametrize("fields", [of_stream("cam-7"), {"multi_modal_uuids": {"video": ["cam-7/1"]}}])
def test_a_chunk_that_comes_again_is_encoded_again(served, fields):
    """Its features depend on what came in between: with identifiers that repeat, vLLM would give those of before."""
    first, second, *_ = chunks(served.family, 0)
    again = [served.ask(prompt(part, **fields))[0] for part in (first, second, first)]
    assert [len(features) for features in again] == [1, 1, 1]
    assert neuroflow.summary(served.tower).streams["cam-7"].frames == 3 * CHUNK // 2
    assert (again[0][0] - again[2][0]).abs().max() > 1e-3


def test_a_video_without_a_stream_is_encoded_once(served):
    """And alone: neither what came before nor what comes with it has a part in its features."""
    frames, other = chunks(served.family, 5)[0], chunks(served.family, 6)[0]
    ((first,), tokens), ((), again) = served.ask(prompt(frames)), served.ask(prompt(frames))
    assert again == tokens
    served.forget()
    ((_, second, _), _) = served.ask(prompt(other), prompt(frames), prompt(other[:2]))
    assert torch.equal(first, second)
    assert neuroflow.summary(served.tower).streams == {}


def test_images_and_videos_of_one_step_run_as_before(served, monkeypatch):
    image, frames = clip(served.family, 1, 4, 4)[0], clip(served.family, 2, 4, 4)
    features, _ = served.ask(prompt(frames, image=image))
    served.forget()
    (model,) = served.llm.apply_model(lambda model: model)
    monkeypatch.setattr(model.visual, "forward", functools.partial(type(model.visual).forward, model.visual))
    assert all(map(torch.equal, features, served.ask(prompt(frames, image=image))[0]))
    assert neuroflow.summary(served.tower).streams == {}


def test_streams_stay_within_their_limit(served):
    for number in range(5):
        served.ask(prompt(chunks(served.family, number)[0], **of_stream(f"cam-{number}")))
    assert list(neuroflow.summary(served.tower).streams) == ["cam-2", "cam-3", "cam-4"]


@pytest.mark.parametrize("stream", ["../etc", "", 7, "x" * 129])
def test_names_that_are_none_are_refused(served, stream):
    with pytest.raises(ValueError, match=r"stream is .*accepted is a name such as 'cam-7'"):
        served.ask(prompt(chunks(served.family, 0)[0], **of_stream(stream)))
    with pytest.raises(ValueError, match=r"of 0 video"):
        served.ask(prompt(image=clip(served.family, 1, 4, 4)[0], **of_stream("cam-7")))


def test_a_stream_too_large_for_the_limits_runs_unpatched(served):
    (model,) = served.llm.apply_model(lambda model: model)
    frames = chunks(served.family, 0)[0]
    videos, before = model.neuroflow_videos, served.tower._neuroflow_engine.streams
    videos.active = videos.patches = 0
    served.tower._neuroflow_engine.streams = neuroflow.StreamCache(max_bytes=1000)
    try:
        features, _ = served.ask(prompt(frames, **of_stream("cam-7")))
    finally:
        served.tower._neuroflow_engine.streams = before
    assert len(features) == 1 and videos.active == videos.patches


def test_ranks_that_share_out_videos_take_no_streams(served, monkeypatch):
    config = served.llm.llm_engine.model_config.multimodal_config
    monkeypatch.setattr(config, "mm_encoder_tp_mode", "data")
    with pytest.raises(ValueError, match=r"stream is 'cam-7'; accepted are videos without one under --mm-encoder-tp"):
        served.ask(prompt(chunks(served.family, 0)[0], **of_stream("cam-7")))


def test_with_ranks_that_share_out_videos_each_is_encoded_by_itself(served, monkeypatch):
    """Of which one gets the first, and another the second."""

    def share_out(visual, pixels, grids, rope_type):
        parts = pixels.split([math.prod(grid) for grid in grids])
        return tuple(visual(part, [grid]) for part, grid in zip(parts, grids, strict=True))

    (model,) = served.llm.apply_model(lambda model: model)
    frames = [chunks(served.family, number)[0] for number in range(2)]
    both = [served.ask(prompt(each))[0][0] for each in frames]
    served.forget()
    monkeypatch.setattr(model, "use_data_parallel", True)
    monkeypatch.setattr(sys.modules[served.vllm_module], "run_dp_sharded_mrope_vision_model", share_out)
    shared, _ = served.ask(prompt(*frames))
    assert len(shared) == 2 and all(map(torch.equal, shared, both))


def test_videos_are_left_out_of_cuda_graphs(served):
    (config,) = served.llm.apply_model(lambda model: model.get_encoder_cudagraph_config())
    assert (config.modalities, config.max_frames_per_video) == (["image"], 1)


@pytest.mark.parametrize("option", ["compile_mm_encoder", "enable_tower_connector_lora"])
def test_a_tower_that_cannot_be_patched_stays_as_it_is(served, option, caplog_vllm):
    (model,) = served.llm.apply_model(lambda model: model)
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace()),
        lora_config=SimpleNamespace(enable_tower_connector_lora=option == "enable_tower_connector_lora"),
        compilation_config=SimpleNamespace(compile_mm_encoder=option == "compile_mm_encoder"),
    )
    assert model._videos_of(config) is None
    assert f"the tower cannot be patched under {option}" in caplog_vllm.text


def test_a_rank_without_a_tower_has_nothing_to_patch(served, monkeypatch):
    from vllm.model_executor.models.utils import StageMissingLayer

    (model,) = served.llm.apply_model(lambda model: model)
    monkeypatch.setattr(model, "visual", StageMissingLayer("image_tower", model.visual))
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace()), lora_config=None)
    assert model._videos_of(config) is None


def settings(**overrides):
    from neuroflow.serve.vllm import _settings

    return _settings(SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(**overrides))))


def test_where_the_settings_come_from(tmp_path, monkeypatch):
    NeuroFlowConfig(threshold=0.25).save(tmp_path / "one.json")
    assert settings()[0] == NeuroFlowConfig(launch="eager")
    assert settings()[1].max_streams == 16
    monkeypatch.setenv("NEUROFLOW_CONFIG", str(tmp_path / "one.json"))
    assert settings()[0].threshold == 0.25
    config, streams = settings(neuroflow={"budget": 0.5}, neuroflow_streams={"max_bytes": 2**20})
    assert (config.budget, streams.max_bytes, streams.max_streams) == (0.5, 2**20, None)
    assert settings(neuroflow=False)[0] is None
    with pytest.raises(ValueError, match="has no field 'treshold'"):
        settings(neuroflow={"treshold": 1})


def test_the_plugin_is_silent_about_models_that_it_does_not_know(tmp_path):
    from neuroflow.serve import vllm_plugin
    from vllm import ModelRegistry

    vllm_plugin.register()
    vllm_plugin.register()
    assert {"neuroflow.serve.vllm"} == {ModelRegistry.models[name].module_name for name in vllm_plugin.ARCHITECTURES}
    config = transformers.Qwen2Config(**vllm_models.LANGUAGE, max_position_embeddings=256)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    vllm_models.byte_tokenizer().save_pretrained(tmp_path)
    options = {"max_model_len": 128}
    plain, _ = asked(tmp_path, None, [{}], plugins="", **options)
    ours, said = asked(tmp_path, None, [{}], processes=True, **options)
    assert ours == plain
    assert "neuroflow" not in said.lower()

"""The examples, on tiny models."""

import ast
import importlib.util
import itertools
import queue
import re
from pathlib import Path
from types import SimpleNamespace

import neuroflow
import pytest
import torch
import transformers
from models import clip, exact, tiny
from questions import GRID, inputs_of, video
from recordings import write_recording
from safetensors.torch import load_file

from bench.vllm_models import made

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(__file__).parents[1] / "python" / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_the_plugin_for_sglang_gives_what_its_tower_gives(family):
    model, module = made(family), example("sglang_plugin")
    tower, grid = model.model.visual, torch.tensor([GRID])
    videos = [video(model, seed) for seed in range(3)]
    with torch.inference_mode():
        outputs = [tower(each, grid_thw=grid) for each in videos]
    dense = torch.cat(
        [torch.cat([output.pooler_output, *(output.get("deepstack_features") or [])], 1) for output in outputs]
    )
    items = [
        SimpleNamespace(feature=torch.cat(videos[:2]), video_grid_thw=grid.repeat(2, 1)),
        SimpleNamespace(feature=videos[2], video_grid_thw=grid),
    ]
    neuroflow.enable_cache(tower, exact(threshold=1e-4))
    ours = module.video_features(tower, items)
    assert ours.shape == dense.shape
    assert torch.cosine_similarity(ours, dense, dim=1).mean() > 0.95 and not torch.allclose(ours, dense, atol=1e-4)
    assert neuroflow.summary(tower).streams == {}
    neuroflow.disable_cache(tower)
    neuroflow.enable_cache(tower, exact(threshold=0))
    torch.testing.assert_close(module.video_features(tower, items), dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_features_from_outside_give_the_answer_of_the_model(family):
    model, module = made(family), example("video_features")
    inputs, greedy = inputs_of(model, family), {"do_sample": False, "max_new_tokens": 6}
    expected = model.generate(**inputs, pixel_values_videos=video(model), **greedy)
    before = dict(vars(model.model.visual))
    tower = neuroflow.enable_cache(made(family).model.visual, exact(threshold=0))
    features = module.video_features(tower, video(model), inputs["video_grid_thw"], "camera")
    assert torch.equal(model.generate(**inputs, mm_encoder_outputs={"video": features}, **greedy), expected)
    assert vars(model.model.visual) == before
    other = module.video_features(tower, video(model, 1), inputs["video_grid_thw"], "camera")
    assert not torch.equal(model.generate(**inputs, mm_encoder_outputs={"video": other}, **greedy), expected)
    assert neuroflow.summary(tower).streams["camera"].frames == 2 * GRID[0]


class Processor:
    """What stands in for that of Qwen3-VL, which needs torchvision: every chunk is the same still."""

    def __init__(self, model):
        self.model, self.frames = model, []

    def apply_chat_template(self, asked, add_generation_prompt):
        return asked[0]["content"][1]["text"]

    def __call__(self, text, videos, return_tensors):
        self.frames.append(len(videos[0]))
        steps, rows, columns = GRID
        still = video(self.model)[: rows * columns].repeat(steps, 1)
        return inputs_of(self.model, "qwen3-vl") | {"pixel_values_videos": still}

    def batch_decode(self, tokens, skip_special_tokens):
        return [f"{tokens.shape[1]} tokens"]


def test_a_video_language_model_is_asked_about_each_chunk(run, tmp_path, monkeypatch):
    model = made("qwen3-vl")
    model.save_pretrained(tmp_path / "model")
    processor = Processor(model)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda path: processor)
    recording = write_recording(tmp_path / "clip.mp4", 180)  # 18 seconds
    lines = run("video_features", tmp_path / "model", recording, "What happens?").splitlines()
    assert processor.frames == [16, 2]  # one a second
    first, second = (re.fullmatch(r"(\d+) s, (\d+)% skipped: \d+ tokens", line) for line in lines)
    assert (first[1], second[1]) == ("0", "16")
    assert int(second[2]) > int(first[2])  # it goes on without a key frame


@pytest.fixture
def run(monkeypatch, capsys):
    """run(name, *arguments) -> what the script prints."""

    def call(name, *arguments):
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        example(name).main()
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """The directory of a tiny SigLIP tower for frames of 64 x 64."""
    folder = tmp_path_factory.mktemp("siglip")
    tiny("siglip", 64).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 64}}')
    return folder


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_to_run_it(path):
    text = path.read_text()
    assert text.count("\n") < 60
    assert path.stem in ast.get_docstring(ast.parse(text))


def test_a_webcam(run, siglip, tmp_path):
    lines = run("webcam", write_recording(tmp_path / "clip.mp4", 6), siglip).splitlines()
    assert lines[0].endswith("key frame: first") and "webcam: 6 frames (1 key)" in lines[7]
    skipped = [float(re.search(r"([\d.]+)% skipped", line)[1]) for line in lines[:6]]
    assert skipped[0] == 0 and min(skipped[1:]) > 30


def test_an_archive(run, siglip, tmp_path):
    for seed in range(2):
        write_recording(tmp_path / "in" / f"{seed}.mp4", 20, seed)
    run("archive", tmp_path / "in", tmp_path / "out", siglip)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.mp4.safetensors", "1.mp4.safetensors"]
    one, other = (load_file(tmp_path / "out" / f"{seed}.mp4.safetensors") for seed in range(2))
    assert one["embeddings"].shape == (20, 64) and not torch.equal(one["embeddings"], other["embeddings"])
    assert one["skipped"][0] == 0 and one["skipped"][1:].mean() > 0.3


def test_many_cameras(run, siglip, tmp_path):
    clips = [write_recording(tmp_path / f"{seed}.mp4", 6, seed) for seed in range(2)]
    lines = run("many_cameras", siglip, *clips).splitlines()
    for path in clips:
        assert [line.split()[1] for line in lines if line.startswith(f"{path} ")] == list("012345")


def test_the_serving_loop_answers_every_camera_in_order():
    model, replies, requests = tiny("siglip"), {}, queue.Queue()
    frames = {camera: clip(frames=5, seed=seed, changed=2) for seed, camera in enumerate("abc")}
    for number, camera in sorted(itertools.product(range(5), "abc"), key=lambda each: (each[0] // 2, each)):
        requests.put((camera, number, frames[camera][number]))
    requests.put(None)
    example("many_cameras").serve(model, requests, lambda *reply: replies.__setitem__(reply[:2], reply[2]), most=4)
    assert requests.empty()
    assert set(replies) == set(itertools.product("abc", range(5)))
    streams = neuroflow.summary(model).streams
    assert {name: (stream.frames, stream.frame_id) for name, stream in streams.items()} == dict.fromkeys("abc", (5, 4))
    neuroflow.disable_cache(model)
    with torch.no_grad():
        for (camera, number), embedding in replies.items():
            dense = model(pixel_values=frames[camera][number][None]).pooler_output[0]
            assert torch.cosine_similarity(embedding, dense, dim=0) > 0.95


def test_a_robot_policy(run, siglip):
    printed = run("robot_policy", siglip)
    assert max(float(off) for off in re.findall(r"off by ([\d.]+)%", printed)) < 20
    for camera in ("base", "wrist"):
        skipped = re.search(rf"{camera}: 20 frames \(1 key\).* ([\d.]+)% of patches skipped", printed)[1]
        assert float(skipped) > 50


def test_the_ops_alone(run):
    printed = run("ops_alone")
    found = re.findall(r"([\d.]+)% of tokens computed, cosine to dense ([\d.]+)", printed)
    assert len(found) == 8 and found[0][0] == "100.0"
    assert all(float(computed) < 10 and float(cosine) > 0.8 for computed, cosine in found[1:])

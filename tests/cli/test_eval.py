"""`neuroflow eval video` on five clips whose answers are worked out by hand, and `neuroflow eval laws`."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import PATCH, tiny, vit_tiny
from neuroflow import NeuroFlowConfig
from neuroflow.cli import eval_laws, eval_video, systems
from neuroflow.street.scene import CLASSES, Scene, write_scene
from neuroflow.video.encode import VideoWriter
from neuroflow.video.source import Source
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, SiglipConfig, SiglipModel

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE, FRAMES, PATCHES = 48, 6, 36
# Three clips that are named rightly, one whose class is second, and one whose class is last of four.
CLIPS = ("Blink/a.mp4", "Blink/b.mp4", "Jump/c.mp4", "Run/d.mp4", "Walk/e.mp4")
LABELS = ("Blink", "Jump", "Run", "Walk")
ORDERS = ((0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (0, 2, 1, 3), (0, 1, 2, 3))


def write_clip(path, seed, frames=FRAMES):
    """A texture of its own, of which a few patches change from frame to frame."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (6, 6, 3), np.uint8).repeat(PATCH, 0).repeat(PATCH, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, Fraction(10)) as writer:
        for _ in range(frames):
            for patch in random.permutation(PATCHES)[:7]:
                row, column = PATCH * (patch // 6), PATCH * (patch % 6)
                image[row : row + PATCH, column : column + PATCH] = random.integers(0, 256, 3)
            writer.write(image)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "siglip"
    tiny("siglip", SIDE).save_pretrained(directory)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "do_normalize": True}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate(CLIPS):
        write_clip(root / name, seed)
    return root


def pixels(path, frames=FRAMES):
    images = [frame.rgb(SIDE, SIDE) for frame in list(Source(str(path)))[:frames]]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.inference_mode()
def dense_by_hand(tower, frames):
    return tower(pixel_values=frames).pooler_output


@torch.inference_mode()
def dual_by_hand(tower, frames, threshold):
    """The published C: embeddings [T, D], and how many patches each frame skips."""
    embeddings, skipped = [], []
    for number, tokens in enumerate(tower.embeddings(frames).split(1)):  # [1, 36, D]
        if number == 0:
            reference, active = tokens, torch.arange(PATCHES)
            cache = torch.empty_like(tokens)
        else:
            surprise = 1 - F.cosine_similarity(tokens, reference, 2)[0]
            active = (surprise > threshold).nonzero()[:, 0]
            if len(active) < 4:
                active = surprise.topk(4).indices.sort().values
            reference = 0.99 * reference + 0.01 * tokens
        cache[:, active] = tower.post_layernorm(tower.encoder(tokens[:, active]).last_hidden_state)
        embeddings.append(tower.head(cache))
        skipped.append(PATCHES - len(active))
    return torch.cat(embeddings), skipped


@pytest.fixture(scope="module")
def classes(tmp_path_factory, folder):
    """Embeddings under which each clip's mean is nearest to the classes in the order of ORDERS."""
    means = torch.stack([dense_by_hand(tiny("siglip", SIDE), pixels(folder / name)).mean(0) for name in CLIPS])
    cosines = torch.tensor([[0.8 - 0.2 * order.index(label) for label in range(4)] for order in ORDERS])
    embeddings = torch.linalg.pinv(F.normalize(means, dim=1).double()) @ cosines.double()  # [D, 4]
    # A part that no clip sees makes the classes equally long, so that only the angles to the clips count.
    basis = torch.linalg.qr(torch.cat((means.T.double(), torch.eye(64, dtype=torch.float64)), 1)).Q
    length = embeddings.norm(dim=0).max() * 1.1
    rest = (length**2 - embeddings.norm(dim=0) ** 2).sqrt()
    path = tmp_path_factory.mktemp("classes") / "classes.npz"
    np.savez(path, names=LABELS, embeddings=(embeddings + basis[:, 10:11] * rest).T.float().numpy())
    return path


@pytest.fixture
def neuroflow(neuroflow_with_warnings):
    """What is left out, or discarded, is said in a warning."""
    return neuroflow_with_warnings


def interval(correct, count):
    """The two shares p at which |p - correct / count| is 1.96 standard deviations of p."""
    shares = np.linspace(0, 1, 1_000_001)
    inside = np.abs(shares - correct / count) <= 1.959964 * np.sqrt(shares * (1 - shares) / count) + 1e-12
    return shares[inside].min(), shares[inside].max()


def test_five_clips_by_hand(neuroflow, folder, model, classes, tmp_path):
    out, tower, threshold = tmp_path / "result.json", tiny("siglip", SIDE), 0.05
    options = ("--preset", "published", "--threshold", threshold, "--out", out)
    code, table, progress = neuroflow("eval", "video", folder, "--model", model, "--classes", classes, *options)
    assert code == 0, progress
    result = json.loads(out.read_text())
    heads = F.normalize(torch.from_numpy(np.load(classes)["embeddings"]), dim=1)
    skips, cosines, places = [], [], {"dense": [], "C 0.05": []}
    for name, order in zip(CLIPS, ORDERS, strict=True):
        frames, label = pixels(folder / name), name.split("/")[0]
        expected = dense_by_hand(tower, frames)
        found, skipped = dual_by_hand(tower, frames, threshold)
        cosine = F.cosine_similarity(found, expected)[1:].mean().item()
        record = result["found"][name]
        assert record["label"] == label and list(record["answers"]) == ["dense", "C 0.05"]
        assert record["answers"]["dense"]["top"] == [LABELS[index] for index in order[:3]]
        answer = record["answers"]["C 0.05"]
        nearest = (heads @ found.mean(0)).argsort(descending=True).tolist()
        assert answer["top"] == [LABELS[index] for index in nearest[:3]]
        assert answer["skipped"] == pytest.approx([patches / PATCHES for patches in skipped])
        assert answer["cosine"] == pytest.approx(cosine, abs=1e-5)
        skips += [patches / PATCHES for patches in skipped[1:]]
        cosines.append(cosine)
        places["dense"].append(order.index(LABELS.index(label)))
        places["C 0.05"].append(nearest.index(LABELS.index(label)))
    assert places["dense"] == [0, 0, 0, 1, 3] and 0.5 < np.mean(skips) < 0.9
    for row in result["table"]:
        first, among = (sum(place < limit for place in places[row["system"]]) for limit in (1, 3))
        assert (row["clips"], row["top1"], row["top3"]) == (5, first / 5, among / 5)
        assert row["top1_interval"] == pytest.approx(interval(first, 5), abs=2e-6)
        assert row["top3_interval"] == pytest.approx(interval(among, 5), abs=2e-6)
    dense, sparse = result["table"]
    assert dense["skipped"] is None and dense["cosine"] is None
    assert sparse["skipped"] == pytest.approx(np.mean(skips)) and sparse["cosine"] == pytest.approx(np.mean(cosines))
    assert "| dense  | 60.00% | 23.1% to 88.2% | 80.00% | 37.6% to 96.4% | -               | -" in table
    assert f"{np.mean(skips):.1%}" in table and f"{np.mean(cosines):.4f}" in table
    assert "5 of 5, 4 classes" in table and "score surprise, signal embedding, reference ema" in table
    assert "5/5" in progress and "dense top-1 60.0%" in progress
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_every_architecture_at_every_threshold(neuroflow, folder, model, classes, tmp_path):
    out = tmp_path / "result.json"
    options = ("--arch", "C", "context", "--threshold", 0, 0.5, "--max-frames", 3, "--stride", 2, "--out", out)
    line = ("eval", "video", folder, "--model", model, "--classes", classes, "--preset", "published")
    code, _, _ = neuroflow(*line, *options)
    assert code == 0
    result = json.loads(out.read_text())
    systems = ["dense", "C 0", "C 0.5", "E 0", "E 0.5"]
    assert [row["system"] for row in result["table"]] == systems
    for record in result["found"].values():
        answers = record["answers"]
        assert list(answers) == systems and len(answers["C 0"]["skipped"]) == 3
        assert answers["C 0"]["top"] == answers["E 0"]["top"] == answers["dense"]["top"]
        assert answers["C 0"]["skipped"] == [0] * 3 and answers["C 0"]["cosine"] == pytest.approx(1, abs=1e-5)
        assert answers["C 0.5"]["skipped"] == answers["E 0.5"]["skipped"] and answers["E 0.5"]["skipped"][1] > 0


def test_a_testlist_a_file_of_settings_and_pictures(neuroflow, folder, model, classes, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "testlist.txt").write_text("Walk/e.mp4 4\nBlink/a.mp4 1\n")
    NeuroFlowConfig(arch="C", budget=0.25, score="surprise", cut_surprise=None).save(tmp_path / "config.json")
    files = ("--testlist", tmp_path / "testlist.txt", "--config", tmp_path / "config.json")
    options = (*files, "--plots", tmp_path / "plots", "--out", tmp_path / "result.json")
    code, table, message = neuroflow("eval", "video", folder, "--model", model, "--classes", classes, *options)
    assert code == 0, message
    assert "2 of 2, 4 classes" in table and "| C budget 0.25" in table and "75.0%" in table
    assert list(json.loads((tmp_path / "result.json").read_text())["found"]) == ["Walk/e.mp4", "Blink/a.mp4"]
    assert (tmp_path / "plots" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_a_damaged_clip_is_reported_and_left_out(neuroflow, model, classes, tmp_path):
    folder, out = tmp_path / "clips", tmp_path / "result.json"
    write_clip(folder / CLIPS[0], 0)
    (folder / "Blink" / "broken.avi").write_text("this is not a video\n" * 50)
    write_clip(folder / "Run" / "z.mp4", 3)
    options = ("--model", model, "--classes", classes, "--arch", "E", "--out", out)
    code, table, message = neuroflow("eval", "video", folder, *options)
    assert code == 0 and "2 of 3, 4 classes" in table
    (warning,) = (line for line in message.splitlines() if "left out" in line)
    assert "warning: left out: " in warning and "broken.avi: it cannot be opened" in warning
    result = json.loads(out.read_text())
    assert list(result["found"]) == ["Blink/a.mp4", "Run/z.mp4"] and list(result["left_out"]) == ["Blink/broken.avi"]
    write_clip(folder / "Blink" / "broken.mp4", 1).replace(folder / "Blink" / "broken.avi")
    assert neuroflow("eval", "video", folder, *options, "--resume")[0] == 0
    assert len(json.loads(out.read_text())["found"]) == 3


@pytest.fixture
def counted(monkeypatch):
    """The number of clips that were classified; `stop_at` ends the run at that many, as Ctrl-C does."""

    class Counter:
        stop_at, count = None, 0

        def __call__(self, *arguments):
            if self.count == self.stop_at:
                raise KeyboardInterrupt
            self.count += 1
            return self.classify(*arguments)

    counter = Counter()
    counter.classify = eval_video.classify
    monkeypatch.setattr(eval_video, "classify", counter)
    return counter


def test_resume_after_a_kill(neuroflow, folder, model, classes, tmp_path, counted):
    out, whole = tmp_path / "result.json", tmp_path / "whole.json"
    line = ("eval", "video", folder, "--model", model, "--classes", classes, "--arch", "E", "--out")
    assert neuroflow(*line, whole)[0] == 0
    counted.stop_at, counted.count = 2, 0
    code, _, message = neuroflow(*line, out)
    assert code == 130 and "interrupted after 2 clips" in message and "--resume continues it" in message
    journal = tmp_path / "result.json.journal"
    assert not out.exists() and len(journal.read_text().splitlines()) == 3
    with journal.open("a") as file:
        file.write('["Jump/c.mp4", {"label": "Ju')
    counted.stop_at, counted.count = None, 0
    code, _, message = neuroflow(*line, out, "--threshold", 0.3, "--resume")
    assert code == 2 and "was made with systems ['E 0.1'], not ['E 0.3']" in message
    code, table, progress = neuroflow(*line, out, "--resume")
    assert code == 0 and counted.count == 3 and "5 of 5" in table and "2/5" in progress
    assert json.loads(out.read_text()) == json.loads(whole.read_text()) and not journal.exists()
    assert neuroflow(*line, out, "--resume")[1] == table and counted.count == 3
    assert neuroflow(*line, out)[0] == 0 and counted.count == 8


def test_an_unfinished_run_is_not_continued_unasked(neuroflow, folder, model, classes, tmp_path, counted):
    line = ("eval", "video", folder, "--model", model, "--classes", classes, "--out", tmp_path / "result.json")
    counted.stop_at = 1
    assert neuroflow(*line)[0] == 130
    counted.stop_at, counted.count = None, 0
    code, _, message = neuroflow(*line)
    assert (
        code == 0
        and counted.count == 5
        and "result.json.journal is discarded, because --resume was not given" in message
    )
    (tmp_path / "result.json").write_text("{")
    code, _, message = neuroflow(*line, "--resume")
    assert code == 2 and "result.json: cannot be continued" in message


TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LETTERS = "abcdefghijklmnopqrstuvwxyz."


def whole_model(directory, kind):
    """A tiny SigLIP or CLIP with both towers, and a tokenizer of letters."""
    torch.manual_seed(0)
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate([*ends, *LETTERS, *(f"{c}</w>" for c in LETTERS)])}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = TEXT | ids | {"vocab_size": len(vocabulary), "max_position_embeddings": 40}
    vision = TEXT | {"image_size": SIDE, "patch_size": PATCH}
    if kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    else:
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval().save_pretrained(directory)
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return model, CLIPTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_classes_of_a_text_tower(neuroflow, folder, tmp_path, kind):
    model, tokenizer = whole_model(tmp_path / "model", kind)
    out, templates = tmp_path / "result.json", ("A video of a person doing {}.", "{}")
    options = ("--model", tmp_path / "model", "--template", *templates, "--arch", "E", "--out", out)
    code, _, message = neuroflow("eval", "video", folder, *options)
    assert code == 0, message

    @torch.inference_mode()
    def embedded(prompt):
        ids = tokenizer(prompt)["input_ids"]
        if kind == "siglip":
            padded = torch.tensor([ids + [1] * (40 - len(ids))])
            return model.text_model(input_ids=padded).pooler_output[0]
        return model.text_projection(model.text_model(input_ids=torch.tensor([ids])).pooler_output[0])

    said = [[template.format(label).lower() for template in templates] for label in ("blink", "jump", "run", "walk")]
    expected = torch.stack([torch.stack([F.normalize(embedded(one), dim=0) for one in each]).mean(0) for each in said])
    classes, project = eval_video.text_classes(str(tmp_path / "model"), list(LABELS), list(templates), "cpu")
    assert classes.names == LABELS and classes.temperature == pytest.approx(model.logit_scale.exp().item())
    assert torch.allclose(classes.embeddings, expected, atol=1e-5) and (project is None) == (kind == "siglip")
    assert (expected[0] - expected[1]).norm() > 0.01
    preprocess = 0.5, 0.5
    if kind == "clip":
        preprocess = eval_laws.TOWERS["clip_vision_model"].normalisation
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in preprocess)
    answers = json.loads(out.read_text())["found"]
    for name in CLIPS:
        frames = ((pixels(folder / name) + 1) / 2 - mean) / std
        with torch.inference_mode():
            image = model.get_image_features(pixel_values=frames)
        image = image if isinstance(image, torch.Tensor) else image.pooler_output
        order = F.cosine_similarity(image.mean(0), expected, 1).argsort(descending=True)[:3]
        assert answers[name]["answers"]["dense"]["top"] == [LABELS[index] for index in order]


def test_prompts_are_lower_case_words_and_no_code_of_the_models_runs(tmp_path, monkeypatch):
    whole_model(tmp_path / "model", "siglip")
    prompts, trusted, load = [], [], eval_video.AutoTokenizer.from_pretrained

    def recording(name, **options):
        return lambda texts, **others: prompts.append(texts) or load(name, **options)(texts, **others)

    def watch(loader):
        load = loader.from_pretrained
        noting = lambda name, **options: trusted.append(options.get("trust_remote_code")) or load(name, **options)  # noqa: E731
        monkeypatch.setattr(loader, "from_pretrained", noting)

    monkeypatch.setattr(eval_video.AutoTokenizer, "from_pretrained", recording)
    for loader in (eval_video.AutoConfig, eval_video.AutoTokenizer, eval_video.AutoModel):
        watch(loader)
    eval_video.text_classes(str(tmp_path / "model"), ["ApplyEyeMakeup", "YoYo"], ["A video of {}.", "{}"], "cpu")
    assert prompts == [["a video of apply eye makeup.", "a video of yo yo."], ["apply eye makeup", "yo yo"]]
    assert len(trusted) >= 3 and set(trusted) == {False}


def test_the_published_table_is_one_command_and_no_table_depends_on_the_machines_speed(
    folder, model, classes, monkeypatch, neuroflow
):
    configs = {}
    monkeypatch.setattr(eval_video, "_patched", lambda model, config: configs.setdefault(config.threshold, config))
    monkeypatch.setattr(eval_video, "classify", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert neuroflow("eval", "video", folder, "--model", model, "--classes", classes, "--preset", "published")[0] == 130
    gate = {"signal": "embedding", "reference": "ema", "ema_decay": 0.01, "score": "surprise", "max_age": None}
    always = {"arch": "C", "cut_share": None, "cut_surprise": None, "dense_above": 1.0, "floor": 4}
    always["cut_light"] = None
    assert configs == {t: NeuroFlowConfig(threshold=t, kernels="rows", **gate, **always) for t in (0.05, 0.1, 0.2)}
    assert neuroflow("eval", "video", folder, "--model", model, "--classes", classes, "--threshold", 0.3)[0] == 130
    assert configs[0.3] == NeuroFlowConfig(arch="C", threshold=0.3, dense_above=1.0, kernels="rows")


def test_the_packages_own_tower_names_drawn_clips_and_frames(neuroflow, tmp_path):
    subject = CLASSES[0]
    write_scene(tmp_path / "clip.mp4", Scene(subject, "local", "static", seed=1), 3, 224)
    (tmp_path / "clips" / subject / "frames").mkdir(parents=True)
    for frame in Source(str(tmp_path / "clip.mp4")):
        frame.picture.to_image().save(tmp_path / "clips" / subject / "frames" / f"{frame.index}.png")
    code, table, _ = neuroflow("eval", "video", tmp_path / "clips")
    assert code == 0 and f"1 of 1, {len(CLASSES)} classes" in table
    systems = [line.split(" | ")[:2] for line in table.splitlines() if "100.00%" in line]
    assert [[name.strip("| ") for name in row] for row in systems] == [
        ["dense", "100.00%"],
        ["C 0.1", "100.00%"],
        ["E 0.1", "100.00%"],
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["missing"], "missing: no such directory; give one that holds a folder of clips for each class"),
        (["empty"], "empty: holds no class folder"),
        (["no-clips"], "no-clips: no clip in its 1 class folders; accepted are files in .avi"),
        (["clips", "--testlist", "absent.txt"], "1 of the 2 clips it lists are not in clips, Run/gone.avi first"),
        (["clips", "--testlist", "unlabelled.txt"], "line 1: 'd.mp4' has no class"),
        (["clips", "--classes", "missing.npz"], "--classes missing.npz: cannot be read"),
        (
            ["clips", "--classes", "twice.npz"],
            "--classes twice.npz: holds 1 different names for 2 embeddings",
        ),
        (["clips", "--classes", "two.npz"], "--classes two.npz: has no class 'Run', a label of clips in clips"),
        (["clips", "--classes", "narrow.safetensors"], "classes is [1, 3]; accepted is [C, 64]"),
        (["clips"], "its type, siglip_vision_model, has no text tower; give --classes FILE"),
        (["clips", "--model", "no-tokenizer"], "its text tower cannot be loaded"),
        (["clips", "--arch", "F"], "arch is 'F'; accepted is"),
        (["clips", "--threshold", -1], "threshold is -1.0; accepted is"),
        (["clips", "--config", "missing.json"], "missing.json: cannot be read"),
        (["clips", "--config", "config.json", "--preset", "published"], "not allowed with argument"),
        (["clips", "--template", "a video."], "'a video.' has no {} for the class"),
        (["clips", "--out", "result.csv"], "give a .json file in a directory that exists"),
        (["clips", "--resume"], "--resume: there is nothing to continue without --out"),
        (["clips", "--classes", "run.npz", "--plots", "two.npz"], "--plots two.npz: cannot be made"),
        (["broken", "--classes", "run.npz"], "broken: none of its 1 clips can be read, Run/d.mp4 first"),
    ],
)
def test_what_cannot_be_done_is_one_line(neuroflow, model, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    for directory in ("empty", "no-clips/Run", "broken/Run"):
        (tmp_path / directory).mkdir(parents=True)
    write_clip(tmp_path / "clips" / "Run" / "d.mp4", 0, 2)
    (tmp_path / "broken" / "Run" / "d.mp4").write_text("this is not a video\n")
    (tmp_path / "absent.txt").write_text("Run/d.mp4\nRun/gone.avi")
    (tmp_path / "unlabelled.txt").write_text("d.mp4")
    np.savez("two.npz", names=["Walk", "Jump"], embeddings=np.eye(2, 64))
    np.savez("twice.npz", names=["Run", "Run"], embeddings=np.eye(2, 64))
    np.savez("run.npz", names=["Run"], embeddings=np.eye(1, 64))
    save_file({"embeddings": torch.eye(1, 3)}, "narrow.safetensors", {"names": '["Run"]'})
    if "no-tokenizer" in options:
        whole_model(tmp_path / "no-tokenizer", "siglip")
        for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            (tmp_path / "no-tokenizer" / file).unlink()
        options = [*options[:-1], str(tmp_path / "no-tokenizer")]
    else:
        options = [*options, "--model", model]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, table, message = neuroflow("eval", "video", *options)
    lines = [line for line in message.splitlines() if "error: " in line]
    assert code == 2 and table == "" and len(lines) == 1 and words in lines[0] and "Traceback" not in message


def test_laws_of_one_clip(neuroflow, folder, model, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    out, plots = tmp_path / "laws.json", tmp_path / "plots"
    line = ("eval", "laws", folder / CLIPS[0], "--model", model, "--preset", "published", "--arch", "C", "E")
    line += ("--threshold", 0.05, 0.2, "--sizes", 48, "80x48", "--out", out)
    code, table, message = neuroflow(*line, "--plots", plots)
    assert code == 0, message
    found = json.loads(out.read_text())["found"]
    names = ("saturation", "degradation", "active shift", "representation gap", "head entropy", "token stability")
    assert list(found) == [f"{law} {arch}" for law in names for arch in "CE"]
    rows = {name: len(each) for name, each in found.items() if name.endswith("C")}
    assert list(rows.values()) == [2, 2, 5, 4, 5, 5]
    assert [row["threshold"] for row in found["saturation E"]] == [0.05, 0.2]
    assert [(row["width"], row["patches"]) for row in found["degradation C"]] == [(48, 36), (80, 60)]
    skipped = np.mean(dual_by_hand(tiny("siglip", SIDE), pixels(folder / CLIPS[0]), 0.05)[1][1:]) / PATCHES
    assert found["saturation C"][0]["skipped"] == pytest.approx(skipped)
    assert np.mean([row["skipped"] for row in found["active shift C"]]) == pytest.approx(skipped)
    for law in names:
        assert f"\n{law}\n" in table and (plots / f"{law.replace(' ', '-')}.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{np.mean([row['cached'] for row in found['active shift E']]):.4f}" in table

    monkeypatch.setattr(eval_laws.laws, "head_entropy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, message = neuroflow(*line)
    assert code == 130 and "interrupted after 8 of 12 laws" in message and "--resume continues it" in message
    monkeypatch.undo()
    for name in ("saturation", "active_shift"):
        monkeypatch.setattr(eval_laws.laws, name, None)
    out.unlink()
    assert neuroflow(*line, "--resume")[1] == table and json.loads(out.read_text())["found"] == found


def test_laws_that_a_model_does_not_have_are_left_out(neuroflow, folder, tmp_path):
    tiny("clip", SIDE).save_pretrained(tmp_path / "clip")
    code, table, message = neuroflow("eval", "laws", folder / CLIPS[0], "--model", tmp_path / "clip", "--arch", "E")
    assert code == 0 and "head entropy is left out: no pooling head attends to all tokens" in message
    assert "active shift" in table and "head entropy" not in table and "| 96    | 96     | 144     |" in table
    tiny("sam", SIDE).save_pretrained(tmp_path / "sam")
    code, table, message = neuroflow("eval", "laws", folder / CLIPS[0], "--model", tmp_path / "sam", "--arch", "E")
    assert code == 0 and "degradation is left out: the model takes one size only" in message
    assert "token stability" in table and "degradation" not in table


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["missing.mp4"], "no such file"),
        (["clip.mp4", "--max-frames", 1], "gives 1 frame(s), and the first is not counted; give more"),
        (["clip.mp4", "--config", "budget.json"], "holds a budget, and the laws vary a threshold; give --threshold"),
        (["clip.mp4", "--sizes", 50], "multiples of the patch size, 8x8"),
        (["clip.mp4", "--out", "no/where.json"], "--out no/where.json: cannot be written"),
    ],
)
def test_laws_that_cannot_be_measured_are_one_line(neuroflow, model, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4", 0, 3)
    NeuroFlowConfig(budget=4).save("budget.json")
    code, table, message = neuroflow("eval", "laws", *options, "--model", model)
    lines = [line for line in message.splitlines() if "error: " in line]
    assert code == 2 and table == "" and len(lines) == 1 and words in lines[0]


def test_a_live_source_has_no_laws(neuroflow, folder, model, monkeypatch):
    def live(*arguments, **options):
        source = Source(*arguments, **options)
        source.live = True
        return source

    monkeypatch.setattr(eval_laws, "Source", live)
    code, _, message = neuroflow("eval", "laws", folder / CLIPS[0], "--model", model)
    assert code == 2 and "a live source gives each frame only once" in message and message.count("\n") == 1


def test_pictures_need_matplotlib(neuroflow, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(systems.importlib.util, "find_spec", lambda name: None)
    code, _, message = neuroflow("eval", "video", folder, "--plots", tmp_path / "plots")
    assert code == 2 and "--plots: matplotlib is missing; install the bench extra" in message
    assert message.count("\n") == 1 and not (tmp_path / "plots").exists()


def test_a_real_vit_on_real_clips(data, neuroflow, tmp_path):
    """Each clip is its own class, so that dense is right and reuse is off by what it loses."""
    vit_tiny(data("weights/vit_tiny_patch16_224.safetensors"), tmp_path / "vit")
    names = ("bird", "milk", "thanks")
    for name in names:
        (tmp_path / "clips" / name).mkdir(parents=True)
        (tmp_path / "clips" / name / "clip.mkv").symlink_to(data(f"videos/{name}.mkv"))
    line = ("run", "--model", tmp_path / "vit", "--max-frames", 8, "--threshold", 0, "--out", tmp_path / "dense.npz")
    means = []
    for name in names:
        assert neuroflow(line[0], data(f"videos/{name}.mkv"), *line[1:])[0] == 0
        means.append(np.load(tmp_path / "dense.npz")["embedding"].mean(0))
    np.savez(tmp_path / "classes.npz", names=names, embeddings=means)
    options = ("--classes", tmp_path / "classes.npz", "--max-frames", 8, "--out", tmp_path / "result.json")
    assert neuroflow("eval", "video", tmp_path / "clips", "--model", tmp_path / "vit", *options)[0] == 0
    dense, dual, context = json.loads((tmp_path / "result.json").read_text())["table"]
    assert dense["top1"] == context["top1"] == 1 and context["top1_interval"][0] == pytest.approx(0.4385, abs=1e-4)
    assert context["skipped"] > 0.5 and context["cosine"] > 0.98 > dual["cosine"] and not math.isnan(dual["cosine"])

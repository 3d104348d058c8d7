"""Files that a user hands over, or that a run has left, damaged at random: read, or refused in one line.

`make fuzz` goes on for longer; the marker's tests begin where the suite's end.
"""

import itertools
import json
import os
import random
import time

import numpy as np
import pytest
import torch
from models import tiny
from neuroflow import NeuroFlowConfig
from neuroflow.calibration import LogitShift
from neuroflow.classes import read_classes
from neuroflow.distillation import Distillation, DistillationConfig
from neuroflow.journal import Findings
from neuroflow.video.results import Record, Results
from neuroflow.weights import distilled_config, load_weights, write
from safetensors.torch import load_file, save_file

CASES = 40  # of each kind in the suite
WORDS = [None, True, "", "x", -5, 1.5, 2**31, 10**30, 1e39, [], {}, [[1]], "NaN", "9" * 30]
TEXTS = ["NaN", "Infinity", "1e999", "[" * 5000, '"\\ud800"', "\0", "-", '{"a":', "]" * 9]


def changed(value, rng):
    """JSON of which a part is another, missing or there twice."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(list(value))
        if rng.random() < 0.2:
            return {key: each for key, each in value.items() if key != name}
        return value | {name: changed(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        number, how = rng.randrange(len(value)), rng.random()
        if how < 0.4:
            return value[:number] + value[number + 1 :] if how < 0.2 else [*value, value[number]]
        return [*value[:number], changed(value[number], rng), *value[number + 1 :]]
    return rng.choice(WORDS)


def damaged_bytes(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        where, how = rng.randrange(len(content) + 1), rng.random()
        if how < 0.3:
            del content[where:]
        elif how < 0.5:
            content[where : where + rng.randrange(40)] = rng.randbytes(rng.randrange(40))
        elif how < 0.8:
            content[where : where + 1] = rng.randbytes(1)
        else:
            content[where:where] = rng.choice(TEXTS).encode()
    return bytes(content)


def damaged_lines(content, rng):
    """The same of JSON lines, one of which may be other JSON, missing or there twice."""
    if rng.random() < 0.4:
        return damaged_bytes(content, rng)
    lines = [json.loads(line) for line in content.splitlines()]
    lines = changed(lines, rng)
    return "".join(json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else [lines])).encode()


def damaged_tensors(content, rng, path):
    """The same of safetensors, whose metadata or tensors may be others."""
    if rng.random() < 0.4:
        return damaged_bytes(content, rng)
    path.write_bytes(content)
    tensors, length = load_file(path), int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    name = rng.choice(list(tensors))
    how = rng.randrange(5)
    if how == 0:
        del tensors[name]
    elif how == 1:
        tensors[name] = torch.zeros(rng.choice([(), (0,), (3,), (2, 0), (1, 2, 3)]))
    elif how == 2 and tensors[name].numel():
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] = rng.choice([torch.nan, torch.inf])
    elif how == 3:
        tensors[name] = tensors[name].to(rng.choice([torch.int64, torch.bool, torch.float16, torch.complex64]))
    elif metadata:
        key = rng.choice(list(metadata))
        try:
            metadata[key] = json.dumps(changed(json.loads(metadata[key]), rng))
        except ValueError:
            metadata[key] = rng.choice(TEXTS)
    save_file(tensors, path, metadata)
    return path.read_bytes()


def damaged_arrays(content, rng, path):
    """The same of an .npz, of which an array may be another, or say of itself what is not so."""
    how = rng.randrange(4)
    if how == 0:
        return damaged_bytes(content, rng)
    path.write_bytes(content)
    arrays = dict(np.load(path))
    name = rng.choice(list(arrays))
    if how == 1:
        shape = rng.choice([(), (0,), (0, 0), (3, 0), (5,), (1, 2, 3)])
        arrays[name] = np.zeros(shape, rng.choice([np.float32, np.int8, "U3", np.complex64, np.float64]))
        np.savez(path, **arrays)
        return path.read_bytes()
    if how == 2:
        arrays[name] = np.full(arrays[name].shape, rng.choice([np.nan, np.inf, 1e300]))
        np.savez(path, **arrays)
        return path.read_bytes()
    # Of the same length, so that the archive holds together but for a checksum.
    return content.replace(b"'shape': (3, 4), }          ", b"'shape': (99999999999, 9999), }"[:28].ljust(28))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Kind -> bytes of a good file, how it is damaged, its name, and who reads it: path -> nothing."""
    root = tmp_path_factory.mktemp("good")
    model = tiny("siglip")
    names = [name for name, _ in model.named_parameters() if "layers.1.mlp" in name]
    weights = {name: model.get_parameter(name).detach() for name in names}
    write(root / "weights", weights, {"config": json.dumps({"arch": "dual", "threshold": 0.1}), "history": "[]"})
    NeuroFlowConfig(ladder=(8, 16)).save(root / "config")
    save_file({"embeddings": torch.eye(3, 4)}, root / "labels", {"names": json.dumps(["a", "b", "c"])})
    np.savez(root / "classes", names=["a", "b", "c"], embeddings=np.eye(3, 4), temperature=np.float32(2))
    LogitShift(torch.ones(5)).save(root / "shift")
    results = Results(root / "result.npz", {"stride": 2, "model": "x"})
    for number in range(4):
        record = Record(2 * number, number / 10, 0.5, 3, number == 0, 1.0, None, None, number == 0, "a")
        results.append(record, np.full(3, number, np.float32))
    results.close()
    findings = Findings(root / "result.json", {"model": "x"})
    for name in "abc":
        findings.append(name, {"label": name, "of": [1, 2.5]})
    findings.close()
    distillation = Distillation(model, DistillationConfig(train="last-1", batch=2, clips=1, epochs=1, strides=1))
    frames = [[torch.full((1, 3, 48, 48), float(number + k)) for number in range(3)] for k in range(2)]
    distillation.evaluate(frames, None)
    distillation.train(frames)
    distillation.checkpoint(root / "checkpoint")
    before = {name: weight.detach().clone() for name, weight in distillation.weights.items()}

    def distilled(path):
        distilled_config(path)
        load_weights(model, path)

    def results_of(path):
        results = Results(path.with_suffix(""), {"stride": 2, "model": "x"}, resume=True)
        try:
            number = len(results.resumed)
            assert [record.frame for record in results.resumed] == list(range(0, 2 * number, 2))
            results.append(Record(2 * number, 0.0, 0.5, 3, False, 1.0, None, None, False, "b"), np.ones(3, np.float32))
            results.finish()
            written = np.load(path.with_suffix(""))
            assert written["embedding"].shape == (number + 1, 3) and np.isfinite(written["embedding"]).all()
        finally:
            results.close()

    def findings_of(path):
        read = lambda found: (found["label"].upper(), sum(found["of"]))  # noqa: E731
        findings = Findings(path.with_suffix(""), {"model": "x"}, resume=True, read=read)
        findings.finish()
        json.loads(path.with_suffix("").read_text(), parse_constant=lambda constant: 1 / 0)

    def checkpoint_of(path):
        try:
            distillation.resume(path)
        except ValueError:
            assert all(torch.equal(weight, before[name]) for name, weight in distillation.weights.items())
            raise
        with torch.no_grad():
            for name, weight in distillation.weights.items():
                weight.copy_(before[name])

    whole = {
        "weights": ("weights", damaged_tensors, "weights.safetensors", distilled),
        "labels": ("labels", damaged_tensors, "labels.safetensors", read_classes),
        "classes": ("classes.npz", damaged_arrays, "classes.npz", read_classes),
        "shift": ("shift", damaged_tensors, "shift.safetensors", LogitShift.load),
        "config": ("config", damaged_lines_of_one, "config.json", NeuroFlowConfig.load),
        "results": ("result.npz.journal", damaged_lines, "result.npz.journal", results_of),
        "findings": ("result.json.journal", damaged_lines, "result.json.journal", findings_of),
        "checkpoint": ("checkpoint", damaged_tensors, "out.checkpoint", checkpoint_of),
    }
    return {kind: ((root / of).read_bytes(), *others) for kind, (of, *others) in whole.items()}


def damaged_lines_of_one(content, rng):
    return damaged_lines(json.dumps(json.loads(content)).encode(), rng)


def try_one(kinds, kind, seed, directory):
    """Damage a file of that kind by a seed, and read it; whether it was refused."""
    content, damage, name, read = kinds[kind]
    rng = random.Random(f"{kind} {seed}")
    for path in directory.iterdir():
        path.unlink()
    path = directory / name
    takes_path = damage in (damaged_tensors, damaged_arrays)
    content = damage(content, rng, path) if takes_path else damage(content, rng)
    path.write_bytes(content)
    try:
        read(path)
    except ValueError as error:  # JournalError among them
        assert "\n" not in str(error), (kind, seed)
        assert path.read_bytes() == content, (kind, seed)
        return True
    except Exception as error:
        raise AssertionError(f"{kind}, seed {seed}: {error!r}") from error
    return False


KINDS = ("weights", "labels", "classes", "shift", "config", "results", "findings", "checkpoint")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused(kinds, kind, tmp_path):
    refused = [try_one(kinds, kind, seed, tmp_path) for seed in range(CASES)]
    assert sum(refused) > CASES // 4


@pytest.mark.fuzz
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_for_as_long_as_asked(kinds, tmp_path):
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", 60))
    for seed in itertools.count(CASES):
        for kind in KINDS:
            try_one(kinds, kind, seed, tmp_path)
        if time.monotonic() > end:
            break
    print(f"{(seed - CASES + 1) * len(KINDS)} damaged files")

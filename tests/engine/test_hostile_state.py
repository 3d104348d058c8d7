"""Damaged and hostile state files: a ValueError that costs nothing, or a stream that goes on."""

import itertools
import json
import os
import random
import time

import neuroflow
import pytest
import torch
from models import clip, exact, tiny
from neuroflow.saving import _checksum
from safetensors import safe_open
from safetensors.torch import save_file

CASES = 60  # of each kind
VALUES = (
    None,
    True,
    -1,
    0,
    1,
    7,
    10**30,
    1.5,
    1e400,
    "x",
    "torch.int8",
    [],
    {},
    [1],
    [[6, 6]],
    [6, -6],
    [-6, -6],
    [2**40, 2**40],
)
FRAMES = clip(frames=4).double()


def encode(model, number, name):
    with torch.inference_mode():
        return neuroflow.encode(model, FRAMES[number : number + 1], [name]).pooler_output


def read(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()  # noqa: SIM118


def change_tensors(chance, tensors, metadata):
    key = chance.choice(sorted(tensors))
    tensor = tensors[key]
    strange = torch.tensor(chance.choice([torch.nan, torch.inf, -1.0, 1e9]))
    changes = {
        "gone": lambda: tensors.pop(key),
        "renamed": lambda: tensors.update({chance.choice(["0.x", "7.age", "", "0.key.x", "0.."]): tensors.pop(key)}),
        "cut": lambda: tensors.update({key: tensor[..., :-1].clone()}),
        "one more axis": lambda: tensors.update({key: tensor[None].clone()}),
        "empty": lambda: tensors.update({key: tensor[:0].clone()}),
        "other dtype": lambda: tensors.update(
            {key: tensor.to(chance.choice([torch.int64, torch.bfloat16, torch.bool]))}
        ),
        "strange": lambda: tensors.update({key: strange.expand(tensor.shape).to(tensor.dtype).clone()}),
        "another's": lambda: tensors.update({key: tensors[chance.choice(sorted(tensors))].clone()}),
    }
    changes[chance.choice(sorted(changes))]()


def change_description(chance, tensors, metadata):
    described = json.loads(metadata["streams"])
    about = chance.choice(described)
    key = chance.choice(sorted(about))
    changes = {
        "gone": lambda: about.pop(key),
        "strange": lambda: about.update({key: chance.choice(VALUES)}),
        "twice": lambda: described.append(about),
        "fewer": described.pop,
    }
    changes[chance.choice(sorted(changes))]()
    metadata["streams"] = json.dumps(described)


def change_metadata(chance, tensors, metadata):
    strange = [json.dumps(chance.choice(VALUES)), "", "{", "[" * 100_000, "9" * 10_000, '"\\ud800"']
    metadata[chance.choice(["streams", "configuration", "weights"])] = chance.choice(strange)


def change_bytes(chance, content):
    at = chance.randrange(len(content))
    if chance.random() < 0.5:
        content[at] ^= 1 << chance.randrange(8)
    elif chance.random() < 0.5:
        del content[at:]
    else:
        content[at:at] = chance.randbytes(chance.randrange(1, 64))


class Bench:
    """A model that holds a stream, and a file of two others."""

    def __init__(self, folder, arch):
        self.path, self.model = folder / "state", tiny("siglip").double()
        neuroflow.enable_cache(self.model, exact(arch=arch, threshold=1e-4))
        self.expected = [encode(self.model, number, "held") for number in range(4)]
        for number, name in itertools.product(range(2), ("a", 2)):
            encode(self.model, number, name)
        neuroflow.save_state(self.model, self.path, ["a", 2])
        self.content = self.path.read_bytes()
        self.tensors, self.metadata = read(self.path)
        neuroflow.reset_cache(self.model)

    def try_one(self, chance):
        """One file; returns whether it was taken."""
        change = chance.choice([change_tensors, change_description, change_metadata, change_bytes])
        if change is change_bytes:
            content = bytearray(self.content)
            change(chance, content)
            self.path.write_bytes(content)
        else:
            tensors, metadata = dict(self.tensors), dict(self.metadata)
            change(chance, tensors, metadata)
            if chance.random() < 0.8:  # as of somebody who knows how
                del metadata["checksum"]
                metadata["checksum"] = _checksum(tensors, metadata)
            save_file(tensors, self.path, metadata)
        neuroflow.reset_cache(self.model)
        for number in range(2):
            encode(self.model, number, "held")
        try:
            names = neuroflow.load_state(self.model, self.path)
        except ValueError as error:
            assert str(error).startswith(f"state {self.path}: ")
            assert len(str(error)) < 2_000
            names = []
        assert list(neuroflow.summary(self.model).streams) == ["held", *names]
        str(neuroflow.summary(self.model))
        torch.testing.assert_close(encode(self.model, 2, "held"), self.expected[2], rtol=0, atol=1e-10)
        for name in names:
            try:
                encode(self.model, 2, name)
            except (RuntimeError, ValueError):  # caches of a width that only a frame can tell
                encode(self.model, 2, name)
            found = encode(self.model, 3, name)
            assert found.isfinite().all()
        return bool(names)


@pytest.mark.filterwarnings("ignore:neuroflow")
@pytest.mark.parametrize("arch", ["A", "D", "E"])
def test_files_changed_at_random(arch, tmp_path):
    bench, chance = Bench(tmp_path, arch), random.Random(arch)
    taken = [bench.try_one(chance) for _ in range(CASES)]
    assert sum(taken) < CASES / 5


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore:neuroflow")
def test_files_changed_at_random_for_long(tmp_path):
    seed, end = time.time_ns(), time.monotonic() + float(os.environ.get("FUZZ_SECONDS", 60))
    chance, benches = random.Random(seed), [Bench(tmp_path, arch) for arch in "ABCDE"]
    tried = 0
    while time.monotonic() < end:
        try:
            chance.choice(benches).try_one(chance)
        except BaseException as error:
            error.add_note(f"seed {seed}, file {tried}")
            raise
        tried += 1
    print(f"{tried} state files")

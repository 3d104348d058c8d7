"""Classes from files: names and embeddings, in either format."""

import json

import numpy as np
import pytest
import torch
from neuroflow.classes import read_classes
from neuroflow.street import STREET, load_classes
from safetensors.torch import save_file


def test_classes_are_read_from_either_format(tmp_path):
    own = read_classes(STREET / "classes.safetensors")
    expected = load_classes()
    assert own.names == expected.names and own.temperature == expected.temperature
    assert torch.equal(own.embeddings, expected.embeddings.float())
    np.savez(tmp_path / "two.npz", names=["a", "b"], embeddings=np.eye(2, 4, dtype=np.float16))
    two = read_classes(tmp_path / "two.npz")
    assert two.names == ("a", "b") and two.temperature == 1 and torch.equal(two.embeddings, torch.eye(2, 4))


def test_the_format_is_told_by_the_content(tmp_path):
    save_file({"embeddings": torch.eye(2, 4)}, tmp_path / "texts.bin", {"names": json.dumps(["a", "a"])})
    np.savez(tmp_path / "arrays.npz", names=["a", "a"], embeddings=np.eye(2, 4))
    (tmp_path / "arrays.npz").rename(tmp_path / "arrays")
    for name in ("texts.bin", "arrays"):
        found = read_classes(tmp_path / name)
        assert found.names == ("a", "a") and torch.equal(found.embeddings, torch.eye(2, 4))


def write_classes(path, kind):
    embeddings = np.eye(2, 4, dtype=np.float32)
    if kind == "no names":
        save_file({"embeddings": torch.eye(2, 4)}, path)
    elif kind == "no embeddings":
        np.savez(path, names=["a", "b"])
    elif kind == "text":
        path.write_text("not a file of arrays")
    elif kind == "three names":
        save_file({"embeddings": torch.eye(2, 4)}, path, {"names": json.dumps(["a", "b", "c"])})
    elif kind == "flat":
        np.savez(path, names=["a", "b"], embeddings=embeddings[:, 0])
    elif kind == "nan":
        np.savez(path, names=["a", "b"], embeddings=embeddings * np.nan)


@pytest.mark.parametrize(
    ("kind", "suffix", "words"),
    [
        ("no names", ".safetensors", "holds no names"),
        ("no embeddings", ".npz", "holds no embeddings"),
        ("text", ".npz", "cannot be read"),
        ("text", ".safetensors", "cannot be read"),
        ("missing", ".npz", "cannot be read"),
        ("three names", ".safetensors", r"holds embeddings \[2, 4\] and 3 names"),
        ("flat", ".npz", r"holds embeddings \[2\]"),
        ("nan", ".npz", "all finite"),
    ],
)
def test_a_bad_file_of_classes_is_an_error(tmp_path, kind, suffix, words):
    path = tmp_path / f"classes{suffix}"
    write_classes(path, kind)
    with pytest.raises(ValueError, match=words) as caught:
        read_classes(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)

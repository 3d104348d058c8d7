"""`neuroflow_kernels` in the layout of Hugging Face's `kernels`, loaded beside the package itself."""

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import neuroflow_kernels
from neuroflow_kernels import dispatch, use_backend

PACKAGE = Path(neuroflow_kernels.__file__).parent
HUB = PACKAGE / "hub"
MISSING = "on the CPU the ops run through their plain torch reference, because the C\\+\\+ extension is missing"


@pytest.fixture
def assembled(tmp_path):
    """The layout, and no module of it afterwards."""
    out = tmp_path / "build" / "hub"
    subprocess.run([sys.executable, HUB / "assemble.py", out], check=True)
    yield out
    for name in [name for name in sys.modules if name.startswith("_neuroflow_kernels_")]:
        del sys.modules[name]


def loaded(variant):
    """As `kernels` does it: under the name that the metadata gives."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def check(ops, generator):
    """Gives what the package gives."""
    x, surprise = torch.randn(2, 9, 16, generator=generator), torch.rand(2, 9, generator=generator)
    index, cu_seqlens = ops.compact(surprise, budget=3)
    query, key = x[0].view(9, 2, 8), x.view(2, 9, 2, 8)
    with use_backend("reference"):
        expected = neuroflow_kernels.compact(surprise, budget=3)
        rows = neuroflow_kernels.gather_rows(x, *expected)
        attended = neuroflow_kernels.attend_rows(query, key, key, cu_seqlens=expected[1])
    assert torch.equal(index, expected[0]) and torch.equal(cu_seqlens, expected[1])
    assert torch.equal(ops.gather_rows(x, index, cu_seqlens), rows)
    assert torch.equal(ops.attend_rows(query, key, key, cu_seqlens=cu_seqlens), attended)
    cache = torch.zeros(2, 9, 16)
    assert ops.scatter_rows_(cache, rows.requires_grad_(), index, cu_seqlens).requires_grad


def test_it_is_loaded_beside_the_package(assembled, generator, monkeypatch):
    with monkeypatch.context() as alone, pytest.warns(RuntimeWarning, match=MISSING):
        alone.setitem(sys.modules, "neuroflow_kernels", None)
        ops = loaded(assembled / "build" / "torch-cuda")  # the test below has the other's namespace
        inside = sys.modules[f"{ops.__name__}.dispatch"]
        for op in inside.Operator.registry.values():
            if op.triton and importlib.util.find_spec("triton"):
                importlib.import_module(f"{ops.__name__}.triton.{op.module}")
    check(ops, generator)
    assert ops.__name__ == inside.NAMESPACE and dispatch.NAMESPACE == "neuroflow"
    assert inside.Operator.registry.keys() == dispatch.Operator.registry.keys()
    assert ops.compact is not neuroflow_kernels.compact and ops.__all__ == neuroflow_kernels.__all__


def test_kernels_loads_it(assembled, generator, monkeypatch):
    pytest.importorskip("kernels", reason="kernels is not installed (`pip install kernels`)")
    card = re.search(r"```py\n(.*?)```", (assembled / "CARD.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(assembled.parents[1])
    names = {}
    with pytest.warns(RuntimeWarning, match=MISSING):
        exec(card, names)
    assert Path(names["ops"].__file__).is_relative_to(assembled)
    assert names["cu_seqlens"].tolist() == [0, 1, 2]
    check(names["ops"], generator)


def test_kernels_finds_every_file_as_it_was(assembled):
    pytest.importorskip("kernels", reason="kernels is not installed (`pip install kernels`)")
    from kernels._rust import Digest, Metadata

    for variant in (assembled / "build").iterdir():
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "build.toml").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        runpy.run_path(str(HUB / "assemble.py"))["assemble"](tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["build.toml"]

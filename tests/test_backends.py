"""Which backend serves, what is said when one cannot, and what the package does without its extension."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import neuroflow_kernels as kernels
from neuroflow_kernels import BackendUnavailable, compact, dispatch, unavailable, use_backend

PACKAGE = Path(kernels.__file__).parent


def run(code, path=PACKAGE.parent, **environment):
    environment = {**os.environ, "PYTHONPATH": str(path), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=path, capture_output=True, text=True)


@pytest.fixture
def without_extension(tmp_path):
    """A copy of the package as a build without a compiler leaves it."""
    shutil.copytree(
        PACKAGE, tmp_path / "neuroflow_kernels", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    )
    return tmp_path


@pytest.mark.parametrize("name", ["gpu", "Reference", "c++"])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=f"backend is {name!r}".replace("+", r"\+")), use_backend(name):
        pass


def test_backend_that_cannot_serve_says_why():
    with use_backend("cuda"), pytest.raises(BackendUnavailable, match="'cuda' cannot serve compact on cpu: it "):
        compact(torch.zeros(1, 4), threshold=0.1)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter serves CPU tensors")
def test_triton_on_the_cpu_says_why():
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="triton"):
        compact(torch.zeros(1, 4), threshold=0.1)


def test_cpp_does_not_serve_cuda():
    assert "cpu tensors only" in unavailable("cpp", "cuda")
    assert unavailable("cpp", "cpu") is None
    assert unavailable("reference", "cuda") is None


def test_requests_nest_and_end(monkeypatch):
    calls = []
    monkeypatch.setattr(
        dispatch, "_implementation", lambda backend, op, module: lambda *_: calls.append(backend) or (None, None)
    )
    surprise = torch.zeros(1, 4)
    with use_backend("reference"):
        compact(surprise, threshold=0.1)
        with use_backend("auto"):
            compact(surprise, threshold=0.1)
        with pytest.raises(ZeroDivisionError), use_backend("cpp"):
            1 / 0  # noqa: B018
        compact(surprise, threshold=0.1)
    compact(surprise, threshold=0.1)
    assert calls == ["reference", "reference"]


def test_torch_compile_keeps_the_backend_it_was_traced_with(monkeypatch):
    torch._dynamo.reset()
    surprise, calls = torch.rand(2, 9), []
    reference = dispatch._implementation("reference", "compact", "compact")
    monkeypatch.setattr(dispatch, "_implementation", lambda *names: calls.append(names) or reference)
    with use_backend("reference"):
        index, _ = torch.compile(compact, backend="aot_eager")(surprise, threshold=0.5)
    assert torch.equal(index, compact(surprise, threshold=0.5)[0])
    assert calls == [("reference", "compact", "compact")]
    torch._dynamo.reset()
    with use_backend("cuda"), pytest.raises(Exception, match="cannot serve compact on cpu"):
        torch.compile(compact, fullgraph=True, backend="aot_eager")(surprise, threshold=0.5)


def test_environment_names_the_backend():
    code = "import torch, neuroflow_kernels as k; print(k.compact(torch.ones(1, 2), threshold=0.5)[0].tolist())"
    assert run(code, NEUROFLOW_BACKEND="reference").stdout == "[0, 1]\n"
    assert run(code, NEUROFLOW_BACKEND="auto").stdout == "[0, 1]\n"
    assert "BackendUnavailable: backend 'cuda' cannot serve" in run(code, NEUROFLOW_BACKEND="cuda").stderr
    assert "ValueError: backend is 'tpu'" in run(code, NEUROFLOW_BACKEND="tpu").stderr


def test_works_without_the_extension_and_warns_once(without_extension):
    code = """
import torch, neuroflow_kernels as k
h, ema = torch.ones(1, 5, 3), torch.ones(1, 5, 3)
print(k.ema_gate_(h, ema, decay=0.1, threshold=0.5)[3].shape, k.unavailable("cpp"))
with k.use_backend("cpp"):
    k.ema_gate_(h, ema, decay=0.1, threshold=0.5)
"""
    result = run(code, without_extension)
    assert result.stdout.startswith("torch.Size([4, 3]) it is not built")
    assert result.stderr.count("RuntimeWarning: neuroflow_kernels: on the CPU the ops run through") == 1
    assert "BackendUnavailable: backend 'cpp' cannot serve ema_gate_ on cpu: it is not built" in result.stderr


def test_extension_that_does_not_load_says_why(without_extension):
    (without_extension / "neuroflow_kernels" / "_cpu.abi3.so").write_bytes(b"not a library")
    result = run("import neuroflow_kernels as k; print(k.unavailable('cpp'))", without_extension)
    assert result.stdout.startswith("_cpu.abi3.so does not load: ")
    assert result.stderr.count("RuntimeWarning") == 1


def test_env_reports_backends_and_versions(without_extension):
    run_env = "import runpy; runpy.run_module('neuroflow_kernels.env', run_name='__main__')"
    lines = dict(line.split(":", 1) for line in run(run_env, NEUROFLOW_BACKEND="auto").stdout.splitlines())
    facts = {name: value.strip() for name, value in lines.items()}
    assert facts["torch"] == torch.__version__
    assert facts["threads"].split(" of ")[1] == str(os.cpu_count())
    assert facts["cpp on cpu"] == "available"
    assert facts["cpp on cuda"] == "it serves cpu tensors only"
    assert facts["reference on cuda"] == "available"
    assert facts["NEUROFLOW_BACKEND"] == "auto"
    assert {"python", "triton", "transformers", "numpy", "neuroflow", "processor"} <= facts.keys()
    assert "cpp on cpu:          it is not built" in run(run_env, without_extension).stdout

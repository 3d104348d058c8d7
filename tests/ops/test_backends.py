"""Which backend serves, what is said when one cannot, and what the package does without its extension."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import neuroflow_kernels as kernels
from neuroflow_kernels import BackendUnavailable, compact, dispatch, gather_rows, unavailable, use_backend
from neuroflow_kernels.cores import own_cores

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


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors stand for the GPU's; the backends that are called past the dispatcher."""
    called = []
    dispatch._warn_once.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(dispatch._EXTENSION_DEVICES, "cuda", "cpu")
    monkeypatch.setattr(dispatch, "_implementation", lambda backend, *_: lambda *_: called.append(backend))
    return called


@pytest.fixture
def cuda_extension(monkeypatch):
    """A CUDA extension with one kernel."""
    monkeypatch.setitem(dispatch._extension_errors, "cuda", None)
    monkeypatch.setattr(dispatch.Operator.registry["gather_rows"], "cuda", True)


def with_triton(monkeypatch, installed):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name if installed else None)


def gather(dtype):
    return gather_rows(torch.ones(1, 2, 3, dtype=dtype), torch.tensor([1]).int(), torch.tensor([0, 1]).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cuda_extension_is_called_through_the_dispatcher(gpu, cuda_extension, dtype):
    for backend in ("auto", "cuda"):
        with use_backend(backend):
            assert gather(dtype).tolist() == [[1, 1, 1]]
    assert gpu == []


def test_float64_passes_the_cuda_extension_by(gpu, cuda_extension, monkeypatch, recwarn):
    with_triton(monkeypatch, True)
    gather(torch.float64)
    assert gpu == ["triton"] and not recwarn.list
    with_triton(monkeypatch, False)
    with pytest.warns(RuntimeWarning, match="what the CUDA extension has no kernel for runs through plain torch"):
        gather(torch.float64)
    assert gpu == ["triton", "reference"]


def test_the_cuda_extension_says_what_it_declines(gpu, cuda_extension):
    with use_backend("cuda"):
        with pytest.raises(BackendUnavailable, match=r"gather_rows on cpu: the CUDA kernels take .*, not float64"):
            gather(torch.float64)
        with pytest.raises(BackendUnavailable, match="compact on cpu: the CUDA extension has no kernel for it"):
            compact(torch.zeros(1, 4), threshold=0.1)
    assert gpu == []


def test_others_serve_beside_the_cuda_extension(gpu, cuda_extension, monkeypatch):
    with_triton(monkeypatch, True)
    for backend in ("reference", "triton"):
        with use_backend(backend):
            gather(torch.float32)
    assert gpu == ["reference", "triton"]


def test_without_the_cuda_extension_it_is_said_once_who_serves(gpu, monkeypatch):
    monkeypatch.setitem(dispatch._extension_errors, "cuda", "it is not built")
    operator = dispatch.Operator.registry["gather_rows"]
    with_triton(monkeypatch, True)
    with pytest.warns(RuntimeWarning, match="through Triton, because the CUDA extension is missing: it is not") as said:
        for _ in range(2):
            dispatch._triton_or_reference(operator)
    with_triton(monkeypatch, False)
    with pytest.warns(RuntimeWarning, match=r"plain torch \(triton is not installed .*missing: it is not built"):
        dispatch._triton_or_reference(operator)
    assert gpu == ["triton", "triton", "reference"] and len(said) == 1


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
    files = "_cpu.abi3.so", "_cuda.abi3.so"
    for file in files:
        (without_extension / "neuroflow_kernels" / file).write_bytes(b"not a library")
    code = "import neuroflow_kernels as k; print(k.unavailable('cpp'), k.unavailable('cuda', 'cuda'), sep='\\n')"
    result = run(code, without_extension)
    for file, said in zip(files, result.stdout.splitlines(), strict=True):
        assert re.match(rf"{file} does not load: .*file too short", said)
    assert result.stderr.count("RuntimeWarning") == 1


def test_env_reports_backends_and_versions(without_extension):
    run_env = "import runpy; runpy.run_module('neuroflow_kernels.env', run_name='__main__')"
    said, _, times = run(run_env, NEUROFLOW_BACKEND="auto", NEUROFLOW_TOKEN="secret").stdout.partition("\n\n")
    facts = {name: value.strip() for name, value in (line.split(":", 1) for line in said.splitlines())}
    assert facts["neuroflow"] == kernels.__version__ and facts["NEUROFLOW_TOKEN"] == "set"
    assert facts["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["threads"].split(" of ")[1] == str(os.cpu_count())
    assert facts["cores"].startswith(f"{len(own_cores())} by affinity, ")
    assert facts["cpp on cpu"] == "available"
    assert facts["cpp on cuda"] == "it serves cpu tensors only"
    assert facts["reference on cuda"] == "available"
    assert facts["NEUROFLOW_BACKEND"] == "auto"
    assert {"python", "triton", "transformers", "numpy", "neuroflow", "processor"} <= facts.keys()
    assert facts["instruction sets"]
    assert re.search(r"^768 -> 3072, bfloat16, 128 rows: +.*torch \d+\.\d{3}", times, re.MULTILINE)
    bare = run(run_env, without_extension).stdout
    assert re.search(r"^cpp on cpu: +it is not built", bare, re.MULTILINE)
    assert re.search(r"^cuda on cuda: +it is not built", bare, re.MULTILINE)

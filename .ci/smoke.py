"""NeuroFlow as a wheel installs it, at work: `make test-wheel` and cibuildwheel run this, outside of the checkout."""

import importlib.metadata
import json
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("error", RuntimeWarning)  # as of an import without kernels

NEEDED = (
    "neuroflow/py.typed",
    "neuroflow/serve/page.html",
    "neuroflow/serve/serve.yaml",
    "neuroflow/street/weights/model.safetensors",
    "neuroflow_kernels/py.typed",
    "neuroflow_kernels/reference/compact.py",
    "neuroflow_kernels/triton/compact.py",
    "neuroflow_cli.py",
)


def run(directory: str, threshold: str) -> list[dict[str, Any]]:
    """What the command writes of each frame of clip.mp4."""
    command = [str(Path(sysconfig.get_path("scripts"), "neuroflow")), "run", "clip.mp4", "--compare"]
    outputs = ["--out", f"{threshold}.jsonl", "--overlay", "overlay.mp4"]
    subprocess.run([*command, "--threshold", threshold, *outputs], cwd=directory, check=True)
    lines = Path(directory, f"{threshold}.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "frame" in record]


def main() -> None:
    distribution = importlib.metadata.distribution("neuroflow")
    files = {str(file) for file in distribution.files or ()}
    tops = {file.partition("/")[0] for file in files if not file.startswith("..")}
    info = f"neuroflow-{distribution.version}.dist-info"
    assert files.issuperset(NEEDED), f"the wheel lacks {sorted(set(NEEDED) - files)}"
    assert tops <= {"neuroflow", "neuroflow_kernels", "neuroflow_cli.py", "__pycache__", info}, f"the wheel has {tops}"

    is_pure = "Root-Is-Purelib: true" in (distribution.read_text("WHEEL") or "")
    if is_pure:
        warnings.simplefilter("default", RuntimeWarning)
    import neuroflow

    import neuroflow_kernels

    installed = sysconfig.get_path("purelib")
    for package in (neuroflow, neuroflow_kernels):
        assert Path(package.__file__).is_relative_to(installed), f"{package.__file__} is not what was installed"
        assert package.__version__ == distribution.version, f"{package.__version__} is not {distribution.version}"
    reason = neuroflow_kernels.unavailable("cpp")
    assert (reason is None) != is_pure, f"Root-Is-Purelib is {is_pure}, and the C++ kernels are {reason or 'there'}"

    from neuroflow.street.scene import Scene, write_scene

    with tempfile.TemporaryDirectory() as directory:
        write_scene(Path(directory, "clip.mp4"), Scene("car", "traversal", "static", seed=1), frames=24)
        dense, sparse = (run(directory, threshold) for threshold in ("0", "0.1"))
    assert min(frame["cosine"] for frame in dense) > 0.9999, "with nothing skipped, the output is not the dense model's"
    assert max(frame["skipped"] for frame in dense) == 0
    assert max(frame["skipped"] for frame in sparse) > 0.5, "hardly anything was skipped"
    kind = "pure Python" if is_pure else "with the C++ kernels"
    print(f"neuroflow {distribution.version}, {kind}, works on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()

"""Lay out `neuroflow_kernels` as a kernel for Hugging Face's `kernels`: `python neuroflow_kernels/hub/assemble.py OUT`.

OUT is then a project for kernel-builder (`build.toml`, `CARD.md`, `torch-ext/`) and, in `build/`, what
`kernels.get_local_kernel` loads: the package in plain Python, once for the CPU and once for CUDA, where Triton serves.
"""

import argparse
import base64
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

HUB = Path(__file__).resolve().parent
PACKAGE = HUB.parent


def assemble(out: Path) -> None:
    """Write the layout.

    Args:
        out: a new or an empty directory.

    Raises:
        FileExistsError: the directory is not empty.
        NotADirectoryError: `out` is a file.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; accepted is a new or an empty directory")
    general = tomllib.loads((HUB / "build.toml").read_text())["general"]
    name = general["name"].replace("-", "_")
    sources = {
        path.relative_to(PACKAGE).as_posix(): path.read_bytes()
        for path in sorted(PACKAGE.rglob("*.py"))
        if HUB not in path.parents
    }
    _write(out / "torch-ext" / name, sources)
    shutil.copy(HUB / "build.toml", out / "build.toml")
    shutil.copy(HUB / "CARD.md", out / "CARD.md")
    shutil.copy(HUB / "CARD.md", out / "README.md")  # where the Hub looks for it

    content = hashlib.sha256(b"".join(file.encode() + source for file, source in sources.items())).hexdigest()
    digest = {file: base64.b64encode(hashlib.sha256(source).digest()).decode() for file, source in sources.items()}
    for backend in general["backends"]:
        metadata = {
            "name": general["name"],
            "id": f"_{name}_{backend}_{content[:7]}",  # of the module, and of the ops' namespace
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digest},
        }
        variant = out / "build" / f"torch-{backend}"
        _write(variant, sources | {"metadata.json": json.dumps(metadata, indent=2).encode()})


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Lay out neuroflow_kernels as a kernel for Hugging Face's `kernels`.")
    parser.add_argument("out", type=Path, help="a new or an empty directory")
    try:
        assemble(parser.parse_args().out)
    except OSError as error:
        parser.error(str(error))

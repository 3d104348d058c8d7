"""How the package is wired: `python -m bench.studies.structure`.

Prints its files and the imports among them, import cycles if there are any, and which files a sparse frame enters and
how often: when a patched model is called, and in `neuroflow run`, compared with the frame before. A file is entered
when one of its functions is called from another file.
"""

import ast
import collections
import contextlib
import graphlib
import io
import sys
import tempfile
import threading
from pathlib import Path

import neuroflow
import neuroflow_cli
import torch
from neuroflow.street import load_street
from neuroflow.street.scene import Scene, write_scene

import neuroflow_kernels

PACKAGE = Path(neuroflow.__file__).parent
FRAMES = 6


def imports():
    """Every file of the package -> the files of it that it imports, at its top or later."""
    paths = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    return {path: _imports_of(path, paths) for path in sorted(paths)}


def _imports_of(path, paths):
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for name in node.names:
                nearest = (folder / f"{name.name}.py", folder / name.name / "__init__.py", Path(f"{folder}.py"))
                found.update(next(([each] for each in (*nearest, folder / "__init__.py") if each in paths), []))
    return found - {path}


def circle():
    """Files that import each other in a circle, or None."""
    try:
        tuple(graphlib.TopologicalSorter(imports()).static_order())
    except graphlib.CycleError as error:
        return error.args[1]
    return None


class Entries:
    """Counts how often each file of the project is entered, in all threads, while the `with` block runs."""

    def __init__(self):
        self.counts = collections.Counter()
        self.roots = [f"{PACKAGE}/", f"{Path(neuroflow_kernels.__file__).parent}/"]

    def file_of(self, frame):
        name = frame.f_code.co_filename
        return next((name[len(root) :] for root in self.roots if name.startswith(root)), None)

    def __call__(self, frame, event, argument):
        file = self.file_of(frame) if event == "call" else None
        if file is None:
            return
        caller = frame.f_back
        while caller is not None and self.file_of(caller) is None:
            caller = caller.f_back
        if caller is None or self.file_of(caller) != file:
            self.counts[file] += 1

    def __enter__(self):
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)
        threading.setprofile(None)


def clip():
    """Frames [T, 3, H, W] of which a corner changes."""
    frames = torch.rand(3, 64, 64).expand(FRAMES, -1, -1, -1).clone()
    frames[:, :, :8, :8] = torch.rand(FRAMES, 3, 8, 8)
    return frames


@torch.inference_mode()
def entered_by_a_call():
    """How often each file is entered by one sparse frame of a patched model."""
    model, _ = load_street()
    neuroflow.enable_cache(model)
    frames = torch.nn.functional.interpolate(clip(), model.config.image_size)
    for frame in frames[:-1].split(1):
        model(pixel_values=frame)
    with Entries() as entries:
        model(pixel_values=frames[-1:])
    return entries.counts


def entered_by_a_run():
    """How often each file is entered by one sparse frame of `neuroflow run`: what a run of one more frame adds."""
    counts = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "clip.mp4")
        collections.deque(write_scene(path, Scene("car", "traversal", "static", seed=1), FRAMES, 64), maxlen=0)
        for frames in (FRAMES - 1, FRAMES):
            shown = io.StringIO()
            with Entries() as entries, contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
                neuroflow_cli.main(["run", str(path), "--max-frames", str(frames)])
            counts.append(entries.counts)
    return counts[1] - counts[0]


def main():
    found = imports()
    lines = {path: len((PACKAGE / path).read_text().splitlines()) for path in found}
    arrows = sum(map(len, found.values()))
    print(f"{len(found)} files of {sum(lines.values())} lines, the longest {max(lines.values())}; {arrows} imports")
    around = circle()
    print("no circle" if around is None else f"a circle: {' -> '.join(map(str, around))}")
    for what, counts in (("a call", entered_by_a_call()), ("`neuroflow run`", entered_by_a_run())):
        print(f"one sparse frame of {what} enters {len(counts)} files, {counts.total()} times:")
        for file, count in counts.most_common():
            print(f"  {count:4}  {file}")


if __name__ == "__main__":
    main()

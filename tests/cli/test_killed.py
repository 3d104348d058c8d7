"""`neuroflow run` killed at any moment, and continued: as if nothing had happened."""

import json
import random
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from models import tiny
from neuroflow.video.encode import VideoWriter

FRAMES, SIDE = 24, 48
# Runs the command of argv to its end; then kills it so many times, each after a drawn share of what that took, and
# continues it. In one process and its children, as what takes longest is to import everything.
RUNS = """
import os, random, signal, sys, time
import neuroflow.cli.run, transformers.models.siglip.modeling_siglip
from neuroflow_cli import main
seed, kills, out, *arguments = sys.argv[1:]
draw = random.Random(int(seed))

def start(*options):
    child = os.fork()
    if not child:
        code = 1
        try:
            code = main(arguments + ["--out", out, *options])
        finally:
            os._exit(code)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

begin = time.monotonic()
assert ended(start()) == 0
took = time.monotonic() - begin
os.rename(out, out + ".whole")
for _ in range(int(kills)):
    child = start("--resume")
    time.sleep(draw.random() * took)
    os.kill(child, signal.SIGKILL)
    if ended(child) == 0:
        break
else:
    assert ended(start("--resume")) == 0
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    tiny("siglip", SIDE).save_pretrained(root / "model")
    noise = np.random.default_rng(0)
    with VideoWriter(root / "clip.mp4", Fraction(10)) as writer:
        for _ in range(FRAMES):
            writer.write(noise.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    return ["run", root / "clip.mp4", "--model", root / "model", "--threshold", 0, "--clip", 2]


def killed(seed, kills, arguments, directory):
    """A run that is killed so many times, beside one that is not."""
    out = directory / "result.jsonl"
    options = [*arguments, "--overlay", directory / "overlay.mp4"] if seed % 2 else arguments
    command = [sys.executable, "-c", RUNS, seed, kills, out, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "error: " in line]
    # An overlay begins where the run that writes it does; if there is no frame left for one, that is an error.
    assert done.returncode == 0 or "left no frame for it" in said[-1], done.stderr
    found, whole = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (out, out.with_suffix(".jsonl.whole"))
    )
    assert [row["frame"] for row in found] == [row["frame"] for row in whole] == list(range(FRAMES))
    assert [row["time_s"] for row in found] == [row["time_s"] for row in whole]
    np.testing.assert_allclose(
        [row["embedding"] for row in found], [row["embedding"] for row in whole], rtol=1e-4, atol=1e-5
    )
    assert {path.name for path in directory.iterdir()} <= {"result.jsonl", "result.jsonl.whole", "overlay.mp4"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_killed_run_is_continued_without_a_row_lost(seed, arguments, tmp_path):
    killed(seed, random.Random(seed).randint(1, 6), arguments, tmp_path)

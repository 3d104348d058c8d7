"""Recordings into an archive by Ray: the same bytes as in one process, whoever is killed meanwhile."""

import functools
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny
from neuroflow.cli.model import load_tower
from neuroflow.serve.archive import archive
from neuroflow.video.encode import VideoWriter
from neuroflow.video.preprocess import Preprocessor
from recordings import held, write_recording

from bench.archive import kill_driver, start, wait_for, workers, written

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("one_thread")]
SIDE = 48


@pytest.fixture(scope="module")
def cluster():
    """Ray, whose workers are used again from test to test."""
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, object_store_memory=2**27, include_dashboard=False, log_to_driver=False)
    # Its workers cannot import what pytest has imported from here.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """The sources and the settings of the command: four recordings, a damaged one, and one that is to be split."""
    root = tmp_path_factory.mktemp("ray")
    tiny("siglip", SIDE).save_pretrained(root / "model")
    for number in range(4):
        write_recording(root / "recordings" / f"{number}.mp4", 100, seed=number)
    write_recording(root / "recordings" / "long.mp4", 1100, cuts=(700,))
    (root / "recordings" / "damaged.mp4").write_bytes(b"no video")
    return [root / "recordings", "--model", root / "model", "--threshold", 0.02, "--max-age", 64]


@pytest.fixture(scope="module")
def expected(options, tmp_path_factory):
    """The archive as this process makes it."""
    from neuroflow_cli import main

    out = tmp_path_factory.mktemp("expected") / "out"
    assert main(["archive", *map(str, options), "--out", str(out)]) == 1
    return held(out)


def test_a_worker_is_killed(tmp_path, neuroflow, cluster, options, expected):
    out, killed = tmp_path / "out", []

    def kill():
        wait_for(lambda: list(out.glob("*.partial")))
        killed.append(wait_for(lambda: workers(os.getpid()))[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    code, table, message = neuroflow("archive", *options, "--out", out, "--ray", "local", "--workers", 2, "--by-shot")
    killer.join()
    assert code == 1 and killed and "recordings        6: 1 cannot be read" in table
    assert message.count("failed: ") == 1 and "damaged.mp4: it cannot be opened" in message
    assert held(out) == expected


def test_the_driver_is_killed(tmp_path, neuroflow, cluster, options, expected):
    out = tmp_path / "out"
    driver = start(*options, "--out", out, "--ray", "local")
    wait_for(lambda: (written(out) and list(out.glob("*.partial"))) or driver.poll() is not None)
    kill_driver(driver)
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*-*.parquet")}
    assert 0 < len(done) < 5 and not (out / "summary.parquet").exists()
    code, table, _ = neuroflow("archive", *options, "--out", out, "--ray", "local", "--resume")
    assert code == 1 and "recordings        6: 1 cannot be read" in table
    assert held(out) == expected
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done


class Deadly(Preprocessor):
    """Ends the process at a white frame."""

    def __call__(self, frame):
        pixels = super().__call__(frame)
        if pixels.mean() > 0.9:
            os.kill(os.getpid(), signal.SIGKILL)
        return pixels


def load(model):
    return load_tower(str(model), torch.device("cpu"), torch.float32), Deadly(SIDE, SIDE)


def test_what_kills_its_worker_is_left_out(tmp_path, cluster, options):
    source, model = options[0], options[2]
    deadly = tmp_path / "deadly.mp4"
    with VideoWriter(deadly, 10) as writer:
        writer.write(np.full((SIDE, SIDE, 3), 255, np.uint8))
    sources = [source / "0.mp4", deadly, source / "1.mp4"]
    rows = archive(sources, tmp_path / "out", functools.partial(load, model), ray="local", workers=2)
    assert {Path(row.path).name: row.frames for row in rows} == {"0.mp4": 100, "1.mp4": 100, "deadly.mp4": 0}
    assert [row.error is not None for row in rows] == [row.path == str(deadly) for row in rows]
    assert "its worker died 3 times" in next(row.error for row in rows if row.error)
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix in (".tries", ".partial")]

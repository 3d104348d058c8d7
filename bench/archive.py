"""An archive on one worker and on two, and with one of them or the driver killed: `python -m bench.archive`.

24 drawn scenes of equal length go through the package's own tower by `neuroflow archive`: in one process, on one
worker of Ray and on two, each computing on one thread. A worker also decodes ahead in a second thread, so one worker
uses more than one core where it may; "on one core" is everything, Ray's own processes too, held to a single core. Then
half-way a worker is killed, and then the driver, whose work a second command continues.

Clips/s are counted from when every worker has written its first clip to the last one; starting Ray and loading the
model show in the seconds alone. A run counts as the same if every file that it wrote, the table of all clips among
them, has the bytes of the first run's.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from neuroflow.street.scene import scenes, write_scene

from bench.tables import begin, table, write

CLIPS, FRAMES = 24, 120
FAILED = 600.0  # seconds after which a run that writes nothing is given up


def descendants(pid):
    """The processes below one, {process: what it is called}."""
    parents, names = {}, {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(directory.name)] = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(directory.name)] = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ValueError):  # it has ended
            continue
    found, new = {}, [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new and child in names]
        found |= {child: names[child] for child in new}
    return found


def workers(pid):
    """The processes below one that encode for Ray."""
    return [child for child, name in descendants(pid).items() if name.startswith("ray::MapWorker")]


def wait_for(condition, seconds=FAILED):
    """What `condition` gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing came within {seconds:g} seconds")
        time.sleep(0.01)
    return found


def start(*arguments, cores=None):
    """`neuroflow archive` on these cores, all where they are None."""
    command = [sys.executable, "-m", "neuroflow_cli", "archive", *map(str, arguments)]
    pin = None if cores is None else lambda: os.sched_setaffinity(0, cores)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=pin)


def written(out):
    """When each clip's file was written, in seconds, in order."""
    return sorted(path.stat().st_mtime_ns / 1e9 for path in out.glob("*-*.parquet"))


def kill_driver(driver):
    """Kill a command, and wait until nothing that it started is left."""
    below = descendants(driver.pid)
    driver.kill()
    driver.wait()
    wait_for(lambda: not any(Path("/proc", str(pid)).exists() for pid in below))


def measure(clips, out, count, kill=None, cores=None):
    """Seconds of a run, and clips a second, None where something was killed; count 0: without Ray."""
    options = ["--ray", "local", "--workers", count] if count else []
    begun = time.time()
    driver = start(clips, "--out", out, *options, cores=cores)
    if kill:
        wait_for(lambda: len(written(out)) >= CLIPS // 2 or driver.poll() is not None)
        if kill == "worker":
            os.kill(workers(driver.pid)[0], signal.SIGKILL)
        else:
            kill_driver(driver)
            driver = start(clips, "--out", out, *options, "--resume")
    if driver.wait():
        raise SystemExit(f"neuroflow archive ended with {driver.returncode}; run it on {clips} to see why")
    times, ahead = written(out), max(count, 1)
    speed = (len(times) - ahead) / (times[-1] - times[ahead - 1])
    return time.time() - begun, None if kill else speed


def held(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=FRAMES, help="of each clip")
    parser.add_argument("--out", default="archive", help="the stem of the files in bench/results, or a path's")
    arguments = parser.parse_args()
    machine = begin(arguments.out)
    runs = {
        "in one process": {"count": 0},
        "1 worker": {"count": 1},
        "1 worker on one core": {"count": 1, "cores": {min(os.sched_getaffinity(0))}},
        "2 workers": {"count": 2},
        "2 workers, one killed": {"count": 2, "kill": "worker"},
        "2 workers, driver killed, continued": {"count": 2, "kill": "driver"},
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder, "clips")
        clips.mkdir()
        for number, scene in enumerate(scenes(CLIPS)):
            write_scene(clips / f"{number}.mp4", scene, arguments.frames)
        first = None
        for name, run in runs.items():
            out = Path(folder, name)
            seconds, speed = measure(clips, out, **run)
            first = first or held(out)
            same = held(out) == first
            rows.append({"run": name, "seconds": seconds, "clips_per_second": speed, "same": same})
            print(*line_of(rows[-1]), sep="  ", flush=True)
    speeds = {row["run"]: row["clips_per_second"] for row in rows}
    ratio, free = (speeds["2 workers"] / speeds[name] for name in ("1 worker on one core", "1 worker"))
    said = f"Two workers encode {ratio:.2f} times the clips a second of one on one core, {free:.2f} times those of one."
    print(said)
    if not all(row["same"] for row in rows):
        raise SystemExit("not all runs wrote the same")
    about, names = __doc__.partition("\n\n")[2].strip(), ["run", "seconds", "clips/s", "same"]
    text = f"# Archive\n\n{about}\n\n{table(names, map(line_of, rows))}\n\n{said}"
    settings = {"clips": CLIPS, "frames": arguments.frames, "threads": 1, "ratio": ratio, "ratio_free": free}
    write(arguments.out, machine, settings, rows, text)


def line_of(row):
    speed = "-" if row["clips_per_second"] is None else f"{row['clips_per_second']:.2f}"
    return [row["run"], f"{row['seconds']:.1f}", speed, "yes" if row["same"] else "no"]


if __name__ == "__main__":
    main()

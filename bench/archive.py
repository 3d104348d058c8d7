"""An archive on one worker and on two, and with one of them or the driver killed: `python -m bench.archive`.

24 drawn scenes of one length through the package's own tower, by `neuroflow archive`: in one process, on one worker of
Ray and on two, on one thread each; then on two of which one is killed once half of the clips are done, and on two whose
driver is killed then, and that a second command continues. Clips/s are those from when every worker has written its
first clip to the last one, so that starting Ray and loading the model are in the seconds alone. A run counts as the
same where every file in its directory, the table of all clips among them, has the bytes of the first run's.
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


def start(*arguments):
    command = [sys.executable, "-m", "neuroflow_cli", "archive", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def written(out):
    """When each clip's file was written, in seconds, in order."""
    return sorted(path.stat().st_mtime_ns / 1e9 for path in out.glob("*-*.parquet"))


def kill_driver(driver):
    """Kill a command, and wait until nothing that it started is left."""
    below = descendants(driver.pid)
    driver.kill()
    driver.wait()
    wait_for(lambda: not any(Path("/proc", str(pid)).exists() for pid in below))


def measure(clips, out, count, kill=None):
    """Seconds of a run, and clips a second, None where something was killed; count 0: without Ray."""
    options = ["--ray", "local", "--workers", count] if count else []
    begun = time.time()
    driver = start(clips, "--out", out, *options)
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
        "in one process": (0, None),
        "1 worker": (1, None),
        "2 workers": (2, None),
        "2 workers, one killed": (2, "worker"),
        "2 workers, driver killed, continued": (2, "driver"),
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder, "clips")
        clips.mkdir()
        for number, scene in enumerate(scenes(CLIPS)):
            write_scene(clips / f"{number}.mp4", scene, arguments.frames)
        first = None
        for name, (count, kill) in runs.items():
            out = Path(folder, name)
            seconds, speed = measure(clips, out, count, kill)
            first = first or held(out)
            same = held(out) == first
            rows.append({"run": name, "seconds": seconds, "clips_per_second": speed, "same": same})
            print(*line_of(rows[-1]), sep="  ", flush=True)
    ratio = rows[2]["clips_per_second"] / rows[1]["clips_per_second"]
    said = f"Two workers encode {ratio:.2f} times the clips a second of one."
    print(said)
    if not all(row["same"] for row in rows):
        raise SystemExit("not all runs wrote the same")
    about, names = __doc__.partition("\n\n")[2].strip(), ["run", "seconds", "clips/s", "same"]
    text = f"# Archive\n\n{about}\n\n{table(names, map(line_of, rows))}\n\n{said}"
    settings = {"clips": CLIPS, "frames": arguments.frames, "threads": 1, "ratio": ratio}
    write(arguments.out, machine, settings, rows, text)


def line_of(row):
    speed = "-" if row["clips_per_second"] is None else f"{row['clips_per_second']:.2f}"
    return [row["run"], f"{row['seconds']:.1f}", speed, "yes" if row["same"] else "no"]


if __name__ == "__main__":
    main()

"""Two runs side by side: `python -m bench.compare A.json B.json`; with one run, A is what is recorded for its machine.

Medians are compared row by row, which means something only on the same machine; `*` marks rows whose ranges from p20 to
p80 do not overlap. Speed-ups are ratios within a run, so they can be compared between machines too.
"""

import argparse
import json
from pathlib import Path

from bench.run import label
from bench.tables import RESULTS, short_name

SPREAD = 0.2  # of a speed-up, within which a run repeats another


def load(path):
    """A run, with its rows by what they are of: (label, system)."""
    run = json.loads(Path(path).read_text())
    return run | {"rows": {(label(row), row["system"]): row for row in run["rows"]}}


def apart(one, other):
    return one["p80_ms"] < other["p20_ms"] or other["p80_ms"] < one["p20_ms"]


def compare(first, second):
    """The lines of the comparison."""
    yield from (f"{name}: {describe(run)}" for name, run in (("A", first), ("B", second)))
    repeated = compared = 0
    yield f"{'':63}{'A ms':>12}{'B ms':>12}{'B / A':>8} {'A speed-up':>12}{'B speed-up':>12}{'B / A':>8}"
    for key, one in first["rows"].items():
        other = second["rows"].get(key)
        if other is None:
            continue
        ratio = other["speedup"] / one["speedup"]
        text = f"{key[0]:50} {key[1]:12}{one['median_ms']:12.3f}{other['median_ms']:12.3f}"
        text += f"{other['median_ms'] / one['median_ms']:8.2f}{'*' if apart(one, other) else ' '}"
        yield f"{text}{one['speedup']:11.2f}x{other['speedup']:11.2f}x{ratio:8.2f}"
        if one["system"] not in ("dense", "reference"):  # what the others are measured against
            compared += 1
            repeated += 1 / (1 + SPREAD) <= ratio <= 1 + SPREAD
    for name, run, others in (("A", first, second), ("B", second, first)):
        only = [" ".join(key) for key in run["rows"] if key not in others["rows"]]
        if only:
            yield f"only in {name}: {', '.join(only)}"
    yield f"speed-ups within {SPREAD:.0%} of each other: {repeated} of {compared}"


def describe(run):
    return ", ".join(f"{name} {value}" for name, value in ({"device": run["device"]} | run["machine"]).items())


def recorded(run):
    """The file in bench/results of runs on the machine of `run`."""
    kind = run["device"].partition(":")[0]
    return RESULTS / f"run-{kind}-{short_name(run['machine']['processor' if kind == 'cpu' else 'cuda:0'])}.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN.json", help="one, or A and B")
    paths = parser.parse_args().runs
    if len(paths) > 2:
        parser.error(f"{len(paths)} runs are named; accepted are one or two")
    if len(paths) == 1:
        paths.insert(0, recorded(load(paths[0])))
        if not paths[0].exists():
            print(f"nothing is recorded for this machine; python -m bench.run --out bench/results/{paths[0].name} does")
            return
    for line in compare(*map(load, paths)):
        print(line)


if __name__ == "__main__":
    main()

"""How results are written: where they lie, which machine and commit they name, and their tables and figures."""

import json
import os
import re
import subprocess
from pathlib import Path

from neuroflow_kernels.env import describe

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("NEUROFLOW_DATA", ROOT.parent / "shared" / "data"))
RESULTS = ROOT / "bench" / "results"
FACTS = ("processor", "instruction sets", "threads", "cuda:0", "python", "torch", "triton", "transformers", "numpy")
PROCESSORS = ("epyc", "xeon", "ryzen", "core")
MARKERS = "os^vD*<>PXph8"


def find(name):
    """The path of a file or directory that is not in the repository."""
    path = DATA / name
    if not path.exists():
        raise SystemExit(f"{name} is not in {DATA}; set NEUROFLOW_DATA to the directory that holds it")
    return path


def share(value):
    return "-" if value is None else f"{100 * value:.1f} %"


def cosine(value):
    return "-" if value is None else f"{value:.4f}"


def table(names, rows):
    """A Markdown table of `rows`, each a list of texts."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def git(*arguments):
    """What git prints about this project; nothing where it is not a checkout."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.rstrip()


def changed():
    """The tracked files that differ from the last commit, results aside."""
    status = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return [line[3:] for line in status.splitlines()]


def machine():
    """Where a result comes from: the machine, the versions and the commit."""
    facts = describe()
    commit = git("describe", "--always")
    found = {name: facts[name] for name in FACTS if name in facts}
    return found | {"commit": f"{commit}-dirty" if changed() else commit or "unknown"}


def begin(stem):
    """The machine and the commit for `write` to name; to be called before anything is measured.

    stem: a file in bench/results without its extension, such as "clip" or "studies/street", or a path elsewhere.

    Raises:
        SystemExit: the file would lie in bench/results, and the code here is not that of a commit.
    """
    if Path(RESULTS, stem).resolve().is_relative_to(RESULTS):
        if not git("describe", "--always"):
            raise SystemExit(f"{stem} has to name the commit that was measured, but {ROOT} is not a git checkout")
        if files := changed():
            raise SystemExit(
                f"{stem} has to name the commit that was measured, and these differ from it: {', '.join(files)}; "
                "commit or stash them first"
            )
    return machine()


def short_name(device):
    """The part of a file name for a processor or GPU such as "AMD EPYC 9654, AVX512": its family if known, else all."""
    words = re.findall("[a-z0-9]+", device.partition(",")[0].lower())
    return next((word for word in words if word in PROCESSORS), "-".join(words))


def write(stem, machine, settings, rows, text):
    """Write bench/results/STEM.json, with the `machine` of `begin`, the settings and every row, and STEM.md."""
    Path(RESULTS, stem).parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "settings": settings, "rows": rows}
    Path(RESULTS, f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    line = ", ".join(f"{name} {value}" for name, value in machine.items())
    Path(RESULTS, f"{stem}.md").write_text(f"{text}\n\n{line}.\n")


def plot_points(stem, title, panels, series):
    """Draw bench/results/STEM.png: for each panel (key, label), the rows of `series` {name: rows} over their skip.

    Cosines are drawn as distances from 1 on a log scale, since most are close to 1.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), layout="constrained")
    for axis, (key, label) in zip(axes, panels, strict=True):
        distance = key.startswith("cosine")
        for number, (name, rows) in enumerate(series.items()):
            points = sorted((100 * row["skipped"], 1 - row[key] if distance else row[key]) for row in rows)
            axis.plot(*zip(*points, strict=True), marker=MARKERS[number % len(MARKERS)], linewidth=1, label=name)
        axis.set(xlabel="patches skipped, %", ylabel=label, yscale="log" if distance else "linear")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    figure.suptitle(title, fontsize=10)
    figure.savefig(RESULTS / f"{stem}.png", dpi=110)
    plt.close(figure)


def plot_bars(stem, title, label, groups, series):
    """Draw bench/results/STEM.png: the values of `series` {name: values, one for each of `groups`}, side by side."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(max(1.1 * len(groups), 6), 4.5), layout="constrained")
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        axis.bar(places, values, width, label=name)
    axis.set_xticks(range(len(groups)), groups, fontsize=8)
    lowest = min(min(values) for values in series.values())
    axis.set(ylabel=label, ylim=(max(lowest - 0.1, 0), 1.02))
    axis.grid(axis="y", alpha=0.3)
    figure.legend(fontsize=7, loc="outside lower center", ncols=len(series))
    axis.set_title(title, fontsize=10)
    figure.savefig(RESULTS / f"{stem}.png", dpi=110)
    plt.close(figure)

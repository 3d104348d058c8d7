"""Figures and tables of benchmark runs: `python -m bench.plot`, for what `python -m bench.run --out RUN.json` wrote.

RUN.png shows the speed-up by resolution, the fidelity that skipping costs (measured by `python -m
bench.studies.fidelity clips`) and the roofline of the ops; RUN.md has every row. The summary tables are printed, and
`--readme` writes those of bench/results/run-*.json, and those of `summaries.py`, into bench/README.md.
"""

import argparse
import itertools
import json
from pathlib import Path

import matplotlib
from matplotlib.lines import Line2D

from bench.run import ceilings_line, label, sustained
from bench.studies.fidelity import MAIN, mean_rows
from bench.summaries import TABLES, of, values, with_tables
from bench.tables import MARKERS, RESULTS, table

matplotlib.use("agg")
import matplotlib.pyplot as plt

README = Path(__file__).with_name("README.md")
FIDELITY = RESULTS / "studies" / "clips-224.json"
FACTS = ("cuda:0", "processor", "instruction sets", "threads", "torch", "transformers", "commit")
STYLES = {"float32": "-", "bfloat16": "--"}
TICKS = (1, 2, 5, 10, 20, 50, 100)


def machine_line(run):
    facts = {name: run["machine"][name] for name in FACTS if name in run["machine"]}
    for name in ["cuda:0"] if run["device"] == "cpu" else ["processor", "instruction sets"]:
        facts.pop(name, None)
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def milliseconds(value):
    return f"{value:.0f} ms" if value >= 20 else f"{value:.3g} ms"


def times(value):
    return f"{value:.2f}x" if value < 2 else f"{value:.1f}x"


def models_table(rows):
    """A row for every size, dtype and clip; a column for every system, dense first."""
    names = values(rows, "system")
    body = []
    for size, dtype in itertools.product(sorted({row["shape"][0] for row in rows}), values(rows, "dtype")):
        here = [row for row in of(rows, dtype=dtype) if row["shape"][0] == size]
        for skip, noise in dict.fromkeys((row["skip"], row["noise"]) for row in here if row["skip"] is not None):
            found = {row["system"]: row for row in here if (row["skip"], row["noise"]) in ((None, None), (skip, noise))}
            cells = [milliseconds(found[name]["median_ms"]) if name in found else "-" for name in names]
            cells = [
                cell if name == "dense" or name not in found else f"{cell}, {times(found[name]['speedup'])}"
                for name, cell in zip(names, cells, strict=True)
            ]
            last = times(sustained(found["E"])) if "E" in found else "-"
            body.append([f"{size} px", dtype, f"{skip:.0%}" + ", noisy" * noise, *cells, last])
    return table(["input", "dtype", "skipped", *names, "E with its key frames"], body)


def ops_table(rows):
    """The largest shape of every op; each backend and baseline but the reference, against it."""
    body = []
    for case, dtype in itertools.product(values(rows, "case"), values(rows, "dtype")):
        here = of(rows, case=case, dtype=dtype)
        for row in here:
            if row["system"] != "reference" and row["shape"] == here[-1]["shape"]:
                shape, share = "x".join(map(str, row["shape"])), f"{row['share_of_ceiling']:.0%}"
                figures = [milliseconds(row["median_ms"]), times(row["speedup"]), share]
                body.append([f"`{case}`", shape, dtype, row["system"], *figures])
    return table(["op", "shape", "dtype", "backend", "median", "over the reference", "of the ceiling"], body)


def tables_of(run):
    """The Markdown of a run for the README."""
    parts = [f"{machine_line(run)}:"]
    for kind, write in (("model", models_table), ("op", ops_table)):
        rows = of(run["rows"], kind=kind)
        if rows:
            parts.append(write(rows))
    return "\n\n".join(parts)


def all_rows(run):
    names = ["what", "system", "median", "p20", "p80", "rounds", "speed-up", "of the ceiling"]
    body = []
    for row in run["rows"]:
        taken = [milliseconds(row[name]) for name in ("median_ms", "p20_ms", "p80_ms")]
        ratios = [times(row["speedup"]), f"{row['share_of_ceiling']:.0%}"]
        body.append([label(row), row["system"], *taken, str(row["rounds"]), *ratios])
    head = f"{machine_line(run)}. Ceilings: {ceilings_line(run['ceilings'])}."
    return "\n\n".join([head, table(names, body)]) + "\n"


def marker_of(number, dtype):
    """How a series is drawn: filled where it is float32, hollow where it is bfloat16."""
    colour = f"C{number % 10}"
    face = colour if dtype == "float32" else "white"
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markerfacecolor": face}


def legend_beside(axis, **options):
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize=8, **options)


def plot_speedup(axis, rows, skip):
    """How many times faster than dense, by resolution."""
    chosen = [row for row in rows if row["skip"] in (None, skip) and row["system"] != "dense" and not row["noise"]]
    for number, name in enumerate(values(chosen, "system")):
        for dtype in values(chosen, "dtype"):
            points = sorted((row["shape"][0], row["speedup"]) for row in of(chosen, system=name, dtype=dtype))
            style = marker_of(number, dtype) | {"linestyle": STYLES[dtype]}
            axis.plot(*zip(*points, strict=True), **style, label=f"{name}, {dtype}")
    sizes = sorted({row["shape"][0] for row in rows})
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="input, px", ylabel="times faster than dense")
    axis.set_title(f"{skip:.0%} skipped")
    ticks = [tick for tick in TICKS if tick <= axis.get_ylim()[1]]
    axis.set_yticks(ticks, map(str, ticks))
    axis.set_xticks(sizes, map(str, sizes))
    axis.minorticks_off()
    legend_beside(axis, handlelength=4)


def plot_fidelity(axis, rows):
    for number, (name, *means) in enumerate(mean_rows(rows)):
        if name in MAIN:
            points = sorted((100 * mean["skipped"], 1 - mean["cosine_mean"]) for mean in means)
            axis.plot(*zip(*points, strict=True), marker=MARKERS[number], label=name)
    axis.set(yscale="log", xlabel="patches skipped, %", ylabel="1 - mean cosine to dense", title="ViT-Ti on real clips")
    legend_beside(axis)


def plot_roofline(axis, rows, ceilings):
    """Bytes per second over FLOPs per byte; ops without arithmetic lie at 0."""
    drawn = [row for row in rows if row["system"] in ("cpp", "cuda", "triton")]
    names = values(drawn, "case")
    for row in drawn:
        intensity, rate = row["flops"] / row["bytes"], 1e3 * row["bytes"] / row["median_ms"]
        axis.plot(intensity, rate, linestyle="", **marker_of(names.index(row["case"]), row["dtype"]))
    reach = [0.0, *(0.1 * 1.1**step for step in range(100))]
    for dtype in values(rows, "dtype"):
        roof = [min(ceilings["memory"], ceilings[dtype] / flops if flops else ceilings["memory"]) for flops in reach]
        axis.plot(reach, roof, STYLES[dtype], color="grey", label=f"ceiling, {dtype}")
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set(yscale="log", xlabel="FLOPs per byte", ylabel="bytes per second", title="ops")
    handles = [Line2D([], [], linestyle="", label=name, **marker_of(n, "float32")) for n, name in enumerate(names)]
    handles.append(Line2D([], [], marker="o", color="k", markerfacecolor="white", linestyle="", label="bfloat16"))
    legend_beside(axis, handles=handles + axis.get_legend_handles_labels()[0])


def plot(run, fidelity, path):
    models, ops = of(run["rows"], kind="model"), of(run["rows"], kind="op")
    skips = [skip for skip in values(models, "skip") if skip]
    panels = [lambda axis, skip=skip: plot_speedup(axis, models, skip) for skip in skips]
    panels.append(lambda axis: plot_fidelity(axis, fidelity["rows"]))
    if ops:
        panels.append(lambda axis: plot_roofline(axis, ops, run["ceilings"]))
    figure, axes = plt.subplots(2, -(-len(panels) // 2), figsize=(8 * -(-len(panels) // 2), 9), layout="constrained")
    for axis, draw in itertools.zip_longest(axes.flat, panels):
        axis.grid(alpha=0.3)
        if draw is None:
            axis.remove()
        else:
            draw(axis)
    figure.suptitle(machine_line(run), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def readme_tables():
    runs = "\n\n".join(tables_of(json.loads(path.read_text())) for path in sorted(RESULTS.glob("run-*.json")))
    return {"runs": runs} | {name: write() for name, write in TABLES.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", help="bench/results/run-*.json where none is named")
    parser.add_argument("--readme", action="store_true", help="write the tables into bench/README.md")
    arguments = parser.parse_args()
    fidelity = json.loads(FIDELITY.read_text())
    for path in arguments.runs or sorted(RESULTS.glob("run-*.json")):
        run = json.loads(path.read_text())
        plot(run, fidelity, path.with_suffix(".png"))
        path.with_suffix(".md").write_text(all_rows(run))
        print(tables_of(run), end="\n\n")
    if arguments.readme:
        README.write_text(with_tables(README.read_text(), readme_tables()))


if __name__ == "__main__":
    main()

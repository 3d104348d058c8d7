"""Charts as SVG to put into a page, in whose style their colours and fonts are named."""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..calibration import Calibration
from .figures import Figures

WIDTH = 9.6  # inches; a chart is as wide as the page, and one point is about one and a half of its pixels
MOST_POINTS, FEWER = 1500, 500  # of a line; of more frames than the first, it has as many points as the second
MOST_RULES = 24  # key frames that are marked through all panels
# Colours that stand for variables of the page's style, which differ in light and dark.
NAMES = ("ink", "quiet", "line", "share", "time", "key", "fifth")
VARIABLES = {f"#0102{number:02x}": name for number, name in enumerate(NAMES)}
INK, QUIET, LINE, SHARE, TIME, KEY, FIFTH = VARIABLES
SERIES = SHARE, KEY, TIME, FIFTH
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "neuroflow",  # the same chart has the same names in it
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g}%")


def timeline(figures: Figures, reasons: Mapping[int, str]) -> Markup:
    """Key frames by reason, share of patches skipped, cosine where it is known, and latency, over time."""
    records = figures.records
    time = np.array([record.time_s for record in records])
    marks: dict[str, list[float]] = {}
    for record in figures.key_frames:
        marks.setdefault(reasons.get(record.frame, "unknown"), []).append(record.time_s)
    heights = [0.2 + 0.17 * len(marks), 1.5, *([1.5] if figures.compared else []), 1.5]

    def draw(figure: Figure) -> None:
        rug, *panels = figure.subplots(len(heights), sharex=True, height_ratios=heights)
        rug.set_title("Key frames, by reason")
        for row, (_, times) in enumerate(marks.items()):
            rug.plot(times, np.full(len(times), row), "|", color=KEY, markersize=7, markeredgewidth=1.4)
        rug.set(yticks=range(len(marks)), yticklabels=list(marks), ylim=(len(marks) - 0.4, -0.6))
        rug.grid(axis="x", visible=False)
        rug.tick_params(axis="x", length=0)
        skipped = panels[0]
        skipped.set_title("Patches skipped")
        _line(skipped, time, [record.skipped for record in records], SHARE)
        skipped.set(ylim=(-0.02, 1.02), yticks=(0, 0.25, 0.5, 0.75, 1))
        skipped.yaxis.set_major_formatter(PERCENT)
        if figures.compared:
            panels[1].set_title("Cosine to the unpatched model")
            _line(panels[1], time, [record.cosine for record in records], KEY)
            panels[1].yaxis.set_major_locator(MaxNLocator(4))
            panels[1].yaxis.set_major_formatter(
                FuncFormatter(lambda cosine, _: f"{cosine:.6g}" if cosine < 1 + 1e-9 else "")
            )
            lowest = min(record.cosine for record in records)
            margin = max(0.1 * (1 - lowest), 0.001)
            panels[1].set_ylim(lowest - margin, 1 + margin)
        latency = panels[-1]
        latency.set_title("Latency, ms a frame")
        _line(latency, time, [record.neuroflow_ms for record in records], TIME, "NeuroFlow")
        values = [record.neuroflow_ms for record in figures.scored or records]
        if figures.compared:
            _line(latency, time, [record.dense_ms for record in records], QUIET, "unpatched")
            values += [record.dense_ms for record in figures.scored]
            latency.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, borderpad=0, handlelength=1.2)
        highest, usual = max(record.neuroflow_ms for record in records), 1.25 * np.quantile(values, 0.99)
        latency.set_ylim(0, usual)
        latency.yaxis.set_major_locator(MaxNLocator(4))
        if highest > usual:
            latency.set_title(f"Latency, ms a frame (peaks of up to {highest:.0f} ms are cut off)")
        if len(figures.key_frames) <= MOST_RULES:
            for axes in panels:
                for record in figures.key_frames:
                    axes.axvline(record.time_s, color=KEY, linewidth=0.7, alpha=0.45, zorder=0.5)
        _time_axis(latency, time)

    return _svg(
        draw, sum(heights) + 0.34 * len(heights) + 0.2, "Key frames, patches skipped, cosine and latency over time"
    )


def ages(counts: np.ndarray) -> Markup:
    """Shares of the patches by the age at which they were reused; counts [33] as `Moments.ages`."""
    most = int(counts.nonzero()[0][-1]) + 1
    names = ["0", "1", *(f"{2**power} to {2 ** (power + 1) - 1}" for power in range(1, most))][:most]
    shares = counts[:most] / counts.sum()

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars = axes.bar(names, shares, color=[TIME, *[SHARE] * (most - 1)][:most], width=0.72)
        axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=2, fontsize=7.5, color=QUIET)
        axes.set(xlabel="frames since the patch was encoded (0: in this frame)", ylim=(0, 1.12 * shares.max()))
        axes.yaxis.set_major_formatter(PERCENT)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="x", length=0)

    return _svg(draw, 2.3, "Share of patches by age")


def sweep(found: Calibration, target: str, value: float) -> Markup:
    """Fidelity and share skipped by threshold, the choice and the target, "fidelity" or "skip", marked."""
    trials = sorted(found.trials)
    thresholds = [trial.threshold for trial in trials]

    def draw(figure: Figure) -> None:
        fidelity, skipped = figure.subplots(2, sharex=True)
        fidelity.set_title("Cosine to the unpatched model")
        means = [trial.fidelity for trial in trials]
        fidelity.plot(thresholds, means, "o-", color=KEY, markersize=3, label="mean")
        fidelity.plot(
            thresholds, [trial.fidelity_p5 for trial in trials], "o:", color=QUIET, markersize=2.5, label="p5"
        )
        fidelity.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, borderpad=0, handlelength=1.6)
        fidelity.yaxis.set_major_formatter(FuncFormatter(lambda cosine, _: f"{cosine:.6g}"))
        skipped.set_title("Patches skipped")
        skipped.plot(thresholds, [trial.skipped for trial in trials], "o-", color=SHARE, markersize=3)
        skipped.set(ylim=(0, 1.02), yticks=(0, 0.25, 0.5, 0.75, 1), xlabel="threshold", xscale="log")
        skipped.yaxis.set_major_formatter(PERCENT)
        skipped.xaxis.set_major_formatter(FuncFormatter(lambda threshold, _: f"{threshold:g}"))
        skipped.xaxis.minorticks_off()
        for axes, name, reached in ((fidelity, "fidelity", found.fidelity), (skipped, "skip", found.skipped)):
            axes.axvline(found.config.threshold, color=INK, linewidth=0.8)
            axes.plot([found.config.threshold], [reached], "o", color=INK, markersize=6)
            if name == target:
                axes.axhline(value, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        offset = {"xytext": (6, -4), "textcoords": "offset points", "va": "top", "color": INK}
        fidelity.annotate("chosen", (found.config.threshold, 1), xycoords=("data", "axes fraction"), **offset)

    return _svg(draw, 4.4, "Fidelity and patches skipped by threshold")


def lines(
    title: str,
    xlabel: str,
    ylabel: str,
    series: Mapping[str, Iterable[Sequence[float]]],
    *,
    level: tuple[str, float, tuple[float, float]] | None = None,
    percent: bool = False,
) -> Markup:
    """Lines through points, each from left to right.

    Args:
        title: what is read out in place of the chart.
        xlabel, ylabel: of the axes.
        series: points (x, y), or (x, y, low, high) with an interval, of each line by its name.
        level: name, value and interval of what all are compared with.
        percent: both axes are shares.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if level is not None:
            name, value, interval = level
            axes.axhspan(*interval, color=QUIET, alpha=0.14, linewidth=0)
            axes.axhline(value, color=QUIET, linestyle=(0, (4, 3)), label=name)
        spread = np.ptp([point[0] for points in series.values() for point in points] or [0.0])
        for number, (name, points) in enumerate(series.items()):
            x, y, *interval = np.array(sorted(points), float).T
            colour = SERIES[number % len(SERIES)]
            style = {"color": colour, "label": name, "marker": "o", "markersize": 3.5}
            if interval:
                low, high = interval
                x = x + 0.006 * spread * (number - (len(series) - 1) / 2)  # or bars would hide each other
                reach = np.maximum([y - low, high - y], 0)  # rounding aside, y lies between the two
                axes.errorbar(x, y, reach, elinewidth=0.9, capsize=2.5, **style)
            else:
                axes.plot(x, y, linestyle="-" if number < len(SERIES) else ":", **style)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=not percent and xlabel in ("frame", "block")))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        if percent:
            axes.xaxis.set_major_formatter(PERCENT)
            axes.yaxis.set_major_formatter(PERCENT)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=6, borderpad=0, handlelength=1.6)

    return _svg(draw, 3.2, title)


def _line(axes: Axes, time: np.ndarray, values: list[float], colour: str, label: str | None = None) -> None:
    """A line, or of many frames medians in front of the range that they are medians of."""
    if len(values) <= MOST_POINTS:
        axes.plot(time, values, color=colour, label=label, marker="o" if len(values) < 3 else None, markersize=3)
        return
    split = np.array_split(np.array(values, float), FEWER)
    middle = [part.mean() for part in np.array_split(time, FEWER)]
    low, high = [part.min() for part in split], [part.max() for part in split]
    axes.fill_between(middle, low, high, color=colour, alpha=0.22, linewidth=0)
    axes.plot(middle, [np.median(part) for part in split], color=colour, label=label)


def _time_axis(axes: Axes, time: np.ndarray) -> None:
    long = time[-1] - time[0] >= 180
    axes.set_xlabel("time, minutes:seconds" if long else "time, seconds")
    axes.margins(x=0.01)
    if long:
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 1.5, 2, 3, 6, 10], integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds // 60:.0f}:{seconds % 60:02.0f}"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(10))


def _svg(draw: Callable[[Figure], None], height: float, title: str) -> Markup:
    """What `draw` puts into a figure of so many inches, as an <svg> that says its colours by the page's names."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes in figure.axes:  # the layout's last bits vary, and names in the file are hashes of positions
            axes.set_position([round(each, 5) for each in axes.get_position().bounds])
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # In a page, <svg> needs neither namespaces nor numbers, which other charts have as well, as names of its parts.
    head, _, body = svg.partition(">")
    head = re.sub(r' (?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", head)
    body = re.sub(r' id="[a-zA-Z0-9]+_\d+"', "", body)
    for colour, name in VARIABLES.items():
        body = body.replace(colour, f"var(--{name})")
    return Markup(f'{head} class="chart" role="img" aria-label="{title}">{body}')

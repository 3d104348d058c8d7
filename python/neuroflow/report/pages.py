"""The pages of reports: one file each, that needs no network, looks at home in light and dark, and prints."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from neuroflow_kernels.env import describe

from ..calibration import Calibration
from ..evaluation import Row
from ..video.results import Record
from .advice import Advice, Setup, advise
from .figures import Figures
from .moments import Moments

LISTED = 100  # rows of key frames in a page
MEANINGS = {  # as FrameReport has them
    "first": "the stream's first frame",
    "gap": "it did not follow the last frame",
    "size": "another size, dtype or device than before",
    "weights": "the model's weights changed",
    "outputs": "other outputs were asked for than before",
    "failed": "the frame before did not come through",
    "nonfinite": "the frame before held NaN or Inf",
    "age": "max_age was reached",
    "cut": "another scene, or the same in another light",
    "dense": "so much changed that a dense pass was faster",
    "unknown": "noted by the run that this one continues",
}


class Section(NamedTuple):
    """A heading, a chart and a table: names of its columns, and its rows as they are shown."""

    title: str
    chart: Any
    names: list[str]
    rows: list[list[str]]


@dataclasses.dataclass(frozen=True)
class RunReport:
    """The report of a run, which looks at every frame as it passes.

    Args:
        path: the file to write.
        settings: what the run is made with, by name.
        setup: what advice depends on.
    """

    path: Path
    settings: Mapping[str, Any]
    setup: Setup
    moments: Moments = dataclasses.field(default_factory=Moments)

    def write(self, figures: Figures, *, interrupted: bool = False) -> None:
        """Write the page.

        Args:
            figures: the run's numbers.
            interrupted: it did not reach the end of its source.

        Raises:
            OSError: it cannot be written.
        """
        from .charts import ages, timeline

        reasons = self.moments.reasons | {
            record.frame: "unknown" for record in figures.key_frames if record.frame not in self.moments.reasons
        }
        counted: dict[str, list[float]] = {}
        for record in figures.key_frames:
            counted.setdefault(reasons[record.frame], []).append(record.neuroflow_ms)
        whole = sum(record.neuroflow_ms for record in figures.records)
        _write(
            self.path,
            "run.html",
            title=self.setup.source,
            interrupted=interrupted,
            figures=figures,
            advice=advise(figures, self.moments.reasons, self.setup),
            stills=self.moments.chosen(),
            timeline=timeline(figures, reasons) if len(figures.records) > 1 else None,
            spans=_spans(figures.records, reasons),
            by_reason=[(reason, MEANINGS[reason], len(times), sum(times) / whole) for reason, times in counted.items()],
            listed=LISTED,
            ages=ages(self.moments.ages) if self.moments.ages.any() else None,
            settings=self.settings,
        )


def _spans(records: list[Record], reasons: Mapping[int, str]) -> list[tuple[str, list[Record]]]:
    """Key frames that follow each other for the same reason, together, with that reason."""
    groups = itertools.groupby(records, lambda record: reasons.get(record.frame))
    return [(reason, list(group)) for reason, group in groups if reason is not None]


def write_calibration(
    path: Path,
    found: Calibration,
    target: str,
    value: float,
    *,
    source: str,
    frames: int,
    advice: Advice,
    settings: Mapping[str, Any],
    facts: Mapping[str, str],
) -> None:
    """Write the report of a calibration.

    Args:
        path: the file to write.
        found: what came of it.
        target: what was asked for, "fidelity" or "skip", and its `value`.
        source: of the frames.
        frames: how many there were.
        advice: what to do with it.
        settings: what it was made with, by name.
        facts: what else there is to say at the top, by name.

    Raises:
        OSError: it cannot be written.
    """
    from .charts import sweep

    _write(
        path,
        "calibration.html",
        title=source,
        found=found,
        trials=sorted(found.trials),
        target=target,
        value=value,
        frames=frames,
        advice=[advice],
        chart=sweep(found, target, value),
        settings=settings,
        facts=facts,
    )


def write_evaluation(
    path: Path,
    *,
    source: str,
    kind: str,
    sections: list[Section],
    settings: Mapping[str, Any],
    facts: Mapping[str, str],
    interrupted: bool = False,
    left_out: Mapping[str, str] | None = None,
) -> None:
    """Write the report of an evaluation.

    Args:
        path: the file to write.
        source: what was evaluated on.
        kind: what was evaluated.
        sections: what was found.
        settings: what it was made with, by name.
        facts: what else there is to say at the top, by name.
        interrupted: not all of the source has been gone through.
        left_out: why some of the source is left out, by name.

    Raises:
        OSError: it cannot be written.
    """
    _write(
        path,
        "evaluation.html",
        title=source,
        kind=kind,
        sections=sections,
        settings=settings,
        facts=facts,
        interrupted=interrupted,
        left_out=left_out or {},
    )


def accuracy(rows: list[Row], archs: Mapping[str, str]) -> Any:
    """A chart of top-1 over patches skipped, with intervals; archs: letter of each system."""
    from .charts import lines

    dense, *sparse = rows
    series: dict[str, list[tuple[float, ...]]] = {}
    for row in sparse:
        if row.skipped is not None:
            series.setdefault(archs[row.system], []).append((row.skipped, row.top1, *row.top1_interval))
    level = dense.system, dense.top1, dense.top1_interval
    return lines("Top-1 by patches skipped", "patches skipped", "top-1", series, level=level, percent=True)


def lines_chart(title: str, xlabel: str, ylabel: str, series: Mapping[str, list[tuple[float, float]]]) -> Any:
    """A chart of lines, None without a point."""
    from .charts import lines

    series = {name: points for name, points in series.items() if points}
    return lines(title, xlabel, ylabel, series) if series else None


def shown_address(source: str) -> str:
    """A source as it may be shown: an address without its user's name, password and query."""
    if "://" not in source:
        return source
    return re.sub(r"(?<=://)[^/?#]*@", "", re.sub(r"[?#].*", "", source, flags=re.DOTALL), count=1)


def _write(path: Path, template: str, **content: Any) -> None:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["percent"] = lambda share: f"{share:.1%}"
    pages.filters["last_name"] = lambda source: source if "://" in source else Path(source).name or source
    pages.filters["number"] = lambda value, digits: f"{value:,.{digits}f}"
    pages.filters["clock"] = lambda seconds: f"{int(seconds // 60)}:{seconds % 60:05.2f}"
    # A name that is no text in any encoding, as a file's may be, is shown as far as it is.
    text = pages.get_template(template).render(**content, environment=describe())
    path.write_bytes(text.encode(errors="replace"))

"""What to try next: rules over a run's numbers, each of which says what it saw."""

import shlex
from collections import Counter
from collections.abc import Iterator
from statistics import median_high
from typing import NamedTuple

from ..config import NeuroFlowConfig
from .figures import Figures

FEW = 30  # scored frames
WAITING, WRITING = 0.5, 0.2  # shares of the loop's own time
REFRESHING = 0.1  # share of the model's time
MOVING = 0.4  # patches encoded in half of the partial frames, or share of the frames that are key frames for a change
FAITHFUL, EXACT, WRONG = 0.99, 0.999, 0.9  # cosines
ROOM = 0.8  # share skipped, below which an exact run could skip more
MANY_SKIPPED, LITTLE_GAINED = 0.6, 1.2


class Advice(NamedTuple):
    """What was found, what to do about it, and a command that does it, if there is one."""

    found: str
    action: str
    command: str | None = None


class Setup(NamedTuple):
    """What of a run's command advice depends on.

    Args:
        source: as the user gave it, to be shown.
        model: the same, None for the package's own.
        config: the settings in force.
        live: the source is a camera or a stream.
        overlay: a video was written.
    """

    source: str
    model: str | None
    config: NeuroFlowConfig
    live: bool = False
    overlay: bool = False

    def command(self, name: str, *options: str) -> str:
        """A command on the same source and model."""
        model = () if self.model is None else ("--model", self.model)
        return shlex.join(["neuroflow", name, self.source, *model, *options])


def advise(figures: Figures, reasons: dict[int, str], setup: Setup) -> list[Advice]:
    """What to try next after a run.

    Args:
        figures: its numbers.
        reasons: why each of its key frames is one, as `FrameReport` has it, by the frame's number.
        setup: what it was run on.
    """
    if not figures.scored:
        found = "No frame could be scored: a run's first is always encoded whole."
        return [Advice(found, "Give a source of more frames: nothing can be reused before the second.")]
    rules = (_few, _fidelity, _movement, _key_frames, _input, _writing, _speed)
    return [advice for rule in rules for advice in rule(figures, reasons, setup)]


def _few(figures: Figures, reasons: dict[int, str], setup: Setup) -> Iterator[Advice]:
    if len(figures.scored) < FEW:
        found = f"The numbers here rest on {_counted(len(figures.scored), 'scored frame')}."
        yield Advice(found, "Run over more before you rely on medians and percentiles.")


def _fidelity(figures: Figures, reasons: dict[int, str], setup: Setup) -> Iterator[Advice]:
    if not figures.compared:
        found = "Fidelity was not measured."
        yield Advice(found, "Run once with the unpatched model beside it.", setup.command("run", "--compare"))
        return
    mean, _, lowest = figures.fidelity
    worst = min(figures.scored, key=lambda record: record.cosine).frame
    if mean < FAITHFUL:
        found = f"The mean cosine is {mean:.4f}, below {FAITHFUL}."
        yield _recalibrate(found, FAITHFUL, setup)
    elif lowest < WRONG:
        found = f"The mean cosine is {mean:.4f}, but frame {worst} falls to {lowest:.4f}."
        yield Advice(found, "See its still for what was missed; a lower --threshold or --max-age catches it sooner.")
    elif mean >= EXACT and figures.skipped < ROOM and _movement_of(figures, reasons) is None:
        found = f"The mean cosine is {mean:.4f} with {figures.skipped:.1%} of the patches skipped: there is room."
        yield _recalibrate(found, FAITHFUL, setup)


def _recalibrate(found: str, target: float, setup: Setup) -> Advice:
    if setup.config.budget is not None:
        direction = "larger" if "below" in found else "smaller"
        return Advice(found, f"Try a {direction} --budget, now {setup.config.budget:g}.")
    if setup.live:
        return Advice(found, "Record some minutes of this source, and find a threshold on them: neuroflow calibrate.")
    options = "--target-fidelity", f"{target:g}", "--out", "config.json"
    action = f"Find the threshold that gives {target:g}, then run with --config config.json."
    return Advice(found, action, setup.command("calibrate", *options))


def _movement_of(figures: Figures, reasons: dict[int, str]) -> str | None:
    """How much of the frames changes, in words, where that is nearly everything; None where it is not."""
    partial = [1 - record.skipped for record in figures.scored if not record.key_frame]
    changed = sum(reasons.get(record.frame) in ("cut", "dense") for record in figures.scored) / len(figures.scored)
    encoded = median_high(partial) if partial else 0.0
    words = []
    if changed > MOVING:
        words.append(f"{changed:.0%} of the frames are key frames for it")
    if encoded > MOVING:
        words.append(f"half of the partial frames encode {encoded:.0%} of their patches or more")
    return " and ".join(words) or None


def _movement(figures: Figures, reasons: dict[int, str], setup: Setup) -> Iterator[Advice]:
    moving = _movement_of(figures, reasons)
    if moving is not None:
        yield Advice(
            f"The picture changes nearly everywhere, as when the camera moves: {moving}.",
            "Little can be reused here. --normalise-motion helps with slow pans; a larger --threshold, and larger "
            "cut_share and cut_surprise in the file that --config names, trade fidelity for speed. Otherwise the "
            "unpatched model costs no more.",
        )


def _key_frames(figures: Figures, reasons: dict[int, str], setup: Setup) -> Iterator[Advice]:
    count: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for record in figures.scored:
        if record.frame in reasons:
            count[reasons[record.frame]] += 1
            spent[reasons[record.frame]] += record.neuroflow_ms
    whole = sum(record.neuroflow_ms for record in figures.scored)
    config, moving = setup.config, _movement_of(figures, reasons) is not None

    def found(reason: str, why: str) -> str:
        return f"{_counted(count[reason], 'key frame')} {why} took {spent[reason] / whole:.0%} of the model's time."

    def worth(reason: str) -> bool:
        return count[reason] > 0 and spent[reason] / whole >= REFRESHING

    if worth("cut") and not moving:
        action = (
            "If the scene stays the same, exposure or flicker sets them off: raise cut_light "
            f"({_setting(config.cut_light)}) or cut_share ({_setting(config.cut_share)}) in the file that --config "
            "names, and watch the cosine."
        )
        yield Advice(found("cut", "for cuts and changes of light"), action)
    if worth("dense") and not moving:
        action = "So much changed in them that a dense pass was faster. A larger --threshold leaves fewer such frames."
        yield Advice(found("dense", "for large changes"), action)
    if worth("age"):
        action = f"Raise --max-age, now {config.max_age}, or spread the work over all frames with --refresh rolling."
        yield Advice(found("age", "for age"), action)
    if count["nonfinite"]:
        action = "Look for NaN or Inf in the model's input or weights, and try --dtype float32."
        yield Advice(found("nonfinite", "after frames with NaN or Inf"), action)
    if count["size"]:
        action = "The source changes its size as it plays; recordings of one size keep their state."
        yield Advice(found("size", "for another size"), action)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def _setting(value: float | None) -> str:
    return "off" if value is None else f"now {value:g}"


def _input(figures: Figures, reasons: dict[int, str], setup: Setup) -> Iterator[Advice]:
    mean = figures.mean_stages
    if mean is None:
        return
    own = mean.total - (mean.dense or 0.0)
    if mean.wait / own < WAITING:
        return
    if setup.live:
        found = f"The model waited for the camera for {mean.wait / own:.0%} of the time."
        action = (
            f"A frame keeps it busy for {own - mean.wait:.1f} of {own:.1f} ms: it could follow about "
            f"{own / (own - mean.wait):.0f} such cameras. neuroflow serve takes many."
        )
        yield Advice(found, action)
        return
    name, most = max(("decoding", mean.decode), ("preprocessing", mean.preprocess), key=lambda stage: stage[1])
    found = (
        f"{mean.wait / own:.0%} of the time went to waiting for input: {name} takes {most:.1f} ms a frame, the model "
        f"{mean.encode:.1f} ms."
    )
    actions = {
        "decoding": "A faster model changes little here. Decode a smaller recording, take fewer frames with --stride, "
        "or share recordings out to several processes: neuroflow archive --ray.",
        "preprocessing": "A faster model changes little here. A recording nearer to the model's size is resized "
        "sooner; neuroflow archive --ray shares recordings out to several processes.",
    }
    yield Advice(found, actions[name])


def _writing(figures: Figures, reasons: dict[int, str], setup: Setup) -> Iterator[Advice]:
    mean = figures.mean_stages
    if mean is not None and setup.overlay and (share := mean.write / (mean.total - (mean.dense or 0.0))) >= WRITING:
        found = f"Writing took {share:.0%} of the time, {mean.write:.1f} ms a frame."
        yield Advice(found, "Leave --overlay out where throughput counts.")


def _speed(figures: Figures, reasons: dict[int, str], setup: Setup) -> Iterator[Advice]:
    if figures.compared and figures.skipped >= MANY_SKIPPED and figures.speed_up < LITTLE_GAINED:
        found = (
            f"{figures.skipped:.0%} of the patches are skipped, but a frame is only {figures.speed_up:.2f}x as fast."
        )
        yield Advice(
            found,
            "What a frame costs whatever it encodes outweighs the rest. Larger inputs (--size), larger models and more "
            "frames in one call (--clip) gain more.",
        )

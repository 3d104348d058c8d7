"""The table at the end of a run."""

from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

from neuroflow_kernels.env import describe

from ..video.results import Record


@dataclass(frozen=True)
class Stages:
    """Where a frame's time went, in milliseconds; frames that go through the model together share theirs equally.

    Attributes:
        decode: until the source gave the frame; a live one is waited for.
        preprocess: from the frame to the model's input.
        wait: of the loop, for that input: both of the former where they were not done ahead.
        encode: in the patched model.
        dense: in the unpatched model, None without a comparison.
        write: results and overlay.
        total: of the loop, from the last frame's end to this one's.
    """

    decode: float
    preprocess: float
    wait: float
    encode: float
    dense: float | None
    write: float
    total: float


def format_report(
    records: list[Record], stages: list[Stages], state_bytes: int, model: str, gate: str, device: torch.device
) -> str:
    """The table of a run: times, skipped patches, fidelity, state and machine.

    Args:
        records: of every frame, at least one.
        stages: of the frames that this run encoded.
        state_bytes: what the stream holds.
        model: the model and its input, one line.
        gate: NeuroFlow's settings, one line.
        device: what the model ran on.
    """
    scored = [record for record in records if not record.first]
    lines = [
        f"frames            {len(records)}, {len(scored)} of them scored (a run's first is dense, and is not)",
        f"model             {model}",
        f"NeuroFlow         {gate}",
    ]
    if scored:
        lines += _statistics(scored)
    if len(stages) > 1:
        lines.append(_pipeline(stages[1:]))
    lines += [
        f"key frames        {sum(record.key_frame for record in records)}",
        f"state             {state_bytes:,} bytes",
        f"machine           {machine(device)}",
    ]
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    """The processor, the device, its threads and the versions that a time depends on, one line."""
    facts = describe()
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return (
        f"{facts['processor']}, on {place}, threads {facts['threads']}, torch {facts['torch']}, "
        f"transformers {facts['transformers']}"
    )


def _statistics(scored: list[Record]) -> list[str]:
    sparse = np.array([record.neuroflow_ms for record in scored])
    skipped = f"patches skipped   {np.mean([record.skipped for record in scored]):.1%}"
    heading = f"ms/frame          {'median':>10}{'p20':>10}{'p80':>10}"
    if scored[0].dense_ms is None:
        return [heading, _times("NeuroFlow", sparse), skipped, "fidelity          not measured; --compare does"]
    dense = np.array([record.dense_ms for record in scored])
    cosine = np.array([record.cosine for record in scored])
    fidelity = f"mean {cosine.mean():.4f}   p5 {np.quantile(cosine, 0.05):.4f}   min {cosine.min():.4f}"
    lines = [
        heading,
        _times("dense", dense),
        _times("NeuroFlow", sparse),
        f"speed-up          {np.median(dense) / np.median(sparse):.2f}x, same frames, side by side",
        skipped,
        f"fidelity          {fidelity}   (cosine to dense)",
    ]
    if scored[0].dense_predicted is not None:
        agreement = np.mean([record.predicted == record.dense_predicted for record in scored])
        lines.append(f"top-1 agreement   {agreement:.1%} of the frames get the class that dense gives them")
    return lines


def _pipeline(stages: list[Stages]) -> str:
    """Means, as they add up; medians do not."""
    mean = {name: fmean(values) for name in vars(stages[0]) if None not in (values := [vars(s)[name] for s in stages])}
    shown = {"encode": "encode", "dense": "dense", "wait": "wait for input", "write": "write"}
    parts = [f"{label} {mean[name]:.1f}" for name, label in shown.items() if name in mean]
    other = mean["total"] - sum(mean[name] for name in shown if name in mean)
    return (
        f"pipeline          {mean['total']:.1f} ms/frame (mean): {', '.join(parts)}, other {other:.1f}; "
        f"the input took decode {mean['decode']:.1f}, preprocess {mean['preprocess']:.1f}"
    )


def _times(name: str, milliseconds: np.ndarray) -> str:
    median, low, high = np.quantile(milliseconds, [0.5, 0.2, 0.8])
    return f"  {name:<16}{median:>10.1f}{low:>10.1f}{high:>10.1f}"

"""The table at the end of a run."""

from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

from neuroflow_kernels.env import describe

from ..video.results import Record


@dataclass(frozen=True)
class Stages:
    """Where a frame's time went, in milliseconds; frames encoded in one call share its time equally.

    Attributes:
        decode: time until the source gave the frame, including the wait for a live one.
        preprocess: from the frame to the model's input.
        wait: time the loop waited for that input; equals the two above if they were not done ahead.
        encode: in the patched model.
        dense: in the unpatched model; None without a comparison.
        write: results and overlay.
        total: of the loop, from the end of the last frame to the end of this one.
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
        records: one for each frame, at least one.
        stages: one for each frame that this run encoded.
        state_bytes: memory that the stream holds.
        model: the model and its input, in one line.
        gate: NeuroFlow's settings, in one line.
        device: the model's.
    """
    scored = [record for record in records if not record.first]
    lines = [
        f"frames            {len(records)}, {len(scored)} of them scored (not a run's first, which is dense)",
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
    """Processor, device, threads and versions, in one line: what timings depend on."""
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
        return [heading, _times("NeuroFlow", sparse), skipped, "fidelity          not measured; use --compare"]
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
        lines.append(f"top-1 agreement   {agreement:.1%} of the frames get the same class as dense")
    return lines


def _pipeline(stages: list[Stages]) -> str:
    """Mean times, which add up, unlike medians."""
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

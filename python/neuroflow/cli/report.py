"""The table at the end of a run."""

import numpy as np
import torch

from neuroflow_kernels.env import describe

from ..video.results import Record


def format_report(records: list[Record], state_bytes: int, model: str, gate: str, device: torch.device) -> str:
    """The table of a run: times, skipped patches, fidelity, state and machine.

    Args:
        records: of every frame, at least one.
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


def _times(name: str, milliseconds: np.ndarray) -> str:
    median, low, high = np.quantile(milliseconds, [0.5, 0.2, 0.8])
    return f"  {name:<16}{median:>10.1f}{low:>10.1f}{high:>10.1f}"

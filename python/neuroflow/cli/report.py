"""The table at the end of a run."""

import torch

from neuroflow_kernels.env import describe

from ..report.figures import Figures, Times


def format_report(figures: Figures) -> str:
    """The table of a run: times, skipped patches, fidelity, state and machine."""
    lines = [
        f"frames            {len(figures.records)}, {len(figures.scored)} of them scored (not a run's first, which is "
        "dense)",
        f"model             {figures.model}",
        f"NeuroFlow         {figures.gate}",
    ]
    if figures.scored:
        lines += _statistics(figures)
    if figures.mean_stages is not None:
        lines.append(_pipeline(figures))
    lines += [
        f"key frames        {len(figures.key_frames)}",
        f"state             {figures.state_bytes:,} bytes",
        f"machine           {figures.machine}",
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


def _statistics(figures: Figures) -> list[str]:
    skipped = f"patches skipped   {figures.skipped:.1%}"
    heading = f"ms/frame          {'median':>10}{'p20':>10}{'p80':>10}"
    if not figures.compared:
        return [heading, _times("NeuroFlow", figures.sparse), skipped, "fidelity          not measured; use --compare"]
    mean, p5, lowest = figures.fidelity
    lines = [
        heading,
        _times("dense", figures.dense),
        _times("NeuroFlow", figures.sparse),
        f"speed-up          {figures.speed_up:.2f}x, same frames, side by side",
        skipped,
        f"fidelity          mean {mean:.4f}   p5 {p5:.4f}   min {lowest:.4f}   (cosine to dense)",
    ]
    if figures.agreement is not None:
        lines.append(f"top-1 agreement   {figures.agreement:.1%} of the frames get the same class as dense")
    return lines


def _pipeline(figures: Figures) -> str:
    mean = figures.mean_stages
    shown = {"encode": mean.encode, "dense": mean.dense, "wait for input": mean.wait, "write": mean.write}
    parts = [f"{name} {value:.1f}" for name, value in shown.items() if value is not None]
    return (
        f"pipeline          {mean.total:.1f} ms/frame (mean): {', '.join(parts)}, other {figures.other_ms:.1f}; "
        f"the input took decode {mean.decode:.1f}, preprocess {mean.preprocess:.1f}"
    )


def _times(name: str, times: Times) -> str:
    return f"  {name:<16}{times.median:>10.1f}{times.p20:>10.1f}{times.p80:>10.1f}"

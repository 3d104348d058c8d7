"""Consecutive key frames, and whether they are frames of several alternating scenes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

SAMPLE = 32  # patches sampled from a frame
MOST_SCENES = 4
IN_TURN = 8  # consecutive frames that match the one a fixed distance back; films do not cut that often
LONG = 30  # consecutive key frames; films do not cut that often either


class Run(NamedTuple):
    """Consecutive frames that had too little in common with the one before to skip any patch.

    An immutable value, so that threads may race to replace it.

    Args:
        length: number of frames.
        samples: a few patches [<= SAMPLE, D] of each of the last frames, normalised to length 1, latest first.
        nearer: for distances of 2 to MOST_SCENES frames, the number of consecutive frames, up to the last, that were at
            most half as far from the frame at that distance as from the one before.
    """

    length: int = 0
    samples: tuple[torch.Tensor, ...] = ()
    nearer: tuple[int, ...] = (0,) * (MOST_SCENES - 1)

    @property
    def scenes(self) -> int | None:
        """Number of scenes that alternate; None if they do not."""
        return next((apart for apart, count in enumerate(self.nearer, 2) if count >= IN_TURN), None)

    def extended(self, patches: torch.Tensor) -> "Run":
        """The run with one more frame, its patches [1, N, D] as the gate compares them."""
        if not self.length:
            return Run(1)  # one cut costs nothing
        count = patches.shape[1]
        chosen = torch.linspace(0, count - 1, min(count, SAMPLE), device=patches.device).long()
        sample = F.normalize(patches[0, chosen].float(), dim=1)
        if self.samples and (self.samples[0].shape, self.samples[0].device) != (sample.shape, sample.device):
            return Run(1)
        nearer = [0] * len(self.nearer)
        if len(self.samples) > 1:
            distances = (1 - torch.stack([(sample * other).sum(1).mean() for other in self.samples])).tolist()
            for number, distance in enumerate(distances[1:]):
                nearer[number] = self.nearer[number] + 1 if distance < distances[0] / 2 else 0
        return Run(self.length + 1, (sample, *self.samples)[:MOST_SCENES], tuple(nearer))

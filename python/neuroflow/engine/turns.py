"""Key frames in a row, and whether they are frames of several scenes that come in turn."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

SAMPLE = 32  # patches that stand for a frame
MOST_SCENES = 4
IN_TURN = 8  # frames in a row that find their scene so many frames before; a film does not cut that often
LONG = 30  # key frames in a row; a film does not cut that often either


class Run(NamedTuple):
    """Frames in a row that had too little in common with the one before to skip any patch.

    A value, never changed, so that threads may race to replace it.

    Args:
        length: how many.
        samples: a few patches [<= SAMPLE, D] of each of the last ones, of length 1, the latest first.
        nearer: for 2 to MOST_SCENES frames apart, how many in a row, up to the last, were at most half as far from that
            one as from the one before.
    """

    length: int = 0
    samples: tuple[torch.Tensor, ...] = ()
    nearer: tuple[int, ...] = (0,) * (MOST_SCENES - 1)

    @property
    def scenes(self) -> int | None:
        """How many scenes the frames show in turn; None where they do not."""
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

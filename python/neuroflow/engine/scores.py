"""How a stream's surprise becomes a score, and which patches are encoded or left whatever their score.

All functions take patches in row-major order of their grid (rows, columns), of one stream or, as [S, N], of several.
"""

import math

import torch
import torch.nn.functional as F

from ..adapters.anatomy import Grid

MOST_SURPRISE = 2.0  # for a patch without NaN or Inf
LEAST_LIGHT = 1e-4  # variance of brightness that counts as noise, in units of normalised pixels
LEAST_COLOUR = 0.01  # variance of colour that counts as noise, relative to that of brightness
AROUND_WEIGHT = 0.8
FRAME_WEIGHT = 0.5


def staleness(surprise: torch.Tensor, age: torch.Tensor, attention: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """Estimate how far a patch's caches have drifted, weighted by how much the pooled output reads the patch.

    A patch's keys, values and output drift with its own content, with that of the patches around it and with the rest
    of the frame: (sqrt(surprise) + 0.8 sqrt(mean surprise of the 3 x 3 patches around) + 0.5 sqrt(mean surprise of the
    frame))^2. This is weighted by the square root of its age in frames, since a patch that keeps changing is stale
    again at once, and by the square root of the attention that the pooled output pays to it, so that tokens go where
    they change the result. In a frame where nothing changed, nothing is stale. Form and weights were found on real
    footage, at equal tokens (bench/results/studies/scores.md).

    Args:
        surprise: [S, N] float32, infinite at patches with NaN.
        age: [S, N], number of frames between this one and the one that last encoded a patch.
        attention: [S, N] with mean 1, or None if unknown.

    Returns:
        [S, N] float32.
    """
    bounded = surprise.clamp_max(MOST_SURPRISE)
    around = F.avg_pool2d(bounded.unflatten(1, grid), 3, stride=1, padding=1, count_include_pad=False).flatten(1)
    drift = surprise.sqrt() + AROUND_WEIGHT * around.sqrt() + FRAME_WEIGHT * bounded.mean(1, keepdim=True).sqrt()
    score = drift.square() * (1 + age).to(drift.dtype).sqrt()
    return score if attention is None else score * attention.sqrt()


def without_common_motion(surprise: torch.Tensor) -> torch.Tensor:
    """Surprise [S, N] above its frame's mean, so that a moving camera does not make every patch active.

    Source: Schmitt 2026, motion normalisation. What the camera's motion changes is then served stale.
    """
    return (surprise - surprise.clamp_max(MOST_SURPRISE).mean(1, keepdim=True)).clamp_min(0)


def dilated(index: torch.Tensor, grid: Grid, rings: int) -> torch.Tensor:
    """The patches `index` (ascending int32) and those up to `rings` patches away, diagonally too."""
    active = torch.zeros(grid, device=index.device)
    active.view(-1)[index] = 1
    # Growing by more than the grid changes nothing.
    down, right = (min(rings, patches - 1) for patches in grid)
    grown = F.max_pool2d(active[None, None], (2 * down + 1, 1), stride=1, padding=(down, 0))
    grown = F.max_pool2d(grown, (1, 2 * right + 1), stride=1, padding=(0, right))
    return grown.flatten().nonzero()[:, 0].int()


def due(age: torch.Tensor, max_age: int) -> torch.Tensor:
    """The patches to encode so that none waits `max_age` frames, bool [S, N]: the oldest, once half-way there.

    At most 2 N / max_age of them in a frame, where waiting for the limit would end in a burst of all patches that a key
    frame encoded; none as long as the score reaches them earlier.
    """
    oldest = age.argsort(descending=True, stable=True)[:, : math.ceil(2 * age.shape[1] / max_age)]
    return torch.zeros_like(age, dtype=torch.bool).scatter(1, oldest, True) & (age >= max_age // 2)


def is_cut(
    surprise: torch.Tensor, active: torch.Tensor, share: float | None, mean_surprise: float | None
) -> torch.Tensor:
    """Whether a frame shows another scene, or so much change that caches hardly help.

    Args:
        surprise: [S, N].
        active: [S], number of the N patches that the rule chose.
        share: a cut has more than this share of its patches active; None ignores the share.
        mean_surprise: a cut has a mean surprise above this, which also works under a budget; None ignores the mean.

    Returns:
        [S] bool.
    """
    cut = torch.zeros_like(active, dtype=torch.bool)
    if share is not None:
        cut |= active > share * surprise.shape[1]
    if mean_surprise is not None:
        cut |= surprise.clamp_max(MOST_SURPRISE).mean(1) > mean_surprise
    return cut


def light_change(colours: torch.Tensor, held: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """How much the light on the patches that a frame does not encode has changed since each was encoded.

    Contrast is the standard deviation of the patches' brightness, saturation their mean distance from grey. The change
    is the absolute log ratio of whichever changed more. Motion in one part of the picture affects neither in the rest.

    Args:
        colours: mean red, green and blue of each patch, [S, N, 3] float32.
        held: the same at each patch's last encoding.
        active: bool [S, N].

    Returns:
        [S] float32.
    """
    count = (~active).sum(1).clamp_min(1)
    seen = torch.stack((colours, held)).masked_fill(active[..., None], 0)
    red, green, blue = seen.unbind(3)  # [2, S, N] each
    brightness = (red + green + blue) / 3
    mean = brightness.sum(2) / count
    light = brightness.square().sum(2) / count - mean.square()  # [2, S]
    saturation = ((red - green).square() + ((red + green) / 2 - blue).square()).sum(2) / count
    light = light.clamp_min(0) + LEAST_LIGHT
    noise = LEAST_COLOUR * light.prod(0).sqrt()
    contrast, colour = (torch.log(now / before).abs() for now, before in (light, saturation + noise))
    return torch.maximum(contrast, colour) / 2


def cls_attention(query: torch.Tensor, keys: torch.Tensor, scaling: float, prefix: int) -> torch.Tensor:
    """The attention that CLS pays to each patch, mean over heads.

    Args:
        query: [S, heads, head_dim], of CLS.
        keys: [S, heads, T, head_dim].
        scaling: factor on the products.
        prefix: number of the T tokens that are not patches.

    Returns:
        [S, N] float32.
    """
    scores = (query[:, :, None] @ keys.mT)[:, :, 0].float() * scaling
    return scores.softmax(2)[..., prefix:].mean(1)

"""Objects from what the gate measures anyway: patches that move, their components, embeddings, names and tracks.

The report on a patched model's last pass has the surprise of its frames, and the model's output has the tokens. Places
are in patches: x from the left, y from the top, the middle of the first patch at (0.5, 0.5).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from torch import nn

from .adapters import Grid, describe
from .engine.scores import AROUND_WEIGHT, MOST_SURPRISE

DIAGONALLY_TOO = np.ones((3, 3))
OUT_OF_REACH = 1e6
ESTABLISHED = 3  # frames after which a track is no accident
STEADINESS = 0.5  # weight of the old velocity beside the new one
GROWTH = 0.25  # of the reach, with the frames since a track was last seen
MEMORY = 0.9  # weight of the old embedding beside the new one


def motion(surprise: torch.Tensor) -> torch.Tensor:
    """How much each patch moves, from its surprise and that of the patches around it.

    (sqrt(surprise) + 0.8 sqrt(mean surprise of the 3 x 3 patches around))^2, which is what `score="staleness"` makes of
    content: noise surprises single patches, objects several.

    Args:
        surprise: [rows, columns], as `FrameReport.surprise` has it.

    Returns:
        [rows, columns] float32; 0 where surprise is NaN, as it is after a key frame.
    """
    bounded = surprise.float().nan_to_num(0.0).clamp_max(MOST_SURPRISE)
    around = F.avg_pool2d(bounded[None, None], 3, stride=1, padding=1, count_include_pad=False)[0, 0]
    return (bounded.sqrt() + AROUND_WEIGHT * around.sqrt()).square()


@dataclasses.dataclass(frozen=True)
class Component:
    """Patches that move and touch.

    Args:
        patches: int64 [n, 2], row and column of each, in row-major order.
    """

    patches: np.ndarray

    @property
    def centroid(self) -> tuple[float, float]:
        """x and y in patches."""
        y, x = self.patches.mean(0) + 0.5
        return float(x), float(y)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom edge, in patches."""
        (top, left), (bottom, right) = self.patches.min(0), self.patches.max(0) + 1
        return int(left), int(top), int(right), int(bottom)


def components(mask: torch.Tensor, least: int = 2) -> list[Component]:
    """The 8-connected components of a motion mask.

    Args:
        mask: bool [rows, columns].
        least: how many patches an object has at least.

    Raises:
        ValueError: a mask that is not of two dimensions.
    """
    if mask.ndim != 2:
        raise ValueError(f"mask has shape {list(mask.shape)}; accepted is [rows, columns]")
    labels, count = ndimage.label(mask.cpu().numpy(), DIAGONALLY_TOO)
    found = [np.argwhere(labels == number) for number in range(1, count + 1)]
    return [Component(patches) for patches in found if len(patches) >= least]


@torch.no_grad()
def component_embeddings(
    model: nn.Module, tokens: torch.Tensor, grid: Grid, found: Sequence[Component]
) -> torch.Tensor:
    """An embedding of each component: its tokens through the model's pooling head, their mean where there is none.

    Args:
        model: a model with a vision tower that NeuroFlow knows, patched or not.
        tokens: the tower's output tokens of one frame [T, D], any before the patches among them: `last_hidden_state[0]`
            of transformers' towers. Architecture "active" has none for most patches.
        grid: rows and columns of patches.
        found: C components.

    Returns:
        [C, D] float32, comparable with the model's pooled output where it has a pooling head.

    Raises:
        ValueError: tokens that are not one for each patch, and those before them.
    """
    anatomy = describe(model)
    rows, columns = grid
    expected = anatomy.prefix + rows * columns + anatomy.suffix
    if tokens.ndim != 2 or len(tokens) != expected:
        raise ValueError(f"tokens have shape {list(tokens.shape)}; accepted is [{expected}, D], one for each patch")
    embeddings = []
    for component in found:
        index = torch.from_numpy(np.ravel_multi_index(component.patches.T, grid)).to(tokens.device)
        own = tokens[anatomy.prefix + index]
        if anatomy.pool is None:
            embeddings.append(own.mean(0))
        else:
            head, method = anatomy.pool
            embeddings.append(getattr(head, method)(torch.cat((tokens[: anatomy.prefix], own))[None])[0])
    return torch.stack(embeddings).float() if embeddings else tokens.new_zeros(0, tokens.shape[1]).float()


def nearest(embeddings: torch.Tensor, classes: torch.Tensor, names: Sequence[str]) -> list[tuple[str, float]]:
    """The name that each embedding comes nearest to, and the cosine to it.

    Args:
        embeddings: [C, D].
        classes: [K, D], embeddings of classes or texts.
        names: of the K.

    Raises:
        ValueError: K or D differs.
    """
    if classes.ndim != 2 or classes.shape != (len(names), embeddings.shape[1]):
        accepted = f"[{len(names)}, {embeddings.shape[1]}], one for each name"
        raise ValueError(f"classes have shape {list(classes.shape)}; accepted is {accepted}")
    cosines = F.normalize(embeddings.float(), dim=1) @ F.normalize(classes.float(), dim=1).T.to(embeddings.device)
    best = cosines.max(1)
    return [(names[index], cosine) for index, cosine in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


@dataclasses.dataclass
class Track:
    """One object from frame to frame.

    Attributes:
        id: counted from 1.
        component: where it was last seen.
        embedding: [D] of length 1, a moving average.
        centroid: x and y in patches; where it is expected, while it is not seen.
        velocity: of the centroid, in patches a frame.
        seen: in how many frames.
        missed: frames since it was last seen.
    """

    id: int
    component: Component
    embedding: torch.Tensor
    centroid: np.ndarray
    velocity: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2))
    seen: int = 1
    missed: int = 0


class Tracker:
    """Follows components from frame to frame, by where they are expected at constant velocity and by their embeddings.

    A component is assigned to at most one track, so that the sum of distance / reach and 1 - cosine, and of missed /
    patience, is least. One in which several tracks are expected hides them from each other: they go on as they went,
    and keep their embeddings. A track that is not seen is kept for `patience` frames, and taken up again by place and
    embedding, unless it is expected outside of the picture by then.

    Args:
        grid: rows and columns of patches.
        reach: how far from where it is expected an object may turn up, in patches; after m missed frames (1 + m)^(1/4)
            times as far.
        patience: for how many frames a track may be missed; one of fewer than 3 frames may not at all.
        likeness: the least cosine at which a track that was missed is taken up again.

    Attributes:
        tracks: those that are followed, the missed ones among them.

    Raises:
        ValueError: a reach that is not above 0, or a patience below 1.
    """

    def __init__(self, grid: Grid, reach: float = 2.5, patience: int = 15, likeness: float = 0.8) -> None:
        if not reach > 0:
            raise ValueError(f"reach is {reach!r}; accepted is a number of patches above 0")
        if not patience >= 1:
            raise ValueError(f"patience is {patience!r}; accepted is a number of frames, 1 or more")
        self.grid = grid
        self.reach = reach
        self.patience = patience
        self.likeness = likeness
        self.tracks: list[Track] = []
        self._born = 0

    def update(self, found: Sequence[Component], embeddings: torch.Tensor) -> list[Track]:
        """Take in the next frame.

        Args:
            found: its C components.
            embeddings: of each, [C, D].

        Returns:
            the tracks that are seen in it, one for each component. Later frames change them.

        Raises:
            ValueError: not one embedding for each component.
        """
        if embeddings.ndim != 2 or len(embeddings) != len(found):
            accepted = f"[{len(found)}, D], one for each component"
            raise ValueError(f"embeddings have shape {list(embeddings.shape)}; accepted is {accepted}")
        embeddings = F.normalize(embeddings.float(), dim=1).cpu()
        for track in self.tracks:
            track.centroid = track.centroid + track.velocity
        within = self._within(found)
        merged = within.sum(0) > 1
        assigned = self._assign(found, embeddings, within)
        for number, track in enumerate(self.tracks):
            if number in assigned:
                self._see(track, found[assigned[number]], embeddings[assigned[number]], merged[assigned[number]])
            else:
                track.missed += 1
        self.tracks = [track for track in self.tracks if not track.missed or self._may_return(track)]
        for number in sorted(set(range(len(found))) - set(assigned.values())):
            self._born += 1
            centroid = np.array(found[number].centroid)
            self.tracks.append(Track(self._born, found[number], embeddings[number], centroid))
        return [track for track in self.tracks if not track.missed]

    def _may_return(self, track: Track) -> bool:
        rows, columns = self.grid
        inside = 0 <= track.centroid[0] < columns and 0 <= track.centroid[1] < rows
        return inside and track.seen >= ESTABLISHED and track.missed <= self.patience

    def _within(self, found: Sequence[Component]) -> np.ndarray:
        """Which established tracks are expected on which components' patches, bool [T, C]."""
        within = np.zeros((len(self.tracks), len(found)), bool)
        for row, track in zip(within, self.tracks, strict=True):
            if track.seen >= ESTABLISHED:
                patch = np.floor(track.centroid[::-1])
                row[:] = [(component.patches == patch).all(1).any() for component in found]
        return within

    def _assign(self, found: Sequence[Component], embeddings: torch.Tensor, within: np.ndarray) -> dict[int, int]:
        """Number of a track -> number of its component."""
        if not self.tracks or not found:
            return {}
        expected = np.stack([track.centroid for track in self.tracks])
        places = np.array([component.centroid for component in found])
        distance = np.linalg.norm(expected[:, None] - places, axis=2)  # [T, C]
        cosine = (torch.stack([track.embedding for track in self.tracks]) @ embeddings.T).numpy()
        missed = np.array([[track.missed] for track in self.tracks])
        near = (distance <= self.reach * (1 + missed) ** GROWTH) | (within & (within.sum(0) > 1))
        possible = near & ((missed == 0) | (cosine >= self.likeness))
        cost = distance / self.reach + 1 - cosine + missed / self.patience
        tracks, chosen = linear_sum_assignment(np.where(possible, cost, OUT_OF_REACH))
        return {int(t): int(c) for t, c in zip(tracks, chosen, strict=True) if possible[t, c]}

    def _see(self, track: Track, component: Component, embedding: torch.Tensor, merged: bool) -> None:
        if not merged:
            place = np.array(component.centroid)
            # What it went beyond its velocity, in all the frames since it was last seen.
            change = (place - track.centroid) / (track.missed + 1)
            track.velocity = track.velocity + (change if track.seen == 1 else (1 - STEADINESS) * change)
            track.centroid = place
            track.embedding = F.normalize(MEMORY * track.embedding + (1 - MEMORY) * embedding, dim=0)
        track.component = component
        track.seen += 1
        track.missed = 0


def to_detections(tracks: Sequence[Track], patch_size: tuple[float, float]) -> Any:
    """Tracks as `supervision.Detections`: boxes in pixels, and ids.

    Args:
        tracks: as `Tracker.update` returns them.
        patch_size: height and width of a patch, in pixels of the frame that the boxes are for.

    Raises:
        ImportError: supervision is not installed.
    """
    try:
        import supervision
    except ModuleNotFoundError as error:
        raise ImportError("to_detections needs supervision; install it (pip install supervision)") from error
    boxes = [box_in_pixels(track.component, patch_size) for track in tracks]
    return supervision.Detections(
        xyxy=np.array(boxes, np.float32).reshape(-1, 4), tracker_id=np.array([track.id for track in tracks], int)
    )


def box_in_pixels(component: Component, patch_size: tuple[float, float]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom edge of a component, patch_size: height and width of a patch in pixels."""
    (height, width), (left, top, right, bottom) = patch_size, component.box
    return left * width, top * height, right * width, bottom * height

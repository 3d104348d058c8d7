"""Objects from what the gate measures: moving patches, their components, embeddings, names and tracks.

`FrameReport.surprise` gives the surprise of a frame, and the model's output gives its tokens. Positions are in patches:
x from the left, y from the top; the centre of the first patch is (0.5, 0.5).
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
ESTABLISHED = 3  # frames after which a track is unlikely to be noise
STEADINESS = 0.5  # weight of the old velocity against the new one
GROWTH = 0.25  # exponent by which the reach grows with missed frames
MEMORY = 0.9  # weight of the old embedding against the new one


def motion(surprise: torch.Tensor) -> torch.Tensor:
    """How much each patch moves, from its own surprise and that of the patches around it.

    (sqrt(surprise) + 0.8 sqrt(mean surprise of the 3 x 3 patches around))^2, as in `score="staleness"`: noise surprises
    single patches, objects several.

    Args:
        surprise: [rows, columns], any float dtype, as in `FrameReport.surprise`.

    Returns:
        [rows, columns] float32; 0 where surprise is NaN, as it is after a key frame.

    Example:
        >>> from neuroflow.objects import motion
        >>> model = neuroflow.enable_cache(model)
        >>> output = model(pixel_values=frames)
        >>> moving = motion(neuroflow.last_pass(model)[-1].surprise) > 0.05  # bool [rows, columns]
    """
    bounded = surprise.float().nan_to_num(0.0).clamp_max(MOST_SURPRISE)
    around = F.avg_pool2d(bounded[None, None], 3, stride=1, padding=1, count_include_pad=False)[0, 0]
    return (bounded.sqrt() + AROUND_WEIGHT * around.sqrt()).square()


@dataclasses.dataclass(frozen=True)
class Component:
    """Moving patches that touch each other.

    Args:
        patches: int64 [n, 2], (row, column) of each, in row-major order.

    Example:
        >>> from neuroflow.objects import components
        >>> mask = torch.zeros(4, 4, dtype=torch.bool)
        >>> mask[1:3, 2] = True
        >>> (component,) = components(mask)
        >>> component.box, component.centroid
        ((2, 1, 3, 3), (2.5, 2.0))
    """

    patches: np.ndarray

    @property
    def centroid(self) -> tuple[float, float]:
        """(x, y) of the centre, in patches."""
        y, x = self.patches.mean(0) + 0.5
        return float(x), float(y)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) edges, in patches."""
        (top, left), (bottom, right) = self.patches.min(0), self.patches.max(0) + 1
        return int(left), int(top), int(right), int(bottom)


def components(mask: torch.Tensor, least: int = 2) -> list[Component]:
    """The 8-connected components of a motion mask.

    Args:
        mask: bool [rows, columns].
        least: minimum number of patches in a component.

    Returns:
        the components, in row-major order of their first patch.

    Raises:
        ValueError: `mask` does not have two dimensions.

    Example:
        >>> from neuroflow.objects import components
        >>> mask = torch.eye(4, dtype=torch.bool)  # diagonal neighbours are connected
        >>> [len(component.patches) for component in components(mask)]
        [4]
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
    """Embed each component: its tokens through the model's pooling head, or their mean if there is none.

    Args:
        model: a model with a vision tower that NeuroFlow knows, patched or not.
        tokens: [T, D], the tower's output tokens of one frame, prefix tokens included: `last_hidden_state[0]` of
            transformers' towers. Architecture "active" has no tokens for most patches.
        grid: (rows, columns) of patches.
        found: C components.

    Returns:
        [C, D] float32, comparable with the model's pooled output if it has a pooling head.

    Raises:
        ValueError: not one token for each patch and prefix token.

    Example:
        >>> from neuroflow.objects import component_embeddings, components
        >>> tokens = model(pixel_values=frame).last_hidden_state[0]
        >>> found = components(torch.eye(4, dtype=torch.bool))
        >>> component_embeddings(model, tokens, (4, 4), found).shape
        torch.Size([1, 32])
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
    """Name each embedding by the nearest class.

    Args:
        embeddings: [C, D], any float dtype.
        classes: [K, D], embeddings of classes or texts.
        names: K names.

    Returns:
        for each embedding, (name, cosine) of the nearest class.

    Raises:
        ValueError: K or D differs.

    Example:
        >>> from neuroflow.objects import nearest
        >>> nearest(torch.tensor([[0.0, 3.0]]), torch.eye(2), ["car", "dog"])
        [('dog', 1.0)]
    """
    if classes.ndim != 2 or classes.shape != (len(names), embeddings.shape[1]):
        accepted = f"[{len(names)}, {embeddings.shape[1]}], one for each name"
        raise ValueError(f"classes have shape {list(classes.shape)}; accepted is {accepted}")
    cosines = F.normalize(embeddings.float(), dim=1) @ F.normalize(classes.float(), dim=1).T.to(embeddings.device)
    best = cosines.max(1)
    return [(names[index], cosine) for index, cosine in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


@dataclasses.dataclass
class Track:
    """One object, followed from frame to frame.

    Args:
        id: counted from 1.
        component: where it was last seen.
        embedding: [D] float32 of length 1, a moving average.
        centroid: [2] float64, x and y in patches: where it is, or is expected while it is not seen.
        velocity: [2] float64, of the centroid, in patches per frame.
        seen: number of frames in which it was seen.
        missed: number of frames since it was last seen.

    Example:
        >>> from neuroflow.objects import Tracker, components
        >>> tracker = Tracker((4, 4))
        >>> (track,) = tracker.update(components(torch.eye(4, dtype=torch.bool)), torch.ones(1, 8))
        >>> track.id, track.seen, track.missed
        (1, 1, 0)
    """

    id: int
    component: Component
    embedding: torch.Tensor
    centroid: np.ndarray
    velocity: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2))
    seen: int = 1
    missed: int = 0


class Tracker:
    """Follow components from frame to frame, by their expected position at constant velocity and by their embeddings.

    Components and tracks are matched one to one, minimising the sum of distance / reach, 1 - cosine and missed /
    patience. If several tracks are expected in one component, they occlude each other: they keep their velocity and
    their embedding. A track that is not seen is kept for `patience` frames and picked up again by position and
    embedding, unless it is expected outside the frame by then.

    Args:
        grid: (rows, columns) of patches.
        reach: maximum distance between an object and its expected position, in patches, above 0. After m missed frames
            it is (1 + m)^(1/4) times as large.
        patience: number of frames a track may be missed, 1 or more. A track seen in fewer than 3 frames may not be
            missed.
        likeness: minimum cosine at which a missed track is picked up again, -1 to 1.

    Attributes:
        tracks: all tracks being followed, including missed ones.

    Raises:
        ValueError: a reach that is not above 0, or a patience below 1.

    Example:
        >>> from neuroflow.objects import Tracker, components
        >>> tracker = Tracker((4, 8))
        >>> for column in range(4):  # an object of 2 x 2 patches that moves right
        ...     mask = torch.zeros(4, 8, dtype=torch.bool)
        ...     mask[1:3, column : column + 2] = True
        ...     tracks = tracker.update(components(mask), torch.ones(1, 16))
        >>> [(track.id, track.seen) for track in tracks]
        [(1, 4)]
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
            found: C components of the frame.
            embeddings: [C, D], any float dtype, one for each component.

        Returns:
            the tracks seen in this frame, one for each component. Later calls update these objects.

        Raises:
            ValueError: not one embedding for each component.

        Example:
            >>> from neuroflow.objects import Tracker
            >>> Tracker((4, 4)).update([], torch.empty(0, 8))
            []
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
        """Whether each established track is expected inside each component, bool [T, C]."""
        within = np.zeros((len(self.tracks), len(found)), bool)
        for row, track in zip(within, self.tracks, strict=True):
            if track.seen >= ESTABLISHED:
                patch = np.floor(track.centroid[::-1])
                row[:] = [(component.patches == patch).all(1).any() for component in found]
        return within

    def _assign(self, found: Sequence[Component], embeddings: torch.Tensor, within: np.ndarray) -> dict[int, int]:
        """Index of a track -> index of its component."""
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
            # How far it is from where its velocity put it, per frame since it was last seen.
            change = (place - track.centroid) / (track.missed + 1)
            track.velocity = track.velocity + (change if track.seen == 1 else (1 - STEADINESS) * change)
            track.centroid = place
            track.embedding = F.normalize(MEMORY * track.embedding + (1 - MEMORY) * embedding, dim=0)
        track.component = component
        track.seen += 1
        track.missed = 0


def to_detections(tracks: Sequence[Track], patch_size: tuple[float, float]) -> Any:
    """Convert tracks to `supervision.Detections`, with boxes in pixels and track ids.

    Args:
        tracks: as returned by `Tracker.update`.
        patch_size: (height, width) of a patch, in pixels of the frame that the boxes are for.

    Returns:
        a `supervision.Detections`: xyxy float32 [n, 4], tracker_id int [n].

    Raises:
        ImportError: supervision is not installed.

    Example:
        >>> from neuroflow.objects import to_detections
        >>> detections = to_detections([], (16, 16))  # doctest: +SKIP
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
    """The box of a component, in pixels.

    Args:
        component: the component.
        patch_size: (height, width) of a patch, in pixels.

    Returns:
        (left, top, right, bottom) edges, in pixels.

    Example:
        >>> from neuroflow.objects import box_in_pixels, components
        >>> (component,) = components(torch.eye(4, dtype=torch.bool))
        >>> box_in_pixels(component, (16, 16))
        (0, 0, 64, 64)
    """
    (height, width), (left, top, right, bottom) = patch_size, component.box
    return left * width, top * height, right * width, bottom * height

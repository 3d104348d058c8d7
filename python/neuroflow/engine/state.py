"""What one stream carries from frame to frame, in memory of its own or next to other streams'."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch

from ..adapters.anatomy import Grid
from .turns import Run

# Why a frame encodes all of its patches; `neuroflow.FrameReport` says what each means.
KeyFrame = Literal["first", "gap", "size", "weights", "outputs", "failed", "nonfinite", "age", "cut", "dense"]
PATCHES = ("age", "active", "surprise", "attention")  # attributes of a state, one value for each patch


class LastFrame(NamedTuple):
    """The last frame's input, and a key of the weights that projected it.

    Its patches' pixels are [1, N, values], their projection [1, N, D].
    """

    windows: torch.Tensor | None
    projected: torch.Tensor | None
    weights: object


def copy_into(held: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """Copy `value` into `held`, or into new memory that later frames can update, in inference mode or not."""
    if held is None:
        with torch.inference_mode(False):
            held = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return held.copy_(value)


class StreamState:
    """What one stream carries from frame to frame.

    `tensors` holds the reference and the caches, each [1, rows, D]. All tensors keep their addresses until the stream
    starts over, so that recorded work finds them.
    """

    def __init__(self, name: Hashable) -> None:
        self.name = name
        # Why its next frame must be a key frame; "failed" while one is being encoded, in case it fails half-way.
        self.key_frame_due: KeyFrame | None = "first"
        self.signature: tuple | None = None
        self.conditions: Hashable = None  # what else its tensors depend on, in the model
        self.grid: Grid = (0, 0)
        self.tensors: dict[Hashable, torch.Tensor] = {}
        self.hidden: frozenset[int] = frozenset()  # indices of the blocks whose output it keeps
        self.age: torch.Tensor | None = None  # [N], frames since a patch was last encoded
        self.last_frame: LastFrame | None = None
        self.attention: torch.Tensor | None = None  # [N] with mean 1, the pooled output's attention to each patch
        self.active: torch.Tensor | None = None  # [N] bool, of the last frame
        self.surprise: torch.Tensor | None = None  # [N] float32, of the last frame
        self.skipped: torch.Tensor | None = None  # [1] float64, sum of all frames' shares
        self.frames = 0
        self.key_frames = 0
        self.since_key_frame = 0
        self.nonfinite = 0
        self.frame_id: int | None = None  # of the last frame, if the caller numbers frames
        self.used = 0.0  # time of last use, on a monotonic clock
        self.state_bytes = 0  # size of `held`, as of the last frame
        self.slab: Slab | None = None  # where its tensors are, if stored with other streams'
        self.last_pass: Hashable = None  # kind of its last pass
        self.run = Run()  # its last key frames, while too much changes between them

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def start_over(self, signature: tuple, grid: Grid, device: torch.device) -> None:
        """Allocate for a key frame of another size, dtype or device, or after a failure."""
        patches = torch.zeros(grid[0] * grid[1], dtype=torch.float32, device=device)
        skipped = torch.zeros(1, dtype=torch.float64) if self.skipped is None else self.skipped
        fresh = {"signature": signature, "grid": grid, "tensors": {}, "slab": None, "attention": None}
        fresh["age"] = copy_into(None, patches.int())
        fresh["active"] = copy_into(None, patches.bool())
        fresh["surprise"] = copy_into(None, patches)
        fresh["skipped"] = copy_into(None, skipped.to(device))
        vars(self).update(fresh)  # in one step, for other threads and in case of an interrupt

    def forget(self, due: KeyFrame) -> None:
        """Drop everything the next frame could use; it is then a key frame for the reason given."""
        self.key_frame_due = due
        self.tensors.clear()
        self.slab = self.attention = self.last_frame = None

    def put(self, name: Hashable, value: torch.Tensor) -> None:
        """Replace a whole cache by value [1, rows, D]."""
        self.tensors[name] = copy_into(self.tensors.get(name), value)

    def note_attention(self, attention: torch.Tensor) -> None:
        """Keep the pooled output's attention to the patches, [N] on any scale, for the next frame's gate."""
        self.attention = copy_into(self.attention, (attention / attention.mean()).float())

    def account(self, active: torch.Tensor | None, surprise: torch.Tensor | None, finite: bool) -> None:
        """Record that a frame encodes the patches `active`, int32 rows, or None for a key frame; surprise: [N]."""
        key_frame = active is None
        self.active.fill_(key_frame)
        if key_frame:
            self.surprise.fill_(torch.nan)
        else:
            self.active[active] = True
            self.surprise.copy_(surprise)
            self.skipped += 1 - active.numel() / self.patches
        self.age.add_(1).masked_fill_(self.active, 0)
        self.frames += 1
        self.key_frames += key_frame
        self.since_key_frame = 0 if key_frame else self.since_key_frame + 1
        self.nonfinite += not finite

    def held(self) -> list[torch.Tensor]:
        last = [] if self.last_frame is None else [self.last_frame.windows, self.last_frame.projected]
        patches = [getattr(self, name) for name in PATCHES]
        return [*self.tensors.values(), *last, *self.run.samples, *(tensor for tensor in patches if tensor is not None)]


class Slab:
    """The tensors of several streams of one size, stored side by side so that one launch serves all of them.

    Each stream keeps using its part. `caches` holds every stream's `tensors`, [S, rows, D]; the rest is [S, N].
    """

    def __init__(self, states: list[StreamState]) -> None:
        self.caches: dict[Hashable, torch.Tensor] = {}
        for name in states[0].tensors:
            self.caches[name] = _joined([state.tensors[name] for state in states])
            for number, state in enumerate(states):
                state.tensors[name] = self.caches[name][number : number + 1]
        self.age, self.active, self.surprise, self.attention, self.skipped = (
            self._part(states, name) for name in (*PATCHES, "skipped")
        )
        for state in states:
            state.slab = self

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore all tensors at the end of the block."""
        named = [self.age, self.active, self.surprise, self.attention, self.skipped]
        tensors = [tensor for tensor in (*self.caches.values(), *named) if tensor is not None]
        before = [tensor.clone() for tensor in tensors]
        yield
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)

    def _part(self, states: list[StreamState], name: str) -> torch.Tensor | None:
        if getattr(states[0], name) is None:
            return None
        part = _joined([getattr(state, name)[None] for state in states])
        for state, row in zip(states, part, strict=True):
            setattr(state, name, row)
        return part


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else copy_into(None, torch.cat(parts))

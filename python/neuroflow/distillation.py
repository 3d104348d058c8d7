"""Sparse distillation: train a tower to give, from the active patches of a frame, what it gives for the whole frame.

Only weights for partial frames are trained. Whole frames keep the model's own weights, which are also the teacher's, so
key frames stay exact and nothing about whole images can be forgotten. What comes before the first block is never
trained: the gate reads the patch projection, and would select other patches if it changed.

Many videos are read at once; a step takes the next few frames of each. They lie side by side like streams. The engine's
own gate runs over each video's frames in order, and the student encodes the active patches with gradients, including
those that flow through caches from earlier frames of the same step.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .adapters import Anatomy, describe
from .adapters.anatomy import by_name, convolution_of, is_patch_projection
from .classes import ClassHead
from .config import ARCHITECTURES, LARGEST, MOST, NeuroFlowConfig, is_integer, is_number
from .embedding import frame_embeddings
from .engine.engine import Engine
from .engine.gate import Gate
from .engine.passes import Pass, Plan, current_pass, split, within
from .engine.projection import note_colours, patch_windows
from .engine.state import StreamState
from .engine.streams import StreamCache
from .files import from_json
from .patch import cache_context, disable_cache, install, is_patched, last_pass, reset_cache
from .weights import copy_sharing_weights, distilled_modules, read, write

STREAM = "clip"
PARTS = ("weights", "average", "best")  # of a checkpoint
TOGETHER = 16  # videos that an evaluation reads at once
WARM_UP = 30  # steps until the learning rate is reached
AVERAGED = 0.99  # decay of the weights' moving average; lower in the first steps


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """What is trained, on what, and when training ends.

    Args:
        arch: the student's architecture, as in `NeuroFlowConfig`.
        train: "head": the final norm and the pooling head. "last-K": also the last K blocks. "all": all blocks.
        epochs: number of passes over all videos, 1 or more.
        rate: peak learning rate of AdamW, above 0; it decays to zero over the epochs as a cosine.
        batch: frames in a step, 2 or more.
        clips: videos that a step's frames come from, 1 to `batch`; all videos if there are fewer.
        strides: maximum stride, 1 or more. Each video is read at a stride drawn from 1 to this.
        thresholds: range from which every fourth video's threshold is drawn, uniformly on a log scale; the others have
            the budget that `skip` gives. Under B the default skips about 50 to 98 % of the patches of static footage.
            The published range, 1e-4 to 0.35, is for surprise that includes the positional embedding.
        decays: range from which each video's `ema_decay` is drawn, uniformly on a log scale, above 0 to 1; only the
            gate of B reads it.
        skip: share of patches skipped in evaluation, and by the distilled model later, between 0 and 1.
        forgetting: an epoch whose accuracy outside the domain falls below the untrained model's by more than this is
            not chosen, 0 to 1.
        patience: number of such epochs in a row that end the training, 1 or more.
        seed: seed of all random draws.

    Raises:
        ValueError: a field that is out of range; the message names what is accepted.

    Example:
        >>> from neuroflow.distillation import DistillationConfig
        >>> DistillationConfig(arch="B", train="last-4").arch
        'active'

    Source: Schmitt 2026, sparse distillation. Weights for partial frames only, steps over many videos, the ranges,
    strides, averaged weights and the forgetting rule are ours.
    """

    arch: str = "active"
    train: str = "all"
    epochs: int = 12
    rate: float = 1e-4
    batch: int = 128
    clips: int = 32
    strides: int = 4
    thresholds: tuple[float, float] = (0.02, 0.5)
    decays: tuple[float, float] = (1e-3, 0.1)
    skip: float = 0.9
    forgetting: float = 0.01
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        accepted = {
            "arch": (self.arch in [*ARCHITECTURES, *ARCHITECTURES.values()], "one of A to E or their names"),
            "train": (re.fullmatch("head|all|last-[1-9][0-9]{0,8}", str(self.train)), "'head', 'last-K' or 'all'"),
            "epochs": (is_integer(self.epochs, 1), f"an integer from 1 to {MOST}"),
            "rate": (is_number(self.rate, 0) and self.rate > 0, "a finite number above 0"),
            "batch": (is_integer(self.batch, 2), f"an integer from 2 to {MOST}"),
            "clips": (is_integer(self.clips, 1) and self.clips <= self.batch, "1 or more, up to the frames of a step"),
            "strides": (is_integer(self.strides, 1), f"an integer from 1 to {MOST}"),
            "thresholds": (_ascend(self.thresholds, LARGEST), "two finite numbers above 0, ascending"),
            "decays": (_ascend(self.decays, 1), "two numbers above 0 and up to 1, ascending"),
            "skip": (is_number(self.skip, 0, 1) and 0 < self.skip < 1, "a share between 0 and 1"),
            "forgetting": (is_number(self.forgetting, 0, 1), "a share from 0 to 1"),
            "patience": (is_integer(self.patience, 1), f"an integer from 1 to {MOST}"),
            "seed": (is_integer(self.seed, -MOST), f"an integer from {-MOST} to {MOST}"),
        }
        for name, (fits, what) in accepted.items():
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r:.200}; accepted is {what}")
        object.__setattr__(self, "arch", ARCHITECTURES.get(self.arch, self.arch))

    def gate(self, **rule: Any) -> NeuroFlowConfig:
        """The student's gate, by `skip` or by another rule.

        It is the default gate, except under B, which caches nothing that could go stale: there it is the published gate
        on the patch projection.

        Args:
            rule: `threshold` or `budget`, in place of the budget that `skip` gives.

        Returns:
            the configuration, with nothing that depends on the speed of the machine.

        Raises:
            ValueError: a value out of range.

        Example:
            >>> from neuroflow.distillation import DistillationConfig
            >>> DistillationConfig(arch="E").gate(threshold=0.2).threshold
            0.2
        """
        rule = rule or {"budget": 1 - self.skip}
        if self.arch != "active":
            return NeuroFlowConfig(arch=self.arch, **rule).reproducible()
        return NeuroFlowConfig.published("active", signal="patch", **rule).reproducible()


class Outside(NamedTuple):
    """Videos outside the training domain, whose last frame is to be classified.

    Args:
        videos: each yields consecutive frames [1, 3, H, W].
        labels: index of the class of each video.
        classes: the class embeddings. Without labels and classes, a frame counts as right if its embedding is nearest
            to the teacher's of the same frame.
    """

    videos: Sequence[Iterable[torch.Tensor]]
    labels: Sequence[int] | None = None
    classes: ClassHead | None = None

    def known(self, embeddings: torch.Tensor, teacher: torch.Tensor) -> float:
        """Share of videos that embeddings [V, D] classify correctly; teacher [V, D]."""
        if self.classes is not None and self.labels is not None:
            scores, truth = self.classes.scores(embeddings), torch.tensor(self.labels)
        else:
            scores, truth = F.normalize(embeddings, dim=1) @ F.normalize(teacher, dim=1).T, torch.arange(len(teacher))
        return (scores.argmax(1).cpu() == truth).double().mean().item()


class Epoch(NamedTuple):
    """The figures after one epoch; number 0 is the model before training.

    Args:
        number: counted from 0.
        loss: mean over the epoch's steps; None for number 0.
        fidelity: mean cosine between student and teacher on the held-out videos, without the first frame of each.
        fidelity_p5: 5th percentile of that cosine.
        skipped: mean share of patches in these frames that were not encoded, 0 to 1.
        outside: share of the outside videos that the student classifies correctly; None without any.
    """

    number: int
    loss: float | None
    fidelity: float
    fidelity_p5: float
    skipped: float
    outside: float | None


@dataclasses.dataclass
class OpenVideo:
    """A video that is being read.

    Args:
        number: of the video.
        frames: the remaining frames, with their indices.
        gate: selects its patches.
        state: the gate's state.
        count: number of its frames in the next pass.
        caches: by name, the caches that the next frame reads.
    """

    number: int
    frames: Iterator[tuple[int, torch.Tensor]]
    gate: Gate
    state: StreamState
    count: int = 0
    caches: dict[Hashable, torch.Tensor] = dataclasses.field(default_factory=dict)


class Steps(Pass):
    """A pass over frames of several videos.

    What a frame reads from a cache was left there by earlier frames of its video; within this pass, with gradients.

    Attributes:
        videos: the videos, whose frames follow one video after another.
    """

    videos: Sequence[OpenVideo] = ()

    @property
    def owners(self) -> list[OpenVideo]:
        """The video that each frame belongs to."""
        return [video for video in self.videos for _ in range(video.count)]

    def store(self, name: Hashable, tokens: torch.Tensor, blend: float = 1.0) -> None:
        fresh = split(tokens, self.lengths if self.partial else self.counts)
        active = self.active if self.partial else [None] * len(fresh)
        self.versions[name] = [
            self._put(name, video, *of) for video, *of in zip(self.owners, fresh, active, strict=True)
        ]

    def store_heads(self, layer: int, entry: int, key: torch.Tensor, value: torch.Tensor) -> None:
        active, state = self.active[entry] if self.partial else None, self.states[entry]
        for name, heads in (("key", key), ("value", value)):
            fresh = heads.transpose(1, 2).flatten(2)
            state.tensors[name, layer] = self._put((name, layer), self.owners[entry], fresh, active)

    def _put(self, name: Hashable, video: OpenVideo, fresh: torch.Tensor, active: torch.Tensor | None) -> torch.Tensor:
        """Update one video's cache with a frame's tokens, out of place, since gradients need the old version."""
        if active is not None:
            fresh = video.caches[name].index_copy(1, active.long(), fresh)
        video.caches[name] = fresh
        return fresh


class Student(Engine):
    """The engine with gradients: frames of several videos in one pass, each video gated in order by its own gate.

    A gate knows the attention that the pooled output pays to patches from the previous pass.

    Attributes:
        videos: the videos of the next pass, whose frames follow one video after another.
        whole: for each frame of the last pass, whether it was encoded whole.
    """

    videos: Sequence[OpenVideo] = ()
    whole: Sequence[bool] = ()

    def on_tower(self, entry: str, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if current_pass.get() is not None:
            return forward(*args, **kwargs)
        arguments = by_name(self.signatures[entry].bind(*args, **kwargs))
        grids = self.anatomy.grids(arguments)
        order = None if self.anatomy.order is None else self.anatomy.order(arguments)
        current = Steps(self.plan, [StreamState(STREAM) for _ in grids], grids, order)
        current.videos = self.videos
        output = within(current_pass, current, forward, *args, **kwargs)
        self.whole = current.whole
        for video, attention in zip(current.owners, current.attention, strict=True):
            if attention is not None:
                video.state.note_attention(attention.detach())
        for video in self.videos:
            video.caches = {name: cache.detach() for name, cache in video.caches.items()}
        return output

    def on_projection(self, forward: Callable, pixels: torch.Tensor) -> torch.Tensor:
        current, projected = current_pass.get(), forward(pixels)
        if current is not None:
            current.projected = projected
            convolution = convolution_of(self.anatomy.projection)
            if is_patch_projection(convolution):
                note_colours(current, convolution, [patch_windows(convolution, image) for image in pixels.split(1)])
        return projected

    @torch.no_grad()
    def choose(self, current: Pass, tokens: torch.Tensor) -> list[torch.Tensor | None]:
        rows: list[torch.Tensor | None] = []
        for video in self.videos:
            for _ in range(video.count):
                number = len(rows)
                this = slice(number, number + 1)
                order = None if current.order is None else current.order[this]
                own = Pass(video.gate.plan, [video.state], [current.grids[number]], order)
                own.projected = None if current.projected is None else current.projected[this]
                own.colours = None if current.colours is None else [current.colours[number]]
                rows += video.gate(own, tokens[this])
                own.complete()
        return rows


class Distillation:
    """The training of one model's weights for partial frames.

    Args:
        model: an unpatched model in evaluation mode that takes frames as `pixel_values` and has a pooled output, from a
            pooling head or a CLS token. It is the teacher and does not change.
        config: what is trained, and how.
        dtype: dtype of matrix products in training: torch.bfloat16 where the device is fast at it, or torch.float32.
            Weights and optimizer state have the model's dtype.

    Attributes:
        weights: the trained weights, by their names in the model.
        average: their moving average, which is evaluated.
        best: the average at the `chosen` epoch.
        history: an `Epoch` for each evaluation so far.

    Raises:
        TypeError: no adapter knows the model.
        ValueError: the model has no pooled output, does not support B, has fewer blocks than "last-K" asks for, or has
            weights in modules with submodules.
        RuntimeError: the model is patched.

    Example:
        >>> from neuroflow.distillation import Distillation, DistillationConfig
        >>> distillation = Distillation(model, DistillationConfig(epochs=1, batch=8, clips=1, strides=1))
        >>> video = list(frames.split(1))
        >>> before = distillation.evaluate([video], outside=None)
        >>> loss = distillation.train([video])
        >>> after = distillation.evaluate([video], outside=None, loss=loss)
        >>> distillation.finished
        True

    Source: Schmitt 2026, sparse distillation.
    """

    def __init__(self, model: nn.Module, config: DistillationConfig, dtype: torch.dtype = torch.float32) -> None:
        if is_patched(model):
            raise RuntimeError(f"{type(model).__name__} is patched; call neuroflow.disable_cache first")
        anatomy = describe(model)
        if anatomy.pool is None and not anatomy.prefix:
            raise ValueError(
                f"{type(model).__name__} has no pooled output; accepted is a model with a pooling head or a CLS token"
            )
        if anatomy.reads({}):
            raise ValueError(
                f"{type(model).__name__} makes features between its blocks, which distillation does not support"
            )
        self.model, self.config, self.dtype = model, config, dtype
        frozen = {own: nn.Parameter(own.detach(), requires_grad=False) for own in model.parameters()}
        self.student = copy_sharing_weights(model, frozen)
        anatomy = describe(self.student)
        own = _trained(self.student, anatomy, config.train)
        self.weights = {name: nn.Parameter(parameter.clone()) for name, parameter in own.items()}
        self.average = {name: nn.Parameter(parameter.clone(), requires_grad=False) for name, parameter in own.items()}
        self.best = {name: parameter.clone() for name, parameter in own.items()}
        self.engine = Student(
            anatomy, config.gate(), StreamCache(), distilled_modules(self.student, anatomy, self.weights)
        )
        # A run has hundreds of steps, not thousands; the average of squares has to keep up.
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=config.rate, betas=(0.9, 0.98))
        self.steps = 0
        self.history: list[Epoch] = []
        self._dense: dict[tuple[str, int, int], torch.Tensor] = {}

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the last `patience` epochs forgot too much."""
        last = self.history[-self.config.patience :]
        forgot = len(last) == self.config.patience and all(self._forgot(epoch) for epoch in last)
        return forgot or len(self.history) > self.config.epochs

    def train(self, videos: Sequence[Iterable[torch.Tensor]]) -> float:
        """Train one epoch.

        Args:
            videos: each yields consecutive frames [1, 3, H, W], every time it is read; all of one size.

        Returns:
            the mean loss.

        Raises:
            ValueError: no video has a frame after its first, or frames differ in size.
        """
        epoch, config = len(self.history), self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        waiting = torch.randperm(len(videos), generator=generator).tolist()
        running: list[OpenVideo] = []
        losses = []
        install(self.engine)
        try:
            while waiting or running:
                done = epoch - (len(waiting) + len(running)) / len(videos)
                opened = []
                while waiting and len(running) + len(opened) < config.clips:
                    number = waiting.pop()
                    opened.append(self._open(number, videos[number], len(videos) - len(waiting), generator))
                running += self._start(opened)
                if not running:
                    continue
                asked = config.batch // len(running)
                taken = [list(itertools.islice(video.frames, asked)) for video in running]
                if any(taken):
                    rate = config.rate * (0.5 + 0.5 * math.cos(math.pi * done / config.epochs))
                    losses += self._step(running, taken, rate)
                running = [video for video, frames in zip(running, taken, strict=True) if len(frames) == asked]
        finally:
            disable_cache(self.student)
        if not losses:
            raise ValueError("no video has a frame after its first; accepted are longer ones")
        return sum(losses) / len(losses)

    @torch.no_grad()
    def evaluate(
        self, videos: Sequence[Iterable[torch.Tensor]], outside: Outside | None, loss: float | None = None
    ) -> Epoch:
        """Measure fidelity on held-out videos and accuracy outside the domain.

        Appends to `history` and keeps the best weights.

        Args:
            videos: held-out videos, as for `train`.
            outside: videos outside the domain; None for none.
            loss: the loss of the epoch, for `history`.

        Returns:
            the figures.

        Raises:
            ValueError: no video has a frame after its first, or frames differ in size.
        """
        anatomy, known = self.engine.anatomy, None
        distilled = distilled_modules(self.student, anatomy, self.average)
        install(Engine(anatomy, self.config.gate(), StreamCache(), distilled))
        try:
            cosines, skipped = [], []
            for _, index, found, expected in self._rounds("held out", videos):
                if index:
                    cosines.append(F.cosine_similarity(found, expected))
                    skipped += [report.skipped for report in last_pass(self.student)]
            if not cosines:
                raise ValueError("no video has a frame after its first; accepted are longer ones")
            if outside is not None:
                last: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
                for names, _, *both in self._rounds("outside", outside.videos):
                    last |= dict(zip(names, zip(*both, strict=True), strict=True))
                known = outside.known(*(torch.stack(side) for side in zip(*last.values(), strict=True)))
        finally:
            disable_cache(self.student)
        values = torch.cat(cosines)
        figures = values.mean().item(), values.quantile(0.05).item(), sum(skipped) / len(skipped), known
        epoch = Epoch(len(self.history), loss, *figures)
        if not self.history or (epoch.fidelity > self.chosen.fidelity and not self._forgot(epoch)):
            self.best = {name: parameter.clone() for name, parameter in self.average.items()}
        self.history.append(epoch)
        return epoch

    def _rounds(
        self, domain: str, videos: Sequence[Iterable[torch.Tensor]]
    ) -> Iterator[tuple[list[int], int, torch.Tensor, torch.Tensor]]:
        """Read several videos in step.

        Yields:
            the videos' numbers, a frame index, and the student's and the teacher's outputs [V, D] for that frame of
            each.
        """
        for number in range(0, len(videos), TOGETHER):
            waiting = dict(enumerate(map(iter, videos[number : number + TOGETHER]), number))
            for index in itertools.count():
                frames = {name: frame for name, of in waiting.items() if (frame := next(of, None)) is not None}
                if not frames:
                    break
                pixels = list(frames.values())
                with cache_context(self.student, *frames):
                    found = frame_embeddings(self.student, _together(pixels))
                yield list(frames), index, found, self._expected([(domain, name, index) for name in frames], pixels)
            reset_cache(self.student)

    @property
    def chosen(self) -> Epoch:
        """The epoch of `history` with the best fidelity among those that did not forget; `best` has its weights."""
        return max((epoch for epoch in self.history if not self._forgot(epoch)), key=lambda epoch: epoch.fidelity)

    def save(self, path: Path) -> None:
        """Write the best weights, with the configuration to run them under and `history`."""
        config = json.dumps(dataclasses.asdict(self.config.gate()))
        write(path, self.best, {"config": config, "history": self._history()})

    def checkpoint(self, path: Path) -> None:
        """Write everything `resume` needs to continue after the last evaluation as if never interrupted."""
        tensors = {f"weights.{name}": tensor.detach() for name, tensor in self.weights.items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
        metadata = {"settings": self._settings(), "history": self._history(), "steps": str(self.steps)}
        write(path, tensors, metadata)

    @torch.no_grad()
    def resume(self, path: Path) -> None:
        """Continue from what `checkpoint` wrote.

        Raises:
            ValueError: the file cannot be read, or was written under other settings or for another model.
        """
        tensors, metadata = read(path)
        if metadata.get("settings") != self._settings():
            raise ValueError(f"{path}: was written by a distillation with other settings; accepted are the same")
        own = list(self.weights.values())
        try:
            parts = {part: {name: tensors[f"{part}.{name}"] for name in self.weights} for part in PARTS}
            state: dict[int, dict[str, torch.Tensor]] = {}
            for key, tensor in tensors.items():
                if key.startswith("optimizer."):
                    _, number, name = key.split(".")
                    state.setdefault(int(number), {})[name] = tensor
            history = [Epoch(**epoch) for epoch in from_json(metadata["history"])]
            steps = int(metadata["steps"])
            for part in parts.values():
                _require_like(part.values(), own)
            for number, moments in state.items():
                _require_like([moments["exp_avg"], moments["exp_avg_sq"]], [own[number]] * 2)
                _require_like([moments["step"]], [torch.zeros(())])
            if any(type(value) not in (int, float, type(None)) for epoch in history for value in epoch) or not history:
                raise ValueError("its history is invalid")
        # A damaged file can fail anywhere it is read, in any way.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{path}: is damaged ({reason}); accepted is what checkpoint wrote") from None
        for name, parameter in self.weights.items():
            parameter.copy_(parts["weights"][name])
            self.average[name].copy_(parts["average"][name])
            self.best[name] = parts["best"][name].to(parameter)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.history, self.steps = history, steps

    def _history(self) -> str:
        return json.dumps([epoch._asdict() for epoch in self.history])

    def _settings(self) -> str:
        shapes = {name: list(parameter.shape) for name, parameter in self.weights.items()}
        return json.dumps([dataclasses.asdict(self.config), str(self.dtype), shapes])

    def _forgot(self, epoch: Epoch) -> bool:
        return epoch.outside is not None and epoch.outside < self.history[0].outside - self.config.forgetting

    def _open(self, number: int, video: Iterable[torch.Tensor], turn: int, generator: torch.Generator) -> OpenVideo:
        """Open the video of that number, as the `turn`-th of its epoch."""
        config = self.config
        stride = int(torch.randint(1, config.strides + 1, (), generator=generator))
        start = int(torch.randint(stride, (), generator=generator))
        threshold, decay = _between(*config.thresholds, generator), _between(*config.decays, generator)
        rule = {"threshold": threshold} if turn % 4 == 0 else {}
        gate = Gate(Plan.of(self.engine.anatomy, dataclasses.replace(config.gate(**rule), ema_decay=decay)))
        frames = itertools.islice(enumerate(video), start, None, stride)
        return OpenVideo(number, frames, gate, StreamState(STREAM))

    def _start(self, videos: list[OpenVideo]) -> list[OpenVideo]:
        """Encode the first frame, which is whole, of each video that has one; return those videos."""
        first = [(video, pixels) for video in videos for _, pixels in itertools.islice(video.frames, 1)]
        started = [video for video, _ in first]
        if started:
            self._encode(started, [[pixels] for _, pixels in first])
        return started

    def _encode(self, videos: list[OpenVideo], frames: list[list[torch.Tensor]]) -> torch.Tensor:
        """The student's outputs [T, D] for the next frames of each video."""
        for video, own in zip(videos, frames, strict=True):
            video.count = len(own)
        self.engine.videos = videos
        pixels = _together([one for own in frames for one in own])
        device = next(self.student.parameters()).device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            return frame_embeddings(self.student, pixels)

    def _step(self, videos: list[OpenVideo], taken: list[list[tuple[int, torch.Tensor]]], rate: float) -> list[float]:
        """One step on (index, pixels) of frames from each video; the loss, or nothing if all frames are whole."""
        frames = [pixels for of_video in taken for _, pixels in of_video]
        keys = [
            ("train", video.number, index)
            for video, of_video in zip(videos, taken, strict=True)
            for index, _ in of_video
        ]
        expected = self._expected(keys, frames)
        found = self._encode(videos, [[pixels for _, pixels in of_video] for of_video in taken])
        partial = ~torch.tensor(self.engine.whole, device=found.device)
        if not partial.any():
            return []
        loss = distillation_loss(found[partial], expected[partial])
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(self.steps / WARM_UP, 1)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            kept = min(AVERAGED, self.steps / (self.steps + 9))
            for name, parameter in self.weights.items():
                self.average[name].lerp_(parameter, 1 - kept)
        return [loss.item()]

    @torch.no_grad()
    def _expected(self, keys: Sequence[tuple[str, int, int]], frames: Sequence[torch.Tensor]) -> torch.Tensor:
        """The teacher's outputs [T, D] for frames [1, 3, H, W]; it sees each frame once, and alone."""
        for key, pixels in zip(keys, frames, strict=True):
            if key not in self._dense:
                self._dense[key] = frame_embeddings(self.model, pixels)
        return torch.cat([self._dense[key] for key in keys])


def distillation_loss(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The published loss: MSE + 0.5 (1 - cosine), on raw pooled outputs.

    Args:
        found: [T, D], the student's.
        expected: [T, D], the teacher's.

    Returns:
        the mean loss, a scalar.

    Example:
        >>> from neuroflow.distillation import distillation_loss
        >>> distillation_loss(torch.eye(2), torch.eye(2)).item()
        0.0

    Source: Schmitt 2026.
    """
    return F.mse_loss(found, expected) + 0.5 * (1 - F.cosine_similarity(found, expected)).mean()


def _trained(model: nn.Module, anatomy: Anatomy, train: str) -> dict[str, nn.Parameter]:
    """The parameters that `train` selects, by their names in the model."""
    depth = len(anatomy.layers)
    blocks = {"head": 0, "all": depth}.get(train)
    if blocks is None:
        blocks = int(train.removeprefix("last-"))
        if blocks > depth:
            raise ValueError(f"train is {train!r}; accepted is last-{depth} at most, as there are {depth} blocks")
    parts = [*anatomy.layers[depth - blocks :], anatomy.last]
    parts += [] if anatomy.pool is None else [anatomy.pool[0]]
    chosen = {id(parameter) for part in parts for parameter in part.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}


def _together(frames: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(sizes := {tuple(pixels.shape[2:]) for pixels in frames}) > 1:
        raise ValueError(f"videos have frames of sizes {sorted(sizes)}; accepted is one size")
    return torch.cat(frames)


def _require_like(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    for tensor, other in zip(found, expected, strict=True):
        if tensor.shape != other.shape or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"a tensor {list(tensor.shape)} in place of finite numbers {list(other.shape)}")


def _ascend(pair: object, most: float) -> bool:
    """Whether `pair` is two numbers above 0 and up to `most`, the second no less than the first."""
    listed = isinstance(pair, list | tuple) and len(pair) == 2 and all(is_number(one, 0, most) for one in pair)
    return listed and 0 < pair[0] <= pair[1]


def _between(low: float, high: float, generator: torch.Generator) -> float:
    """A number drawn evenly on a log scale."""
    return low * (high / low) ** torch.rand((), generator=generator, dtype=torch.float64).item()

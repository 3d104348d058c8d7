"""Sparse distillation: a tower taught to give, from the active patches of a frame, what it gives for the whole one.

What is trained are weights for partial frames alone; whole frames are encoded with the model's own, which are the
teacher's too. So key frames stay exact, and of whole pictures nothing can be forgotten. What stands in front of the
first block is never trained: the gate reads the patch projection, and would choose other patches if it changed.

Many videos are gone through at once, and a step takes the next few frames of each. They lie side by side as streams
would, the engine's own gate goes through each video's in order, and the student encodes what is active, with gradients;
what a frame finds in a cache comes with those of the step's earlier frames.
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
TOGETHER = 16  # videos that an evaluation goes through at once
WARM_UP = 30  # steps until the learning rate is reached
AVERAGED = 0.99  # of the weights' moving average stays at a step, less at the first ones


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """What is trained, on what, and when it ends.

    Args:
        arch: the student's architecture, as in `NeuroFlowConfig`.
        train: "head", the final norm and the pooling head; "last-K", the last K blocks too; "all", all blocks.
        epochs: times that every video is gone through.
        rate: learning rate of AdamW, which falls to nothing over the epochs as a cosine does.
        batch: frames of a step.
        clips: videos that a step's frames are from, or all videos where there are fewer.
        strides: a video is gone through by every frame, or up to every so-manieth one; which is drawn for each.
        thresholds: between these every fourth video's threshold is drawn, evenly on a log scale; the others' budget is
            that of `skip` instead. Under B the default skips about 50 to 98 % of the patches of footage that stands
            still; the published 1e-4 to 0.35 is for surprise with the positional embedding in it.
        decays: between these every video's weight of a new frame is drawn, in the moving average that B's gate reads.
        skip: share of the patches that the evaluation skips, and the distilled model from then on.
        forgetting: an epoch that knows less outside the domain than the untrained model, by more, is not chosen.
        patience: so many such epochs in a row end the training.
        seed: of every draw.

    Raises:
        ValueError: a value that makes no sense; the message says which does.

    Source: Schmitt 2026, sparse distillation; weights for partial frames alone, steps over many videos, the ranges of
    the draws, strides, averaged weights and the end by forgetting are ours.
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
        """The student's gate, by `skip` or another rule: the default one, and of B, which caches nothing that could be
        stale, the published one on the patch projection.
        """
        rule = rule or {"budget": 1 - self.skip}
        if self.arch != "active":
            return NeuroFlowConfig(arch=self.arch, **rule).reproducible()
        return NeuroFlowConfig.published("active", signal="patch", **rule).reproducible()


class Outside(NamedTuple):
    """Videos outside the training domain, of which the last frame is to be known.

    Args:
        videos: each gives consecutive frames [1, 3, H, W].
        labels: of each, an index into the classes.
        classes: what embeddings are named by. Without both, a frame counts as known where its embedding is nearest to
            the teacher's of the same one.
    """

    videos: Sequence[Iterable[torch.Tensor]]
    labels: Sequence[int] | None = None
    classes: ClassHead | None = None

    def known(self, embeddings: torch.Tensor, teacher: torch.Tensor) -> float:
        """Share of the videos that embeddings [V, D] name rightly; teacher [V, D]."""
        if self.classes is not None and self.labels is not None:
            scores, truth = self.classes.scores(embeddings), torch.tensor(self.labels)
        else:
            scores, truth = F.normalize(embeddings, dim=1) @ F.normalize(teacher, dim=1).T, torch.arange(len(teacher))
        return (scores.argmax(1).cpu() == truth).double().mean().item()


class Epoch(NamedTuple):
    """What stands after one epoch; number 0 is the model before training.

    Args:
        loss: mean over the epoch's steps, None of number 0.
        fidelity, fidelity_p5: cosine of the student to the teacher on the held-out videos' frames but the first of
            each, mean and 5th percentile.
        skipped: mean share of the patches of these frames that were not encoded.
        outside: share of the videos outside that the student knows; None without any.
    """

    number: int
    loss: float | None
    fidelity: float
    fidelity_p5: float
    skipped: float
    outside: float | None


@dataclasses.dataclass
class OpenVideo:
    """A video that is being gone through.

    Args:
        number: of the video.
        frames: what is left of it, with the frames' own numbers.
        gate: what chooses its patches.
        state: of the gate.
        count: of its frames in the next pass.
        caches: by name, those that the next frame finds.
    """

    number: int
    frames: Iterator[tuple[int, torch.Tensor]]
    gate: Gate
    state: StreamState
    count: int = 0
    caches: dict[Hashable, torch.Tensor] = dataclasses.field(default_factory=dict)


class Steps(Pass):
    """A pass of frames of several videos. What a frame finds in a cache its video's frames before it have left there,
    in this pass with gradients.

    Attributes:
        videos: whose frames these are, one video's after another's.
    """

    videos: Sequence[OpenVideo] = ()

    @property
    def owners(self) -> list[OpenVideo]:
        """Of each frame, the video that it is of."""
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
        """Bring one video's cache up to date with a frame's tokens; what it was before stays for the gradients."""
        if active is not None:
            fresh = video.caches[name].index_copy(1, active.long(), fresh)
        video.caches[name] = fresh
        return fresh


class Student(Engine):
    """The engine with gradients: frames of several videos in one pass, each video's gated in order by its own gate.

    What the pooled output pays the patches is known to a gate from the pass before.

    Attributes:
        videos: those of the next pass, whose frames come one video's after another's.
        whole: of each frame of the last pass, whether it was encoded whole.
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
    """Weights for partial frames of one model, on their way.

    Args:
        model: an unpatched model in evaluation mode that takes frames as `pixel_values`, with a pooled output: by a
            pooling head or a CLS token. It is the teacher, and stays as it is.
        config: see `DistillationConfig`.
        dtype: of the products in training: torch.bfloat16 where the device is fast at that, or torch.float32. Weights
            and optimizer are of the model's own dtype.

    Attributes:
        weights: that are trained, by their names in the model.
        average: the moving average of them, which is evaluated.
        best: those of the `chosen` epoch.
        history: an `Epoch` for every evaluation so far.

    Raises:
        TypeError: a model that no adapter knows.
        ValueError: one without a pooled output or that B cannot serve, with fewer blocks than "last-K" asks for, or
            whose weights are of modules that have parts.
        RuntimeError: the model is patched.
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
                f"{type(model).__name__} makes features between its blocks, which distillation does not serve"
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
        # A run has hundreds of steps, not thousands, and the average of squares is to follow them.
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=config.rate, betas=(0.9, 0.98))
        self.steps = 0
        self.history: list[Epoch] = []
        self._dense: dict[tuple[str, int, int], torch.Tensor] = {}

    @property
    def finished(self) -> bool:
        """All epochs are done, or the last few forgot too much."""
        last = self.history[-self.config.patience :]
        forgot = len(last) == self.config.patience and all(self._forgot(epoch) for epoch in last)
        return forgot or len(self.history) > self.config.epochs

    def train(self, videos: Sequence[Iterable[torch.Tensor]]) -> float:
        """One epoch; the mean loss.

        Args:
            videos: each gives consecutive frames [1, 3, H, W], of one size in all, whenever it is gone through.

        Raises:
            ValueError: no frame after the first in any of them, or frames of several sizes.
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
            raise ValueError("videos give no frame after their first; accepted are longer ones")
        return sum(losses) / len(losses)

    @torch.no_grad()
    def evaluate(
        self, videos: Sequence[Iterable[torch.Tensor]], outside: Outside | None, loss: float | None = None
    ) -> Epoch:
        """Fidelity on held-out videos and what is known outside; adds to `history`, and keeps the best weights.

        Videos are as for `train`.

        Raises:
            ValueError: the videos have no frame after their first, or frames of several sizes.
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
                raise ValueError("videos give no frame after their first; accepted are longer ones")
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
        """Numbers of some videos, an index, and of each one's frame of that index the student's and the teacher's
        outputs [V, D].
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
        """The best fidelity of `history` among what did not forget, whose weights are `best`."""
        return max((epoch for epoch in self.history if not self._forgot(epoch)), key=lambda epoch: epoch.fidelity)

    def save(self, path: Path) -> None:
        """Write the best weights, of what was trained, with the configuration to run them under and `history`."""
        config = json.dumps(dataclasses.asdict(self.config.gate()))
        write(path, self.best, {"config": config, "history": self._history()})

    def checkpoint(self, path: Path) -> None:
        """Write what `resume` needs to go on after the last evaluation as if nothing had happened."""
        tensors = {f"weights.{name}": tensor.detach() for name, tensor in self.weights.items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
        metadata = {"settings": self._settings(), "history": self._history(), "steps": str(self.steps)}
        write(path, tensors, metadata)

    @torch.no_grad()
    def resume(self, path: Path) -> None:
        """Take up what `checkpoint` wrote.

        Raises:
            ValueError: the file cannot be read, or was written under other settings or for another model.
        """
        tensors, metadata = read(path)
        if metadata.get("settings") != self._settings():
            raise ValueError(f"{path}: is of a distillation with other settings; accepted are the same")
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
                raise ValueError("its history is none")
        # What is damaged fails where it is read, in as many ways as it is.
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
        """The video of that number, which is the `turn`-th of its epoch."""
        config = self.config
        stride = int(torch.randint(1, config.strides + 1, (), generator=generator))
        start = int(torch.randint(stride, (), generator=generator))
        threshold, decay = _between(*config.thresholds, generator), _between(*config.decays, generator)
        rule = {"threshold": threshold} if turn % 4 == 0 else {}
        gate = Gate(Plan.of(self.engine.anatomy, dataclasses.replace(config.gate(**rule), ema_decay=decay)))
        frames = itertools.islice(enumerate(video), start, None, stride)
        return OpenVideo(number, frames, gate, StreamState(STREAM))

    def _start(self, videos: list[OpenVideo]) -> list[OpenVideo]:
        """Give those that have a frame their first one, which is whole, and return them."""
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
        """One step on frames taken from videos, numbers and pixels of each; the loss, or none if all are whole."""
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
        """The teacher's outputs [T, D] for frames [1, 3, H, W], which it sees once each, and alone."""
        for key, pixels in zip(keys, frames, strict=True):
            if key not in self._dense:
                self._dense[key] = frame_embeddings(self.model, pixels)
        return torch.cat([self._dense[key] for key in keys])


def distillation_loss(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Mean squared error of raw pooled outputs [T, D], and half of one less their cosine."""
    return F.mse_loss(found, expected) + 0.5 * (1 - F.cosine_similarity(found, expected)).mean()


def _trained(model: nn.Module, anatomy: Anatomy, train: str) -> dict[str, nn.Parameter]:
    """The parameters that `train` asks for, by their names in the model."""
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
        raise ValueError(f"videos give frames of {sorted(sizes)}; accepted are those of one size")
    return torch.cat(frames)


def _require_like(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    for tensor, other in zip(found, expected, strict=True):
        if tensor.shape != other.shape or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"a tensor {list(tensor.shape)} where finite numbers {list(other.shape)} are due")


def _ascend(pair: object, most: float) -> bool:
    """Two numbers above 0 and up to `most`, the second no less than the first."""
    listed = isinstance(pair, list | tuple) and len(pair) == 2 and all(is_number(one, 0, most) for one in pair)
    return listed and 0 < pair[0] <= pair[1]


def _between(low: float, high: float, generator: torch.Generator) -> float:
    """A number drawn evenly on a log scale."""
    return low * (high / low) ** torch.rand((), generator=generator, dtype=torch.float64).item()

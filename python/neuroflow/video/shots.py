"""Encode a recording shot by shot: each shot is its own stream, so any worker can encode it."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..classes import ClassHead
from ..config import NeuroFlowConfig
from ..patch import reset_cache
from .ahead import Prepared
from .preprocess import Preprocessor
from .stream import STREAM, Encoded, encode_stream

CUT = 0.15  # mean difference of consecutive frames, from 0 to 1 (black to white), above which a new shot begins
SIDE = 16  # of the compared images, in pixels; coarse, so that small motion makes no difference


class Shots:
    """The shot each frame belongs to, asked in order: a key function for `itertools.groupby`.

    A shot begins where a frame has little in common with the one before, and where the gate would refresh all patches
    at once, `max_age` frames after the shot began. Both follow from the frames alone, so a reader that starts at the
    beginning of a shot finds the same later shots as one that has seen everything before.

    Args:
        preprocess: makes the model's input.
        config: the gate's settings.
        why: reason given for the shot that the first frame begins.
    """

    def __init__(self, preprocess: Preprocessor, config: NeuroFlowConfig, why: str = "first") -> None:
        self._scale = torch.tensor(preprocess.std)[:, None, None] / (255 * preprocess.rescale)
        self._longest = config.max_age if config.refresh == "key" else None
        self._before: torch.Tensor | None = None
        self._length = 0
        self._shot = 0, why

    def __call__(self, prepared: Prepared) -> tuple[int, str]:
        """(index of the shot's first frame, reason it begins there: "cut", "age", or the one given for the first)."""
        picture = F.adaptive_avg_pool2d(prepared.pixels[0], SIDE) * self._scale
        if self._before is None:
            self._begin(prepared, self._shot[1])
        elif (picture - self._before).abs().mean() > CUT:
            self._begin(prepared, "cut")
        elif self._length == self._longest:
            self._begin(prepared, "age")
        self._before = picture
        self._length += 1
        return self._shot

    def _begin(self, prepared: Prepared, why: str) -> None:
        self._shot = prepared.frame.index, why
        self._length = 0


def encode_shots(
    inputs: Iterable[Prepared],
    model: PreTrainedModel,
    shots: Shots,
    classes: ClassHead | None = None,
    length: int = 1,
) -> Iterator[Encoded]:
    """Like `encode_stream`, but every shot starts from nothing, with a key frame and its own call."""
    for (begin, why), shot in itertools.groupby(inputs, shots):
        with contextlib.suppress(KeyError):
            reset_cache(model, STREAM)
        for encoded in encode_stream(shot, model, classes=classes, length=length):
            yield dataclasses.replace(encoded, key_frame=why) if encoded.record.frame == begin else encoded

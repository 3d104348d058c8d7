"""The frames of a video through a model, one by one."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..adapters import describe
from ..adapters.anatomy import interpolation
from ..classes import ClassHead
from ..patch import cache_context, last_pass
from ..timing import timed
from .ahead import Prepared
from .results import Record

STREAM = "video"


@dataclass(frozen=True)
class Encoded:
    """The result for one frame.

    Attributes:
        prepared: the frame and the model's input.
        record: what is recorded about it, besides its embedding.
        embedding: [D] float32.
        active: [rows, columns] bool, the patches that were encoded.
        surprise: [rows, columns] float32, as `FrameReport` has it.
        key_frame: why it is a key frame, as `FrameReport` has it; None: it is none.
        wait_ms: time spent waiting for the input, in milliseconds.
        together: number of frames in the same call; its times are shares of theirs.
    """

    prepared: Prepared
    record: Record
    embedding: np.ndarray
    active: torch.Tensor
    surprise: torch.Tensor
    key_frame: str | None
    wait_ms: float
    together: int


def encode_stream(
    inputs: Iterable[Prepared],
    model: PreTrainedModel,
    dense: PreTrainedModel | None = None,
    classes: ClassHead | None = None,
    length: int = 1,
) -> Iterator[Encoded]:
    """Encode frames in order, all as the stream STREAM.

    Args:
        inputs: the frames.
        model: a patched tower.
        dense: the unpatched tower to compare with; None for no comparison.
        classes: classes to name each frame by; None for none.
        length: frames in one call of each model, after the first frame, which goes alone.
    """

    def predicted(embedding: torch.Tensor | None) -> str | None:
        if classes is None or embedding is None:
            return None
        return classes.names[classes.scores(embedding[None]).argmax()]

    embedding_of = describe(model).embedding
    asked, first = time.perf_counter(), True
    for number, clip in enumerate(_clips(inputs, length)):
        wait_ms = (time.perf_counter() - asked) * 1e3 / len(clip)
        pixels = torch.cat([prepared.pixels for prepared in clip]).to(model.device, model.dtype)
        # Alternate which comes first, so that neither always runs on a cache left by the other.
        if dense is not None and number % 2 == 0:
            reference, dense_ms = _timed_output(dense, pixels)
        with cache_context(model, STREAM):
            output, neuroflow_ms = _timed_output(model, pixels)
        if dense is not None and number % 2 == 1:
            reference, dense_ms = _timed_output(dense, pixels)
        embeddings = embedding_of(output).float()
        expected = [None] * len(clip) if dense is None else embedding_of(reference).float()
        reports = last_pass(model)
        for prepared, report, embedding, dense_embedding in zip(clip, reports, embeddings, expected, strict=True):
            cosine = None if dense is None else F.cosine_similarity(embedding, dense_embedding, 0).item()
            record = Record(
                frame=prepared.frame.index,
                time_s=round(prepared.frame.time, 6),
                skipped=report.skipped,
                active=int(report.active.sum()),
                key_frame=report.key_frame is not None,
                neuroflow_ms=neuroflow_ms / len(clip),
                dense_ms=None if dense is None else dense_ms / len(clip),
                cosine=cosine,
                first=first,
                predicted=predicted(embedding),
                dense_predicted=predicted(dense_embedding),
            )
            vector, together = embedding.cpu().numpy(), len(clip)
            yield Encoded(prepared, record, vector, report.active, report.surprise, report.key_frame, wait_ms, together)
            first = False
        asked = time.perf_counter()


def _clips(inputs: Iterable[Prepared], length: int) -> Iterator[list[Prepared]]:
    """As `embedding.in_clips`: the first frame, then so many at a time; those before an error come before it."""
    clip: list[Prepared] = []
    wanted = 1
    try:
        for prepared in inputs:
            clip.append(prepared)
            if len(clip) == wanted:
                yield clip
                clip, wanted = [], length
    except Exception:
        if clip:
            yield clip
        raise
    if clip:
        yield clip


@torch.inference_mode()
def _timed_output(model: PreTrainedModel, pixels: torch.Tensor) -> tuple[ModelOutput, float]:
    arguments = interpolation(model, pixels)
    return timed(lambda: model(pixel_values=pixels, **arguments), pixels.device)

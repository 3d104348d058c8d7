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
    """What came of one frame.

    Attributes:
        prepared: the frame and the model's input.
        record: what is known of it besides its embedding.
        embedding: [D] float32.
        active: [rows, columns] bool, the patches that were encoded.
        wait_ms: until the input was there.
    """

    prepared: Prepared
    record: Record
    embedding: np.ndarray
    active: torch.Tensor
    wait_ms: float


def encode_stream(
    inputs: Iterable[Prepared],
    model: PreTrainedModel,
    dense: PreTrainedModel | None = None,
    classes: ClassHead | None = None,
) -> Iterator[Encoded]:
    """What comes of each frame, all of the stream STREAM.

    Args:
        inputs: the frames.
        model: a patched tower.
        dense: the same one unpatched, to be compared with.
        classes: what the embeddings are told apart as, if anything.
    """

    def predicted(embedding: torch.Tensor | None) -> str | None:
        if classes is None or embedding is None:
            return None
        return classes.names[classes.scores(embedding[None]).argmax()]

    embedding_of = describe(model).embedding
    asked = time.perf_counter()
    for number, prepared in enumerate(inputs):
        wait_ms = (time.perf_counter() - asked) * 1e3
        pixels = prepared.pixels.to(model.device, model.dtype)
        # Taking turns, so that neither always finds the processor's cache as the other left it.
        if dense is not None and number % 2 == 0:
            reference, dense_ms = _timed_output(dense, pixels)
        with cache_context(model, STREAM):
            output, neuroflow_ms = _timed_output(model, pixels)
        if dense is not None and number % 2 == 1:
            reference, dense_ms = _timed_output(dense, pixels)
        embedding = embedding_of(output)[0].float()
        expected = None if dense is None else embedding_of(reference)[0].float()
        (report,) = last_pass(model)
        record = Record(
            frame=prepared.frame.index,
            time_s=round(prepared.frame.time, 6),
            skipped=report.skipped,
            active=int(report.active.sum()),
            key_frame=report.key_frame is not None,
            neuroflow_ms=neuroflow_ms,
            dense_ms=dense_ms if dense is not None else None,
            cosine=None if expected is None else F.cosine_similarity(embedding, expected, 0).item(),
            first=number == 0,
            predicted=predicted(embedding),
            dense_predicted=predicted(expected),
        )
        yield Encoded(prepared, record, embedding.cpu().numpy(), report.active, wait_ms)
        asked = time.perf_counter()


@torch.inference_mode()
def _timed_output(model: PreTrainedModel, pixels: torch.Tensor) -> tuple[ModelOutput, float]:
    arguments = interpolation(model, pixels)
    return timed(lambda: model(pixel_values=pixels, **arguments), pixels.device)

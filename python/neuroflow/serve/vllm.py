"""Qwen2.5-VL and Qwen3-VL in vLLM, with vision towers that encode only what changes in a video.

A video is a clip: it starts with a key frame and leaves no state behind. A video that belongs to a stream continues
where the stream's last video ended. Its features then depend on what came before, so vLLM's caches must not confuse it
with another video of the same content: it gets an identifier of its own.
"""

import contextlib
import dataclasses
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models import qwen2_5_vl, qwen3_vl, qwen3_vl_moe
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig

from .. import NeuroFlowConfig, StreamCache, cache_context, enable_cache, last_pass
from ..patch import run_unpatched

logger = init_logger("vllm.neuroflow")

STREAM = "neuroflow_stream"  # a video's field that holds the name of its stream, UTF-8 in uint8; empty: none
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
CHUNK = re.compile(rf"({NAME.pattern})/\d+")  # an identifier that names the stream of a video
MOST_STREAMS = 16  # by default; each takes some 100 MB with a large tower
LOGGED = 10.0  # minimum time between log lines, in seconds

# The stream of each video, or None, in the request being processed and in the model's current call.
_asked: ContextVar[list[str | None] | None] = ContextVar("neuroflow_vllm_asked", default=None)
_named: ContextVar[list[str | None] | None] = ContextVar("neuroflow_vllm_named", default=None)
_videos: ContextVar[list[str | None] | None] = ContextVar("neuroflow_vllm_videos", default=None)  # None: no videos


@contextlib.contextmanager
def _where(variable: ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


class Processor:
    """What a vLLM processor does in addition: read streams from requests, and keep their videos apart.

    A request names the stream of its videos by `mm_processor_kwargs={"stream": "cam-7"}`, or of each video by an
    identifier such as "cam-7/000123" in `multi_modal_uuids`.
    """

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Like vLLM's.

        Raises:
            ValueError: an invalid name; a stream without a video; or a stream while the ranks divide videos among them.
        """
        options = dict(inputs.hf_processor_mm_kwargs)
        stream = options.pop("stream", None)
        videos = inputs.mm_data_items.get_all_counts().get("video", 0)
        identifiers = (inputs.mm_uuid_items or {}).get("video") or [None] * videos
        chunks = [None if each is None else CHUNK.fullmatch(each) for each in identifiers]
        names = [chunk[1] if stream is None and chunk else stream for chunk in chunks]
        if stream is not None and not (isinstance(stream, str) and NAME.fullmatch(stream) and videos):
            accepted = f"accepted is a name such as 'cam-7' ({NAME.pattern}), beside a video"
            raise ValueError(f"stream is {stream!r}, of {videos} video(s); {accepted}")
        inputs = dataclasses.replace(inputs, hf_processor_mm_kwargs=options)
        if not any(names):
            return super().apply(inputs, timing_ctx)
        if self.info.ctx.get_mm_config().mm_encoder_tp_mode == "data":
            raise ValueError(
                f"stream is {next(filter(None, names))!r}; accepted are videos without one under "
                "--mm-encoder-tp-mode data, which sends each to whichever rank is free"
            )
        own = {"video": [f"neuroflow-{uuid.uuid4().hex}" for _ in names]}
        inputs = dataclasses.replace(inputs, mm_uuid_items={**(inputs.mm_uuid_items or {}), **own})
        with _where(_asked, names):
            return super().apply(inputs, timing_ctx)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        processed, names = super()._apply_hf_processor_main(mm_items, hf_kwargs), _asked.get()
        if names is not None:  # for all videos, since none is cached
            processed[STREAM] = [torch.tensor(list((name or "").encode()), dtype=torch.uint8) for name in names]
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        if STREAM not in hf_inputs:
            return fields
        return {**fields, STREAM: MultiModalFieldConfig.batched("video", keep_on_cpu=True)}


class Videos:
    """Encode the videos of one model, one after the other, and log how much was skipped.

    This replaces the tower's forward. Images, and whatever is recorded as CUDA graphs, run as before.

    Args:
        tower: vLLM's, unpatched.
        config: the configuration for its videos.
        streams: holds the streams within its limits.

    Raises:
        ValueError: a configuration that the tower does not support.
    """

    def __init__(self, tower: nn.Module, config: NeuroFlowConfig, streams: StreamCache) -> None:
        self.tower, self.config, self.streams = enable_cache(tower, config, streams), config, streams
        self.forward: Callable[..., torch.Tensor] = tower.forward
        tower.forward = self.encode
        self.count = self.steps = self.patches = 0
        self.active = 0.0
        self.spans: list[tuple[Any, Any]] = []
        self.logged = -math.inf

    def encode(
        self, x: torch.Tensor, grid_thw: Any, *, encoder_metadata: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Like the tower's forward: patches [sum of T * H * W, values] of videos T x H x W, end to end."""
        names = _videos.get()
        if names is None:
            return self._as_before(x, grid_thw, encoder_metadata=encoder_metadata)
        sizes = grid_thw.tolist() if isinstance(grid_thw, torch.Tensor) else grid_thw
        if len(names) != len(sizes):  # some of them, if ranks divide videos without names
            names = [None] * len(sizes)
        parts = x.split([math.prod(size) for size in sizes])
        # One at a time, so that none depends on what else is requested.
        features = [self._encode_one(*each) for each in zip(parts, sizes, names, strict=True)]
        self._log()
        return features[0] if len(features) == 1 else torch.cat(features)

    def _encode_one(self, x: torch.Tensor, size: list[int], name: str | None) -> torch.Tensor:
        begin = _now(x.device)
        steps, patches = size[0], math.prod(size)
        active = patches
        if name is None and steps == 1:  # nothing follows it
            features = self._as_before(x, [size])
        else:
            try:
                with contextlib.nullcontext() if name is None else cache_context(self.tower, name):
                    features = self.forward(x, [size])
                active = sum(report.active.sum().item() for report in last_pass(self.tower))
            except ValueError as error:  # a stream too large for the limits must not end the server
                logger.warning_once("NeuroFlow: a video runs unpatched: %s", error)
                features = self._as_before(x, [size])
        self.spans.append((begin, _now(x.device)))
        self.count, self.steps = self.count + 1, self.steps + steps
        self.patches, self.active = self.patches + patches, self.active + active
        return features

    def _as_before(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return run_unpatched(self.tower, self.forward, *args, **kwargs)

    def _log(self) -> None:
        if time.monotonic() - self.logged < LOGGED:
            return
        self.logged = time.monotonic()
        logger.info(
            "NeuroFlow: %d video(s) of %d steps in time, %.1f %% of patches skipped, %.1f ms a video in the tower",
            self.count,
            self.steps,
            100 * (1 - self.active / self.patches),
            sum(_milliseconds(*span) for span in self.spans) / len(self.spans),
        )
        self.count = self.steps = self.patches = 0
        self.active = 0.0
        self.spans.clear()


def _now(device: torch.device) -> Any:
    """The time, or on a GPU an event, so that nothing waits."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def _milliseconds(begin: Any, end: Any) -> float:
    if isinstance(end, float):
        return 1e3 * (end - begin)
    end.synchronize()
    return begin.elapsed_time(end)


def _settings(vllm_config: VllmConfig) -> tuple[NeuroFlowConfig | None, StreamCache]:
    """Settings from `--hf-overrides '{"neuroflow": {...}, "neuroflow_streams": {...}}'` or the file NEUROFLOW_CONFIG.

    Raises:
        TypeError: a limit that `StreamCache` does not have.
        ValueError: an invalid configuration or limit.
    """
    overrides, path = vllm_config.model_config.hf_config, os.environ.get("NEUROFLOW_CONFIG")
    fields = getattr(overrides, "neuroflow", None)
    limits = getattr(overrides, "neuroflow_streams", None) or {"max_streams": MOST_STREAMS}
    if fields is False:
        return None, StreamCache()
    if fields is not None:
        config = NeuroFlowConfig.from_fields(fields)
    else:
        config = NeuroFlowConfig() if path is None else NeuroFlowConfig.load(path)
    # NeuroFlow records CUDA graphs for live frames, and vLLM has its own.
    return dataclasses.replace(config, launch="eager"), StreamCache(**limits)


class Model:
    """What a vLLM model does in addition: its videos go through `Videos`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.neuroflow_videos = self._videos_of(vllm_config)

    def _videos_of(self, vllm_config: VllmConfig) -> Videos | None:
        config, streams = _settings(vllm_config)
        lora = vllm_config.lora_config
        if config is None or isinstance(self.visual, StageMissingLayer):  # on a rank that has no tower
            return None
        for given, option in (
            (vllm_config.compilation_config.compile_mm_encoder, "compile_mm_encoder"),
            (lora is not None and lora.enable_tower_connector_lora, "enable_tower_connector_lora"),
        ):
            if given:
                logger.warning("NeuroFlow: nothing is skipped, because the tower cannot be patched under %s", option)
                return None
        if vllm_config.parallel_config.tensor_parallel_size > 1:
            config = config.reproducible()  # all ranks must choose the same patches
        rule = f"threshold {config.threshold}" if config.budget is None else f"budget {config.budget}"
        logger.info("NeuroFlow: videos are encoded by %s, %s; images as before", config.arch, rule)
        return Videos(self.visual, config, streams)

    def get_encoder_cudagraph_config(self) -> Any:
        config = super().get_encoder_cudagraph_config()
        if self.neuroflow_videos is None:
            return config
        modalities = [each for each in config.modalities if each != "video"]
        return dataclasses.replace(config, modalities=modalities, max_frames_per_video=1)

    def embed_multimodal(self, **kwargs: object) -> Any:
        given = kwargs.pop(STREAM, None)
        names = None if given is None else [bytes(each.tolist()).decode() or None for each in given]
        with _where(_named, names):
            return super().embed_multimodal(**kwargs)

    def _process_video_input(self, video_input: Any) -> Any:
        with _where(_videos, _named.get() or [None] * len(video_input["video_grid_thw"])):
            return super()._process_video_input(video_input)


class _Qwen2_5Processor(Processor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    pass


class _Qwen3Processor(Processor, qwen3_vl.Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen2_5Processor, info=qwen2_5_vl.Qwen2_5_VLProcessingInfo, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder
)
class Qwen2_5_VLForConditionalGeneration(Model, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen3Processor, info=qwen3_vl.Qwen3VLProcessingInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class Qwen3VLForConditionalGeneration(Model, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen3Processor, info=qwen3_vl_moe.Qwen3VLMoeProcessingInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class Qwen3VLMoeForConditionalGeneration(Model, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL with experts."""

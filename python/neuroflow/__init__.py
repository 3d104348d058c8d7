"""Vision transformers over video, at the cost of the patches that changed."""

from neuroflow_kernels import __version__ as __version__

from . import (
    adapters,
    interface,  # noqa: F401 - registers the attention implementation
)
from .adapters import Anatomy, Family, describe, register_adapter, supported_models
from .calibration import Calibration, CalibrationError, LogitShift, calibrate
from .config import NeuroFlowConfig
from .engine.passes import FrameReport
from .engine.streams import StreamCache
from .explain import explain
from .patch import (
    StreamSummary,
    Summary,
    cache_context,
    disable_cache,
    enable_cache,
    encode,
    is_patched,
    last_pass,
    reset_cache,
    stream,
    summary,
)
from .saving import load_state, save_state

__all__ = [
    "Anatomy",
    "Calibration",
    "CalibrationError",
    "Family",
    "FrameReport",
    "LogitShift",
    "NeuroFlowConfig",
    "StreamCache",
    "StreamSummary",
    "Summary",
    "adapters",
    "cache_context",
    "calibrate",
    "describe",
    "disable_cache",
    "enable_cache",
    "encode",
    "explain",
    "is_patched",
    "last_pass",
    "load_state",
    "register_adapter",
    "reset_cache",
    "save_state",
    "stream",
    "summary",
    "supported_models",
]

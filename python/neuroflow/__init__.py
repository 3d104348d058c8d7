"""Vision transformers over video, at the cost of the patches that changed."""

from . import (
    adapters,
    interface,  # noqa: F401 - registers the attention implementation
)
from .adapters import Anatomy, Family, register_adapter, supported_models
from .calibration import Calibration, CalibrationError, LogitShift, calibrate
from .config import NeuroFlowConfig
from .patch import cache_context, disable_cache, enable_cache, encode, is_patched, reset_cache, summary
from .saving import load_state, save_state
from .state import StreamSummary, Summary
from .streams import StreamCache

__all__ = [
    "Anatomy",
    "Calibration",
    "CalibrationError",
    "Family",
    "LogitShift",
    "NeuroFlowConfig",
    "StreamCache",
    "StreamSummary",
    "Summary",
    "adapters",
    "cache_context",
    "calibrate",
    "disable_cache",
    "enable_cache",
    "encode",
    "is_patched",
    "load_state",
    "register_adapter",
    "reset_cache",
    "save_state",
    "summary",
    "supported_models",
]

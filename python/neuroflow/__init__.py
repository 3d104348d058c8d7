"""Vision transformers over video, at the cost of the patches that changed."""

from . import adapters
from .adapters import Anatomy, Family, register_adapter, supported_models
from .calibration import Calibration, CalibrationError, LogitShift, calibrate
from .config import NeuroFlowConfig
from .patch import cache_context, disable_cache, enable_cache, encode, is_patched, reset_cache, summary
from .state import StreamSummary, Summary

__all__ = [
    "Anatomy",
    "Calibration",
    "CalibrationError",
    "Family",
    "LogitShift",
    "NeuroFlowConfig",
    "StreamSummary",
    "Summary",
    "adapters",
    "cache_context",
    "calibrate",
    "disable_cache",
    "enable_cache",
    "encode",
    "is_patched",
    "register_adapter",
    "reset_cache",
    "summary",
    "supported_models",
]

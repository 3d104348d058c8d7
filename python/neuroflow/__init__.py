"""Vision transformers over video, at the cost of the patches that changed."""

from . import adapters
from .config import NeuroFlowConfig
from .patch import cache_context, disable_cache, enable_cache, encode, reset_cache, summary
from .state import StreamSummary, Summary

__all__ = [
    "NeuroFlowConfig",
    "StreamSummary",
    "Summary",
    "adapters",
    "cache_context",
    "disable_cache",
    "enable_cache",
    "encode",
    "reset_cache",
    "summary",
]

"""Other ways to encode video with less, as baselines: one method per file, written plainly in eager torch.

A baseline is made from a model and its one setting, is called frame by frame with pixels [1, 3, H, W], and returns the
frame's embedding [1, D]. `reset()` forgets the stream, and `flops` counts what its matrix products cost.
"""

from .attention_dropping import AttentionDropping
from .eventful import Eventful
from .frame_skipping import FrameSkipping
from .pixel_gate import PixelGate
from .published import Published
from .stc import STC
from .tome import TokenMerging

__all__ = ["STC", "AttentionDropping", "Eventful", "FrameSkipping", "PixelGate", "Published", "TokenMerging"]

"""From frames to a model's `pixel_values`, with the model's own rescaling and normalisation."""

import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from transformers.image_processing_base import ImageProcessingMixin

from .source import Frame


@dataclass(frozen=True)
class Preprocessor:
    """Resizes by area averaging to (height, width), then rescales and normalises: (x * rescale - mean) / std.

    It serves one thread at a time.
    """

    height: int
    width: int
    rescale: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    _reformatter: VideoReformatter = field(default_factory=VideoReformatter, init=False, repr=False, compare=False)

    @classmethod
    def from_pretrained(cls, model: str, height: int, width: int) -> "Preprocessor":
        """The settings in the `preprocessor_config.json` of a Hugging Face id or local directory.

        Where there is none, pixels are scaled to [-1, 1], with a warning.
        """
        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(model)
        except (OSError, ValueError):
            warnings.warn(f"{model} has no preprocessor_config.json: pixels are scaled to [-1, 1]", stacklevel=2)
            return cls(height, width)
        identity = {"rescale": 1.0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        return cls(
            height,
            width,
            settings.get("rescale_factor", cls.rescale) if settings.get("do_rescale", True) else identity["rescale"],
            tuple(settings.get("image_mean") or cls.mean) if settings.get("do_normalize", True) else identity["mean"],
            tuple(settings.get("image_std") or cls.std) if settings.get("do_normalize", True) else identity["std"],
        )

    def __call__(self, frame: Frame) -> torch.Tensor:
        """frame -> [1, 3, height, width] float32."""
        # In numpy, as torch would start threads of its own in every thread that prepares frames; in place, and planar
        # before it is four times as large, as this is bound by memory.
        planes = np.ascontiguousarray(frame.rgb(self.height, self.width, self._reformatter).transpose(2, 0, 1))
        pixels = planes.astype(np.float32)
        pixels *= np.float32(self.rescale)
        pixels -= np.float32(self.mean)[:, None, None]
        pixels /= np.float32(self.std)[:, None, None]
        return torch.from_numpy(pixels[None])

"""From frames to a model's `pixel_values`, with the model's own rescaling and normalisation."""

import warnings
from dataclasses import dataclass, field
from typing import Any

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
    def from_pretrained(cls, model: str, usual: "Preprocessor") -> "Preprocessor":
        """The settings in the `preprocessor_config.json` of a Hugging Face id or local directory.

        What it leaves open is as `usual` has it; where there is no such file, that is everything, with a warning.
        """
        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(model)
        except (OSError, ValueError):
            usually = f"mean {_numbers(usual.mean)}, std {_numbers(usual.std)}"
            warnings.warn(f"{model} has no preprocessor_config.json: pixels are normalised by {usually}", stacklevel=2)
            return usual
        rescaled, normalised = settings.get("do_rescale") is not False, settings.get("do_normalize") is not False
        height, width = _final_size(settings) or (usual.height, usual.width)
        return cls(
            height,
            width,
            settings.get("rescale_factor") or usual.rescale if rescaled else 1.0,
            tuple(settings.get("image_mean") or usual.mean) if normalised else (0.0, 0.0, 0.0),
            tuple(settings.get("image_std") or usual.std) if normalised else (1.0, 1.0, 1.0),
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


def _final_size(settings: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width after the crop or, without one, the resizing that `settings` ask for; None: not told."""
    cropped = settings.get("do_center_crop") is not False and settings.get("crop_size")
    size = cropped or settings.get("size")
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size.get("height"), size.get("width"))
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return (height, width) if height and width else None


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3g}" for value in values)

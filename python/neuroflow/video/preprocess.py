"""Turn frames into a model's `pixel_values`, with the model's own resizing, crop, rescaling and normalisation."""

import dataclasses
import json
import reprlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from transformers.utils import cached_file

from .source import MAX_PIXELS, Frame, SourceError

FLOAT32_MAX = float(np.finfo(np.float32).max)
# Where a checkpoint describes its preprocessing: the file, and the key in it.
FILES = (("processor_config.json", "image_processor"), ("preprocessor_config.json", None))


@dataclass(frozen=True)
class Preprocessor:
    """Resize by area averaging, then rescale and normalise: (x * rescale - mean) / std.

    Use one in each thread; it is not safe to share.

    Args:
        height: height of the model's input, in pixels.
        width: its width, in pixels.
        rescale: factor on pixel values of 0 to 255.
        mean: of red, green and blue, after rescaling.
        std: of red, green and blue, after rescaling.
        crop: cut height x width from the middle of the resized frame, padded with black if it is smaller. False resizes
            every frame to height x width, whatever its shape.
        resize: with `crop`, what to resize to first: a short side (keeping the shape), (height, width), or None for no
            resizing.
    """

    height: int
    width: int
    rescale: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    crop: bool = False
    resize: int | tuple[int, int] | None = None
    _reformatter: VideoReformatter = field(default_factory=VideoReformatter, init=False, repr=False, compare=False)

    @classmethod
    def from_pretrained(cls, model: str, usual: "Preprocessor") -> "Preprocessor":
        """Read the settings in the `preprocessor_config.json` of a Hugging Face id or local directory.

        Missing settings come from `usual`; if there is no file, all do, with a warning. Settings that are not
        supported, such as padding, give a warning.

        Raises:
            ValueError: the file cannot be read, or has an invalid value.
        """
        settings = _settings(model)
        if settings is None:
            usually = f"mean {_numbers(usual.mean)}, std {_numbers(usual.std)}"
            warnings.warn(f"{model} has no preprocessor_config.json: pixels are normalised by {usually}", stacklevel=2)
            return usual
        rescaled, normalised = settings.flag("do_rescale", True), settings.flag("do_normalize", True)
        crop_size, size = settings.sides("crop_size"), settings.sides("size")
        resized, cropped = settings.flag("do_resize", True), settings.flag("do_center_crop", crop_size is not None)
        if cropped:
            if isinstance(crop_size, int):
                crop_size = crop_size, crop_size
            height, width = crop_size or (usual.height, usual.width)
        else:
            height, width = (size, size) if isinstance(size, int) else size or (usual.height, usual.width)
        followed = {
            "do_resize": resized or cropped,
            "size": cropped or not settings.keeps_shape("size"),
            "do_pad": not settings.flag("do_pad", False),
        }
        if not all(followed.values()):
            names = ", ".join(name for name, done in followed.items() if not done)
            instead = f"frames are resized to {width}x{height}, whatever their shape"
            warnings.warn(f"{settings.path}: {names} is not supported: {instead}", stacklevel=2)
        return cls(
            height,
            width,
            settings.number("rescale_factor", usual.rescale) if rescaled else 1.0,
            settings.channels("image_mean", usual.mean) if normalised else (0.0, 0.0, 0.0),
            settings.channels("image_std", usual.std, above_zero=True) if normalised else (1.0, 1.0, 1.0),
            cropped,
            (size or min(height, width)) if cropped and resized else None,
        )

    def __reduce__(self) -> tuple[type["Preprocessor"], tuple[Any, ...]]:
        return type(self), tuple(getattr(self, each.name) for each in dataclasses.fields(self) if each.init)

    def resized(self, height: int, width: int) -> "Preprocessor":
        """A copy that resizes whole frames to this size, without a crop."""
        return dataclasses.replace(self, height=height, width=width, crop=False, resize=None)

    def region(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Left, top, right and bottom edge, in pixels, of what the model sees of a frame of size (height, width)."""
        if not self.crop:
            return 0.0, 0.0, float(size[1]), float(size[0])
        height, width = self.size_before_crop(size)
        across, down = size[1] / width, size[0] / height
        left, top = (width - self.width) // 2, (height - self.height) // 2
        return left * across, top * down, (left + self.width) * across, (top + self.height) * down

    def __call__(self, frame: Frame) -> torch.Tensor:
        """Turn a frame into the model's input, [1, 3, height, width] float32.

        Raises:
            SourceError: a frame so long that resizing its short side would make it too large.
        """
        # In numpy, since torch would start threads in every thread that prepares frames. In place, and planar before
        # it grows to four times the size, since this is bound by memory.
        rgb = self._middle(frame) if self.crop else frame.rgb(self.height, self.width, self._reformatter)
        pixels = np.ascontiguousarray(rgb.transpose(2, 0, 1)).astype(np.float32)
        pixels *= np.float32(self.rescale)
        pixels -= np.float32(self.mean)[:, None, None]
        pixels /= np.float32(self.std)[:, None, None]
        return torch.from_numpy(pixels[None])

    def shown(self, pixels: torch.Tensor) -> np.ndarray:
        """The image behind a model's input: [3, height, width] -> [height, width, 3] uint8."""
        rgb = pixels.float().numpy().transpose(1, 2, 0) * np.float32(self.std) + np.float32(self.mean)
        return np.nan_to_num(rgb / np.float32(self.rescale)).round().clip(0, 255).astype(np.uint8)

    def size_before_crop(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that a frame of size (height, width) is resized to before the crop."""
        if isinstance(self.resize, int):
            return tuple(self.resize * side // min(size) for side in size)
        return self.resize or size

    def _middle(self, frame: Frame) -> np.ndarray:
        height, width = self.size_before_crop(frame.size)
        if height * width > MAX_PIXELS:
            shape = "x".join(str(side) for side in reversed(frame.size))
            raise SourceError(
                f"frame {frame.index} is {shape}: {width}x{height} before the crop is too large; give --size"
            )
        top, left = (height - self.height) // 2, (width - self.width) // 2
        rgb = frame.rgb(height, width, self._reformatter)
        rgb = rgb[max(top, 0) : max(top, 0) + self.height, max(left, 0) : max(left, 0) + self.width]
        above, before = max(-top, 0), max(-left, 0)
        below, after = self.height - rgb.shape[0] - above, self.width - rgb.shape[1] - before
        return np.pad(rgb, ((above, below), (before, after), (0, 0)))


@dataclass(frozen=True)
class _Settings:
    """The settings in a file; every method raises ValueError for an invalid value."""

    path: Path
    values: dict[str, Any]

    def flag(self, name: str, usual: bool) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._bad(name, "true or false")
        return usual if value is None else value

    def number(self, name: str, usual: float) -> float:
        value = self.values.get(name)
        if value is not None and not (_is_number(value) and np.float32(value) > 0):
            raise self._bad(name, "a number above 0")
        return usual if value is None else float(value)

    def channels(
        self, name: str, usual: tuple[float, float, float], above_zero: bool = False
    ) -> tuple[float, float, float]:
        value = self.values.get(name)
        if value is None:
            return usual
        if _is_number(value):
            value = [value] * 3
        right = isinstance(value, list) and len(value) == 3 and all(_is_number(each) for each in value)
        if not right or (above_zero and np.float32(min(value)) <= 0):
            raise self._bad(name, f"3 numbers{' above 0' * above_zero}, of red, green and blue")
        return tuple(float(each) for each in value)

    def keeps_shape(self, name: str) -> bool:
        """Whether height and width depend on the frame's shape."""
        value = self.values.get(name)
        return isinstance(value, dict) and not {"height", "width"} <= value.keys()

    def sides(self, name: str) -> int | tuple[int, int] | None:
        """A short side, or height and width; None if not given, or if only a long side is."""
        value = self.values.get(name)
        if value is None:
            return None
        accepted = 'an integer, [height, width], or "height" and "width", "shortest_edge" or "longest_edge"'
        found = value
        if isinstance(value, dict):
            value = {key: side for key, side in value.items() if side is not None}
            if {"height", "width"} <= value.keys():
                found = [value["height"], value["width"]]
            else:
                found = value.get("shortest_edge", value.get("longest_edge"))
        sides = found if isinstance(found, list) else [found]
        whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
        if not whole or len(sides) not in (1, 2) or sides[0] * sides[-1] > MAX_PIXELS:
            raise self._bad(name, f"{accepted}, of {MAX_PIXELS:,} pixels at most")
        if isinstance(value, dict) and not {"height", "shortest_edge"} & value.keys():
            return None
        return tuple(sides) if len(sides) == 2 else sides[0]

    def _bad(self, name: str, accepted: str) -> ValueError:
        return ValueError(f"{self.path}: {name} is {reprlib.repr(self.values[name])}; accepted is {accepted}")


def _settings(model: str) -> _Settings | None:
    for name, key in FILES:
        try:
            path = Path(cached_file(model, name))
        # It does not exist, or cannot be reached.
        except (OSError, ValueError):
            continue
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: cannot be read ({reason}); accepted is a JSON object") from None
        values = content.get(key) if key is not None and isinstance(content, dict) else content
        if key is not None and values is None:
            continue
        if not isinstance(values, dict):
            raise ValueError(f"{path}: holds {reprlib.repr(values)}; accepted is a JSON object")
        return _Settings(path, values)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)

"""The drawn street: scenes of known classes, and the tower that comes with the package, a small SigLIP that knows them.

Drawing needs the `video` extra.
"""

from pathlib import Path

import torch
from transformers import SiglipVisionModel

from ..classes import ClassHead, read_classes

STREET = Path(__file__).parent / "weights"


def load_street(directory: Path = STREET) -> tuple[SiglipVisionModel, ClassHead]:
    """The tower in `directory`, in float32 and evaluation mode, and its classes."""
    model = SiglipVisionModel.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), load_classes(directory)


def load_classes(directory: Path = STREET) -> ClassHead:
    """The classes of the tower in `directory`."""
    return read_classes(directory / "classes.safetensors")

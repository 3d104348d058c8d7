"""The drawn street: scenes of known classes, and the small SigLIP in the package that knows them.

Drawing needs the `video` extra.
"""

from pathlib import Path

import torch
from transformers import SiglipVisionModel

from ..classes import ClassHead, read_classes

STREET = Path(__file__).parent / "weights"


def load_street(directory: Path = STREET) -> tuple[SiglipVisionModel, ClassHead]:
    """Load the tower in `directory`, in float32 and evaluation mode, and its classes."""
    model = SiglipVisionModel.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), load_classes(directory)


def load_classes(directory: Path = STREET) -> ClassHead:
    """Load the classes of the tower in `directory`."""
    return read_classes(directory / "classes.safetensors")

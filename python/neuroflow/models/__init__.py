"""The tower that comes with the package: a small SigLIP that knows the classes of the drawn scenes."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import SiglipVisionModel

STREET = Path(__file__).parent / "street"


@dataclass(frozen=True)
class ClassHead:
    """Class embeddings that pooled embeddings are compared with, as SigLIP's are with those of texts.

    Attributes:
        names: of the C classes.
        embeddings: [C, D] float32.
        temperature: factor of the cosines.
    """

    names: tuple[str, ...]
    embeddings: torch.Tensor
    temperature: float

    def scores(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled embeddings [S, D] of any float dtype -> scores [S, C] float32, temperature times cosine."""
        classes = F.normalize(self.embeddings.to(pooled.device), dim=1)
        return self.temperature * F.normalize(pooled.float(), dim=1) @ classes.T


def load_street(directory: Path = STREET) -> tuple[SiglipVisionModel, ClassHead]:
    """The tower in `directory`, in float32 and evaluation mode, and its classes."""
    model = SiglipVisionModel.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), load_classes(directory)


def load_classes(directory: Path = STREET) -> ClassHead:
    """The classes of the tower in `directory`."""
    with safe_open(directory / "classes.safetensors", "pt") as file:
        names = tuple(json.loads(file.metadata()["names"]))
        return ClassHead(names, file.get_tensor("embeddings"), file.get_tensor("temperature").item())

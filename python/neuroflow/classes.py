"""Class or text embeddings to compare frames with, and the files that hold them."""

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open

from .files import from_json

ACCEPTED = "embeddings [C, D] and C names, in .npz or .safetensors"
MOST_BYTES = 2**31  # that an .npz may unpack to


@dataclass(frozen=True)
class ClassHead:
    """Class embeddings that pooled embeddings are compared with, such as SigLIP's text embeddings.

    Attributes:
        names: of the C classes.
        embeddings: [C, D] float32.
        temperature: factor on the cosines.
    """

    names: tuple[str, ...]
    embeddings: torch.Tensor
    temperature: float = 1.0

    def scores(self, pooled: torch.Tensor) -> torch.Tensor:
        """Scores [S, C] float32, temperature times cosine, of pooled embeddings [S, D] of any float dtype."""
        classes = F.normalize(self.embeddings.to(pooled.device), dim=1)
        return self.temperature * F.normalize(pooled.float(), dim=1) @ classes.T


def read_classes(path: Path) -> ClassHead:
    """Read class embeddings from a file: `embeddings` [C, D] of any float dtype, C `names`, optionally `temperature`.

    In .npz all are arrays. In .safetensors the names are a JSON list in the metadata, as in the file that comes with
    the package.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(part.file_size for part in archive.infolist())
            if unpacked > MOST_BYTES:
                raise ValueError(f"it unpacks to {unpacked:,} bytes")
            with np.load(path) as file:
                arrays = dict(file)
            names = tuple(map(str, arrays.pop("names")))
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        else:
            with safe_open(path, "pt") as file:
                names = from_json((file.metadata() or {})["names"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("names is not a list of strings")
        embeddings = tensors["embeddings"].float()
        temperature = tensors["temperature"].float().item() if "temperature" in tensors else 1.0
    except KeyError as error:
        raise ValueError(f"{path}: holds no {error.args[0]}; accepted are {ACCEPTED}") from None
    # Each library raises its own errors for a damaged file, or for another kind of file under this name.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: cannot be read ({reason}); accepted are {ACCEPTED}") from None
    fits = embeddings.ndim == 2 and len(embeddings) == len(names) and embeddings.numel() > 0
    if not fits or not embeddings.isfinite().all():
        found = f"embeddings {list(embeddings.shape)} and {len(names)} names"
        raise ValueError(f"{path}: holds {found}; accepted are {ACCEPTED}, all finite")
    if not math.isfinite(temperature):
        raise ValueError(f"{path}: temperature is {temperature!r}; accepted is a finite number")
    return ClassHead(tuple(names), embeddings, temperature)

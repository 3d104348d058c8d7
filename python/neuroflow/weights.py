"""Weights for partial frames: in a file, and next to the model's own weights, which key frames keep using."""

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .adapters import Anatomy
from .config import NeuroFlowConfig
from .files import from_json, replacing, writing

Model = TypeVar("Model", bound=nn.Module)


def copy_sharing_weights(model: Model, others: Mapping[torch.Tensor, torch.Tensor] | None = None) -> Model:
    """A second copy of a model that shares its weights, so that one can be patched and the other not.

    Args:
        others: some of the model's parameters -> what the copy has in their place.
    """
    others = others or {}
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): others.get(tensor, tensor) for tensor in tensors})


def distilled_modules(
    model: nn.Module, anatomy: Anatomy, weights: Mapping[str, nn.Parameter]
) -> dict[nn.Module, nn.Module]:
    """Modules of `model` -> copies that use `weights`, named as in the model, in place of their own.

    They are modules of the blocks that map each token on its own, and the pooling head as a whole.

    Raises:
        ValueError: a weight belongs to another kind of module.
    """
    head = None if anatomy.pool is None else anatomy.pool[0]
    of_head = set() if head is None else set(head.modules())
    others = {model.get_parameter(name): weight for name, weight in weights.items()}
    found: dict[nn.Module, nn.Module] = {}
    for name in weights:
        module = model.get_submodule(name.rpartition(".")[0])
        if module in of_head:
            module = head
        elif next(module.children(), None) is not None:
            raise ValueError(
                f"{name} belongs to a {type(module).__name__}, which has submodules; accepted are weights of modules "
                "without any, such as linears and norms, and of the pooling head"
            )
        if module not in found:
            found[module] = copy_sharing_weights(module, others)
    return found


def load_weights(model: nn.Module, path: Path) -> dict[str, nn.Parameter]:
    """Read the weights for partial frames of `model` from a file, on the model's device and in its dtype.

    Raises:
        ValueError: the file cannot be read, or holds something else or weights that the model does not have.
    """
    tensors, metadata = read(path)
    _config(path, metadata)
    own = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ValueError(f"{path}: has {name} {list(tensor.shape)}, which {type(model).__name__} does not have")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or Inf, or {tensor.dtype}; accepted are finite floats")
    return {name: nn.Parameter(tensor.to(own[name]), requires_grad=False) for name, tensor in tensors.items()}


def distilled_config(path: Path) -> NeuroFlowConfig:
    """The configuration that the weights in a file were trained for.

    Raises:
        ValueError: the file cannot be read, or `neuroflow distill` did not write it.
    """
    with _opened(path) as file:
        return _config(path, file.metadata() or {})


def _config(path: Path, metadata: dict[str, str]) -> NeuroFlowConfig:
    if "config" not in metadata:
        raise ValueError(f"{path}: holds no distilled weights; accepted is a file that neuroflow distill wrote")
    try:
        return NeuroFlowConfig.from_fields(from_json(metadata["config"]))
    except ValueError as error:
        raise ValueError(
            f"{path}: invalid settings: {error}; accepted is a file that neuroflow distill wrote"
        ) from None


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, replacing an existing one atomically.

    Raises:
        OutputError: it cannot be written.
    """
    with replacing(path) as partial, writing(path, SafetensorError):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: it cannot be read.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); accepted is a safetensors file") from None

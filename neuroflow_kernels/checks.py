"""Argument checks at the ops' public edge: each message names the argument, what it was, and what is accepted."""

import itertools
import math
from collections.abc import Sequence
from typing import NoReturn

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def reject(name: str, value: object, accepted: str) -> NoReturn:
    raise ValueError(f"{name} is {describe(value)}; accepted is {accepted}")


def require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        reject(name, value, accepted)


def rank(name: str, value: torch.Tensor, dims: str, *dtypes: torch.dtype) -> None:
    """A tensor with as many dimensions as `dims` names, such as '[S, N, D]'."""
    if not (isinstance(value, torch.Tensor) and value.ndim == dims.count(",") + 1 and value.dtype in dtypes):
        reject(name, value, f"a tensor of shape {dims}, of dtype " + " or ".join(map(str, dtypes)))


def same(name: str, value: torch.Tensor, shape: tuple[int, ...], device: torch.device, *dtypes: torch.dtype) -> None:
    fits = isinstance(value, torch.Tensor) and value.shape == shape and value.device == device
    if not (fits and value.dtype in dtypes):
        accepted = " or ".join(map(str, dict.fromkeys(dtypes)))
        reject(name, value, f"a tensor of shape {list(shape)} on {device}, of dtype {accepted}")


def updated(name: str, value: torch.Tensor) -> None:
    """A tensor that the op writes in place: contiguous, because a copy would lose the update."""
    require(value.is_contiguous(), name, value, "a contiguous tensor, as it is updated in place")


def held(name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor within its storage: torch reads and writes past the end of one that was freed or cut short."""
    if value.numel() > 0 and not torch.compiler.is_compiling():
        reach = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        fits = value.untyped_storage().nbytes() >= (value.storage_offset() + reach + 1) * value.itemsize
        require(fits, name, value, "a tensor whose storage was not freed or cut short")
    return value


def contiguous(name: str, value: torch.Tensor) -> torch.Tensor:
    return value if value.is_contiguous() else held(name, value).contiguous()


def fraction(name: str, value: float) -> float:
    require(isinstance(value, (int, float)) and 0 <= value <= 1, name, value, "a number from 0 to 1")
    return float(value)


def count(name: str, value: int) -> int:
    fits = isinstance(value, (int, torch.SymInt)) and 0 <= value < 2**63
    require(fits, name, value, "an integer, 0 or more, of 64 bits")
    return value


def ascending(name: str, value: Sequence[int]) -> None:
    numbers = isinstance(value, (list, tuple)) and all(isinstance(number, int) for number in value)
    fits = numbers and value and value[0] > 0 and all(low < high for low, high in itertools.pairwise(value))
    require(fits, name, value, "a list or tuple of ascending integers above 0")


def per_stream(
    name: str, value: torch.Tensor | float, streams: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """A number for all streams, or one for each: a contiguous [S] tensor of `dtype`."""
    if isinstance(value, torch.Tensor):
        if value.shape == (streams,) and value.device == device:
            return held(name, value).to(dtype).contiguous()
    elif isinstance(value, (int, float)) and value >= 0:
        if value != math.inf or not dtype.is_floating_point:
            value = min(value, (torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype).max)
        return torch.full((streams,), value, dtype=dtype, device=device)
    reject(name, value, f"a number, 0 or more, or a tensor of shape [{streams}] (one value per stream) on {device}")


def selection(index: torch.Tensor, cu_seqlens: torch.Tensor, device: torch.device) -> None:
    """`index` and `cu_seqlens` as `compact` returns them."""
    for name, value in (("index", index), ("cu_seqlens", cu_seqlens)):
        fits = isinstance(value, torch.Tensor) and value.ndim == 1 and value.dtype == torch.int32
        if not (fits and value.is_contiguous() and value.device == device):
            reject(name, value, f"a contiguous int32 tensor of one dimension on {device}, as `compact` returns it")
    require(cu_seqlens.shape[0] >= 1, "cu_seqlens", cu_seqlens, "a tensor of S + 1 offsets")

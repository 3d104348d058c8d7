"""Which backend serves a call, and why the others do not.

Every op is one torch op in the namespace `neuroflow`. Its reference is registered for every device
(CompositeExplicitAutograd); the C++ extension adds the CPU key, the CUDA extension or else Triton the CUDA key. So
torch's own dispatcher picks per call, by the device of the tensors, and a build without extensions still works.

A backend can be asked for by name, with `use_backend` or the environment variable NEUROFLOW_BACKEND. One that cannot
serve the call raises `BackendUnavailable` with the reason; it is never replaced silently.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar

import torch

BACKENDS = ("reference", "cpp", "cuda", "triton")

_NOT_BUILT = {
    "_cpu": "it is not built (`pip install --no-build-isolation .` builds it where torch and a C++ compiler are)",
    "_cuda": "it has no extension yet; triton serves cuda tensors",
}
_library = torch.library.Library("neuroflow", "DEF")
_extension_errors: dict[str, str | None] = {}


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot serve this call; the message says why."""


def _load_extension(stem: str) -> str | None:
    """Load `stem`.*.so beside this file into torch's dispatcher. Returns why it could not be, or None."""
    files = sorted(Path(__file__).parent.glob(f"{stem}.*so")) + sorted(Path(__file__).parent.glob(f"{stem}.*pyd"))
    if not files:
        return _NOT_BUILT[stem]
    try:
        torch.ops.load_library(files[0])
    except (OSError, RuntimeError) as error:
        return f"{files[0].name} does not load: {str(error).splitlines()[0]}"
    return None


def load_extensions() -> None:
    """Load what was built, once, at import; say once when the CPU is left to the reference."""
    for backend, stem in (("cpp", "_cpu"), ("cuda", "_cuda")):
        _extension_errors[backend] = _load_extension(stem)
    if _extension_errors["cuda"] is not None:
        for op in Operator.registry.values():
            if op.triton:
                _library.impl(op.name, functools.partial(_triton_or_reference, op), "CUDA")
    if _extension_errors["cpp"] is not None:
        warnings.warn(
            "neuroflow_kernels: on the CPU the ops run through their plain torch reference, because the C++ "
            f"extension is missing: {_extension_errors['cpp']}",
            RuntimeWarning,
            stacklevel=3,
        )


def _check_requested(name: str) -> str | None:
    if name in ("", "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; accepted are 'auto', {', '.join(map(repr, BACKENDS))}")
    return name


_default = _check_requested(os.environ.get("NEUROFLOW_BACKEND", "auto"))
_requested: ContextVar[str | None] = ContextVar("neuroflow_backend", default=_default)


@torch.compiler.assume_constant_result
def _requested_backend() -> str | None:
    return _requested.get()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op called inside the block with backend `name`: 'reference', 'cpp', 'cuda', 'triton' or 'auto'.

    What `torch.compile` traces keeps the backend that was asked for while it was traced; around 'reference' and
    'triton' the graph breaks.
    """
    token = _requested.set(_check_requested(name))
    try:
        yield
    finally:
        _requested.reset(token)


def unavailable(backend: str, device: str = "cpu") -> str | None:
    """Why `backend` cannot serve tensors on `device` ('cpu', 'cuda'), or None when it can."""
    if backend == "reference":
        return None
    if backend in ("cpp", "cuda"):
        wanted = "cpu" if backend == "cpp" else "cuda"
        return _extension_errors[backend] or (None if device == wanted else f"it serves {wanted} tensors only")
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (`pip install triton`)"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it serves cuda tensors only (CPU tensors need TRITON_INTERPRET=1 in the environment, for tests)"
    return None


def without_row_kernels() -> str | None:
    """Why `linear_rows` and `attend_rows` are no faster here than torch's own products, or None where they are."""
    if _requested_backend() not in (None, "cpp"):
        return f"backend {_requested_backend()!r} was asked for"
    if _extension_errors["cpp"] is not None:
        return _extension_errors["cpp"]
    capability = torch.backends.cpu.get_cpu_capability()
    return None if capability == "AVX512" else f"they are written for AVX512, and torch finds {capability}"


@functools.cache
def _implementation(backend: str, op: str, module: str) -> Callable:
    return getattr(importlib.import_module(f".{backend}.{module}", __package__), op)


@functools.cache
def _warn_triton_missing(reason: str) -> None:
    warnings.warn(
        f"neuroflow_kernels: on the GPU the ops run through plain torch: {reason}", RuntimeWarning, stacklevel=2
    )


def _triton_or_reference(op: "Operator", *args: object) -> object:
    reason = unavailable("triton", "cuda")
    if reason is not None:
        _warn_triton_missing(reason)
    return _implementation("reference" if reason else "triton", op.name, op.module)(*args)


def _function(setup: Callable, backward: Callable) -> type[torch.autograd.Function]:
    """An implementation that is not called through torch's dispatcher, and so not through the op's gradient there."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(implementation: Callable, *args: object) -> torch.Tensor:
            return implementation(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
            setup(ctx, inputs[1:], output)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
            return None, *backward(ctx, *gradients)

    return Function


class Operator:
    """One op of the namespace `neuroflow`: schema and fake, called through whichever backend is due.

    The file `ops/<module>.py` that makes it has a namesake in `reference/` and, with `triton`, in `triton/`, which
    define a function of the op's name with the schema's arguments in order. An op without `triton` is one that a GPU
    library does better than a kernel of ours; there the reference calls that.

    `gradient`, where the op has one, is what `torch.autograd.Function` calls setup_context and backward. It holds for
    every backend, those called by name too.
    """

    registry: ClassVar[dict[str, "Operator"]] = {}

    def __init__(
        self,
        module: str,
        schema: str,
        fake: Callable,
        triton: bool = True,
        gradient: tuple[Callable, Callable] | None = None,
    ) -> None:
        self.module = module.rpartition(".")[2]
        self.triton = triton
        self.name = schema.partition("(")[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, _implementation("reference", self.name, self.module), "CompositeExplicitAutograd")
        torch.library.register_fake(f"neuroflow::{self.name}", fake, lib=_library)
        self.gradient = None
        if gradient is not None:
            setup, backward = gradient
            torch.library.register_autograd(f"neuroflow::{self.name}", backward, setup_context=setup, lib=_library)
            self.gradient = _function(setup, backward)
        self.overload = getattr(torch.ops.neuroflow, self.name).default
        Operator.registry[self.name] = self

    def __call__(self, *args: object) -> object:
        backend = _requested_backend()
        if backend is None:
            return self.overload(*args)
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        reason = unavailable(backend, device)
        if backend == "triton" and not self.triton:
            reason = "it has no Triton kernel, as the library behind the reference is the faster one on a GPU"
        if reason is not None:
            raise BackendUnavailable(f"backend {backend!r} cannot serve {self.name} on {device}: {reason}")
        if backend in ("cpp", "cuda"):
            return self.overload(*args)
        implementation = _implementation(backend, self.name, self.module)
        return implementation(*args) if self.gradient is None else self.gradient.apply(implementation, *args)

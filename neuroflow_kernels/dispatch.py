"""Which backend serves a call, and why the others do not.

Every op is one torch op in the namespace NAMESPACE. Its reference is registered for every device
(CompositeExplicitAutograd). The C++ extension adds the CPU key, the CUDA extension the CUDA key, and Triton takes the
CUDA key of the ops that the CUDA extension lacks. So torch's own dispatcher picks a kernel for each call, by the device
of the tensors, and a build without extensions still works. float64, for which the CUDA extension has no kernels, goes
to Triton or the reference before the dispatcher sees it.

A backend can be asked for by name, with `use_backend` or the environment variable NEUROFLOW_BACKEND. One that cannot
serve the call raises `BackendUnavailable` with the reason; no other backend takes its place.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from . import checks

Result = TypeVar("Result")

BACKENDS = ("reference", "cpp", "cuda", "triton")
# The kernel hub imports a copy under a name of its own, beside which others may be loaded.
NAMESPACE = "neuroflow" if __package__ == "neuroflow_kernels" else __package__.replace(".", "_")

_NOT_BUILT = {
    "_cpu": "it is not built (`pip install --no-build-isolation .` builds it where torch and a C++ compiler are)",
    "_cuda": "it is not built (`pip install --no-build-isolation .` builds it where nvcc and torch for CUDA are)",
}
_EXTENSION_DEVICES = {"cpp": "cpu", "cuda": "cuda"}
_library = torch.library.Library(NAMESPACE, "DEF")
_extension_errors: dict[str, str | None] = {}


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot serve this call; the message says why.

    Example:
        >>> import torch
        >>> from neuroflow_kernels import BackendUnavailable, compact, use_backend
        >>> try:
        ...     with use_backend("cuda"):
        ...         compact(torch.zeros(1, 4), threshold=0.1)
        ... except BackendUnavailable as error:
        ...     print(str(error).partition(":")[0])
        backend 'cuda' cannot serve compact on cpu
    """


def _load_extension(stem: str) -> str | None:
    """Load `stem`.*.so beside this file into torch's dispatcher. Returns why it could not be, or None."""
    files = sorted(Path(__file__).parent.glob(f"{stem}.*so")) + sorted(Path(__file__).parent.glob(f"{stem}.*pyd"))
    if not files:
        return _NOT_BUILT[stem]
    try:
        torch.ops.load_library(files[0])
    except (OSError, RuntimeError) as error:
        cause = str(error.__cause__ or error)  # torch's own error names the file and nothing else
        return f"{files[0].name} does not load: {cause.splitlines()[0]}"
    return None


def load_extensions() -> None:
    """Load the extensions that were built, at import, and warn if the CPU has only the reference."""
    for backend, stem in (("cpp", "_cpu"), ("cuda", "_cuda")):
        _extension_errors[backend] = _load_extension(stem)
    for op in Operator.registry.values():
        op.cpp = op.overload.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU)
        op.cuda = op.overload.has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA)
        if op.triton and not op.cuda:
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
    """Serve every op called inside the block with backend `name`.

    The request holds for the current thread or task. Code traced by `torch.compile` keeps the backend that was asked
    for during tracing; 'reference' and 'triton' break the graph.

    Args:
        name: 'reference', 'cpp', 'cuda', 'triton', or 'auto' to let torch's dispatcher choose by device.

    Raises:
        ValueError: the name is none of these.

    Example:
        >>> import torch
        >>> from neuroflow_kernels import linear_rows, use_backend
        >>> with use_backend("reference"):
        ...     linear_rows(torch.ones(1, 2), torch.ones(1, 2))
        tensor([[2.]])
    """
    token = _requested.set(_check_requested(name))
    try:
        yield
    finally:
        _requested.reset(token)


def unavailable(backend: str, device: str = "cpu") -> str | None:
    """Why a backend cannot serve tensors on a device, or None if it can.

    Args:
        backend: 'reference', 'cpp', 'cuda' or 'triton'.
        device: 'cpu' or 'cuda'.

    Returns:
        The reason, in one line, or None.

    Example:
        >>> from neuroflow_kernels import unavailable
        >>> print(unavailable("reference"))
        None
        >>> reason = unavailable("cuda", "cpu")  # "it is not built ..." or "it serves cuda tensors only"
        >>> reason is None
        False
    """
    if backend == "reference":
        return None
    if backend in _EXTENSION_DEVICES:
        wanted = _EXTENSION_DEVICES[backend]
        return _extension_errors[backend] or (None if device == wanted else f"it serves {wanted} tensors only")
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (`pip install triton`)"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it serves cuda tensors only (CPU tensors need TRITON_INTERPRET=1 in the environment, for tests)"
    return None


def without_row_kernels() -> str | None:
    """Why `linear_rows` and `attend_rows` are no faster here than torch's own products, or None if they are.

    Returns:
        The reason, in one line, or None: they were built, no other backend was asked for, and this processor has
        AVX-512.

    Example:
        >>> from neuroflow_kernels import use_backend, without_row_kernels
        >>> with use_backend("reference"):
        ...     without_row_kernels()
        "backend 'reference' was asked for"
    """
    if _requested_backend() not in (None, "cpp"):
        return f"backend {_requested_backend()!r} was asked for"
    if _extension_errors["cpp"] is not None:
        return _extension_errors["cpp"]
    capability = torch.backends.cpu.get_cpu_capability()
    return None if capability == "AVX512" else f"they are written for AVX512, and torch finds {capability}"


def is_choice(rows: torch.Tensor) -> bool:
    """Whether products of such rows may take any of the `ways`: without gradients or autocast, and unless a backend was
    asked for that computes them its own way.
    """
    return (
        not torch.is_grad_enabled()
        and rows.device.type == "cpu"
        and rows.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_autocast_enabled("cpu")
        and _requested_backend() in (None, "cpp")
    )


def row_kernels_serve(rows: torch.Tensor) -> bool:
    """Whether `linear_rows` and `attend_rows`, which have no gradient, have fast kernels for such rows here.

    Args:
        rows: the tensor [M, ...] that would go through them; only its device and dtype count.

    Returns:
        True on a CPU with AVX-512 for float32 and bfloat16, without gradients, autocast or another backend asked for.

    Example:
        >>> import torch
        >>> from neuroflow_kernels import row_kernels_serve
        >>> row_kernels_serve(torch.ones(1, 8, dtype=torch.float64))
        False
    """
    return is_choice(rows) and without_row_kernels() is None


@functools.cache
def _implementation(backend: str, op: str, module: str) -> Callable:
    implementation = getattr(importlib.import_module(f".{backend}.{module}", __package__), op)
    names = tuple(inspect.signature(implementation).parameters)

    @functools.wraps(implementation)
    def checked(*args: object) -> object:
        for name, value in zip(names, args, strict=True):
            if isinstance(value, torch.Tensor):
                checks.held(name, value)
        return implementation(*args)

    return checked


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"neuroflow_kernels: {message}", RuntimeWarning, stacklevel=2)


def _without_cuda_kernel(op: "Operator") -> str:
    """The backend of cuda tensors that the CUDA extension does not serve."""
    if not op.triton:
        return "reference"
    missing, reason = _extension_errors["cuda"], unavailable("triton", "cuda")
    choice = "Triton" if reason is None else f"plain torch ({reason})"
    if missing is not None:
        _warn_once(f"on the GPU the ops run through {choice}, because the CUDA extension is missing: {missing}")
    elif reason is not None:
        _warn_once(f"on the GPU, what the CUDA extension has no kernel for runs through {choice}")
    return "triton" if reason is None else "reference"


def _triton_or_reference(op: "Operator", *args: object) -> object:
    return _implementation(_without_cuda_kernel(op), op.name, op.module)(*args)


def _function(setup: Callable, backward: Callable) -> type[torch.autograd.Function]:
    """Gives an implementation called past torch's dispatcher the gradient that it would have there."""

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


class Operator(Generic[Result]):
    """One op of the namespace NAMESPACE: its schema and fake, and the choice of backend for each call.

    An op made in `ops/<module>.py` has a file of the same name in `reference/` and, with `triton`, in `triton/`. Each
    defines a function of the op's name that takes the schema's arguments in order. An op without `triton` is one that a
    GPU library does better than a kernel of ours; on a GPU its reference calls that library.

    `gradient`, if the op has one, is the pair that `torch.autograd.Function` calls setup_context and backward. It
    applies to every backend, also to one asked for by name.
    """

    registry: ClassVar[dict[str, "Operator[Any]"]] = {}

    def __init__(
        self,
        module: str,
        schema: str,
        fake: Callable[..., Result],
        triton: bool = True,
        gradient: tuple[Callable, Callable] | None = None,
    ) -> None:
        self.module = module.rpartition(".")[2]
        self.triton = triton
        self.cpp = self.cuda = False  # until the extensions are loaded
        self.name = schema.partition("(")[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, _implementation("reference", self.name, self.module), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=_library)
        self.gradient = None
        if gradient is not None:
            setup, backward = gradient
            torch.library.register_autograd(f"{NAMESPACE}::{self.name}", backward, setup_context=setup, lib=_library)
            self.gradient = _function(setup, backward)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        arguments = self.overload._schema.arguments
        self.written = [at for at, argument in enumerate(arguments) if argument.is_write]
        if self.written:
            _library.impl(self.name, self._write, "ADInplaceOrView", with_keyset=True)
        Operator.registry[self.name] = self

    def _declined(self, backend: str, dtype: torch.dtype) -> str | None:
        """Why a backend that is available has no kernel of this op for `dtype`."""
        if backend == "triton" and not self.triton:
            return "it has no Triton kernel, as the library behind the reference is the faster one on a GPU"
        if backend == "cpp" and not self.cpp:
            return "the C++ extension has no kernel for it"
        if backend == "cuda" and not self.cuda:
            return "the CUDA extension has no kernel for it"
        if backend == "cuda" and dtype == torch.float64:
            return "the CUDA kernels take float32, bfloat16 and float16, not float64"
        return None

    def _announce(self, args: Sequence[object]) -> None:
        """What torch does before an op of its own writes in place."""
        written = [args[at] for at in self.written]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in written):
            leaf = "leaf " if any(tensor.requires_grad and tensor.is_leaf for tensor in written) else ""
            raise RuntimeError(
                f"{NAMESPACE}::{self.name} has no gradient and writes in place to a {leaf}tensor that requires grad; "
                "call it under torch.no_grad()"
            )
        torch.autograd.graph.increment_version(written)

    def _write(self, keys: torch._C.DispatchKeySet, *args: object) -> object:
        self._announce(args)
        return self.overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

    def __call__(self, *args: object) -> Result:
        backend = _requested_backend()
        tensor = next(a for a in args if isinstance(a, torch.Tensor))
        device = tensor.device.type
        owned = self.cuda and device == _EXTENSION_DEVICES["cuda"]
        if backend is None and owned and self._declined("cuda", tensor.dtype):
            # Decided here because in the dispatcher a kernel owns its key for every dtype.
            backend = _without_cuda_kernel(self)
        serve = self.overload
        if backend is not None:
            reason = unavailable(backend, device) or self._declined(backend, tensor.dtype)
            if reason is not None:
                raise BackendUnavailable(f"backend {backend!r} cannot serve {self.name} on {device}: {reason}")
            if backend not in _EXTENSION_DEVICES:
                serve = _implementation(backend, self.name, self.module)
                if self.gradient is not None:
                    serve = functools.partial(self.gradient.apply, serve)
        if not self.written or torch.compiler.is_compiling():
            return serve(*args)
        # Skips `_write`, which does this for `torch.ops.neuroflow` but, being Python, costs more than all the rest.
        self._announce(args)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return serve(*args)

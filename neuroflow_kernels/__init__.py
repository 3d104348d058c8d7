"""Fused ops for temporally sparse transformers: tensors in, tensors out.

`ema_surprise_` measures each token against a running reference, `compact` turns surprise into a packed index,
`gather_rows` and `scatter_rows_` move rows between the full and the packed layout, and `ema_gate_` goes from tokens to
packed rows in one call. In a transformer block `scatter_kv_` updates the cached keys and values, `attend_rows` attends
from the packed rows to them, and `attend_versions` does so for a whole clip. `linear_rows` is a linear layer over
packed rows, for CPUs. All are batched over S independent streams.

On a GPU the host waits for the device in two cases only: `gather_rows` and `ema_gate_` without `rows` read back the
count of active tokens, and `compact` copies a ladder that is not a tensor.
"""

from .dispatch import (
    BackendUnavailable,
    load_extensions,
    row_kernels_serve,
    unavailable,
    use_backend,
    without_row_kernels,
)
from .ops.attend_rows import attend_rows
from .ops.attend_versions import attend_versions
from .ops.compact import compact
from .ops.ema_gate import ema_gate_
from .ops.ema_surprise import ema_surprise_
from .ops.gather_rows import gather_rows
from .ops.linear_rows import linear_rows
from .ops.scatter_kv import scatter_kv_
from .ops.scatter_rows import scatter_rows_

__version__ = "0.1.0"  # of both packages: the build reads it here

load_extensions()

__all__ = [
    "BackendUnavailable",
    "attend_rows",
    "attend_versions",
    "compact",
    "ema_gate_",
    "ema_surprise_",
    "gather_rows",
    "linear_rows",
    "row_kernels_serve",
    "scatter_kv_",
    "scatter_rows_",
    "unavailable",
    "use_backend",
    "without_row_kernels",
]

"""Tokens, references and selections of rows that the tests of the ops share."""

import math

import torch

from neuroflow_kernels.reference.ema_surprise import ema_surprise_ as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


# (S, N, D), rows per stream
CASES = [((1, 1, 1), [1]), ((1, 5, 7), [3]), ((3, 4, 33), [2, 0, 4]), ((2, 9, 768), [5, 1]), ((2, 3, 8), [0, 0])]


CASES += [((1, 3, 1152), [2]), ((1, 2, 2056), [1])]


EMPTY = [((0, 4, 8), []), ((2, 0, 8), [0, 0])]


def select(generator, shape, counts):
    """A selection of that many rows of each stream, as compact returns it."""
    streams, tokens, _ = shape
    rows = [
        stream * tokens + torch.randperm(tokens, generator=generator)[:count].sort().values
        for stream, count in enumerate(counts)
    ]
    packed = torch.cat(rows) if rows else torch.empty(0)
    index = torch.full((streams * tokens,), -1, dtype=torch.int32)
    index[: len(packed)] = packed
    return index, torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def misaligned(tensor):
    """The same values, one element past where memory can be read 16 bytes at a time."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


GATE_DTYPES = [  # of tokens, and of their references
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
]


def frame(generator, shape, dtype=torch.float32, reference_dtype=torch.float32):
    h = torch.randn(shape, generator=generator)
    ema = h + 0.5 * torch.randn(shape, generator=generator)
    return h.to(dtype), ema.to(reference_dtype)


def expect(h, ema, decay):
    """Surprise and new reference of the reference op, run in float64."""
    moved = ema.to(torch.float64, copy=True)
    surprise = reference(h.double(), moved, decay)
    return surprise, moved


def assert_moved(ema, moved):
    """Equal but for one rounding to the reference's dtype."""
    torch.testing.assert_close(ema, moved.to(ema.dtype), rtol=torch.finfo(ema.dtype).eps, atol=1e-6, equal_nan=True)


def definition(surprise, threshold=None, budget=None, floor=4):
    """The rows of every stream's active tokens, by sorting."""
    streams, tokens = surprise.shape
    selections = []
    for stream in range(streams):
        values = [math.inf if math.isnan(value) else value for value in surprise[stream].tolist()]
        order = sorted(range(tokens), key=lambda token: (-values[token], token))
        if budget is not None:
            count = budget[stream]
        elif threshold[stream] <= 0:
            count = tokens
        else:
            count = sum(value > threshold[stream] for value in values)
        active = sorted(order[: min(max(count, floor), tokens)])
        selections.append([stream * tokens + token for token in active])
    return selections

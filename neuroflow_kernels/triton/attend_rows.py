"""Few queries, many cached keys: tiles of queries alone would leave most of a GPU idle, so the keys are split too.

A program attends from one tile of a stream's queries, in one head, to one split of that stream's keys, which are
consecutive or wherever a table says. With one split it writes the result; with several, a second launch combines them.
The number of splits follows from the shapes and the GPU, which the host knows, so a result is the same in every run.
"""

import functools

import torch
import triton
import triton.language as tl

from ..reference.attend_rows import attend_rows as reference
from .common import FUSE_MULTIPLY_ADD, stride_unit

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
LOG2_E = 1.4426950408889634
WIDEST_HEAD = 256  # wider ones, and float64, go through the reference
SHORTEST_SPLIT = 256  # keys; below this, moving the partial sums takes as long as reading the keys
WARPS = 8  # that keep a multiprocessor busy


@triton.jit(
    do_not_specialize=["streams", "rows", "tokens", "held", "heads", "query_stride", "query_head_stride", "span"]
)
def _attend_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    table: tl.tensor,
    cu_seqlens: tl.tensor,
    out: tl.tensor,
    mixes: tl.tensor,
    peaks: tl.tensor,
    totals: tl.tensor,
    streams: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    held: tl.tensor,
    heads: tl.tensor,
    query_stride: tl.tensor,
    query_head_stride: tl.tensor,
    log2_scale: tl.tensor,
    span: tl.tensor,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_STREAMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    lane = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    width = heads * HEAD_DIM
    first = split * span
    last = tl.minimum(first + span, tokens)
    if cu_seqlens is None:
        stream = 0
        start = tile * BLOCK_ROWS
        end = rows
    else:
        # A tile holds rows of one stream; which ones is found by counting the tiles of earlier streams.
        each = tl.arange(0, BLOCK_STREAMS)
        begins = tl.minimum(tl.load(cu_seqlens + each, mask=each < streams, other=0), rows)
        ends = tl.minimum(tl.load(cu_seqlens + each + 1, mask=each < streams, other=0), rows)
        tiles = (ends - begins + BLOCK_ROWS - 1) // BLOCK_ROWS
        passed = tl.cumsum(tiles) <= tile
        stream = tl.sum(passed.to(tl.int32))
        start = tl.sum(tl.where(each == stream, begins, 0))
        start += (tile - tl.sum(tl.where(passed, tiles, 0))) * BLOCK_ROWS
        end = tl.sum(tl.where(each == stream, ends, 0))
        last = tl.where(stream < streams, last, first)  # no stream is left for this tile
        if not SPLIT:
            padding = tile * BLOCK_ROWS + lane
            empty = (padding >= tl.load(cu_seqlens + streams)) & (padding < rows)
            at = padding.to(tl.int64)[:, None] * width + head * HEAD_DIM + column[None, :]
            tl.store(out + at, 0.0, mask=empty[:, None] & (column < HEAD_DIM)[None, :])

    row = (start + lane).to(tl.int64)
    inside = (row < end)[:, None] & (column < HEAD_DIM)[None, :]  # [BLOCK_ROWS, BLOCK_DIM]
    at = (row[:, None] * query_stride + head.to(tl.int64) * query_head_stride) * UNIT + column[None, :]
    queries = tl.load(query + at, mask=inside, other=0)
    if UPCAST:
        queries = queries.to(tl.float32)

    token = tl.arange(0, BLOCK_TOKENS)
    own = stream * tokens.to(tl.int64) + first
    if table is None:
        key += own * width
        value += own * width
    else:
        table += own
    key += head * HEAD_DIM
    value += head * HEAD_DIM
    # Not -Inf, from which -Inf could not be taken.
    peak = tl.full((BLOCK_ROWS,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    mixed = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    for begin in range(first, last, BLOCK_TOKENS):
        there = begin + token < last
        loaded = there[:, None] & (column < HEAD_DIM)[None, :]
        if table is None:
            lies = token[:, None] * width + column[None, :]  # [BLOCK_TOKENS, BLOCK_DIM]
        else:
            version = tl.load(table + token, mask=there, other=0)
            lies = version.to(tl.int64)[:, None] * width + column[None, :]
            loaded = loaded & ((version >= 0) & (version < held))[:, None]
            table += BLOCK_TOKENS
        keys = tl.load(key + lies, mask=loaded, other=0)
        if UPCAST:
            keys = keys.to(tl.float32)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * log2_scale
        scores = tl.where(there[None, :], scores, float("-inf"))  # [BLOCK_ROWS, BLOCK_TOKENS]
        higher = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - higher)
        weights = tl.exp2(scores - higher[:, None])
        peak = higher
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(value + lies, mask=loaded, other=0)
        weights = weights.to(values.dtype)
        if UPCAST:
            weights = weights.to(tl.float32)
            values = values.to(tl.float32)
        mixed = tl.dot(weights, values, mixed * shrink[:, None], input_precision="ieee")
        if table is None:
            key += BLOCK_TOKENS * width
            value += BLOCK_TOKENS * width

    if SPLIT:
        slot = (split * rows + row) * heads + head
        tl.store(peaks + slot, peak, mask=row < end)
        tl.store(totals + slot, total, mask=row < end)
        tl.store(mixes + slot[:, None] * HEAD_DIM + column[None, :], mixed, mask=inside)
    else:
        at = row[:, None] * width + head * HEAD_DIM + column[None, :]
        tl.store(out + at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["streams", "rows", "heads", "splits"])
def _combine_kernel(
    mixes: tl.tensor,
    peaks: tl.tensor,
    totals: tl.tensor,
    cu_seqlens: tl.tensor,
    out: tl.tensor,
    streams: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """One program per row and head."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.arange(0, BLOCK_SPLITS)
    column = tl.arange(0, BLOCK_DIM)
    if cu_seqlens is not None:
        filled = row < tl.load(cu_seqlens + streams)
        splits = tl.where(filled, splits, 0)
    there = split < splits
    slot = (split.to(tl.int64) * rows + row) * heads + head
    peak = tl.load(peaks + slot, mask=there, other=LOWEST)
    total = tl.load(totals + slot, mask=there, other=0)
    at = slot[:, None] * HEAD_DIM + column[None, :]
    mixed = tl.load(mixes + at, mask=there[:, None] & (column < HEAD_DIM)[None, :], other=0)
    weight = tl.exp2(peak - tl.max(peak))
    result = tl.sum(weight[:, None] * mixed, 0) / tl.sum(weight * total)
    if cu_seqlens is not None:
        result = tl.where(filled, result, 0)
    at = (row.to(tl.int64) * heads + head) * HEAD_DIM + column
    tl.store(out + at, result.to(out.dtype.element_ty), mask=column < HEAD_DIM)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """The GPU's count, or an H100's 132 if kernels are only interpreted or compiled."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether tensor cores take such factors: Triton uses none before sm_80, and its interpreter gets 16 bits wrong."""
    if dtype == torch.float32 or triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend != "cuda" or target.arch >= 80


def _tile(rows: int, block_dim: int, multiplies: bool) -> dict[str, int | None]:
    """Launch options for streams of so many rows, in as few tiles as possible because each tile reads all keys.

    A block of keys with its values is 16 KiB, or 32 KiB at the widest; two or three are in flight at once. ptxas gets a
    register limit where it would otherwise use so few that it spills.
    """
    wide = block_dim > 128
    if not multiplies:
        block_tokens, registers = (16, 255) if wide else (32, 128)
        return {
            "BLOCK_ROWS": 16,
            "BLOCK_TOKENS": block_tokens,
            "num_warps": 8,
            "num_stages": 2,
            "maxnreg": registers,
        }
    block_rows = 16 if rows <= 16 else 64 if rows <= 64 or wide else 128
    warps = 8 if block_rows == 128 or (wide and block_rows == 64) else 4
    return {
        "BLOCK_ROWS": block_rows,
        "BLOCK_TOKENS": 64 if block_dim <= 64 else 32,
        "num_warps": warps,
        "num_stages": 2 if wide else 3,
        "maxnreg": 255 if warps == 4 else None,
    }


@functools.cache
def _span(tokens: int, block_tokens: int, programs: int, at_once: int) -> int:
    """Keys per split, in whole blocks: the fewest splits that finish within a seventh of the earliest possible time.

    Each split has `programs` programs; `at_once` programs run concurrently.
    """
    splits = range(1, max(1, tokens // SHORTEST_SPLIT) + 1)
    times = [triton.cdiv(programs * count, at_once) / count for count in splits]
    chosen = next(count for count, time in zip(splits, times, strict=True) if 7 * time <= 8 * min(times))
    return triton.cdiv(triton.cdiv(tokens, block_tokens), chosen) * block_tokens


def attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor | None, scale: float
) -> torch.Tensor:
    if query.dtype == torch.float64 or query.shape[2] > WIDEST_HEAD:
        return reference(query, key, value, cu_seqlens, scale)
    return attend(query, key, value, None, cu_seqlens, scale)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Keys and values are [S, T, heads, head_dim], or [R, heads, head_dim] with a `table` [S, T] of rows."""
    (rows, heads, dim), (streams, tokens) = query.shape, (key if table is None else table).shape[:2]
    out = query.new_empty(query.shape)
    if out.numel() == 0:
        return out
    if streams == 0:
        return out.zero_()
    block_dim, unit = max(16, triton.next_power_of_2(dim)), stride_unit(query)
    with torch.cuda.device_of(query):
        multiplies = _multiplies(query.dtype)
        share = triton.cdiv(rows, streams)  # a stream's queries, if all have as many
        tile = _tile(share, block_dim, multiplies)
        # An upper bound: each stream but one may leave its last tile partly empty.
        tiles = triton.cdiv(rows, tile["BLOCK_ROWS"]) + streams - 1
        programs = streams * triton.cdiv(share, tile["BLOCK_ROWS"]) * heads
        at_once = _multiprocessors(query.device) * WARPS // tile["num_warps"]
        span = _span(tokens, tile["BLOCK_TOKENS"], programs, at_once)
        splits = triton.cdiv(tokens, span)
        mixes = peaks = totals = None
        if splits > 1:
            mixes = query.new_empty((splits, rows, heads, dim), dtype=torch.float32)
            peaks, totals = query.new_empty((2, splits, rows, heads), dtype=torch.float32)
        _attend_kernel[(tiles, heads, splits)](
            query,
            key,
            value,
            table,
            cu_seqlens,
            out,
            mixes,
            peaks,
            totals,
            streams,
            rows,
            tokens,
            key.shape[0],
            heads,
            query.stride(0) // unit,
            query.stride(1) // unit,
            scale * LOG2_E,
            span,
            UNIT=unit,
            HEAD_DIM=dim,
            SPLIT=splits > 1,
            UPCAST=not multiplies,
            BLOCK_STREAMS=max(16, triton.next_power_of_2(streams)),
            BLOCK_DIM=block_dim,
            **tile,
            **FUSE_MULTIPLY_ADD,
        )
        if splits > 1:
            block_splits = triton.next_power_of_2(splits)
            _combine_kernel[(rows, heads)](
                mixes,
                peaks,
                totals,
                cu_seqlens,
                out,
                streams,
                rows,
                heads,
                splits,
                HEAD_DIM=dim,
                BLOCK_SPLITS=block_splits,
                BLOCK_DIM=block_dim,
                num_warps=min(8, triton.cdiv(block_splits * block_dim, 512)),
                **FUSE_MULTIPLY_ADD,
            )
    return out

"""Two launches. The first finds, for each stream, how many tokens are active and the key that separates them from the
rest. The second writes them; each program derives its place from the counts of earlier streams and of earlier blocks of
its stream, so the order is the same in every run.
"""

import torch
import triton
import triton.language as tl

from .common import FUSE_MULTIPLY_ADD

# Keys that a program holds at once, 16 per thread. One program selects for a whole stream, so it gets many threads; a
# long stream is written by several programs, each of which reads the blocks before its own.
SELECT_BLOCK = 8192
WRITE_BLOCK = 4096


@triton.jit
def _ordered_key(surprise: tl.tensor) -> tl.tensor:
    """Unsigned integers in the order of the floats, with NaN as +inf and -0 as 0; none is 0 or 2**32 - 1."""
    surprise = tl.where(surprise != surprise, float("inf"), surprise)
    surprise = tl.where(surprise == 0, 0.0, surprise)
    bits = surprise.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit(do_not_specialize=["streams", "floor"])
def _select_kernel(
    surprise: tl.tensor,
    rule: tl.tensor,
    selected: tl.tensor,
    streams: tl.tensor,
    tokens: tl.tensor,
    floor: tl.tensor,
    BUDGET: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per stream; a token is active above `cutoff`, and at it among the first `ties`."""
    stream = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    surprise += stream * tokens
    rule = tl.load(rule + stream)
    if BUDGET:
        count = tl.minimum(tl.maximum(rule, floor), tokens)
        reached = tl.where(count == tokens, tokens, 0)
        cutoff = tl.where(count == tokens, 0, 0xFFFFFFFF).to(tl.uint32)
    else:
        cutoff = tl.where(rule <= 0, 0, _ordered_key(rule)).to(tl.uint32)
        above = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, tokens, BLOCK):
            inside = start + column < tokens
            key = _ordered_key(tl.load(surprise + start + column, mask=inside, other=0))
            above += (inside & (key > cutoff)).to(tl.int32)
        reached = tl.sum(above)
        count = tl.maximum(reached, floor)

    ties = 0
    if count > reached:
        # Radix search for the count-th largest key, eight bits at a time from the top; `found` masks the known bits.
        # Not unrolled, because that would quadruple code that every stream runs once.
        digits = tl.arange(0, 256)
        ties = count
        cutoff = cutoff * 0
        found = cutoff
        for step in range(4):
            shift = 24 - 8 * step
            tally = tl.zeros((256,), tl.int32)
            for start in range(0, tokens, BLOCK):
                inside = start + column < tokens
                key = _ordered_key(tl.load(surprise + start + column, mask=inside, other=0))
                inside = inside & ((key ^ cutoff) & found == 0)
                tally += tl.histogram((key >> shift & 255).to(tl.int32), 256, mask=inside)
            at_least = tl.sum(tally) - tl.cumsum(tally) + tally
            digit = tl.sum((at_least >= ties).to(tl.int32)) - 1
            ties -= tl.sum(tl.where(digits > digit, tally, 0))
            cutoff = cutoff | (digit << shift).to(tl.uint32)
            found = found | (255 << shift).to(tl.uint32)

    tl.store(selected + stream, count)
    tl.store(selected + streams + stream, cutoff.to(tl.int32, bitcast=True))
    tl.store(selected + 2 * streams + stream, ties)


@triton.jit(do_not_specialize=["streams"])
def _write_kernel(
    surprise: tl.tensor,
    selected: tl.tensor,
    index: tl.tensor,
    cu_seqlens: tl.tensor,
    streams: tl.tensor,
    tokens: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program per block of a stream."""
    blocks = tl.cdiv(tokens, BLOCK)
    stream = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK
    first = stream * tokens
    column = tl.arange(0, BLOCK)
    cutoff = tl.load(selected + streams + stream).to(tl.uint32, bitcast=True)
    ties = tl.load(selected + 2 * streams + stream)

    offsets = tl.zeros((BLOCK,), tl.int32)
    counts = tl.zeros((BLOCK,), tl.int32)
    for other in range(0, streams, BLOCK):
        count = tl.load(selected + other + column, mask=other + column < streams, other=0)
        counts += count
        offsets += tl.where(other + column < stream, count, 0)
    total = tl.sum(counts)
    offset = tl.sum(offsets)

    above_before = tl.zeros((BLOCK,), tl.int32)
    equal_before = tl.zeros((BLOCK,), tl.int32)
    for earlier in range(0, start, BLOCK):
        key = _ordered_key(tl.load(surprise + first + earlier + column))
        above_before += (key > cutoff).to(tl.int32)
        equal_before += (key == cutoff).to(tl.int32)

    inside = start + column < tokens
    row = first + start + column
    key = _ordered_key(tl.load(surprise + row, mask=inside, other=0))
    above = inside & (key > cutoff)
    equal = inside & (key == cutoff)
    above_rank = tl.sum(above_before) + tl.cumsum(above.to(tl.int32)) - above.to(tl.int32)
    equal_rank = tl.sum(equal_before) + tl.cumsum(equal.to(tl.int32)) - equal.to(tl.int32)
    slot = offset + above_rank + tl.minimum(equal_rank, ties)
    tl.store(index + slot, row, mask=above | (equal & (equal_rank < ties)))
    # Slots that no token fills lie past the total, so the two stores never overlap.
    tl.store(index + row, -1, mask=inside & (row >= total))

    if start == 0:
        tl.store(cu_seqlens + stream + 1, offset + tl.load(selected + stream))
        if stream == 0:
            tl.store(cu_seqlens, 0)


def compact(
    surprise: torch.Tensor, threshold: torch.Tensor | None, budget: torch.Tensor | None, floor: int
) -> tuple[torch.Tensor, torch.Tensor]:
    streams, tokens = surprise.shape
    index = surprise.new_empty((streams * tokens,), dtype=torch.int32)
    if streams * tokens == 0:
        return index, surprise.new_zeros((streams + 1,), dtype=torch.int32)
    cu_seqlens = surprise.new_empty((streams + 1,), dtype=torch.int32)
    selected = surprise.new_empty((3, streams), dtype=torch.int32)  # count, cutoff, ties
    rule = budget if threshold is None else threshold
    width = max(256, triton.next_power_of_2(tokens))
    select_block, write_block = min(width, SELECT_BLOCK), min(width, WRITE_BLOCK)
    with torch.cuda.device_of(surprise):
        _select_kernel[(streams,)](
            surprise,
            rule,
            selected,
            streams,
            tokens,
            min(floor, tokens),
            BUDGET=threshold is None,
            BLOCK=select_block,
            num_warps=max(4, select_block // 512),
            **FUSE_MULTIPLY_ADD,
        )
        _write_kernel[(streams * triton.cdiv(tokens, write_block),)](
            surprise,
            selected,
            index,
            cu_seqlens,
            streams,
            tokens,
            BLOCK=write_block,
            num_warps=max(4, write_block // 512),
            **FUSE_MULTIPLY_ADD,
        )
    return index, cu_seqlens

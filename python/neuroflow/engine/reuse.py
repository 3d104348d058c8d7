"""Which version of a patch serves a frame that does not encode it."""

import itertools

import torch

from neuroflow_kernels import ema_surprise_

from .passes import Pass

Turn = tuple[torch.Tensor, torch.Tensor]  # tokens of an entry, and the packed rows that serve them from then on


def nearest(current: Pass, signals: list[torch.Tensor], rows: list[torch.Tensor | None]) -> list[Turn | None]:
    """Find patches whose next version in the pass is nearer in content than their last; it serves them from there on.

    Nothing passes a cut, or a frame with NaN or Inf.

    Args:
        current: gated, against what each patch was at its last encoding.
        signals: [1, N, D] of each entry, in row-major order of its grid.
        rows: each entry's active tokens, as from `Gate`.

    Returns:
        for each entry, the tokens that switch to their next version, [K] int32 rows of its own, and the packed rows of
        those versions, [K]; None if none does.
    """
    lengths = [count if own is None else own.numel() for count, own in zip(current.counts, rows, strict=True)]
    starts = list(itertools.accumulate(lengths, initial=0))
    turns: list[Turn | None] = [None] * len(rows)
    for stream in dict.fromkeys(map(id, current.states)):
        entries = [entry for entry, state in enumerate(current.states) if id(state) == stream]
        _turn(current, entries, signals, rows, starts, turns)
    return turns


def _turn(
    current: Pass,
    entries: list[int],
    signals: list[torch.Tensor],
    rows: list[torch.Tensor | None],
    starts: list[int],
    turns: list[Turn | None],
) -> None:
    """`nearest` for the T entries of one stream."""
    prefix, suffix = current.plan.anatomy.prefix, current.plan.anatomy.suffix
    reports = [current.reports[entry] for entry in entries]
    active = torch.stack([report.active.flatten() for report in reports])  # [T, N]
    surprise = torch.stack([report.surprise.flatten() for report in reports])
    count, device = len(entries), active.device
    time = torch.arange(count, device=device)[:, None]
    opaque = [
        report.key_frame == "cut" or not current.finite[entry] for entry, report in zip(entries, reports, strict=True)
    ]
    closed = torch.tensor([*opaque, True], device=device)
    # [T, N], the next entry that encodes the patch or lets nothing through; T: none.
    event = torch.where(active | closed[:-1, None], time, count).flip(0).cummin(0).values.flip(0)
    following = torch.cat((event[1:], torch.full_like(event[:1], count)))
    distance = torch.full_like(surprise, torch.inf)  # to the next version
    slots = torch.full_like(following, -1)  # the packed row of a patch, where it is active
    content = signals[entries[-1]].clone()
    for number in range(count - 1, -1, -1):
        entry, order = entries[number], None if current.order is None else current.order[entries[number]]
        h, own = signals[entry], rows[entry]
        packed = torch.arange(starts[entry] + prefix, starts[entry + 1] - suffix, device=device)
        if own is None:
            slots[number] = packed if order is None else packed[order.argsort()]
            content.copy_(h)
            continue
        distance[number] = ema_surprise_(h, content, 0.0)[0]
        patches = own[prefix : len(own) - suffix].long() - prefix
        patches = patches if order is None else order[patches]
        slots[number, patches] = packed
        content[0, patches] = h[0, patches]
    nearer = ~active & ~closed[following] & (distance < surprise)
    # A patch that has switched since its last encoding need not switch again.
    turned, encoded = (torch.where(of, time, -1).cummax(0).values for of in (nearer, active))
    turned = torch.cat((torch.full_like(turned[:1], -1), turned[:-1]))
    numbers, patches = (nearer & (turned <= encoded)).nonzero().unbind(1)
    versions = slots[following[numbers, patches], patches]
    counts = torch.bincount(numbers, minlength=count).tolist()
    for entry, these, version in zip(entries, patches.split(counts), versions.split(counts), strict=True):
        if these.numel():
            tokens = these if current.order is None else current.order[entry].argsort()[these]
            turns[entry] = (tokens + prefix).int(), version

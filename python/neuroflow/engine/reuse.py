"""Which version of a patch serves it in a frame that does not encode it."""

import itertools

import torch

from neuroflow_kernels import ema_surprise_

from .passes import Pass


def nearest(
    current: Pass, signals: list[torch.Tensor], rows: list[torch.Tensor | None]
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """The patches of each entry whose next version in the pass is nearer in content than their last.

    From there on they are served by it. A cut lets nothing through, and nor does a frame with NaN or Inf.

    Args:
        current: gated, against what each patch was when it was last encoded.
        signals: [1, N, D] of each entry, in row-major order of its grid.
        rows: its active tokens, as `Gate` has them.

    Returns:
        of each entry the tokens that turn to their next version, [K] int32 rows of its own, and those versions, [K]
        rows of the packed tokens; None: none does.
    """
    prefix = current.plan.anatomy.prefix
    lengths = [count if own is None else own.numel() for count, own in zip(current.counts, rows, strict=True)]
    starts = [0, *itertools.accumulate(lengths)]
    early: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(rows)
    for stream in dict.fromkeys(map(id, current.states)):
        entries = [entry for entry, state in enumerate(current.states) if id(state) == stream]
        nearer: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by entry: which patches, and their next version
        content = row = None  # of each patch's next version, -1 where there is none
        for entry in reversed(entries):
            h, report = signals[entry], current.reports[entry]
            active, own = report.active.flatten(), rows[entry]
            if own is not None and row is not None:
                distance = ema_surprise_(h, content, 0.0)[0]
                nearer[entry] = (row >= 0) & (distance < report.surprise.flatten()) & ~active, row
            if row is None or own is None:
                content, row = h.clone(), torch.full_like(active, -1, dtype=torch.int64)
            if report.key_frame == "cut" or not current.finite[entry]:
                row = torch.full_like(row, -1)
                continue
            slots = torch.full((current.counts[entry],), -1, device=h.device)
            packed = torch.arange(starts[entry], starts[entry + 1], device=h.device)
            slots[slice(None) if own is None else own] = packed
            slots = slots[prefix:]
            if current.order is not None:
                slots = slots[current.order[entry].argsort()]
            row = torch.where(active, slots, row)
            content = torch.where(active[:, None], h, content)
        turned = torch.zeros_like(active)
        for entry in entries:
            if rows[entry] is None:
                turned = torch.zeros_like(turned)
                continue
            turned &= ~current.reports[entry].active.flatten()
            if entry not in nearer:
                continue
            these, row = nearer[entry]
            these = these & ~turned
            turned |= these
            patches = these.nonzero()[:, 0]
            if not patches.numel():
                continue
            tokens = patches if current.order is None else current.order[entry].argsort()[patches]
            early[entry] = (tokens + prefix).int(), row[patches]
    return early

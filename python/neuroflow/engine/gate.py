"""The gate: which patches of a frame are encoded, and what the next frame is compared with."""

import warnings
from collections.abc import Callable, Hashable

import torch

from neuroflow_kernels import compact, ema_surprise_, gather_rows, scatter_rows_

from ..adapters.anatomy import Grid
from . import crossover, reuse, scores
from .passes import FrameReport, Pass, Plan, split
from .state import KeyFrame, StreamState, copy_into
from .turns import LONG, Run

# Default counts of patches in a recorded pass. Above 64, at most a third of them is filler.
LADDER = tuple(rung for power in range(6, 20) for rung in (2**power, 3 * 2 ** (power - 1)))


def is_recordable(device: torch.device) -> bool:
    """Whether work on `device` can be recorded and replayed."""
    return device.type == "cuda"


def warn(message: str) -> None:
    warnings.warn(f"neuroflow: {message}", RuntimeWarning, stacklevel=3)


class Gate:
    """Chooses which patches are encoded: signals, surprise, scores, the rule, and the references to compare with.

    Called in front of the first block. It selects the active tokens of every stream in a pass, updates their
    references, and keeps account in their states. It also works without an engine, one pass after another:

        plan = Plan.of(describe(model), NeuroFlowConfig(signal="embedding"))
        gate, state = Gate(plan), StreamState("cam-7")
        current = Pass(plan, [state], [(14, 14)])
        (rows,) = gate(current, tokens)
        current.complete()

    Args:
        plan: its configuration says what is measured, and by which rule.
        warn: receives messages for the user about a stream.

    Attributes:
        crossovers: by size of pass, the share of active patches above which dense is faster, as far as known.
    """

    def __init__(self, plan: Plan, warn: Callable[[str], None] = warn) -> None:
        self.plan = plan
        self.config = plan.config
        self.warn = warn
        # A frame needs at least one token; if a CLS token makes the output, no patch is needed.
        self.floor = max(
            plan.config.floor, 0 if plan.anatomy.prefix + plan.anatomy.suffix and plan.anatomy.pool is None else 1
        )
        self.crossovers: dict[crossover.Size, float] = {}
        self._ladders: dict[torch.device, torch.Tensor] = {}
        self._run = Run()  # run of frames without names, across calls

    def __call__(self, current: Pass, tokens: torch.Tensor) -> list[torch.Tensor | None]:
        """Gate the entries of a pass, each stream's in order, given all tokens in front of the first block.

        Returns:
            each entry's active tokens, int32 rows of its own, or None for all of them.
        """
        signals = self.signals(current, tokens)
        rows: list[torch.Tensor | None] = [None] * len(signals)
        for state in current.states:
            current.due.setdefault(id(state), state.key_frame_due)
            state.key_frame_due = "failed"  # until the pass is complete
        for entries in current.rounds():
            self._gate_round(current, entries, signals, tokens, rows)
        if current.nameless and self.config.reuse == "nearest" and self.config.reference == "refreshed":
            current.early = reuse.nearest(current, signals, rows)
        return rows

    def _gate_round(
        self,
        current: Pass,
        entries: list[int],
        signals: list[torch.Tensor],
        tokens: torch.Tensor,
        rows: list[torch.Tensor | None],
    ) -> None:
        """Gate one entry from each of several streams; `rows` receives their active tokens."""
        due: dict[int, KeyFrame | None] = dict.fromkeys(entries)
        surprises: dict[int, torch.Tensor | None] = {}  # [N] each, None for a key frame
        for entry in entries:
            if current.surprises is None:
                due[entry], surprises[entry] = self._compare(current, entry, signals[entry])
            else:
                surprises[entry] = current.surprises[entry]
        chosen = self._choose(current, surprises)
        due |= {entry: "cut" for entry in entries if surprises[entry] is not None and chosen[entry] is None}
        if crossover.is_above(current, tokens, chosen, self.crossovers):
            due = {entry: why or "dense" for entry, why in due.items()}
            chosen = dict.fromkeys(chosen)
        prefix, suffix = self.plan.anatomy.prefix, self.plan.anatomy.suffix
        leading = torch.arange(prefix, dtype=torch.int32, device=tokens.device)
        trailing = torch.arange(suffix, dtype=torch.int32, device=tokens.device)
        for entry in entries:
            state, h, surprise, index = current.states[entry], signals[entry], surprises[entry], chosen[entry]
            finite = bool((h.sum(dtype=torch.float32) if surprise is None else surprise.amax()).isfinite())
            if not finite:
                self.warn(f"stream {state.name!r}: a frame holds NaN or Inf; the next one is a key frame")
            self._refresh(state, h, index)
            if current.nameless or due[entry] in ("cut", "dense"):
                self._note_run(current, state, due[entry], h, alone=len(entries) == 1)
            if self.config.cut_light is not None and current.colours is not None:
                self._note_colours(state, current.colours[entry], index)
            state.account(index, surprise, finite)
            current.due[id(state)] = None if finite else "nonfinite"
            current.finite[entry] = finite
            current.reports[entry] = FrameReport.of(state, due[entry])
            if index is not None and current.order is not None:
                index = current.order[entry].argsort()[index].sort().values.int()
            if index is not None and index.numel() < h.shape[1]:
                rows[entry] = torch.cat((leading, index + prefix, trailing + prefix + h.shape[1]))

    def _note_run(self, current: Pass, state: StreamState, why: KeyFrame | None, h: torch.Tensor, alone: bool) -> None:
        """Warn if nothing is ever skipped because too much changes between frames, unless the settings ask for that.

        Args:
            why: reason why the frame, patches h [1, N, D], is a key frame, or None.
            alone: no other stream's frame contributed to that.
        """
        config, nameless = self.config, current.nameless
        all_by_choice = config.threshold == 0 or config.tokens_per_frame(h.shape[1]) == h.shape[1]
        dense = why == "dense" and alone and config.dense_above is None
        if all_by_choice or not (dense or why == "cut" or (nameless and why == "first")):
            self._run = Run() if nameless else self._run
            return
        before = self._run if nameless else Run() if state.since_key_frame else state.run
        run = before.extended(h)
        if nameless:
            self._run = run
        else:
            state.run = run
        where = "calls without names" if nameless else f"stream {state.name!r}"
        if run.scenes and not before.scenes:
            names = ", ".join(f"'cam-{number}'" for number in range(1, run.scenes + 1))
            self.warn(
                f"{where}: frames of {run.scenes} scenes alternate, so each is a key frame and nothing is skipped; "
                f"name their streams: with neuroflow.cache_context(model, {names})"
            )
        elif run.length == LONG and not run.scenes and not nameless:
            rule = "larger threshold" if config.budget is None else "smaller budget"
            self.warn(
                f"{where}: {LONG} frames in a row changed too much to skip patches, as when a camera moves. If several "
                "cameras take turns, name their streams: with neuroflow.cache_context(model, 'cam-1', 'cam-2'). If "
                f"not, a {rule}, with larger cut_share and cut_surprise, trades fidelity for speed; otherwise the "
                "unpatched model is as fast"
            )

    @property
    def decay(self) -> float:
        """Weight of the new frame in the reference of patches that it does not encode."""
        return {"refreshed": 0.0, "previous": 1.0}.get(self.config.reference, self.config.ema_decay)

    def signals(self, current: Pass, tokens: torch.Tensor) -> list[torch.Tensor]:
        """What the gate compares for each entry, [1, N, D] in row-major order."""
        if self.config.signal == "pixel":
            signals = split(current.pixels, current.patches)
        elif self.config.signal == "embedding" or current.projected is None:
            first = self.plan.anatomy.prefix
            each = zip(split(tokens, current.counts), current.patches, strict=True)
            signals = [own[:, first : first + count] for own, count in each]
        elif current.projected.ndim > 3:
            signals = split(current.projected.flatten(2).transpose(1, 2), current.patches)
        else:
            signals = split(current.projected, current.patches)
        if current.order is None:
            return signals
        return [h[:, order.argsort()] for h, order in zip(signals, current.order, strict=True)]

    def _compare(self, current: Pass, entry: int, h: torch.Tensor) -> tuple[KeyFrame | None, torch.Tensor | None]:
        """Why an entry with patches h [1, N, D] is a key frame, or else None and its surprise [N].

        Updates moving averages.
        """
        state, grid, kept = current.states[entry], current.grids[entry], self.plan.kept(current.asked)
        signature = (grid, h.shape[2], h.dtype, h.device)
        due = current.due[id(state)] or self._expired(state) or ("gap" if current.gaps[entry] else None)
        if state.signature not in (None, signature):
            before, now = (f"{s[0][0]}x{s[0][1]} patches, {s[2]} on {s[3]}" for s in (state.signature, signature))
            self.warn(f"stream {state.name!r} changed from {before} to {now}; it starts over with a key frame")
            due = due or "size"
        if state.signature != signature or state.hidden != kept or due == "failed":
            state.start_over(signature, grid, h.device)
            state.hidden = kept
        return due, None if due else self.surprise(h, state.tensors)[0]

    def due(self, state: StreamState) -> KeyFrame | None:
        """Why the next frame of a stream must be a key frame, as far as its past decides."""
        return state.key_frame_due or self._expired(state)

    def _expired(self, state: StreamState) -> KeyFrame | None:
        expired = self.config.refresh == "key" and state.since_key_frame + 1 >= (self.config.max_age or torch.inf)
        return "age" if expired else None

    def surprise(self, h: torch.Tensor, caches: dict[Hashable, torch.Tensor]) -> torch.Tensor:
        """Surprise [S, N] of patches h [S, N, D] against the references in `caches`; updates moving averages."""
        surprise = ema_surprise_(h, caches["reference"], self.decay)
        if self.config.reference == "dual":
            surprise = torch.maximum(surprise, ema_surprise_(h, caches["fast"], self.config.fast_decay))
        # A cosine can round to slightly above 1.
        return surprise.clamp_min(0)

    def _choose(self, current: Pass, surprises: dict[int, torch.Tensor | None]) -> dict[int, torch.Tensor | None]:
        """Each entry's active patches, ascending int32, or None for a key frame."""
        config = self.config
        chosen: dict[int, torch.Tensor | None] = dict.fromkeys(surprises)
        gated = [entry for entry, surprise in surprises.items() if surprise is not None]
        for grid in dict.fromkeys(current.grids[entry] for entry in gated):
            alike = [entry for entry in gated if current.grids[entry] == grid]
            states = [current.states[entry] for entry in alike]
            surprise = torch.stack([surprises[entry] for entry in alike])
            age = torch.stack([state.age for state in states])
            unknown = torch.ones_like(surprise[0])
            attention = [unknown if state.attention is None else state.attention for state in states]
            index, cu_seqlens = self.active(self.score(surprise, age, torch.stack(attention), grid))
            ends, patches = cu_seqlens.tolist(), surprise.shape[1]
            active = [index[ends[row] : ends[row + 1]] - row * patches for row in range(len(alike))]
            if config.dilation:
                active = [scores.dilated(each, grid, config.dilation) for each in active]
            counts = torch.tensor([each.numel() for each in active], device=surprise.device)
            cuts = scores.is_cut(surprise, counts, config.cut_share, config.cut_surprise)
            known = current.colours is not None and all("colours" in state.tensors for state in states)
            if config.cut_light is not None and known:
                chosen_ones = torch.zeros_like(surprise, dtype=torch.bool)
                for row, each in zip(chosen_ones, active, strict=True):
                    row[each] = True
                now = torch.cat([current.colours[entry] for entry in alike])
                held = torch.cat([state.tensors["colours"] for state in states])
                cuts |= scores.light_change(now, held, chosen_ones) > config.cut_light
            for entry, each, cut in zip(alike, active, cuts.tolist(), strict=True):
                chosen[entry] = None if cut else each
        return chosen

    def active(self, score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The active patches of streams with one grid and scores [S, N], before dilation.

        Returns:
            index and cu_seqlens as from `compact`; nothing waits for a GPU.
        """
        config, (streams, patches) = self.config, score.shape
        budget = config.tokens_per_frame(patches)
        ladder = self.ladder(score.device)
        if not config.share_budget:
            return compact(score, config.threshold, budget, self.floor, ladder)
        best = score.topk(min(self.floor, patches)).indices
        shared = score.scatter(1, best, torch.inf).view(1, -1)
        index, _ = compact(shared, config.threshold, budget * streams, self.floor, ladder)
        starts = torch.arange(streams + 1, dtype=torch.int32, device=index.device) * patches
        ordered = index.masked_fill(index < 0, streams * patches)
        return index, torch.searchsorted(ordered, starts, out_int32=True)

    def ladder(self, device: torch.device) -> torch.Tensor | None:
        """The counts of active patches that a pass may have, on its device."""
        rungs = self.config.ladder
        if rungs is None and self.config.launch == "graph" and is_recordable(device) and not self.config.dilation:
            rungs = LADDER
        if rungs is not None and device not in self._ladders:
            self._ladders[device] = copy_into(None, torch.tensor(rungs, dtype=torch.int32).to(device))
        return self._ladders.get(device)

    def score(
        self, surprise: torch.Tensor, age: torch.Tensor, attention: torch.Tensor | None, grid: Grid
    ) -> torch.Tensor:
        """The score that the rule reads; everything is [S, N]. Infinite where a patch's age or a NaN forces it."""
        config = self.config
        score = scores.without_common_motion(surprise) if config.normalise_motion else surprise
        if config.score == "staleness":
            score = scores.staleness(score, age, attention, grid)
        if config.refresh == "rolling" and config.max_age is not None:
            score = score.masked_fill(scores.due(age, config.max_age), torch.inf)
        return score

    def _refresh(self, state: StreamState, h: torch.Tensor, index: torch.Tensor | None) -> None:
        """Update the references of the patches that a frame encodes: all in a key frame, else `index` if needed."""
        if index is None:
            # 16 bits would lose the small steps of a moving average.
            wide = torch.promote_types(h.dtype, torch.float32) if 0 < self.decay < 1 else h.dtype
            state.put("reference", h.to(wide))
            if self.config.reference == "dual":
                state.put("fast", h.to(wide))
        elif self.config.reference == "refreshed":
            ends = torch.tensor([0, index.numel()], dtype=torch.int32, device=index.device)
            scatter_rows_(state.tensors["reference"], gather_rows(h, index, ends, index.numel()), index, ends)

    def _note_colours(self, state: StreamState, colours: torch.Tensor, index: torch.Tensor | None) -> None:
        """Keep the colours [1, N, 3] of the patches that a frame encodes."""
        if index is None:
            state.put("colours", colours)
        elif "colours" in state.tensors:
            state.tensors["colours"].index_copy_(1, index.long(), colours.index_select(1, index))

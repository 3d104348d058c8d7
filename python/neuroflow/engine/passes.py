"""One pass through a patched tower: which tokens of which streams are in it, and how they reach the caches."""

import dataclasses
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, Self, TypeVar

import torch
from torch import nn

from neuroflow_kernels import attend_rows, attend_versions, gather_rows, scatter_kv_, scatter_rows_
from neuroflow_kernels.dispatch import is_choice

from ..adapters.anatomy import Anatomy, Grid
from ..config import NeuroFlowConfig
from .kernels import Kernels
from .scores import cls_attention
from .state import KeyFrame, Slab, StreamState


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Where in a tower tokens are packed and restored under one configuration.

    Args:
        anatomy: the tower's.
        config: the configuration it runs under.
        first_packed: index of the first block that runs on active tokens only.
        final: index of the block whose output is all that the rest of the tower sees; None if a norm follows it.
        watched: indices of the blocks whose attention from CLS tells the gate what the pooled output reads.
        layer_of: index of each attention's block.
        configs: the model's own configurations of the attentions that call transformers' interface.
    """

    anatomy: Anatomy
    config: NeuroFlowConfig
    first_packed: int
    final: int | None
    watched: range
    layer_of: dict[nn.Module, int]
    configs: dict[nn.Module, Any]

    @classmethod
    def of(cls, anatomy: Anatomy, config: NeuroFlowConfig) -> Self:
        """The plan for an unpatched tower.

        Raises:
            ValueError: a configuration that the tower does not support.
        """
        depth, tower = len(anatomy.layers), type(anatomy.tower).__name__
        if config.signal == "pixel" and anatomy.projection is None:
            raise ValueError(
                f"signal is 'pixel', which {tower} does not give in the order of its tokens; accepted is 'patch' or "
                "'embedding'"
            )
        mid_layer = depth // 2 - 1 if config.mid_layer is None else config.mid_layer
        if config.arch == "midlayer" and mid_layer >= depth - 1:
            raise ValueError(f"mid_layer is {mid_layer}; accepted is less than {depth - 1}, the last block")
        if config.arch == "active" and anatomy.needs_every_token:
            raise ValueError(
                f"arch is 'active'; {tower} makes a map of all patches, so accepted is one that keeps the others: "
                "'context', 'dual', 'midlayer' or 'mlp'"
            )
        if config.arch == "mlp" and not anatomy.mlps:
            raise ValueError(
                f"arch is 'mlp'; no MLP was found in {tower}'s blocks, so accepted are 'context', 'dual' and 'midlayer'"
            )
        # Attention in the last blocks best predicts what the pooled output reads from a patch.
        watched = depth - max(depth // 3, 1) if anatomy.prefix and config.score == "staleness" else depth
        return cls(
            anatomy,
            config,
            first_packed={"mlp": depth, "midlayer": mid_layer + 1}.get(config.arch, 0),
            final=depth - 1 if anatomy.last is anatomy.layers[-1] else None,
            watched=range(watched, depth),
            layer_of={module: layer for layer, module in enumerate(anatomy.attentions)},
            configs={} if anatomy.attention is not None else {module: module.config for module in anatomy.attentions},
        )

    def kept(self, asked: frozenset[int]) -> frozenset[int]:
        """Of the blocks whose output is wanted for all patches, those that need a cache besides the output's."""
        if self.config.arch == "active":
            return frozenset()
        return frozenset(layer for layer in asked if layer >= self.first_packed and layer != self.final)


def blocks_of_hidden_states(asked: bool | int | Iterable[int] | None, depth: int) -> set[int]:
    """The blocks that produce the hidden states asked for by `output_hidden_states`.

    Integers count hidden states, where 0 is the input of the first block, possibly from the end; in transformers up to
    at least 5.20 they count blocks.
    """
    if not asked or asked is True:
        return set(range(depth)) if asked else set()
    numbers = [asked] if isinstance(asked, int) else asked
    blocks = {block for number in numbers for block in ((number - 1, number) if number >= 0 else (number + depth,))}
    return blocks & set(range(depth))


@dataclasses.dataclass(frozen=True)
class FrameReport:
    """What a pass did with one frame.

    Args:
        stream: name of the frame's stream.
        key_frame: why every patch was encoded and the caches were refilled; None for a frame that used them. "first":
            the first of its stream. "gap": frames before it are missing. "size": another size, dtype, autocast setting
            or device. "weights": the model's weights changed. "outputs": other hidden states or feature maps were asked
            for. "failed": the frame before it did not get through the tower. "nonfinite": the frame before it held NaN
            or Inf. "age": `max_age` was reached. "cut": another scene, or another light. "dense": so much changed that
            a dense pass was faster.
        active: bool [rows, columns], the patches that were encoded.
        surprise: float32 [rows, columns], 1 - cosine between each patch and its reference, 0 to 2. inf where a patch
            holds NaN; NaN everywhere in a key frame, which has no reference to compare with.

    Example:
        >>> model = neuroflow.enable_cache(model)
        >>> output = model(pixel_values=frames)
        >>> [report.key_frame for report in neuroflow.last_pass(model)][:2]
        ['first', None]
    """

    stream: Hashable
    key_frame: KeyFrame | None
    active: torch.Tensor
    surprise: torch.Tensor

    @classmethod
    def of(cls, state: StreamState, key_frame: KeyFrame | None) -> Self:
        """Report on the last frame of a stream."""
        maps = (values.view(state.grid).clone() for values in (state.active, state.surprise))
        return cls(state.name, key_frame, *maps)

    @property
    def skipped(self) -> float:
        """Share of patches that were not encoded, 0 to 1."""
        return 1 - self.active.sum().item() / self.active.numel()


def split(values: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    """Values of several streams, in a batch or end to end, as [1, count, D] each, without padding."""
    rows = values.flatten(0, -2)
    if rows.shape[0] == sum(counts):
        return [part[None] for part in rows.split(counts)]
    return [part[None, :count] for part, count in zip(values.flatten(1, -2), counts, strict=True)]


def for_each_query(heads: torch.Tensor, queries: torch.Tensor, dim: int) -> torch.Tensor:
    """Repeat keys or values along `dim` so that each query head has its own; queries may share heads."""
    groups = queries.shape[dim] // heads.shape[dim]
    return heads if groups == 1 else heads.repeat_interleave(groups, dim)


def is_parallel(device: torch.device) -> bool:
    """Whether entries of a clip are attended from at once. A CPU does them in turn, to stay in its cache."""
    return device.type == "cuda"


class Pass:
    """One pass through a tower: a ragged list of entries, each of which is one frame of one stream.

    A live frame is one entry. One frame from each of S cameras is S entries. A clip of T frames is T entries of one
    stream, in time order. Tokens come from the tower as [E, T, D], [E, rows, columns, D] or end to end as [sum of T, D]
    or [1, sum of T, D]. Packed they are [1, M, D], the active tokens of one entry after another.

    Args:
        plan: the tower's.
        states: the stream state of each entry.
        grids: (rows, columns) of patches of each entry.
        order: for each entry, as in `Anatomy.order`.
        asked: indices of the blocks whose output is wanted for all tokens.
        gaps: for each entry, whether frames are missing before it.
        nameless: its streams are clips that end with the call.
        kernels: the tower's, which outlive the pass.
    """

    def __init__(
        self,
        plan: Plan,
        states: list[StreamState],
        grids: list[Grid],
        order: list[torch.Tensor] | None = None,
        asked: frozenset[int] = frozenset(),
        gaps: list[bool] | None = None,
        nameless: bool = False,
        kernels: Kernels | None = None,
    ) -> None:
        self.plan = plan
        self.states = states
        self.grids = grids
        self.order = order
        self.asked = asked
        self.nameless = nameless
        self.kernels = kernels or Kernels(plan.config.kernels)
        self.entered: set[str] = set()  # methods of the tower called so far
        self.due: dict[int, KeyFrame | None] = {}  # by id of a state, why its next entry must be a key frame
        self.surprises: list[torch.Tensor] | None = None  # [N] of each entry, if known in advance
        self.gaps = gaps or [False] * len(states)
        last = {id(state): entry for entry, state in enumerate(states)}
        # For each entry, whether another one of its stream follows.
        self.followed = [last[id(state)] != entry for entry, state in enumerate(states)]
        self.patches = [rows * columns for rows, columns in grids]  # of each entry
        others = plan.anatomy.prefix + plan.anatomy.suffix
        self.counts = [others + count for count in self.patches]  # of tokens
        self.projected: torch.Tensor | None = None
        self.pixels: torch.Tensor | None = None  # [S, N, values of a patch]
        self.colours: list[torch.Tensor] | None = None  # [1, N, 3] of each entry, patch means
        # By argument name, in the last block: the value for all tokens, and for packed ones.
        self.positions: dict[str, tuple[Any, Any]] = {}
        self.blocks = 0  # number of blocks run so far
        self.last_shown: tuple[torch.Tensor, torch.Tensor] | None = None  # result of `shown`, and its packed tokens
        self.versions: dict[Hashable, list[torch.Tensor]] = {}  # caches as each entry left them
        self.attention: list[torch.Tensor | None] = [None] * len(states)  # [N] of each entry, received by its patches
        self.finite = [True] * len(states)
        self.reports: list[FrameReport | None] = [None] * len(states)
        # For each entry, tokens that switch to their next version, and its packed rows; see `reuse.nearest`.
        self.early: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(states)
        self.table: torch.Tensor | None = None  # from `_table`, if entries of a stream are attended from at once
        self.going_on: list[StreamState] = []  # streams with caches from earlier passes
        self.whole: list[bool] = []  # for each entry, whether all its tokens are encoded
        self.padded = False  # some rows of the batch are padding
        self.partial = False  # some of its rows are not encoded
        self.packed = False  # the residual stream holds active tokens only
        self.measured = False  # partial products go through `kernels`
        self.rounded = False  # packed tokens are multiplied in bfloat16
        self.part: bool | None = None  # whether the current entries are whole; None: mixed
        self.unmeasured: Hashable = None  # size of this pass, if its crossover is to be measured
        self.first_block: tuple[torch.Tensor, Callable] | None = None  # for that measurement: its tokens, and the block

    def select(self, active: list[torch.Tensor | None], tokens: torch.Tensor) -> None:
        """Set each entry's active tokens among `tokens`: int32 rows of its T, or None for all of them."""
        self.shape = tokens.shape
        self.rounded = self._rounds(tokens)
        self.whole = [rows is None for rows in active]
        width = tokens.shape[1:-1].numel()  # rows per entry, if `tokens` is a batch
        is_batch = tokens.ndim > 2 and len(tokens) == len(self.counts)
        self.starts = [stream * width if is_batch else sum(self.counts[:stream]) for stream in range(len(self.counts))]
        self.padded = is_batch and any(count != width for count in self.counts)
        self.partial = self.padded or any(rows is not None for rows in active)
        if not self.partial:
            return
        self.active = active
        self.measured = self.chooses(tokens)
        device = tokens.device
        self.rows = [
            torch.arange(count, dtype=torch.int32, device=device) if chosen is None else chosen
            for count, chosen in zip(self.counts, active, strict=True)
        ]
        self.lengths = [chosen.numel() for chosen in self.rows]
        self.offsets = [0, *itertools.accumulate(self.lengths)]
        self.index = torch.cat([chosen + start for start, chosen in zip(self.starts, self.rows, strict=True)])
        self.cu_seqlens = torch.tensor(self.offsets, dtype=torch.int32, device=device)
        # What each entry writes to the caches: its own rows, and next versions used early.
        self.into = [
            rows if early is None else torch.cat((rows, early[0]))
            for rows, early in zip(self.rows, self.early, strict=True)
        ]
        self.ends = torch.tensor([[0, rows.numel()] for rows in self.into], dtype=torch.int32, device=device)
        together = any(self.followed) and len(set(self.counts)) == 1 and not self.rounded
        if self.plan.config.arch == "context" and together and is_parallel(device):
            self.table = self._table(device)

    @contextmanager
    def only(self, whole: bool) -> Iterator[None]:
        """Restrict the block to entries that are encoded whole, or to those that are not."""
        self.part = whole
        try:
            yield
        finally:
            self.part = None

    def rounds(self) -> list[list[int]]:
        """Indices of entries that may be gated together: the first of every stream, then the second, and so on."""
        rounds: list[list[int]] = []
        turns: Counter[int] = Counter()
        for entry, state in enumerate(self.states):
            if turns[id(state)] == len(rounds):
                rounds.append([])
            rounds[turns[id(state)]].append(entry)
            turns[id(state)] += 1
        return rounds

    def complete(self) -> None:
        """Let the next frame of every stream use its last one here, unless that held NaN or Inf."""
        for state, finite in zip(self.states, self.finite, strict=True):
            state.key_frame_due = None if finite else "nonfinite"

    def _rounds(self, tokens: torch.Tensor) -> bool:
        return self.plan.config.precision == "bfloat16" and tokens.dtype == torch.float32

    def chooses(self, tokens: torch.Tensor) -> bool:
        """Whether products of these tokens go through `kernels`."""
        return self.plan.config.kernels != "torch" and is_choice(tokens)

    def runs(self, rows: int) -> list[tuple[bool, int]]:
        """Split rows, of all tokens or of active ones, into runs: (whole, number of rows) for consecutive entries."""
        if rows == self.index.numel():
            lengths = self.lengths
        else:
            is_batch = len(self.shape) > 2 and self.shape[0] == len(self.states)
            lengths = [rows // len(self.states)] * len(self.states) if is_batch else self.counts
        streams = itertools.groupby(zip(self.whole, lengths, strict=True), operator.itemgetter(0))
        return [(whole, sum(length for _, length in of)) for whole, of in streams]

    def pack(self, tokens: torch.Tensor) -> torch.Tensor:
        """All tokens -> [1, M, D]."""
        return gather_rows(tokens.flatten(0, -2)[None], self.index, self.cu_seqlens, self.index.numel())[None]

    def shown(self, name: Hashable, tokens: torch.Tensor) -> torch.Tensor:
        """Packed tokens merged into the cache `name`, or padded if nothing is cached; see `repacked`."""
        everything = self.pad(tokens) if self.plan.config.arch == "active" else self.restored(name)
        self.last_shown = everything, tokens
        return everything

    def repacked(self, tokens: torch.Tensor) -> torch.Tensor:
        """The packed tokens behind `tokens`, if these are the ones last returned by `shown`."""
        everything, packed = self.last_shown or (None, None)
        return packed if tokens is everything else tokens

    def pack_positions(self, name: str, pack: Callable[[Any, Callable], Any], value: Any) -> Any:
        """The value of one of `Anatomy.positions` for the packed tokens."""
        if name not in self.positions or self.positions[name][0] is not value:
            self.positions[name] = value, pack(value, self._take)
        return self.positions[name][1]

    def _take(self, table: torch.Tensor | None, fill: float) -> torch.Tensor:
        """The packed tokens' rows of a table for one entry or all, with or without rows for the prefix.

        For None, their indices among all tokens of their entry.
        """
        if table is None:
            return torch.cat(self.rows)
        entries, prefix, rows = len(self.states), self.plan.anatomy.prefix, self.shape[:-1].numel()
        if len(table) == rows:
            return table[self.index]
        if len(table) in (rows - entries * prefix, self.counts[0] - prefix) and prefix:
            table = table.unflatten(0, (-1, self.counts[0] - prefix))
            table = nn.functional.pad(table, (*(0, 0) * (table.ndim - 2), prefix, 0), value=fill).flatten(0, 1)
        return table[self.index if len(table) == rows else torch.cat(self.rows)]

    def heads(self, heads: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys or values of all streams as [1, heads, rows, head_dim] each."""
        lengths = self.lengths if self.packed else self.counts
        if lengths == [heads.shape[2]]:
            return [heads]
        if not self.packed and heads.shape[0] == len(lengths):
            return [part[:, :, :length] for part, length in zip(heads.split(1), lengths, strict=True)]
        return list(heads.split(lengths, 2))

    def brought(self, values: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """From packed values with rows along `dim`, those that each entry writes to the caches."""
        if len(self.lengths) == 1 and self.early[0] is None:
            return [values]
        parts = list(values.split(self.lengths, dim))
        for entry, early in enumerate(self.early):
            if early is not None:
                parts[entry] = torch.cat((parts[entry], values.index_select(dim, early[1])), dim)
        return parts

    def store(self, name: Hashable, tokens: torch.Tensor, blend: float = 1.0) -> None:
        """Update the cache `name` with every entry in turn, from all tokens, or from [1, M, D] in a partial pass."""
        if not self.partial:
            for state, fresh in zip(self.states, split(tokens, self.counts), strict=True):
                state.put(name, fresh)
            return
        versions = []
        for entry, (state, fresh) in enumerate(zip(self.states, self.brought(tokens, 1), strict=True)):
            if self.active[entry] is None:
                state.put(name, fresh)
            else:
                cache, prefix, suffix = state.tensors[name], self.plan.anatomy.prefix, self.plan.anatomy.suffix
                scatter_rows_(cache, fresh[0], self.into[entry], self.ends[entry], blend)
                if blend < 1:  # CLS and registers follow every frame
                    cache[:, :prefix] = fresh[:, :prefix]
                    own = fresh[:, : self.lengths[entry]]
                    cache[:, cache.shape[1] - suffix :] = own[:, own.shape[1] - suffix :]
            versions.append(state.tensors[name].clone() if self.followed[entry] else state.tensors[name])
        self.versions[name] = versions

    def store_heads(self, layer: int, entry: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Update a block's cached keys and values with one entry's, [1, heads, rows, head_dim]."""
        state, active = self.states[entry], self.active[entry] if self.partial else None
        if self.rounded and key.dtype == torch.float32:
            key, value = key.bfloat16(), value.bfloat16()
        if active is None:
            for name, heads in (("key", key), ("value", value)):
                state.put((name, layer), heads.transpose(1, 2).flatten(2))
        else:
            rows = (heads[0].transpose(0, 1) for heads in (key, value))  # [M, heads, head_dim]
            caches = state.tensors["key", layer], state.tensors["value", layer]
            scatter_kv_(*caches, *rows, self.into[entry], self.ends[entry])

    def _table(self, device: torch.device) -> torch.Tensor:
        """Where the keys and values of each entry's tokens are, [E, T] int32.

        Rows count through the caches of the continuing streams, one after another, then through the packed rows.
        """
        tokens, first = self.counts[0], self.rounds()[0]
        self.going_on = [self.states[entry] for entry in first if not self.whole[entry]]
        numbers = torch.arange(tokens, dtype=torch.int32, device=device)
        lies = {id(state): numbers + tokens * place for place, state in enumerate(self.going_on)}
        packed = torch.arange(self.index.numel(), dtype=torch.int32, device=device) + tokens * len(self.going_on)
        table = []
        for state, into, rows in zip(self.states, self.into, self.brought(packed, 0), strict=True):
            lies[id(state)] = lies.get(id(state), numbers).index_copy(0, into.long(), rows)
            table.append(lies[id(state)])
        return torch.stack(table)

    def attend_versions(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Attention of packed queries to what each entry's stream holds at that time, all [1, heads, M, head_dim].

        Leaves the block's cached keys and values as the last entry of each stream has them.
        """
        rows = []
        for name, fresh in (("key", key), ("value", value)):
            caches = [state.tensors[name, layer][0].unflatten(1, (key.shape[1], -1)) for state in self.going_on]
            rows.append(torch.cat((*caches, fresh[0].transpose(0, 1))))  # [R, heads, head_dim]
        queries = query[0].transpose(0, 1)
        of_heads = (for_each_query(each, queries, 1) for each in rows)
        attended = attend_versions(queries, *of_heads, self.table, self.cu_seqlens, scaling)[None]
        for state, followed, table in zip(self.states, self.followed, self.table, strict=True):
            if not followed:
                for name, held in zip(("key", "value"), rows, strict=True):
                    state.put((name, layer), held[table.long()].flatten(1)[None])
        return attended

    def add_attention(self, attention: list[torch.Tensor], first: int = 0) -> None:
        """Add the pooled output's attention to the patches of entries from `first` on, [N] each."""
        for stream, paid in enumerate(attention, first):
            before = self.attention[stream]
            self.attention[stream] = paid if before is None else before + paid

    def add_cls_attention(self, query: torch.Tensor, keys: torch.Tensor, scaling: float, first: int = 0) -> None:
        """Add CLS attention, query [S, heads, head_dim], to keys [S, heads, T, head_dim] of entries from `first` on."""
        keys = for_each_query(keys, query, 1)
        self.add_attention(list(cls_attention(query, keys, scaling, self.plan.anatomy.prefix)), first)

    def restored(self, name: Hashable) -> torch.Tensor:
        """The cache `name` as each entry left it, in the shape of the tower's tokens, padded with zeros.

        This is a copy: callers may keep it while the caches change.
        """
        caches = self.versions.pop(name)
        if not self.padded:
            return torch.cat(caches, 1).unflatten(1, self.shape[:-1])[0]
        tokens = caches[0].new_zeros(self.shape)
        for row, cache in zip(tokens.flatten(1, -2), caches, strict=True):
            row[: cache.shape[1]] = cache[0]
        return tokens

    def pad(self, tokens: torch.Tensor) -> torch.Tensor:
        """[1, M, D] -> [S, longest, D], padded with zeros."""
        return nn.utils.rnn.pad_sequence(tokens[0].split(self.lengths), batch_first=True)


current_pass: ContextVar[Pass | None] = ContextVar("neuroflow_pass", default=None)
Result = TypeVar("Result")


def within(variable: ContextVar, value: Any, work: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
    """Call `work` with `variable` set to `value`; an interrupt leaves nothing to restore."""
    context = copy_context()
    context.run(variable.set, value)
    return context.run(work, *args, **kwargs)


class Unrecordable(Exception):
    """Why a pass cannot be recorded."""


class StaticPass(Pass):
    """A partial pass whose shapes are known in advance; only the device knows which tokens belong to which stream.

    Args:
        slab: of `states`, whose frames form a batch of one size.
        gate: function (this pass, all tokens in front of the first block) -> the tokens to continue with, after `take`.
    """

    def __init__(
        self,
        plan: Plan,
        states: list[StreamState],
        grids: list[Grid],
        slab: Slab,
        gate: Callable[["StaticPass", torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__(plan, states, grids)
        self.slab = slab
        self.gate = gate
        self.seen: torch.Tensor | None = None  # [S, N], attention received by the patches
        self.mask: torch.Tensor | None = None  # by `same_stream`

    def take(self, index: torch.Tensor, cu_seqlens: torch.Tensor, tokens: torch.Tensor) -> None:
        """Select the patches `index` of all streams, rows of [S * N], and every stream's prefix among `tokens`."""
        prefix, streams, patches = self.plan.anatomy.prefix, len(self.states), self.patches[0]
        self.shape = tokens.shape
        self.rounded = self._rounds(tokens)
        self.partial = True
        self.whole = [False] * streams
        self.measured = self.chooses(tokens)
        self.cu_seqlens, self.index = cu_seqlens, index
        if prefix:
            numbers = torch.arange(streams + 1, dtype=torch.int32, device=index.device)
            own = torch.arange(prefix, dtype=torch.int32, device=index.device)
            self.cu_seqlens = cu_seqlens + prefix * numbers
            leading = (numbers[:-1, None] * self.counts[0] + own).flatten()
            self.index = torch.cat((leading, index + prefix * (index // patches + 1)))
            if streams > 1:
                self.index = self.index.sort().values
        self.rows = [self.index % self.counts[0]]
        self.lengths = [self.index.numel()]  # of all streams together

    def store(self, name: Hashable, tokens: torch.Tensor, blend: float = 1.0) -> None:
        cache = self.slab.caches[name]
        scatter_rows_(cache, tokens[0], self.index, self.cu_seqlens, blend)
        if blend < 1 and self.plan.anatomy.prefix:
            own = torch.arange(self.plan.anatomy.prefix, device=cache.device)
            cache[:, : len(own)] = tokens[0][self.cu_seqlens[:-1, None] + own]

    def store_all_heads(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Update a block's cached keys and values, [1, heads, M, head_dim]."""
        caches = self.slab.caches["key", layer], self.slab.caches["value", layer]
        scatter_kv_(*caches, key[0].transpose(0, 1), value[0].transpose(0, 1), self.index, self.cu_seqlens)

    def restored(self, name: Hashable) -> torch.Tensor:
        return self.slab.caches[name].view(self.shape)  # the output is copied as a whole

    def add_attention(self, attention: list[torch.Tensor], first: int = 0) -> None:
        paid = torch.stack(attention)
        self.seen = paid if self.seen is None else self.seen + paid

    def attend_cached(self, query: torch.Tensor, layer: int, watched: bool, scaling: float | None) -> torch.Tensor:
        """Attention of the active queries [1, heads, M, head_dim] to all cached tokens of their stream."""
        caches = (self.slab.caches[name, layer].unflatten(2, (-1, query.shape[3])) for name in ("key", "value"))
        key, value = (for_each_query(cache, query.transpose(1, 2), 2) for cache in caches)
        rows = query[0].transpose(0, 1)  # [M, heads, head_dim]
        if watched:
            self.add_cls_attention(rows[self.cu_seqlens[:-1]], key.transpose(1, 2), scaling)
        return attend_rows(rows, key, value, scaling, self.cu_seqlens)[None]

    def same_stream(self) -> torch.Tensor | None:
        """Which packed tokens see each other, [1, 1, M, M]; None: all."""
        if len(self.states) == 1:
            return None
        if self.mask is None:
            slots = torch.arange(self.index.numel(), dtype=torch.int32, device=self.index.device)
            stream = torch.searchsorted(self.cu_seqlens, slots, right=True)
            self.mask = (stream[:, None] == stream)[None, None]
        return self.mask

    def pad(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens  # of one stream

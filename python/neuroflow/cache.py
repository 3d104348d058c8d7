"""The engine: which patches of a frame are encoded, and what the others contribute.

A patched tower runs its own forward. The engine stands at a few points of it: it reads the patch projection, packs the
active tokens in front of a block [S, T, D] -> [1, M, D], serves attention and MLP from caches, and scatters the encoded
tokens back after the last module that takes each by itself, and after blocks whose output is wanted of all patches (as
hidden states or feature maps). An architecture is a choice of points:

    mlp       packs in front of each MLP and restores after it
    active    packs in front of the first block; the rest is gone
    dual      packs in front of the first block, restores the output
    midlayer  packs in front of a middle block, restores the output
    context   as dual; each block's keys and values of all tokens are kept and attended to

With every patch active nothing is packed and the tower runs as it would unpatched, while the caches are filled. On a
CPU packed tokens go through `linear_rows` and `attend_rows` where those have fast kernels.
"""

import contextlib
import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from neuroflow_kernels import attend_rows, compact, ema_surprise_, gather_rows, linear_rows, scatter_rows_

from . import crossover, graphs, policies
from .adapters import Anatomy, Grid
from .adapters.anatomy import by_name
from .config import NeuroFlowConfig
from .frame import Frame, StaticFrame, Unrecordable, current_frame, split
from .rewrites import (
    are_few,
    attention_pool,
    fold_head,
    in_bfloat16,
    is_foldable,
    is_linear,
    is_patch_projection,
    patch_windows,
    project_windows,
)
from .state import Seen, Size, StreamState, copied
from .streams import StreamCache

ATTENTION = "neuroflow"
DEFAULT_STREAM = "default"
DENSE_PROJECTION = 0.75  # of the patches; above it, picking out the changed ones gains nothing


def blocks_of_hidden_states(asked: bool | int | Iterable[int] | None, depth: int) -> set[int]:
    """The blocks that give the hidden states which `output_hidden_states` asks for.

    That may be numbers: of hidden states, of which 0 is what the first block takes, also counted from the last; up to
    transformers 5.20 at least, of blocks.
    """
    if not asked or asked is True:
        return set(range(depth)) if asked else set()
    numbers = [asked] if isinstance(asked, int) else asked
    blocks = {block for number in numbers for block in ((number - 1, number) if number >= 0 else (number + depth,))}
    return blocks & set(range(depth))


class Engine:
    """The streams of one patched tower, and the functions that stand at its points.

    What is of a partial frame goes through the `twins` of modules that have one.

    Every `on_*` method takes the original forward of its point first. Outside of a pass through the tower
    (`current_frame` is None) it only calls that, so that parts of a patched model used by themselves behave as before.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        config: NeuroFlowConfig,
        streams: StreamCache,
        twins: Mapping[nn.Module, nn.Module] | None = None,
    ) -> None:
        depth = len(anatomy.layers)
        self.anatomy = anatomy
        self.config = config
        self.twins = twins or {}
        self.weights: Path | None = None  # where those of the twins are from
        if config.signal == "pixel" and anatomy.projection is None:
            raise ValueError(
                f"signal is 'pixel', which {type(anatomy.tower).__name__} does not show in the order of its tokens; "
                "accepted is 'patch' or 'embedding'"
            )
        # A frame without any token has no output; where it is a CLS token's it needs no patch.
        self.floor = max(config.floor, 0 if anatomy.prefix and anatomy.pool is None else 1)
        self.mid_layer = depth // 2 - 1 if config.mid_layer is None else config.mid_layer
        if config.arch == "midlayer" and self.mid_layer >= depth - 1:
            raise ValueError(f"mid_layer is {self.mid_layer}; accepted is less than {depth - 1}, the last block")
        if config.arch == "active" and anatomy.needs_every_token:
            raise ValueError(
                f"arch is 'active'; {type(anatomy.tower).__name__} makes a map of all patches, so accepted is one that "
                "serves the others too: 'context', 'dual', 'midlayer' or 'mlp'"
            )
        # Blocks before this one run on all tokens; the output of the last may be all that the rest of the tower sees.
        self.first_packed = {"mlp": depth, "midlayer": self.mid_layer + 1}.get(config.arch, 0)
        self.final = depth - 1 if anatomy.last is anatomy.layers[-1] else None
        # What the pooled output reads in the last blocks tells best what it reads of a patch altogether.
        self.watched = (
            range(depth - max(depth // 3, 1), depth) if anatomy.prefix and config.score == "staleness" else ()
        )
        self.signatures = {entry: inspect.signature(getattr(anatomy.tower, entry)) for entry in anatomy.entries}
        self.layer_of = {module: layer for layer, module in enumerate(anatomy.attentions)}
        self.configs: dict[nn.Module, Any] = {}  # of attentions that call transformers' interface, the model's own
        self.adopted = False  # patched by itself, as its attention implementation asked for
        self.kept: dict[Hashable, tuple[list, Any]] = {}  # by `derived`
        self.ladders: dict[torch.device, torch.Tensor] = {}
        self.graphs = graphs.Graphs(self) if config.engine == "graph" else None
        self.crossovers: dict[Size, float] = {}  # those that are known
        self.streams = streams
        self.named: ContextVar[tuple[Hashable, ...]] = ContextVar("neuroflow_streams", default=(DEFAULT_STREAM,))
        self.numbered: ContextVar[tuple[int, ...] | None] = ContextVar("neuroflow_frame_ids", default=None)
        self.unpatched: ContextVar[bool] = ContextVar("neuroflow_unpatched", default=False)
        self._warned: set[str] = set()

    def points(self) -> list[tuple[nn.Module, str, Callable]]:
        """(module, method, replacement that takes the original first) for everything this architecture needs."""
        anatomy, arch = self.anatomy, self.config.arch
        points: list[tuple[nn.Module, str, Callable]] = []
        for entry in anatomy.entries:
            points.append((anatomy.tower, entry, lambda *args, entry=entry, **kw: self.on_tower(entry, *args, **kw)))
        for module, method, override in anatomy.overrides:  # of blocks too: inside of all that follows
            points.append((module, method, lambda *args, to=override, **kwargs: self.on_override(to, *args, **kwargs)))
        if anatomy.rotary is not None:  # inside of what packs
            points += [(layer, "forward", self.on_rotary) for layer in anatomy.layers]
        for layer, block in enumerate(anatomy.layers):
            points.append((block, "forward", lambda *args, layer=layer, **kw: self.on_layer(layer, *args, **kw)))
        if anatomy.projection is not None:
            points.append((anatomy.projection, "forward", self.on_projection))
        for table in anatomy.tables:
            points.append((*table, lambda *args, table=table, **kw: self.on_table(table, *args, **kw)))
        with_linears = [*anatomy.layers]
        if anatomy.pool is not None:
            points.append((*anatomy.pool, self.on_pool))
            heads = [anatomy.pool[0], self.twins.get(anatomy.pool[0])]
            with_linears += [head for head in heads if head is not None and is_foldable(head)]
        for part in with_linears:
            for module in part.modules():
                if is_linear(module):
                    points.append((module, "forward", lambda *args, module=module: self.on_linear(module, *args)))
        for module, twin in self.twins.items():
            if anatomy.pool is None or module is not anatomy.pool[0]:
                partial = functools.partial(self.on_linear, twin, twin.forward) if is_linear(twin) else twin.forward
                points.append((module, "forward", lambda *args, partial=partial: self.on_twin(partial, *args)))
        if anatomy.attention is not None:
            for module in anatomy.attentions:
                points.append(
                    (module, "forward", lambda *args, module=module, **kw: self.on_attention(module, *args, **kw))
                )
        if arch == "mlp":
            for layer, (first, last) in enumerate(anatomy.mlps):
                points.append((first, "forward", self.on_mlp_input))
                points.append((last, "forward", lambda *args, layer=layer: self.on_mlp_output(layer, *args)))
        elif self.final is None:
            points.append((anatomy.last, "forward", self.on_last))
        return points

    @property
    def decay(self) -> float:
        """Weight of the new frame in the reference, for patches that it does not encode."""
        return {"refreshed": 0.0, "previous": 1.0}.get(self.config.reference, self.config.ema_decay)

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"neuroflow: {message}", RuntimeWarning, stacklevel=2)

    @contextlib.contextmanager
    def runs_unpatched(self) -> Iterator[None]:
        """A block in which the tower is meant to run as it would unpatched."""
        token = self.unpatched.set(True)
        try:
            yield
        finally:
            self.unpatched.reset(token)

    @torch.compiler.disable(reason="which patches are encoded, and so every shape, is decided frame by frame")
    def on_tower(self, entry: str, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if current_frame.get() is not None and current_frame.get().engine is self:
            return forward(*args, **kwargs)  # one entry calls another
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "a patched model cannot be exported, as which patches are encoded is decided frame by frame; call "
                "neuroflow.disable_cache first"
            )
        signature, names = self.signatures[entry], self.named.get()
        bound = signature.bind(*args, **kwargs)
        arguments = by_name(bound)
        name = next(iter(signature.parameters))
        if not isinstance(arguments.get(name), torch.Tensor):
            raise ValueError(f"{name} is {arguments.get(name)!r}; accepted is a tensor, one frame of each stream")
        grids, read = self.anatomy.grids(arguments), frozenset(self.anatomy.reads(arguments))
        if self.config.arch == "active" and read:
            self.warn_once("arch 'active' has no feature maps of all patches; calls that ask for them run unpatched")
            with self.runs_unpatched():
                return forward(*args, **kwargs)
        if len(grids) != len(names):
            if self.adopted and names == (DEFAULT_STREAM,):
                self.warn_once(f"{name} holds {len(grids)} frames of streams without names; such batches run unpatched")
                with self.runs_unpatched():
                    return forward(*args, **kwargs)
            raise ValueError(
                f"{name} holds {len(grids)} frames, and the context names {len(names)} stream(s); accepted is one "
                "frame of each stream: neuroflow.encode(model, pixels, stream_ids=[...]) names them"
            )
        order = None if self.anatomy.order is None else self.anatomy.order(arguments)
        hidden = arguments.get("output_hidden_states")
        if hidden is None:
            hidden = getattr(getattr(self.anatomy.tower, "config", None), "output_hidden_states", None)
        asked = read | blocks_of_hidden_states(hidden, len(self.anatomy.layers))
        with self.streams.used(names, [rows * columns for rows, columns in grids]) as states, torch.no_grad():
            self._note_gaps(states)
            self._note_asked(states, asked)
            surprises = None
            if self.graphs is not None:
                output, surprises = self.graphs.run(entry, forward, bound, arguments, states, grids, asked)
                if output is not None:
                    return output
            frame = Frame(self, states, grids, order, surprises, asked)
            token = current_frame.set(frame)
            try:
                output = forward(*args, **kwargs)
            finally:
                current_frame.reset(token)
            whole = frame.blocks == len(self.anatomy.layers)
            if not whole:
                self.warn_once(
                    f"a frame went through {frame.blocks} of {len(self.anatomy.layers)} blocks, so that later blocks "
                    "know nothing of it; the one after it is a key frame"
                )
            for state, finite, attention in zip(states, frame.finite, frame.attention, strict=True):
                state.valid = finite and whole
                if attention is not None:
                    state.heed(attention)
        if frame.unmeasured is not None:
            self.crossovers[frame.unmeasured] = crossover.measure(frame, *frame.first_block)
        return output

    def _note_gaps(self, states: list[StreamState]) -> None:
        """A frame that does not follow the last one of its stream is a key frame."""
        frame_ids = self.numbered.get()
        if frame_ids is None:
            return
        for state, frame_id in zip(states, frame_ids, strict=True):
            if state.valid and state.frame_id is not None and frame_id != state.frame_id + 1:
                state.valid = False
                self.warn_once(
                    f"stream {state.name!r}: frames are missing or out of order; what follows is a key frame"
                )
            state.frame_id = frame_id

    def _kept(self, asked: frozenset[int]) -> frozenset[int]:
        """Of the blocks whose output is wanted of all patches, those that a cache is kept for beside the output's."""
        if self.config.arch == "active":
            return frozenset()
        return frozenset(layer for layer in asked if layer >= self.first_packed and layer != self.final)

    def _note_asked(self, states: list[StreamState], asked: frozenset[int]) -> None:
        """A frame of which other blocks' output is wanted than of the last one of its stream is a key frame."""
        kept = self._kept(asked)
        for state in states:
            if state.signature is not None and state.hidden != kept:
                state.valid = False
                self.warn_once(
                    f"stream {state.name!r}: other hidden states or feature maps are asked for than of its last frame; "
                    "it starts over with a key frame"
                )

    def on_projection(self, forward: Callable, pixels: torch.Tensor) -> torch.Tensor:
        frame = current_frame.get()
        if frame is None:
            return forward(pixels)
        projection = self.anatomy.projection
        if not is_patch_projection(projection):
            frame.projected, frame.pixels = forward(pixels), pixels
            return frame.projected
        windows = [patch_windows(projection, image) for image in pixels.split(1)]  # [1, N, values] each
        if self.config.signal == "pixel":
            frame.pixels = torch.cat(windows)
        rows = [self._project(*of) for of in zip(frame.states, windows, strict=True)]  # [1, N, D] each
        projected = rows[0] if len(rows) == 1 else torch.cat(rows)
        counts = [length // size for length, size in zip(pixels.shape[2:], projection.kernel_size, strict=True)]
        frame.projected = projected.transpose(1, 2).unflatten(2, counts)
        return frame.projected

    def _project(self, state: StreamState, windows: torch.Tensor) -> torch.Tensor:
        """One stream's patches [1, N, values] projected to [1, N, D]; those with the last frame's pixels were already.

        Only on the CPU: a GPU would be waited for, and loses little by projecting all.
        """
        projection = self.anatomy.projection
        if windows.device.type != "cpu":
            return project_windows(projection, windows)
        weights = self.derived(projection, "projection", object)  # another object for other weights
        seen, state.seen = state.seen, None
        if seen is None or seen.windows.shape != windows.shape or seen.windows.dtype != windows.dtype:
            seen = Seen(None, None, None)
        changed = policies.changed(seen.windows, windows) if seen.weights is weights else None
        kept, projected = seen.windows, seen.projected
        if changed is None or changed.numel() > DENSE_PROJECTION * windows.shape[1]:
            kept, projected = copied(windows, kept), copied(project_windows(projection, windows), projected)
        elif changed.numel():
            ends = torch.tensor([0, changed.numel()], dtype=torch.int32)
            fresh = gather_rows(windows, changed, ends, changed.numel())
            scatter_rows_(kept, fresh, changed, ends)
            scatter_rows_(projected, project_windows(projection, fresh), changed, ends)
        state.seen = Seen(kept, projected, weights)
        return projected

    def on_table(self, table: tuple[nn.Module, str], compute: Callable, *args: Any, **kwargs: Any) -> Any:
        if current_frame.get() is None:
            return compute(*args, **kwargs)
        given = [*args, *kwargs.items()]
        shapes = [(arg.shape, arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in given]
        return self.derived(table[0], (*table, *shapes), lambda: compute(*args, **kwargs))

    def on_override(self, override: Callable, original: Callable, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if current_frame.get() is None else override(original, *args, **kwargs)

    def on_rotary(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        frame, name = current_frame.get(), self.anatomy.rotary[0]
        if frame is not None and frame.packed and kwargs.get(name) is not None:
            kwargs[name] = frame.pack_positions(kwargs[name])
        return forward(*args, **kwargs)

    def on_attention(self, module: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        frame = current_frame.get()
        if frame is None:
            return forward(*args, **kwargs)
        return self.anatomy.attention(
            module, functools.partial(self.attend, frame, module, is_causal=False), *args, **kwargs
        )

    def derived(self, module: nn.Module, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` makes of the weights of `module`: kept until they change."""
        tensors = [*module.parameters(), *module.buffers()]
        if any(tensor.is_inference() for tensor in tensors):
            return compute()  # such weights do not count their changes
        weights = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if self.kept.get(key, (None,))[0] != weights:
            self.kept[key] = weights, compute()
        return self.kept[key][1]

    def on_layer(self, layer: int, forward: Callable, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        frame = current_frame.get()
        if frame is None:
            if layer == 0 and not self.unpatched.get():
                self.warn_once(
                    f"{type(self.anatomy.tower).__name__} is patched, and frames went past what is: accepted are calls "
                    f"of its {', '.join(self.anatomy.entries)}; others run as without a patch"
                )
            return forward(tokens, *args, **kwargs)
        if layer == 0:
            if isinstance(frame, StaticFrame):
                tokens = frame.gate(frame, tokens)
            else:
                self._gate(frame, tokens)
                if frame.unmeasured is not None:
                    frame.first_block = tokens, lambda tokens: forward(tokens, *args, **kwargs)
        if layer == self.first_packed and frame.partial:
            frame.packed, tokens = True, frame.pack(tokens)
        elif frame.packed:
            tokens = frame.repacked(tokens)
        frame.blocks = layer + 1
        result = forward(tokens, *args, **kwargs)
        if layer >= self.first_packed and layer in (*frame.asked, self.final):
            return self._of_all(frame, "output" if layer == self.final else ("hidden", layer), result)
        return result

    def on_linear(self, module: nn.Linear, forward: Callable, tokens: torch.Tensor) -> torch.Tensor:
        frame = current_frame.get()
        if frame is None:
            return forward(tokens)
        rounded, few = frame.packed and frame.rounded, frame.row_kernels and are_few(tokens)
        if not rounded and not few:
            return forward(tokens)
        rows, weight, bias = tokens.flatten(0, -2), module.weight, module.bias
        if rounded:
            rows = rows.bfloat16()
            weight, bias = self.derived(module, (module, "rounded"), lambda: in_bfloat16(module))
        product = linear_rows(rows, weight, bias) if few else nn.functional.linear(rows, weight, bias)
        return product.to(tokens.dtype).unflatten(0, tokens.shape[:-1])

    def on_twin(self, partial: Callable, forward: Callable, tokens: torch.Tensor) -> torch.Tensor:
        frame = current_frame.get()
        if frame is None or all(frame.whole):
            return forward(tokens)
        if not any(frame.whole):
            return partial(tokens)
        rows = tokens.flatten(0, -2)
        runs = frame.runs(len(rows))
        parts = zip(runs, rows.split([count for _, count in runs]), strict=True)
        mapped = [(forward if whole else partial)(part) for (whole, _), part in parts]
        return torch.cat(mapped).unflatten(0, tokens.shape[:-1])

    def on_mlp_input(self, forward: Callable, tokens: torch.Tensor) -> torch.Tensor:
        frame = current_frame.get()
        return forward(frame.pack(tokens) if frame is not None and frame.partial else tokens)

    def on_mlp_output(self, layer: int, forward: Callable, tokens: torch.Tensor) -> torch.Tensor:
        frame, increments = current_frame.get(), forward(tokens)
        if frame is None:
            return increments
        frame.store(("increment", layer), increments)
        return frame.restored(("increment", layer)) if frame.partial else increments

    def on_last(self, forward: Callable, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        frame = current_frame.get()
        if frame is None or frame.blocks < len(self.anatomy.layers):  # of a feature map
            return forward(tokens, *args, **kwargs)
        if frame.packed:
            tokens = frame.repacked(tokens)
        return self._of_all(frame, "output", forward(tokens, *args, **kwargs))

    def _of_all(self, frame: Frame, name: Hashable, result: Any) -> Any:
        """What a block or the last norm gave, of all tokens: those it did not encode as the cache `name` has them."""
        outputs = result[0] if isinstance(result, tuple) else result
        if self.config.arch != "active":
            frame.store(name, outputs, self.config.blend)
        if not frame.packed:
            return result
        outputs = frame.shown(name, outputs)
        return (outputs, *result[1:]) if isinstance(result, tuple) else outputs

    def on_pool(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        frame = current_frame.get()
        if frame is None:
            return forward(*args, **kwargs)
        tokens, *args = args
        if self.config.arch == "active" and frame.packed:
            lengths = frame.lengths if len(frame.lengths) > 1 else None
        else:
            lengths = frame.counts if frame.padded else None
        head, method = self.anatomy.pool
        twin = self.twins.get(head)
        if twin is None or all(frame.whole):
            return self._pool(frame, head, functools.partial(forward, *args, **kwargs), tokens, lengths, 0)
        pooled, first = [], 0
        for whole, streams in itertools.groupby(frame.whole):
            these = slice(first, first + len(list(streams)))
            module, call = (head, forward) if whole else (twin, getattr(twin, method))
            call = functools.partial(call, *args, **kwargs)
            pooled.append(self._pool(frame, module, call, tokens[these], lengths and lengths[these], first))
            first = these.stop
        return torch.cat(pooled)

    def _pool(
        self,
        frame: Frame,
        head: nn.Module,
        forward: Callable,
        tokens: torch.Tensor,
        lengths: list[int] | None,
        first: int,
    ) -> torch.Tensor:
        """Pooled [S, D] of all tokens [S, T, D] of the streams from `first` on, by a head whose forward is given."""
        if is_foldable(head):
            folded = self.derived(head, (head, "folded"), lambda: fold_head(head))
            pooled, attention = attention_pool(head, folded, tokens, lengths)
            if self.config.score == "staleness" and self.config.arch != "active":
                counts = frame.counts[first : first + len(attention)]
                frame.pay([row[:count] for row, count in zip(attention, counts, strict=True)], first)
            return pooled
        if lengths is None:
            return forward(tokens)
        own = [tokens[stream : stream + 1, :length] for stream, length in enumerate(lengths)]
        return torch.cat([forward(each) for each in own])

    def attend(
        self,
        frame: Frame,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        product: Callable | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention as the model had it, from the active queries to what this architecture lets them see.

        Args:
            query, key, value: [S, heads, T, head_dim], or [1, heads, rows of all streams, head_dim] when packed or end
                to end.
            product: (query [1, heads, M, head_dim] of one stream, key and value [1, heads, K, head_dim], rows of the
                queries and rows of the keys among its tokens, int32 or None for all, its grid) -> [1, M, heads,
                head_dim], for attention that is not simply from every query to every key.
            kwargs: handed to transformers' attention function; `scaling` is of the products.

        Returns:
            [S, T, heads, head_dim], or [1, rows of all streams, heads, head_dim] when packed or by `product`; and
            attention weights or None.
        """
        name = getattr(self.configs.get(module), "_attn_implementation", ATTENTION)
        attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if name != ATTENTION:
            attention = ALL_ATTENTION_FUNCTIONS.get(name, attention)
        context, layer = self.config.arch == "context", self.layer_of[module]
        if frame.packed and frame.rounded and query.dtype == torch.float32:
            rounded = (heads.bfloat16() for heads in (query, key, value))
            attended, weights = self.attend(frame, module, *rounded, mask, product, **kwargs)
            return attended.to(query.dtype), weights
        if context:
            frame.store_heads(layer, key, value)
        watched = layer in self.watched
        if not frame.packed and product is None and query.shape[0] == len(frame.states):
            if watched:
                frame.watch(query[:, :, 0], key, kwargs["scaling"])
            return attention(module, query, key, value, mask, **kwargs)
        if isinstance(frame, StaticFrame):
            if product is not None:
                raise Unrecordable("its attention is not simply from every query to every key")
            if context:
                return frame.attend_cached(query, layer, watched, kwargs.get("scaling")), None
            return attention(module, query, key, value, frame.same_stream(), **kwargs)
        outputs = []
        parts = [frame.heads(heads) for heads in (query, key, value)]
        for stream, (state, queries, keys, values) in enumerate(zip(frame.states, *parts, strict=True)):
            rows = key_rows = frame.rows[stream] if frame.packed else None
            if context and frame.packed:
                keys = state.tensors["key", layer].unflatten(2, (key.shape[1], -1)).transpose(1, 2)
                values = state.tensors["value", layer].unflatten(2, (value.shape[1], -1)).transpose(1, 2)
                key_rows = None
            if watched and (context or not frame.packed or frame.whole[stream]):
                frame.watch(queries[:, :, 0], keys, kwargs["scaling"], stream)
            # Packed tokens of one stream only see tokens of that stream, none of which is padding.
            if product is not None:
                outputs.append(product(queries, keys, values, rows, key_rows, frame.grids[stream]))
            elif frame.packed and frame.row_kernels:
                lying = (heads[0].transpose(0, 1) for heads in (queries, keys, values))  # [*, heads, head_dim]
                outputs.append(attend_rows(*lying, kwargs.get("scaling"))[None])
            else:
                outputs.append(attention(module, queries, keys, values, None, **kwargs)[0])
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), None

    def _gate(self, frame: Frame, tokens: torch.Tensor) -> None:
        """Choose each stream's active patches, move the references on, and account for it."""
        prefix = self.anatomy.prefix
        signals = self.signals(frame, tokens)
        surprises = frame.surprises  # [N] each, None for a key frame
        if surprises is None:
            of_streams, kept = zip(frame.states, signals, frame.grids, strict=True), self._kept(frame.asked)
            surprises = [self._surprise(state, h, grid, kept) for state, h, grid in of_streams]
        chosen = self._choose(frame, surprises)
        if crossover.is_above(frame, tokens, chosen):
            chosen = [None] * len(chosen)
        leading = torch.arange(prefix, dtype=torch.int32, device=tokens.device)
        rows: list[torch.Tensor | None] = []
        for stream, (state, h, surprise, index) in enumerate(
            zip(frame.states, signals, surprises, chosen, strict=True)
        ):
            finite = bool((h.sum(dtype=torch.float32) if surprise is None else surprise.amax()).isfinite())
            if not finite:
                self.warn_once(f"stream {state.name!r}: a frame holds NaN or Inf; the one after it is a key frame")
            self._refresh(state, h, index)
            state.account(index, surprise, finite)
            frame.finite.append(finite)
            if index is not None and frame.order is not None:
                index = frame.order[stream].argsort()[index].sort().values.int()
            rows.append(None if index is None or index.numel() == h.shape[1] else torch.cat((leading, index + prefix)))
        frame.select(rows, tokens)

    def signals(self, frame: Frame, tokens: torch.Tensor) -> list[torch.Tensor]:
        """What the gate compares of each stream, [1, N, D] in row-major order."""
        if self.config.signal == "pixel":
            signals = split(frame.pixels, frame.patches)
        elif self.config.signal == "embedding" or frame.projected is None:
            signals = [own[:, self.anatomy.prefix :] for own in split(tokens, frame.counts)]
        elif frame.projected.ndim > 3:
            signals = split(frame.projected.flatten(2).transpose(1, 2), frame.patches)
        else:
            signals = split(frame.projected, frame.patches)
        if frame.order is None:
            return signals
        return [h[:, order.argsort()] for h, order in zip(signals, frame.order, strict=True)]

    def _surprise(self, state: StreamState, h: torch.Tensor, grid: Grid, kept: frozenset[int]) -> torch.Tensor | None:
        """One stream's surprise [N] at its patches h [1, N, D]; None where it needs a key frame.

        Moves averages on.
        """
        signature = (grid, h.shape[2], h.dtype, h.device)
        if state.signature not in (None, signature):
            before, now = (f"{s[0][0]}x{s[0][1]} patches, {s[2]} on {s[3]}" for s in (state.signature, signature))
            self.warn_once(f"stream {state.name!r} changed from {before} to {now}; it starts over with a key frame")
        comparable = self.is_steady(state) and state.signature == signature
        state.valid = False
        if state.signature != signature or state.hidden != kept:
            state.start_over(signature, grid, h.device)
            state.hidden = kept
        return self.surprise(h, state.tensors)[0] if comparable else None

    def is_steady(self, state: StreamState) -> bool:
        """Whether the next frame of a stream need not be a key frame, as far as its past goes."""
        expired = self.config.refresh == "key" and state.since_key_frame + 1 == self.config.max_age
        return state.valid and not expired

    def surprise(self, h: torch.Tensor, caches: dict[Hashable, torch.Tensor]) -> torch.Tensor:
        """Surprise [S, N] at patches h [S, N, D] against the references in `caches`; moves averages on."""
        surprise = ema_surprise_(h, caches["reference"], self.decay)
        if self.config.reference == "dual":
            surprise = torch.maximum(surprise, ema_surprise_(h, caches["fast"], self.config.fast_decay))
        # A cosine can round to just above 1.
        return surprise.clamp_min(0)

    def _choose(self, frame: Frame, surprises: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Each stream's active patches, ascending int32, or None for a key frame."""
        config = self.config
        chosen: list[torch.Tensor | None] = [None] * len(surprises)
        gated = [stream for stream, surprise in enumerate(surprises) if surprise is not None]
        for grid in dict.fromkeys(frame.grids[stream] for stream in gated):
            alike = [stream for stream in gated if frame.grids[stream] == grid]
            states = [frame.states[stream] for stream in alike]
            surprise = torch.stack([surprises[stream] for stream in alike])
            age = torch.stack([state.age for state in states])
            unknown = torch.ones_like(surprise[0])
            attention = [unknown if state.attention is None else state.attention for state in states]
            index, cu_seqlens = self.active(self.score(surprise, age, torch.stack(attention), grid))
            ends, patches = cu_seqlens.tolist(), surprise.shape[1]
            active = [index[ends[row] : ends[row + 1]] - row * patches for row in range(len(alike))]
            if config.dilation:
                active = [policies.dilated(each, grid, config.dilation) for each in active]
            counts = torch.tensor([each.numel() for each in active], device=surprise.device)
            cuts = policies.is_cut(surprise, counts, config.cut_share, config.cut_surprise).tolist()
            for stream, each, cut in zip(alike, active, cuts, strict=True):
                chosen[stream] = None if cut else each
        return chosen

    def active(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The active patches of streams of one grid that have the scores [S, N], before dilation.

        Returns:
            index and cu_seqlens as `compact` does; nothing waits for a GPU.
        """
        config, (streams, patches) = self.config, scores.shape
        budget = config.tokens_per_frame(patches)
        ladder = self.ladder(scores.device)
        if not config.share_budget:
            return compact(scores, config.threshold, budget, self.floor, ladder)
        best = scores.topk(min(self.floor, patches)).indices
        shared = scores.scatter(1, best, torch.inf).view(1, -1)
        index, _ = compact(shared, config.threshold, budget * streams, self.floor, ladder)
        starts = torch.arange(streams + 1, dtype=torch.int32, device=index.device) * patches
        ordered = index.masked_fill(index < 0, streams * patches)
        return index, torch.searchsorted(ordered, starts, out_int32=True)

    def ladder(self, device: torch.device) -> torch.Tensor | None:
        """The numbers of active patches that a pass may have, on its device."""
        rungs = self.config.ladder
        if rungs is None and self.graphs is not None and graphs.serves(device) and not self.config.dilation:
            rungs = graphs.LADDER
        if rungs is not None and device not in self.ladders:
            self.ladders[device] = copied(torch.tensor(rungs, dtype=torch.int32).to(device), None)
        return self.ladders.get(device)

    def score(
        self, surprise: torch.Tensor, age: torch.Tensor, attention: torch.Tensor | None, grid: Grid
    ) -> torch.Tensor:
        """What the rule reads, [S, N] as all arguments: infinite where a patch's age or a NaN forces it."""
        config = self.config
        score = policies.without_common_motion(surprise) if config.normalise_motion else surprise
        if config.score == "staleness":
            score = policies.staleness(score, age, attention, grid)
        if config.refresh == "rolling" and config.max_age is not None:
            score = score.masked_fill(policies.due(age, config.max_age), torch.inf)
        return score

    def _refresh(self, state: StreamState, h: torch.Tensor, index: torch.Tensor | None) -> None:
        """Set the references of the patches that a frame encodes: all in a key frame, `index` if they follow it."""
        if index is None:
            # 16 bits would lose the small steps of a moving average.
            wide = torch.promote_types(h.dtype, torch.float32) if 0 < self.decay < 1 else h.dtype
            state.put("reference", h.to(wide))
            if self.config.reference == "dual":
                state.put("fast", h.to(wide))
        elif self.config.reference == "refreshed":
            ends = torch.tensor([0, index.numel()], dtype=torch.int32, device=index.device)
            scatter_rows_(state.tensors["reference"], gather_rows(h, index, ends, index.numel()), index, ends)

"""The engine: which patches of a frame are encoded, and what the others contribute.

A patched tower runs its own forward. The engine stands at a few points of it: it reads the patch projection, packs the
active tokens in front of a block [S, T, D] -> [1, M, D], serves attention and MLP from caches, and scatters the encoded
tokens back after the last norm. An architecture is a choice of points:

    mlp       packs in front of each MLP and restores after it
    active    packs in front of the first block; the rest is gone
    dual      packs in front of the first block, restores the output
    midlayer  packs in front of a middle block, restores the output
    context   as dual; each block's keys and values of all tokens are kept and attended to

With every patch active nothing is packed and the tower runs as it would unpatched, while the caches are filled. On a
CPU packed tokens go through `linear_rows` and `attend_rows` where those have fast kernels.
"""

import inspect
import itertools
import warnings
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from neuroflow_kernels import attend_rows, compact, ema_surprise_, gather_rows, linear_rows, scatter_rows_

from . import policies
from .adapters import Anatomy, Grid
from .config import NeuroFlowConfig
from .rewrites import (
    are_few,
    attention_pool,
    fold_head,
    is_patch_projection,
    patch_windows,
    project_windows,
    row_kernels_serve,
)
from .state import Seen, StreamState, copied

ATTENTION = "neuroflow"
DEFAULT_STREAM = "default"
DENSE_PROJECTION = 0.75  # of the patches; above it, picking out the changed ones gains nothing


class Frame:
    """One pass through the tower: a batch of frames, one of each stream in `states`."""

    def __init__(self, engine: "Engine", states: list[StreamState], arguments: dict[str, Any]) -> None:
        self.engine = engine
        self.states = states
        self.arguments = arguments
        self.projected: torch.Tensor | None = None
        self.pixels: torch.Tensor | None = None  # [S, N, values of a patch]
        self.attention: list[torch.Tensor | None] = [None] * len(states)
        self.finite: list[bool] = []
        self.partial = False  # some patch of some stream is not encoded
        self.packed = False  # the residual stream holds active tokens only
        self.row_kernels = False  # what is partial is multiplied by the kernels for few rows

    def select(self, active: list[torch.Tensor | None], tokens: torch.Tensor) -> None:
        """Take each stream's active tokens among tokens [S, T, D]: int32 rows of its T, or None for all of them."""
        self.partial = any(rows is not None for rows in active)
        if not self.partial:
            return
        self.active = active
        self.row_kernels = row_kernels_serve(tokens)
        count, device = tokens.shape[1], tokens.device
        whole = torch.arange(count, dtype=torch.int32, device=device)
        rows = [whole if chosen is None else chosen for chosen in active]
        self.lengths = [chosen.numel() for chosen in rows]
        self.offsets = [0, *itertools.accumulate(self.lengths)]
        self.index = torch.cat([chosen + stream * count for stream, chosen in enumerate(rows)])
        self.cu_seqlens = torch.tensor(self.offsets, dtype=torch.int32, device=device)
        self.ends = torch.tensor([[0, length] for length in self.lengths], dtype=torch.int32, device=device)

    def pack(self, tokens: torch.Tensor) -> torch.Tensor:
        """[S, T, D] -> [1, M, D]"""
        return gather_rows(tokens, self.index, self.cu_seqlens, self.offsets[-1])[None]

    def store(self, name: Hashable, tokens: torch.Tensor, blend: float = 1.0) -> None:
        """Bring the cache `name` of every stream up to date with tokens [S, T, D], or [1, M, D] in a partial frame."""
        for stream, state in enumerate(self.states):
            if not self.partial:
                state.put(name, tokens[stream : stream + 1])
                continue
            fresh = tokens[:, self.offsets[stream] : self.offsets[stream + 1]]
            if self.active[stream] is None:
                state.put(name, fresh)
            else:
                cache, prefix = state.tensors[name], self.engine.anatomy.prefix
                scatter_rows_(cache, fresh[0], self.active[stream], self.ends[stream], blend)
                if blend < 1:
                    cache[:, :prefix] = fresh[:, :prefix]  # CLS and registers follow every frame

    def cached(self, name: Hashable) -> torch.Tensor:
        """The cache `name` of all streams, [S, T, D]; for one stream the cache itself."""
        caches = [state.tensors[name] for state in self.states]
        return caches[0] if len(caches) == 1 else torch.cat(caches)

    def pad(self, tokens: torch.Tensor) -> torch.Tensor:
        """[1, M, D] -> [S, longest, D], zeros past each stream's own."""
        return nn.utils.rnn.pad_sequence(tokens[0].split(self.lengths), batch_first=True)


_frame: ContextVar[Frame | None] = ContextVar("neuroflow_frame", default=None)


class Engine:
    """The streams of one patched tower, and the functions that stand at its points.

    Every `on_*` method takes the original forward of its point first. Outside of a pass through the tower (`_frame` is
    None) it only calls that, so that parts of a patched model used by themselves behave as before.
    """

    def __init__(self, anatomy: Anatomy, config: NeuroFlowConfig) -> None:
        depth = len(anatomy.layers)
        self.anatomy = anatomy
        self.config = config
        # A frame without any token has no output; where there is a CLS token it needs no patch.
        self.floor = max(config.floor, 0 if anatomy.prefix else 1)
        self.mid_layer = depth // 2 - 1 if config.mid_layer is None else config.mid_layer
        if config.arch == "midlayer" and self.mid_layer >= depth - 1:
            raise ValueError(f"mid_layer is {self.mid_layer}; accepted is less than {depth - 1}, the last block")
        self.decay = {"refreshed": 0.0, "previous": 1.0}.get(config.reference, config.ema_decay)
        # What the pooled output reads in the last blocks tells best what it reads of a patch altogether.
        self.watched = (
            range(depth - max(depth // 3, 1), depth) if anatomy.prefix and config.score == "staleness" else ()
        )
        self.signature = inspect.signature(anatomy.tower.forward)
        self.layer_of = {module: layer for layer, module in enumerate(anatomy.attentions)}
        self.attention_name: str | None = None
        self.kept: dict[Hashable, tuple[list, Any]] = {}  # by `derived`
        self.streams: dict[Hashable, StreamState] = {}
        self.named: ContextVar[tuple[Hashable, ...]] = ContextVar("neuroflow_streams", default=(DEFAULT_STREAM,))
        self._warned: set[str] = set()

    def points(self) -> list[tuple[nn.Module, str, Callable]]:
        """(module, method, replacement that takes the original first) for everything this architecture needs."""
        anatomy, arch = self.anatomy, self.config.arch
        points: list[tuple[nn.Module, str, Callable]] = [
            (anatomy.tower, "forward", self.on_tower),
            (anatomy.projection, "forward", self.on_projection),
            (anatomy.layers[0], "forward", self.on_first_layer),
        ]
        if hasattr(anatomy.tower.embeddings, "interpolate_pos_encoding"):
            points.append((anatomy.tower.embeddings, "interpolate_pos_encoding", self.on_positions))
        if anatomy.head is not None:
            points.append((anatomy.head, "forward", self.on_head))
        for part in (*anatomy.layers, *([] if anatomy.head is None else [anatomy.head])):
            for module in part.modules():
                if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
                    points.append((module, "forward", lambda *args, module=module: self.on_linear(module, *args)))
        if arch == "mlp":
            for layer, (first, last) in enumerate(anatomy.mlps):
                points.append((first, "forward", self.on_mlp_input))
                points.append((last, "forward", lambda *args, layer=layer: self.on_mlp_output(layer, *args)))
        else:
            points.append((anatomy.norm, "forward", self.on_norm))
        if arch == "midlayer":
            points.append((anatomy.layers[self.mid_layer + 1], "forward", self.on_later_layer))
        return points

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"neuroflow: {message}", RuntimeWarning, stacklevel=2)

    def on_tower(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        arguments = self.signature.bind(*args, **kwargs).arguments
        pixels, names = arguments.get("pixel_values"), self.named.get()
        if not isinstance(pixels, torch.Tensor):
            raise ValueError(f"pixel_values is {pixels!r}; accepted is a tensor, one frame of each stream")
        count = pixels.shape[0]
        if count != len(names):
            raise ValueError(
                f"pixel_values holds {count} frames, and the context names {len(names)} stream(s); accepted is one "
                "frame of each stream: neuroflow.encode(model, pixels, stream_ids=[...]) names them"
            )
        states = [self.streams.get(name) or StreamState(name) for name in names]
        frame = Frame(self, states, arguments)
        token = _frame.set(frame)
        try:
            with torch.no_grad():
                output = forward(*args, **kwargs)
        finally:
            _frame.reset(token)
        for state, finite, attention in zip(states, frame.finite, frame.attention, strict=True):
            state.valid = finite
            if attention is not None:
                state.attention = attention / attention.mean()
            self.streams[state.name] = state
        return output

    def on_projection(self, forward: Callable, pixels: torch.Tensor) -> torch.Tensor:
        frame = _frame.get()
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
        columns = pixels.shape[3] // projection.kernel_size[1]
        frame.projected = projected.transpose(1, 2).unflatten(2, (-1, columns))
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
        changed, projected = None, None
        if seen is not None and seen.windows.shape == windows.shape and seen.windows.dtype == windows.dtype:
            projected = seen.projected
            if seen.weights is weights:
                changed = policies.changed(seen.windows, windows)
        if changed is None or changed.numel() > DENSE_PROJECTION * windows.shape[1]:
            projected = copied(project_windows(projection, windows), projected)
        elif changed.numel():
            ends = torch.tensor([0, changed.numel()], dtype=torch.int32)
            fresh = project_windows(projection, gather_rows(windows, changed, ends, changed.numel()))
            scatter_rows_(projected, fresh, changed, ends)
        state.seen = Seen(windows, projected, weights)
        return projected

    def on_positions(self, interpolate: Callable, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The positional table interpolated to a size is kept."""
        table = self.anatomy.tower.embeddings
        key = ("positions", embeddings.shape[1], height, width)
        return self.derived(table, key, lambda: interpolate(embeddings, height, width))

    def derived(self, module: nn.Module, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` makes of the weights of `module`: kept until they change."""
        parameters = list(module.parameters())
        if any(parameter.is_inference() for parameter in parameters):
            return compute()  # such weights do not count their changes
        weights = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
        if self.kept.get(key, (None,))[0] != weights:
            self.kept[key] = weights, compute()
        return self.kept[key][1]

    def on_first_layer(self, forward: Callable, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        frame = _frame.get()
        if frame is not None:
            self._gate(frame, tokens)
            if self.config.arch in ("active", "dual", "context"):
                tokens = self._pack(frame, tokens)
        return forward(tokens, *args, **kwargs)

    def on_later_layer(self, forward: Callable, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        frame = _frame.get()
        return forward(tokens if frame is None else self._pack(frame, tokens), *args, **kwargs)

    def on_linear(self, module: nn.Linear, forward: Callable, tokens: torch.Tensor) -> torch.Tensor:
        frame = _frame.get()
        if frame is None or not frame.row_kernels or not are_few(tokens):
            return forward(tokens)
        rows = linear_rows(tokens.flatten(0, -2), module.weight, module.bias)
        return rows.unflatten(0, tokens.shape[:-1])

    def on_mlp_input(self, forward: Callable, tokens: torch.Tensor) -> torch.Tensor:
        frame = _frame.get()
        return forward(frame.pack(tokens) if frame is not None and frame.partial else tokens)

    def on_mlp_output(self, layer: int, forward: Callable, tokens: torch.Tensor) -> torch.Tensor:
        frame, increments = _frame.get(), forward(tokens)
        if frame is None:
            return increments
        frame.store(("increment", layer), increments)
        return frame.cached(("increment", layer)) if frame.partial else increments

    def on_norm(self, forward: Callable, tokens: torch.Tensor) -> torch.Tensor:
        frame, outputs = _frame.get(), forward(tokens)
        if frame is None:
            return outputs
        if self.config.arch == "active":
            return frame.pad(outputs) if frame.packed else outputs
        frame.store("output", outputs, self.config.blend)
        if not frame.packed:
            return outputs
        # A copy, of one stream too: the caller may keep what it gets, and the caches go on changing.
        return torch.cat([state.tensors["output"] for state in frame.states])

    def on_head(self, forward: Callable, tokens: torch.Tensor, *args: Any) -> torch.Tensor:
        frame = _frame.get()
        if frame is None:
            return forward(tokens, *args)
        head = self.anatomy.head
        folded = self.derived(head, "head", lambda: fold_head(head))
        if self.config.arch == "active" and frame.packed:
            return attention_pool(head, folded, tokens, frame.lengths)[0]
        pooled, attention = attention_pool(head, folded, tokens)
        if self.config.score == "staleness":
            frame.attention = list(attention)
        return pooled

    def attend(
        self,
        frame: Frame,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention as the model had it, from the active queries to what this architecture lets them see.

        query, key, value: [S, heads, T, head_dim], or [1, heads, M, head_dim] when packed.
        """
        attention = ALL_ATTENTION_FUNCTIONS.get(self.attention_name, ALL_ATTENTION_FUNCTIONS["sdpa"])
        context, layer = self.config.arch == "context", self.layer_of[module]
        if context:
            frame.store(("key", layer), key.transpose(1, 2).flatten(2))
            frame.store(("value", layer), value.transpose(1, 2).flatten(2))
        watched = layer in self.watched and (context or not frame.packed)
        if not frame.packed:
            if watched:
                for stream in range(len(frame.states)):
                    self._watch(frame, stream, query[stream, :, 0], key[stream], module.scaling)
            return attention(module, query, key, value, mask, **kwargs)
        outputs = []
        for stream, (state, start, stop) in enumerate(
            zip(frame.states, frame.offsets, frame.offsets[1:], strict=False)
        ):
            queries, keys, values = query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop]
            if context:
                keys = state.tensors["key", layer].unflatten(2, (key.shape[1], -1)).transpose(1, 2)
                values = state.tensors["value", layer].unflatten(2, (value.shape[1], -1)).transpose(1, 2)
            if watched:
                self._watch(frame, stream, query[0, :, start], keys[0], module.scaling)
            # Packed tokens of one stream only see tokens of that stream, none of which is padding.
            if frame.row_kernels:
                rows = (tensor[0].transpose(0, 1) for tensor in (queries, keys, values))  # [*, heads, head_dim]
                outputs.append(attend_rows(*rows, kwargs.get("scaling"))[None])
            else:
                outputs.append(attention(module, queries, keys, values, None, **kwargs)[0])
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), None

    def _pack(self, frame: Frame, tokens: torch.Tensor) -> torch.Tensor:
        if not frame.partial:
            return tokens
        frame.packed = True
        return frame.pack(tokens)

    def _watch(self, frame: Frame, stream: int, query: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
        """Add up the attention that CLS, query [heads, head_dim], pays the patches among keys [heads, T, head_dim]."""
        scores = (keys @ query[..., None])[..., 0].float() * scaling
        attention = scores.softmax(1)[:, self.anatomy.prefix :].mean(0)
        before = frame.attention[stream]
        frame.attention[stream] = attention if before is None else before + attention

    def _gate(self, frame: Frame, tokens: torch.Tensor) -> None:
        """Choose each stream's active patches, move the references on, and account for it."""
        grid, prefix = self.anatomy.grid(frame.projected, frame.arguments), self.anatomy.prefix
        if self.config.signal == "pixel":
            signal = frame.pixels
        elif self.config.signal == "embedding":
            signal = tokens[:, prefix:]
        elif frame.projected.ndim == 4:
            signal = frame.projected.flatten(2).transpose(1, 2)
        else:
            signal = frame.projected
        surprises = [
            self._surprise(state, h, grid) for state, h in zip(frame.states, signal.split(1), strict=True)
        ]  # [N] each, None for a key frame
        chosen = self._choose(frame.states, surprises, grid)
        leading = torch.arange(prefix, dtype=torch.int32, device=tokens.device)
        rows: list[torch.Tensor | None] = []
        for state, h, surprise, index in zip(frame.states, signal.split(1), surprises, chosen, strict=True):
            finite = bool((h.sum(dtype=torch.float32) if surprise is None else surprise.amax()).isfinite())
            if not finite:
                self.warn_once(f"stream {state.name!r}: a frame holds NaN or Inf; the one after it is a key frame")
            self._refresh(state, h, index)
            state.account(index, finite)
            frame.finite.append(finite)
            rows.append(None if index is None or index.numel() == h.shape[1] else torch.cat((leading, index + prefix)))
        frame.select(rows, tokens)

    def _surprise(self, state: StreamState, h: torch.Tensor, grid: Grid) -> torch.Tensor | None:
        """One stream's surprise [N] at its patches h [1, N, D]; None where it needs a key frame.

        Moves averages on.
        """
        signature = (grid, h.shape[2], h.dtype, h.device)
        if state.signature not in (None, signature):
            before, now = (f"{s[0][0]}x{s[0][1]} patches, {s[2]} on {s[3]}" for s in (state.signature, signature))
            self.warn_once(f"stream {state.name!r} changed from {before} to {now}; it starts over with a key frame")
        expired = self.config.refresh == "key" and state.since_key_frame + 1 == self.config.max_age
        comparable = state.valid and state.signature == signature and not expired
        state.valid = False
        if state.signature != signature:
            state.start_over(signature, grid, h.device)
        if not comparable:
            return None
        surprise = ema_surprise_(h, state.tensors["reference"], self.decay)
        if self.config.reference == "dual":
            surprise = torch.maximum(surprise, ema_surprise_(h, state.tensors["fast"], self.config.fast_decay))
        # A cosine can round to just above 1.
        return surprise[0].clamp_min(0)

    def _choose(
        self, states: list[StreamState], surprises: list[torch.Tensor | None], grid: Grid
    ) -> list[torch.Tensor | None]:
        """Each stream's active patches, ascending int32, or None for a key frame."""
        config, patches = self.config, grid[0] * grid[1]
        chosen: list[torch.Tensor | None] = [None] * len(states)
        gated = [stream for stream, surprise in enumerate(surprises) if surprise is not None]
        if not gated:
            return chosen
        scores = torch.stack([self._score(states[stream], surprises[stream], grid) for stream in gated])
        budget = config.tokens_per_frame(patches)
        if config.share_budget:
            for row in scores:
                row[row.topk(min(self.floor, patches)).indices] = torch.inf
            scores, budget = scores.view(1, -1), budget * len(gated)
        index, cu_seqlens = compact(scores, config.threshold, budget, self.floor)
        index = index[: int(cu_seqlens[-1])]
        starts = torch.arange(len(gated) + 1, dtype=torch.int32, device=index.device) * patches
        bounds = torch.searchsorted(index, starts).tolist()
        for number, stream in enumerate(gated):
            active = index[bounds[number] : bounds[number + 1]] - number * patches
            if config.dilation:
                active = policies.dilated(active, grid, config.dilation)
            if not policies.is_cut(surprises[stream], active.numel(), config.cut_share, config.cut_surprise):
                chosen[stream] = active
        return chosen

    def _score(self, state: StreamState, surprise: torch.Tensor, grid: Grid) -> torch.Tensor:
        """What the rule reads, [N]: infinite where a patch's age or a NaN forces it."""
        config = self.config
        score = policies.without_common_motion(surprise) if config.normalise_motion else surprise
        if config.score == "staleness":
            score = policies.staleness(score, state.age, state.attention, grid)
        if config.refresh == "rolling" and config.max_age is not None:
            score = score.masked_fill(policies.due(state.age, config.max_age), torch.inf)
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


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    frame = _frame.get()
    if frame is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    return frame.engine.attend(frame, module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)

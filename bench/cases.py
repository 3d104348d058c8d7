"""The registry: what the benchmarks measure, how each case is built, and how it is checked before it is timed.

Ops run on every backend that serves the device, next to the plain torch lines that they replace. Models are a SigLIP
tower of base size with random weights: unpatched, compiled, as the published system, and under NeuroFlow's
architectures, all of which encode the same frames.
"""

import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import neuroflow
import torch
import torch.nn.functional as F
from neuroflow.engine.gate import LADDER
from neuroflow.weights import copy_sharing_weights
from transformers import SiglipVisionConfig, SiglipVisionModel

from bench.baselines import Published
from neuroflow_kernels import (
    attend_rows,
    attend_versions,
    compact,
    ema_gate_,
    ema_surprise_,
    gather_rows,
    linear_rows,
    scatter_kv_,
    scatter_rows_,
)

PATCH = 16
DTYPES = (torch.float32, torch.bfloat16)
SIZES, SKIPS = (224, 448, 896), (0.97, 0.84, 0.0)
SYSTEMS = ("published-C", "C", "E", "rounded-C", "rounded-E")
SHARP = 0.5  # the published system's threshold: noise of a new kind is far from its average, what stood still is at 0
NOISE = 4 / 127.5  # a sensor's standard deviation, in units of pixels from -1 to 1
RECORDED = 4  # frames after which all of them are replayed: a key frame, one to set up, one to record, one more
ACTIVE, THRESHOLD, DECAY = 0.03, 0.1, 1e-3  # so slow that a thousand calls on one frame find the same patches active


class Op(NamedTuple):
    """A way to call an op.

    inputs: (shape, dtype, generator) -> what `call` takes, on the CPU.
    call: *inputs -> a tensor or a tuple of them, tensors that it updates among them.
    cost: *inputs -> the bytes that it has to read and write, and its FLOPs.
    baselines: by name, other ways to do the same; they return as many of `call`'s first results as they have.
    rounding: what rounding on the way to a result may add to it, in units of the dtype's epsilon.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    inputs: Callable
    call: Callable
    cost: Callable
    dtypes: tuple[torch.dtype, ...] = DTYPES
    baselines: Mapping[str, Callable] = MappingProxyType({})
    rounding: float = 0


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


class OpCase(NamedTuple):
    op: Op
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self):
        return f"{self.op.name} {'x'.join(map(str, self.shape))} {name_of(self.dtype)}"

    def build(self, device="cpu"):
        """The case's inputs, always the same."""
        made = self.op.inputs(self.shape, self.dtype, torch.Generator().manual_seed(0))
        return [value.to(device) if isinstance(value, torch.Tensor) else value for value in made]


def copied(inputs):
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in inputs]


def results(returned):
    return returned if isinstance(returned, tuple) else (returned,)


def check(op, found, expected):
    """Raises AssertionError where a result differs from the reference's; whole numbers must be the same."""
    for one, other in zip(results(found), results(expected), strict=False):
        if other.dtype.is_floating_point:
            epsilon = torch.finfo(other.dtype).eps
            torch.testing.assert_close(one, other, rtol=2 * epsilon, atol=1e-5 + op.rounding * epsilon)
        else:
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def size_of(*tensors):
    return sum(tensor.nbytes for tensor in tensors)


def frame(shape, dtype, generator):
    """Tokens and their references [S, N, D]: a little noise everywhere, and a few that show something new. How many."""
    ema = torch.randn(shape, generator=generator)
    h = ema + 0.05 * torch.randn(shape, generator=generator)
    new = active_rows(shape, generator)
    h.view(-1, shape[2])[new] = torch.randn(len(new), shape[2], generator=generator)
    return h.to(dtype), ema.to(dtype), len(new)


def active_rows(shape, generator):
    """The same number of random rows in each stream, ascending, of the flattened [S * N]."""
    streams, tokens = shape[:2]
    chosen = torch.rand(streams, tokens, generator=generator).topk(max(round(ACTIVE * tokens), 4)).indices
    return (chosen.sort().values + tokens * torch.arange(streams)[:, None]).flatten()


def surprises(shape, dtype, generator):
    return (torch.rand(shape[:2], generator=generator) * THRESHOLD / (1 - ACTIVE),)


def selection(shape, dtype, generator):
    """x [S, N, D], packed [rows, D] of its active rows, index and cu_seqlens."""
    rows = active_rows(shape, generator)
    index = torch.full((shape[0] * shape[1],), -1, dtype=torch.int32)
    index[: len(rows)] = rows
    cu_seqlens = torch.arange(shape[0] + 1, dtype=torch.int32) * (len(rows) // shape[0])
    x = torch.randn(shape, generator=generator).to(dtype)
    return x, torch.randn(len(rows), shape[2], generator=generator).to(dtype), index, cu_seqlens


def normed_selection(shape, dtype, generator):
    return *selection(shape, dtype, generator), torch.randn(2, shape[2], generator=generator).to(dtype)


def linear_inputs(shape, dtype, generator):
    """x [M, K], weight [N, K], bias [N] of shape (M, K, N)."""
    rows, taken, given = shape
    weight = torch.randn(given, taken, generator=generator) / taken**0.5
    made = torch.randn(rows, taken, generator=generator), weight, torch.randn(given, generator=generator)
    return [value.to(dtype) for value in made]


def attention_inputs(shape, dtype, generator):
    """Queries [M, heads, head_dim], keys and values [T, heads, head_dim] of shape (M, T, heads, head_dim)."""
    queries, tokens, *heads = shape
    return [torch.randn(rows, *heads, generator=generator).to(dtype) for rows in (queries, tokens, tokens)]


def streams_inputs(shape, dtype, generator):
    """As many queries of each stream [S * M, heads, head_dim], keys and values [S, T, heads, head_dim], cu_seqlens, of
    shape (S, M, T, heads, head_dim).
    """
    streams, queries, tokens, *heads = shape
    sizes = (streams * queries,), (streams, tokens), (streams, tokens)
    made = [torch.randn(*size, *heads, generator=generator).to(dtype) for size in sizes]
    return *made, torch.arange(streams + 1, dtype=torch.int32) * queries


def versions_inputs(shape, dtype, generator):
    """Of a clip of S frames, M of whose T tokens are new in each: queries [S * M, heads, head_dim], all versions of
    keys and values [T + S * M, heads, head_dim], the table [S, T] and cu_seqlens, of shape (S, M, T, heads, head_dim).
    """
    frames, queries, tokens, *heads = shape
    held = tokens + frames * queries
    made = [torch.randn(size, *heads, generator=generator).to(dtype) for size in (frames * queries, held, held)]
    table = torch.arange(tokens, dtype=torch.int32).repeat(frames, 1)
    for frame in range(frames):
        new = torch.randperm(tokens, generator=generator)[:queries]
        table[frame:, new] = tokens + frame * queries + torch.arange(queries, dtype=torch.int32)
    return *made, table, torch.arange(frames + 1, dtype=torch.int32) * queries


def attend_gathered(query, key, value, table, cu_seqlens):
    return attend_known(query, key[table], value[table], cu_seqlens)


def attend_known(query, key, value, cu_seqlens):
    """With as many queries of each stream, which the host knows, attention is a batch."""
    by_head = (tensor.transpose(1, 2) for tensor in (query.unflatten(0, (len(key), -1)), key, value))
    return F.scaled_dot_product_attention(*by_head).transpose(1, 2).flatten(0, 1)


def projected(shape, dtype, generator):
    """Caches [S, N, heads * head_dim], keys and values [M, heads, head_dim] as a model's attention has them, index and
    cu_seqlens, of shape (S, N, heads, head_dim).
    """
    *frame, heads, dim = shape
    key_cache, key, *selected = selection((*frame, heads * dim), dtype, generator)
    key = key.unflatten(1, (heads, dim)).transpose(0, 1).contiguous().transpose(0, 1)
    return key_cache, key_cache + 1, key, key + 1, *selected


def eager_gate(h, ema, rows):
    surprise = 1 - F.cosine_similarity(h, ema, dim=-1)
    active = (surprise > THRESHOLD).flatten().nonzero()[:, 0]
    ema.mul_(1 - DECAY).add_(h, alpha=DECAY)
    return h.flatten(0, 1).index_select(0, active), ema


def streaming(h, ema, rows):
    """Reads h and ema and writes ema, as the gate must, and does nothing else."""
    ema.add_(h, alpha=DECAY)
    return ()


def fused_gate(h, ema, rows):
    surprise, index, cu_seqlens, packed = ema_gate_(h, ema, decay=DECAY, threshold=THRESHOLD, rows=rows)
    return packed, ema, surprise, index, cu_seqlens


FRAMES = ((1, 196, 768), (8, 784, 768), (1, 12544, 768))  # a ViT-B at 224 px, 8 streams at 448 px, 1792 px

OPS = [
    Op(
        "ema_surprise_",
        FRAMES,
        frame,
        lambda h, ema, rows: (ema_surprise_(h, ema, DECAY), ema),
        cost=lambda h, ema, rows: (size_of(h, ema, ema) + 4 * h[..., 0].numel(), 6 * h.numel()),
    ),
    Op(
        "compact",
        FRAMES,
        surprises,
        lambda surprise: compact(surprise, THRESHOLD),
        cost=lambda surprise: (2 * size_of(surprise), 0),
        dtypes=(torch.float32,),
    ),
    Op(
        "compact, budget",
        FRAMES,
        surprises,
        lambda surprise: compact(surprise, budget=round(ACTIVE * surprise.shape[1])),
        cost=lambda surprise: (2 * size_of(surprise), 0),
        dtypes=(torch.float32,),
    ),
    Op(
        "gather_rows",
        FRAMES,
        selection,
        lambda x, packed, index, cu_seqlens: gather_rows(x, index, cu_seqlens, len(packed)),
        cost=lambda x, packed, *_: (size_of(packed, packed), 0),
    ),
    Op(
        "gather_rows, norm",
        FRAMES,
        normed_selection,
        lambda x, packed, index, cu_seqlens, norm: gather_rows(
            x, index, cu_seqlens, len(packed), norm_weight=norm[0], norm_bias=norm[1]
        ),
        cost=lambda x, packed, index, cu_seqlens, norm: (size_of(packed, packed, norm), 8 * packed.numel()),
    ),
    Op(
        "scatter_rows_",
        FRAMES,
        selection,
        lambda x, packed, index, cu_seqlens: scatter_rows_(x, packed, index, cu_seqlens),
        cost=lambda x, packed, *_: (size_of(packed, packed), 0),
    ),
    Op(
        "scatter_rows_, blend",
        FRAMES,
        selection,
        lambda x, packed, index, cu_seqlens: scatter_rows_(x, packed, index, cu_seqlens, 0.5),
        cost=lambda x, packed, *_: (size_of(packed, packed, packed), 2 * packed.numel()),
    ),
    Op(
        "ema_gate_",
        FRAMES,
        frame,
        fused_gate,
        cost=lambda h, ema, rows: (
            size_of(h, ema, ema) + 8 * h[..., 0].numel() + rows * h[0, 0].nbytes,
            6 * h.numel(),
        ),
        baselines={"eager": eager_gate, "streaming": streaming},
    ),
    Op(
        "linear_rows",
        ((6, 768, 768), (24, 768, 3072), (94, 3072, 768)),
        linear_inputs,
        linear_rows,
        cost=lambda x, weight, bias: (
            size_of(x, weight, bias) + len(x) * bias.nbytes,
            2 * len(x) * weight.numel(),
        ),
    ),
    Op(
        "attend_rows",
        ((6, 196, 12, 64), (24, 784, 12, 64), (94, 3136, 12, 64)),
        attention_inputs,
        attend_rows,
        cost=lambda query, key, value: (size_of(query, query, key, value), 4 * query.numel() * len(key)),
        rounding=1 / 8,  # a kernel may round the weights of the values
    ),
    Op(
        "attend_rows, streams",
        ((8, 24, 784, 12, 64),),
        streams_inputs,
        lambda query, key, value, cu_seqlens: attend_rows(query, key, value, cu_seqlens=cu_seqlens),
        cost=lambda query, key, value, _: (size_of(query, query, key, value), 4 * query.numel() * key.shape[1]),
        baselines={"lengths known": attend_known},
        rounding=1 / 8,
    ),
    Op(
        "attend_versions",
        ((16, 32, 196, 12, 64),),  # a clip of 16 frames at 224 px
        versions_inputs,
        attend_versions,
        cost=lambda query, key, value, table, _: (
            size_of(query, query, key, value, table),
            4 * query.numel() * table.shape[1],
        ),
        baselines={"gathered, lengths known": attend_gathered},
        rounding=1 / 8,
    ),
    Op(
        "scatter_kv_",
        tuple((*shape[:2], 12, 64) for shape in FRAMES),
        projected,
        scatter_kv_,
        cost=lambda key_cache, value_cache, key, value, *_: (2 * size_of(key, value), 0),
    ),
]
OP_CASES = [OpCase(op, shape, dtype) for op in OPS for shape in op.shapes for dtype in op.dtypes]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of an embedding, by its relative distance


def tower(size, dtype, device="cpu"):
    """The tower of SigLIP base for size x size pixels, with random weights, always the same."""
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(image_size=size, patch_size=PATCH)).eval()
    return model.to(device, dtype)


def patches_of(model):
    return (model.config.image_size // model.config.patch_size) ** 2


def active_of(model, skip):
    """How many patches change from frame to frame; the published system encodes 4 in any case."""
    return max(round(patches_of(model) * (1 - skip)), 4)


def frames(model, active, noise=False, seed=0):
    """Endless frames [1, 3, size, size] of random pixels, of which the same `active` patches are new in each.

    They are the same ones because an average over past frames would find others active for long after they changed.

    noise: add a sensor's noise to every frame, so that no patch has quite the pixels that it had. Without it all but
        the active ones do, as on video whose encoder found them unchanged.
    """
    generator = torch.Generator().manual_seed(seed)
    patch = model.config.patch_size
    side = model.config.image_size // patch
    windows = torch.rand(side * side, 3, patch, patch, generator=generator) * 2 - 1
    chosen = torch.randperm(side * side, generator=generator)[:active]
    while True:
        pixels = windows.unflatten(0, (side, side)).permute(2, 0, 3, 1, 4).reshape(1, 3, side * patch, side * patch)
        if noise:
            pixels = pixels + NOISE * torch.randn(pixels.shape, generator=generator)
        yield pixels.to(model.device, model.dtype)
        windows[chosen] = torch.rand(active, 3, patch, patch, generator=generator) * 2 - 1


def dense(model):
    """The model as a system: it takes pixels [1, 3, size, size] and returns the tower's embedding [1, D]."""
    return lambda pixels: model(pixel_values=pixels).pooler_output


def compiled(model):
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    return dense(torch.compile(copy_sharing_weights(model), mode=mode))


def patched(model, arch, **rule):
    """A copy of the model, on the same weights, under NeuroFlow."""
    model = copy_sharing_weights(model)
    neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(arch=arch, **rule))
    return model


def precision_of(name):
    """A rounded system's products are of bfloat16 where it encodes a part of a float32 model's frame."""
    return "bfloat16" if name.startswith("rounded") else "model"


def dtype_of(name, dtype):
    """That of the factors of most of a system's products, the model's being `dtype`."""
    return torch.bfloat16 if precision_of(name) == "bfloat16" else dtype


def flops(model, name, active):
    """FLOPs of the blocks in a frame of which `active` patches are encoded.

    What the system does, not what dense would: A attends from all patches, D runs half of its blocks on all.
    """
    config, patches = model.config, patches_of(model)
    width, inner = config.hidden_size, config.intermediate_size

    def block(queries, keys, rows):
        return 8 * queries * width**2 + 4 * queries * keys * width + 4 * rows * width * inner

    everything, few = block(patches, patches, patches), block(active, active, active)
    block_of = {
        "A": block(patches, patches, active),
        "B": few,
        "C": few,
        "D": (everything + few) / 2,
        "E": block(active, patches, active),
    }
    return config.num_hidden_layers * block_of.get(name[-1], everything)


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def error_of(model, name, pixels, expected):
    """The largest relative distance of what a sparse system gives from what it must give, where that is known.

    With nothing skipped all give dense's embedding. E gives it on a frame that stands still too, whatever part of it is
    encoded. B and C give what the published ones do. On a GPU graphs give what is launched one by one gives.

    pixels: two frames [1, 3, size, size]. expected: dense's embedding of the second.
    """
    first, second = pixels
    arch, always = name[-1], {"dense_above": 1.0, "precision": precision_of(name)}
    if name.startswith("published"):
        return distance(Published(model, 0, arch)(second), expected)
    everything = dense(patched(model, arch, threshold=0, **always))
    everything(first)
    errors = [distance(everything(second), expected)]
    active = active_of(model, max(SKIPS))
    # Eager, as a graph encodes more patches than are active, up to the next number of its ladder.
    part = dense(patched(model, arch, budget=active, floor=0, launch="eager", **always))
    if arch == "E":
        part(second)
        errors.append(distance(part(second), expected))
    elif arch in "BC":
        published = Published(model, SHARP, arch)
        for shown in itertools.islice(frames(model, active), 2):
            found, other = part(shown), published(shown)
        errors.append(distance(found, other))
    if model.device.type == "cuda":
        ways = [
            dense(patched(model, arch, budget=active, floor=0, ladder=LADDER, launch=launch, **always))
            for launch in ("eager", "graph")
        ]
        for shown in itertools.islice(frames(model, active), RECORDED):
            launched, replayed = (way(shown) for way in ways)
        errors.append(distance(replayed, launched))
    return max(errors)

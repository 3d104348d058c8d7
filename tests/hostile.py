"""Arguments that users of the ops come up with and their authors did not, drawn at random.

A case is a dict of what an op's schema takes, in its order.
"""

import math

import torch
from rows import DTYPES, select

SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-30, 1e30, -1e30)
WRITTEN = {
    "ema_surprise_": ["ema"],
    "ema_gate_": ["ema"],
    "scatter_rows_": ["cache"],
    "scatter_kv_": ["key_cache", "value_cache"],
}
# Dimensions that other arguments decide on.
DECIDED = {
    "ema_surprise_": {"ema": (0, 1, 2)},
    "ema_gate_": {"ema": (0, 1, 2), "threshold": (0,), "budget": (0,)},
    "compact": {"threshold": (0,), "budget": (0,)},
    "gather_rows": {"norm_weight": (0,), "norm_bias": (0,)},
    "scatter_rows_": {"packed": (1,)},
    "scatter_kv_": {"value_cache": (0, 1, 2), "key": (1, 2), "value": (0, 1, 2)},
    "attend_rows": {"key": (2, 3), "value": (0, 1, 2, 3), "cu_seqlens": (0,)},
    "attend_versions": {"key": (1, 2), "value": (0, 1, 2), "cu_seqlens": (0,)},
    "linear_rows": {"weight": (1,), "bias": (0,)},
}
SELECTING = ["gather_rows", "scatter_rows_", "scatter_kv_"]
ANY_STRIDES = {("scatter_kv_", "key"), ("scatter_kv_", "value"), ("attend_rows", "query"), ("attend_versions", "query")}


class Draw:
    """Random numbers, and tensors that lie in memory in every way that torch knows."""

    def __init__(self, seed):
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def number(self, low, high):
        return int(torch.randint(low, high, (), generator=self.generator))

    def one(self, choices):
        return choices[self.number(0, len(choices))]

    def size(self, *, least=0):
        return max(least, self.one([0, 1, 1, 2, 3, 5, 7, 8, 16, 17, 33, 70]))

    def values(self, shape, dtype):
        values = torch.randn(shape, generator=self.generator)
        if values.numel() and self.number(0, 3) == 0:
            for _ in range(self.number(1, 4)):
                values.view(-1)[self.number(0, values.numel())] = self.one(SPECIAL)
        return values.to(dtype)

    def guarded(self, tensor):
        """The same values in the middle of a storage whose rest is NaN, or the largest integer."""
        before, after = self.number(0, 9), self.number(0, 40)
        rest = math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        storage = torch.full((before + tensor.numel() + after,), rest, dtype=tensor.dtype)
        inside = storage[before : before + tensor.numel()].view(tensor.shape)
        return inside.copy_(tensor)

    def strided(self, tensor):
        kind = self.number(0, 5)
        if kind == 0 or tensor.ndim == 0:
            return self.guarded(tensor)
        if kind == 1:
            order = torch.randperm(tensor.ndim, generator=self.generator).tolist()
            return self.guarded(tensor.permute(order).contiguous()).permute([order.index(i) for i in range(len(order))])
        if kind == 2:
            return self.guarded(tensor.repeat_interleave(2, tensor.ndim - 1))[..., ::2]
        if kind == 3:
            dim = self.number(0, tensor.ndim)
            return self.guarded(tensor.narrow(dim, 0, min(1, tensor.shape[dim]))).expand(tensor.shape)
        # Rows that overlap.
        strides = [self.number(0, 3) for _ in tensor.shape]
        reach = sum(max(size - 1, 0) * stride for size, stride in zip(tensor.shape, strides, strict=True))
        return self.guarded(self.values((reach + 1,), tensor.dtype)).as_strided(tensor.shape, strides)

    def tokens(self, *shape, dtype):
        return self.strided(self.values(shape, dtype))

    def written(self, *shape, dtype):
        return self.guarded(self.values(shape, dtype))

    def selection(self, streams, tokens):
        counts = [self.number(0, tokens + 1) for _ in range(streams)]
        return dict(zip(("index", "cu_seqlens"), select(self.generator, (streams, tokens, 0), counts), strict=True))

    def rule(self, streams):
        floor = {"floor": self.one([0, 1, 4, 100, 2**40])}
        if self.number(0, 2):
            return {"threshold": self.tokens(streams, dtype=torch.float32), "budget": None} | floor
        budget = torch.randint(-3, 20, (streams,), generator=self.generator, dtype=torch.int32)
        return {"threshold": None, "budget": self.strided(budget)} | floor


def odd(op, seed, dtypes=DTYPES):
    """A case that the op's public function takes."""
    d = Draw(seed)
    dtype, streams, tokens, dim = d.one(dtypes), d.one([0, 1, 1, 2, 3]), d.size(), d.size()
    heads, head_dim = d.one([0, 1, 1, 2, 3]), d.size()
    if op in ("ema_surprise_", "ema_gate_"):
        wider = torch.promote_types(dtype, torch.float32)
        case = {
            "h": d.tokens(streams, tokens, dim, dtype=dtype),
            "ema": d.written(streams, tokens, dim, dtype=d.one([dtype, wider])),
            "decay": d.one([0.0, 0.1, 1.0]),
        }
        return case if op == "ema_surprise_" else case | d.rule(streams) | {"rows": d.one([None, 0, 3, 40])}
    if op == "compact":
        return {"surprise": d.tokens(streams, tokens, dtype=torch.float32)} | d.rule(streams)
    if op == "gather_rows":
        norm = d.number(0, 2)
        weights = [d.tokens(dim, dtype=dtype) if norm else None for _ in range(2)]
        return {
            "x": d.tokens(streams, tokens, dim, dtype=dtype),
            **d.selection(streams, tokens),
            "rows": d.one([0, 3, 90]),
            "norm_weight": weights[0],
            "norm_bias": weights[1],
            "eps": 1e-3,
        }
    if op == "scatter_rows_":
        return {
            "cache": d.written(streams, tokens, dim, dtype=dtype),
            "packed": d.tokens(d.size(), dim, dtype=dtype),
            **d.selection(streams, tokens),
            "blend": d.one([0.0, 0.3, 1.0]),
        }
    if op == "scatter_kv_":
        fresh = d.size(), heads, head_dim
        return {
            "key_cache": d.written(streams, tokens, heads * head_dim, dtype=dtype),
            "value_cache": d.written(streams, tokens, heads * head_dim, dtype=dtype),
            "key": d.tokens(*fresh, dtype=dtype),
            "value": d.tokens(*fresh, dtype=dtype),
            **d.selection(streams, tokens),
        }
    if op == "attend_versions":
        held, rows = d.size(least=1), d.size()
        ends = torch.randint(0, rows + 3, (streams,), generator=d.generator).sort().values
        table = torch.randint(0, held, (streams, max(tokens, 1)), generator=d.generator, dtype=torch.int32)
        return {
            "query": d.tokens(rows, heads, head_dim, dtype=dtype),
            "key": d.tokens(held, heads, head_dim, dtype=dtype),
            "value": d.tokens(held, heads, head_dim, dtype=dtype),
            "table": table,
            "cu_seqlens": torch.cat([torch.zeros(1), ends]).int(),
            "scale": d.one([0.3, 1.0, 0.0, -0.5]),
        }
    if op == "attend_rows":
        packed = d.number(0, 2)
        streams, tokens, rows = streams if packed else 1, max(tokens, 1), d.size()
        ends = torch.randint(0, rows + 3, (streams,), generator=d.generator).sort().values
        return {
            "query": d.tokens(rows, heads, head_dim, dtype=dtype),
            "key": d.tokens(streams, tokens, heads, head_dim, dtype=dtype),
            "value": d.tokens(streams, tokens, heads, head_dim, dtype=dtype),
            "cu_seqlens": torch.cat([torch.zeros(1), ends]).int() if packed else None,
            "scale": d.one([0.3, 1.0, 0.0, -0.5]),
        }
    width = d.size()
    return {
        "x": d.tokens(d.size(), dim, dtype=dtype),
        "weight": d.tokens(width, dim, dtype=dtype),
        "bias": d.one([None, d.tokens(width, dtype=dtype)]),
    }


def plain(op, seed):
    """A case that `torch.ops` takes too: contiguous, of dtypes that every kernel has, and of finite numbers."""
    case = odd(op, seed, DTYPES[:3])
    for name, value in case.items():
        if isinstance(value, torch.Tensor):
            if name not in WRITTEN.get(op, ()):
                case[name] = value.contiguous()
            if value.is_floating_point():
                case[name].nan_to_num_(0, 0, 0).clamp_(-9, 9)
    return case


def wrong(op, seed):
    """A case that no kernel may run, and what is wrong with it."""
    d, case = Draw(seed), plain(op, seed)
    tensors = [name for name, value in case.items() if isinstance(value, torch.Tensor)]
    full = [name for name in tensors if case[name].numel()]
    faults = [("rank", name) for name in tensors] + [("dtype", name) for name in tensors]
    faults += [(fault, name) for fault in ("freed", "cut") for name in full]
    faults += [("size", name) for name in DECIDED[op] if case[name] is not None] * 3
    faults += [("strides", name) for name in full if case[name].shape[-1] > 1 and (op, name) not in ANY_STRIDES]
    faults += [(name, name) for name in ("rows", "floor", "threshold", "budget", "norm_weight") if name in case]
    fault, name = d.one(faults)
    value = case[name]
    if fault == "rank":
        case[name] = value[None] if d.number(0, 2) else value[..., None]
    elif fault == "dtype":
        case[name] = torch.zeros(value.shape, dtype=d.one([torch.int8, torch.int64, torch.complex64]))
    elif fault == "freed":
        value.untyped_storage().resize_(0)
    elif fault == "cut":
        value.set_(value.clone()).untyped_storage().resize_(value.numel() * value.itemsize - 1)
    elif fault == "size":
        shape, dim = list(value.shape), d.one(DECIDED[op][name])
        shape[dim] = d.one([size for size in (shape[dim] - 1, shape[dim] + 1, shape[dim] + 9) if size >= 0])
        case[name] = torch.zeros(shape, dtype=value.dtype)
    elif fault == "strides":
        case[name] = value.repeat_interleave(2, -1)[..., ::2]
    elif fault in ("rows", "floor"):
        case[name] = -1
    elif fault == "norm_weight":
        case[name] = torch.zeros(case["x"].shape[2], dtype=case["x"].dtype) if value is None else None
        case["norm_bias"] = None if value is None else case["norm_bias"]
    else:  # both rules, or neither
        streams = next(iter(case.values())).shape[0]
        dtype = torch.float32 if name == "threshold" else torch.int32
        case[name] = torch.ones(streams, dtype=dtype) if value is None else None
    return case, f"{fault} of {name}"


def selecting(op, seed):
    """A case whose rows lie anywhere."""
    d, case = Draw(seed), plain(op, seed)
    for _ in range(d.number(1, 4)):
        value = case[d.one(["index", "cu_seqlens"])]
        at = value.numel() - 1 if value is case["cu_seqlens"] else d.number(0, max(value.numel(), 1))
        value[at : at + 1] = d.one([-(2**31), -1, 0, 1, value.numel(), 2**31 - 1])
    return case

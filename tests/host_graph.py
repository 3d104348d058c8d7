"""Graphs without a GPU: a stand-in for `neuroflow.engine.graphs.CudaGraph` on the CPU."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
COPIES_FROM_HOST = {"aten::lift_fresh"}  # what torch.tensor(...) does
READS = {"aten::item", "aten::is_nonzero"}  # as inference mode shows them


def tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


def written(func, args, kwargs):
    """The tensors that a call of `func` writes to."""
    given = [*args, *([None] * (len(func._schema.arguments) - len(args)))]
    for number, argument in enumerate(func._schema.arguments):
        value = given[number] if number < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors(value)


class HostGraph(TorchDispatchMode):
    """Records the ops of torch, and does them again on the same memory.

    As with a CUDA graph, recording changes nothing and computes nothing, what is recorded may neither wait for the
    device nor copy from the host, and Python does not run again.
    """

    new_pool = staticmethod(list)

    def __init__(self, pool):
        super().__init__()
        pool.append(self)
        self.calls = []
        self.before = {}
        self.replays = 0

    @contextlib.contextmanager
    def recording(self):
        recording = contextlib.ExitStack()

        def begin():
            recording.enter_context(self)
            recording.enter_context(without_tolist())

        with recording:
            yield begin
        for tensor, value in self.before.values():
            tensor.copy_(value)
        for _, _, _, fresh in self.calls:
            for result in fresh:
                result.fill_(torch.nan if result.is_floating_point() else 111)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if (WAITS & set(func.tags) and name != "aten::index") or name in READS:
            raise RuntimeError(f"{name} waits for the device while a graph is recorded")
        if name in COPIES_FROM_HOST:
            raise RuntimeError("a tensor is made on the host while a graph is recorded")
        if name in ("aten::index", "aten::index_put_") and any(each.dtype == torch.bool for each in tensors(args[1])):
            raise RuntimeError("a mask is counted while a graph is recorded")
        known = {memory(each) for each in tensors((args, kwargs))}
        own = {memory(result) for *_, fresh in self.calls for result in fresh}
        for tensor in written(func, args, kwargs):
            if memory(tensor) not in own and id(tensor) not in self.before:
                self.before[id(tensor)] = tensor, tensor.clone()
        results = func(*args, **kwargs)
        fresh = [each for each in tensors(results) if memory(each) not in known]
        self.calls.append((func, args, kwargs, fresh))
        return results

    def replay(self):
        self.replays += 1
        with torch.inference_mode():  # which may write to tensors of both kinds
            for func, args, kwargs, fresh in self.calls:
                results = tensors(func(*args, **kwargs))
                for result, again in zip(fresh, results if fresh else (), strict=True):
                    result.copy_(again)

    @staticmethod
    def held_bytes(pool):
        return sum(result.nbytes for graph in pool for *_, fresh in graph.calls for result in fresh)


@contextlib.contextmanager
def without_tolist():
    def refuse(tensor):
        raise RuntimeError("tolist waits for the device while a graph is recorded")

    original, torch.Tensor.tolist = torch.Tensor.tolist, refuse
    try:
        yield
    finally:
        torch.Tensor.tolist = original

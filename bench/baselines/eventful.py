from functools import partial

import torch

from .tower import Tower

FIRST = 1e6


class Eventful(Tower):
    """Before each linear stage of a block, the tokens that moved most are recomputed; a buffer holds what others gave.

    A gate stands before the projections to queries, keys and values, before the projection after attention, and before
    the MLP. Each keeps the input that every token last gave its stage; the `count` tokens whose input is farthest from
    that, by L2 norm, go through the stage, of those that moved at all. Attention is computed for all tokens from the
    buffered queries, keys and values. CLS, which is what is read, goes before all others if it moved.

    Not reproduced: the incremental products inside attention, which keep N x N scores for each block and head, and the
    gates' threshold policy.

    Source: Dutson et al. 2023, Eventful Transformers: Leveraging Temporal Redundancy in Vision Transformers.
    """

    def __init__(self, model, count):
        super().__init__(model)
        self.count = count
        self.reset()

    def reset(self):
        self.stages = [
            [Gated(stage, self.count, self.prefix) for stage in (partial(self.qkv, block), block.project, block.mlp)]
            for block in self.blocks
        ]

    def qkv(self, block, tokens):
        return torch.cat(block.qkv(tokens), 2)

    @torch.inference_mode()
    def __call__(self, pixels):
        tokens = self.embed(pixels)
        for block, (qkv, project, mlp) in zip(self.blocks, self.stages, strict=True):
            attended = block.attend(*qkv(block.norm1(tokens)).chunk(3, 2))
            tokens = tokens + project(attended)
            tokens = tokens + mlp(block.norm2(tokens))
        return self.pool(self.norm(tokens))


class Gated:
    """A function of tokens [1, n, D], each on its own, behind a gate that lets `count` of a frame's T through."""

    def __init__(self, function, count, prefix):
        self.function, self.count, self.prefix = function, count, prefix
        self.reference = None  # [1, T, D], what each token last was when the function saw it
        self.buffer = None  # [1, T, ...], what the function gave then

    def __call__(self, tokens):
        if self.reference is None:
            self.reference, self.buffer = tokens.clone(), self.function(tokens)
            return self.buffer
        moved = (tokens - self.reference)[0].norm(dim=-1)
        moved[: self.prefix] *= FIRST
        index = moved.topk(min(self.count, len(moved))).indices
        index = index[moved[index] > 0]
        if len(index):
            chosen = tokens[:, index]
            self.reference[:, index] = chosen
            self.buffer[:, index] = self.function(chosen)
        return self.buffer

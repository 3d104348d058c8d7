import torch
import torch.nn.functional as F

from .tower import Tower


class STC(Tower):
    """Per block, the share of tokens whose keys are least like those of the last full frame is recomputed.

    Every `period`-th frame is encoded whole, and each block keeps its keys, values, attention outputs and MLP outputs.
    In the frames between, a block projects the keys of all tokens, takes the `share` of them with the lowest cosine to
    the kept keys, and computes queries, values, attention and MLP for these alone: they attend to all keys, the new
    ones, and to the kept values with their own put in. The others add the kept outputs. The kept ones stay those of the
    last full frame. CLS, which the paper's towers do not have, is always recomputed.

    The paper takes a share of 0.25. Not reproduced: STC-Pruner, which is about the language model behind the tower.

    Source: Wang et al. 2025, Accelerating Streaming Video Large Language Models via Hierarchical Token Compression,
    STC-Cacher.
    """

    def __init__(self, model, share=0.25, period=4):
        super().__init__(model)
        self.share, self.period = share, period
        self.reset()

    def reset(self):
        self.frames = 0
        self.kept = None  # of each block: keys, values, attention outputs, MLP outputs [1, T, D]

    @torch.inference_mode()
    def __call__(self, pixels):
        tokens = self.embed(pixels)
        if self.frames % self.period == 0:
            self.kept = []
            for block in self.blocks:
                tokens = self.full(block, tokens)
        else:
            for block, kept in zip(self.blocks, self.kept, strict=True):
                tokens = self.partial(block, kept, tokens)
        self.frames += 1
        return self.pool(self.norm(tokens))

    def full(self, block, tokens):
        query, key, value = block.qkv(block.norm1(tokens))
        attention = block.project(block.attend(query, key, value))
        tokens = tokens + attention
        increment = block.mlp(block.norm2(tokens))
        self.kept.append((key, value, attention, increment))
        return tokens + increment

    def partial(self, block, kept, tokens):
        kept_key, kept_value, kept_attention, kept_increment = kept
        normed = block.norm1(tokens)
        key = block.linear(block.key, normed)
        likeness = F.cosine_similarity(key[0], kept_key[0], dim=-1)
        likeness[: self.prefix] = -torch.inf
        count = max(round(self.share * len(likeness)), 1)
        index = likeness.topk(count, largest=False).indices
        chosen = normed[:, index]
        value = kept_value.index_copy(1, index, block.linear(block.value, chosen))
        attended = block.project(block.attend(block.linear(block.query, chosen), key, value))
        tokens = tokens + kept_attention.index_copy(1, index, attended)
        return tokens + kept_increment.index_copy(1, index, block.mlp(block.norm2(tokens[:, index])))

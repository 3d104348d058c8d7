import math

import torch

from .tower import Tower


class AttentionDropping(Tower):
    """After a quarter, half and three quarters of the blocks, the share of tokens that CLS attends to most is kept.

    In each of these blocks (3, 6 and 9 of 12), between attention and MLP, the tokens with the highest attention from
    CLS, mean over heads, stay: `share` of those that are left. The others become one token, their mean weighted by that
    attention (the paper's is the sum, to which it then fine-tunes).

    Training-free: the selection is EViT's, by attention, and not DynamicViT's, which learns a predictor; neither's
    fine-tuning of the model is reproduced. ViT alone, as it reads CLS.

    Source: Liang et al. 2022, Not All Patches Are What You Need: Expediting Vision Transformers via Token
    Reorganizations (EViT); the places and the geometric shares are also those of Rao et al. 2021, DynamicViT.
    """

    def __init__(self, model, share):
        super().__init__(model)
        if self.prefix != 1:
            raise TypeError(f"{type(model).__name__} has no CLS token; attention dropping reads its attention")
        self.share = share
        self.drops = [len(self.blocks) * quarters // 4 for quarters in (1, 2, 3)]

    @torch.inference_mode()
    def __call__(self, pixels):
        tokens = self.embed(pixels)
        for number, block in enumerate(self.blocks):
            query, key, value = block.qkv(block.norm1(tokens))
            tokens = tokens + block.project(block.attend(query, key, value))
            if number in self.drops:
                tokens = drop(tokens, cls_attention(block.split(query)[0], block.split(key)[0]), self.share)
            tokens = tokens + block.mlp(block.norm2(tokens))
        return self.pool(self.norm(tokens))


def cls_attention(query, key):
    """What CLS pays each patch, mean over heads: query and key [heads, T, d] -> [T - 1]."""
    scores = (key @ query[:, 0, :, None])[..., 0] * query.shape[2] ** -0.5
    return scores.softmax(1)[:, 1:].mean(0)


def drop(tokens, attention, share):
    """Tokens [1, T, D] -> CLS, the `share` of the rest with the most `attention` [T - 1], one token of the others."""
    count = math.ceil(share * len(attention))
    if count == len(attention):
        return tokens
    order = attention.argsort(descending=True)
    kept, rest = order[:count].sort().values, order[count:]
    patches = tokens[0, 1:]
    fused = (attention[rest, None] * patches[rest]).sum(0) / attention[rest].sum()
    return torch.cat((tokens[0, :1], patches[kept], fused[None]))[None]

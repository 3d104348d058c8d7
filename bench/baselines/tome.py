import torch
import torch.nn.functional as F

from .tower import Tower


class TokenMerging(Tower):
    """Between attention and MLP of every block, `r` tokens are merged into the ones most like them, within a frame.

    Tokens are split by turns into two sets; each of the first set has one partner in the second, by the cosine of
    their keys averaged over heads, and the `r` most similar pairs become their means, weighted by how many patches each
    token stands for. Attention is proportional: the logarithm of those sizes is added to the scores. CLS is never
    merged into another token. At most half of the patches' tokens are merged in a block.

    Not reproduced: merging over space and time of the paper's video models; ViT alone, as the paper has no pooling
    head with attention.

    Source: Bolya et al. 2023, Token Merging: Your ViT But Faster.
    """

    def __init__(self, model, r):
        super().__init__(model)
        if self.prefix != 1:
            raise TypeError(f"{type(model).__name__} has no CLS token; token merging reads it")
        self.r = r

    @torch.inference_mode()
    def __call__(self, pixels):
        tokens = self.embed(pixels)
        sizes = torch.ones_like(tokens[0, :, :1])
        for block in self.blocks:
            query, key, value = block.qkv(block.norm1(tokens))
            attended = block.attend(query, key, value, sizes.log().view(1, 1, 1, -1))
            tokens = tokens + block.project(attended)
            merged, sizes = merge(tokens[0], sizes, block.split(key)[0].mean(0), self.r)
            tokens = merged[None] + block.mlp(block.norm2(merged[None]))
        return self.pool(self.norm(tokens))


def merge(tokens, sizes, keys, r):
    """Tokens [T, D], CLS first, and their sizes [T, 1] -> the same of T - r tokens, by the likeness of keys [T, d]."""
    r = min(r, (len(tokens) - 1) // 2)
    keys = F.normalize(keys, dim=-1)
    likeness = keys[::2] @ keys[1::2].T
    likeness[0] = -torch.inf
    best, partner = likeness.max(1)
    order = best.argsort(descending=True)
    gone, kept = order[:r], order[r:].sort().values  # CLS stays first
    weighted = tokens * sizes
    sums = weighted[1::2].index_add(0, partner[gone], weighted[::2][gone])
    counts = sizes[1::2].index_add(0, partner[gone], sizes[::2][gone])
    return torch.cat((tokens[::2][kept], sums / counts)), torch.cat((sizes[::2][kept], counts))

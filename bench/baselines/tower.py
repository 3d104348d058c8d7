"""A vision tower taken apart, as the baselines run its blocks in ways of their own."""

import torch.nn.functional as F
from neuroflow.adapters import describe
from transformers.activations import ACT2FN


class Tower:
    """The parts of a ViT (its CLS output) or SigLIP tower of transformers, which keeps its weights and its forward.

    flops: two for each multiply-add of the patch projection and of the blocks, counted up from 0; norms, activations
        and a pooling head are left out.
    prefix: how many tokens before the patches are no patches: 1 of ViT, 0 of SigLIP.
    """

    def __init__(self, model):
        self.anatomy = describe(model)
        self.prefix = self.anatomy.prefix
        self.norm = self.anatomy.last
        self.flops = 0
        parts = zip(self.anatomy.layers, self.anatomy.attentions, self.anatomy.mlps, strict=True)
        self.blocks = [Block(self, *each) for each in parts]

    def reset(self):
        """Forget the stream, of which a method within one frame knows nothing: the next frame is its first."""

    def embed(self, pixels):
        """Pixels [1, 3, H, W] -> tokens [1, T, D] with positions, CLS first where there is one."""
        tokens = self.anatomy.tower.embeddings(pixels, interpolate_pos_encoding=True)
        weight = self.anatomy.projection.weight
        self.flops += 2 * (tokens.shape[1] - self.prefix) * weight.numel()
        return tokens

    def pool(self, outputs):
        """The frame's embedding [1, D] of outputs [1, T, D], which have gone through the last norm."""
        return outputs[:, 0] if self.anatomy.pool is None else self.anatomy.pool[0](outputs)


class Block:
    """One block: pre-norm attention and MLP on tokens [1, T, D], in steps that its `__call__` takes in turn."""

    def __init__(self, tower, layer, attention, mlp):
        self.tower = tower
        self.heads = attention.config.num_attention_heads
        self.activation = ACT2FN[attention.config.hidden_act]
        self.up, self.down = mlp
        if hasattr(layer, "layer_norm1"):
            self.norm1, self.norm2 = layer.layer_norm1, layer.layer_norm2
        else:
            self.norm1, self.norm2 = layer.layernorm_before, layer.layernorm_after
        if hasattr(attention, "query"):  # ViT up to transformers 5.8
            self.query, self.key, self.value = attention.query, attention.key, attention.value
            self.output = layer.attention.output.dense
        else:
            self.query, self.key, self.value = attention.q_proj, attention.k_proj, attention.v_proj
            self.output = attention.out_proj if hasattr(attention, "out_proj") else attention.o_proj

    def linear(self, module, tokens):
        self.tower.flops += 2 * tokens.shape[1] * module.weight.numel()
        return module(tokens)

    def qkv(self, tokens):
        """Queries, keys and values [1, T, D] of tokens that have gone through `norm1`."""
        return [self.linear(module, tokens) for module in (self.query, self.key, self.value)]

    def split(self, tokens):
        """[1, T, D] -> [1, heads, T, D / heads]"""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def attend(self, query, key, value, bias=None):
        """Queries [1, M, D] to keys and values [1, T, D] -> [1, M, D], before `output`; bias [1, 1, 1, T] on scores."""
        self.tower.flops += 4 * query.shape[1] * key.shape[1] * key.shape[2]
        query, key, value = (self.split(tokens) for tokens in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)

    def project(self, attended):
        return self.linear(self.output, attended)

    def mlp(self, tokens):
        """The MLP of tokens that have gone through `norm2`."""
        return self.linear(self.down, self.activation(self.linear(self.up, tokens)))

    def __call__(self, tokens):
        tokens = tokens + self.project(self.attend(*self.qkv(self.norm1(tokens))))
        return tokens + self.mlp(self.norm2(tokens))

"""timm's VisionTransformer and Eva, the towers of its ViT, DeiT, DINO, CLIP, SigLIP, PE and RoPE-ViT models."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .anatomy import Anatomy, Grid, grids_of_images, mean_of_last

BLOCKS = ("Block", "ResPostBlock", "EvaBlock", "EvaBlockPostNorm")
ATTENTIONS = ("Attention", "AttentionRope", "EvaAttention")


def vision_transformer(tower: nn.Module) -> Anatomy:
    """timm's VisionTransformer, its DeiT with a distillation token, and Eva, from timm 1.0 on.

    `forward`, `forward_features`, `forward_intermediates` and everything built on them take sparse frames.
    `forward_head` called on its own treats every row as a token, including the padding between streams of a batch under
    architecture B.
    """
    _accept("patch_embed", [tower.patch_embed], ("PatchEmbed",))
    layers = tuple(tower.blocks)
    _accept("blocks", layers, BLOCKS)
    attentions = tuple(layer.attn for layer in layers)
    _accept("attention", attentions, ATTENTIONS)
    projection = tower.patch_embed.proj

    def grids(arguments: dict[str, Any]) -> list[Grid]:
        if arguments.get("is_causal"):
            raise ValueError("is_causal is True; accepted is False, as a sparse frame also attends to later tokens")
        drop_rate = getattr(tower.patch_drop, "prob", 0)
        if drop_rate and tower.training:
            raise ValueError(
                f"patch_drop_rate is {drop_rate} in training mode; accepted is 0, or evaluation mode, which drops no "
                "patches"
            )
        grids = grids_of_images(projection, "attn_mask")(arguments)
        if tower.patch_embed.dynamic_img_pad:
            return [tower.patch_embed.dynamic_feat_size(arguments["x"].shape[2:])] * len(grids)
        return grids

    def reads(arguments: dict[str, Any]) -> Iterable[int]:
        if "indices" not in arguments:
            return ()
        indices, depth = arguments["indices"], len(layers)
        if indices is None or isinstance(indices, int):
            return range(depth - (depth if indices is None else indices), depth)
        return [index % depth for index in indices]

    def embedding(output: Any) -> torch.Tensor:
        if isinstance(output, list):  # of feature maps
            return mean_of_last(output)
        if not isinstance(output, torch.Tensor):  # of transformers' wrappers
            if "feature_maps" in output:
                return mean_of_last(output.feature_maps)
            held = (output.get(name) for name in ("logits", "pooler_output", "last_hidden_state"))
            output = next(tensor for tensor in held if tensor is not None)
        if output.ndim == 2:
            return output
        return output[:, 0] if tower.cls_token is not None else output.mean(1)

    rope = getattr(tower, "rope", None)
    return Anatomy(
        tower=tower,
        projection=projection,
        layers=layers,
        attentions=attentions,
        mlps=tuple((layer.mlp, layer.mlp) for layer in layers),
        last=tower.norm,
        prefix=tower.num_prefix_tokens,
        grids=grids,
        embedding=embedding,
        pool=None if tower.global_pool in ("", "token") else (tower, "forward_head"),
        entries=("forward", "forward_features", "forward_intermediates"),
        tables=() if rope is None else ((rope, "get_embed"),),
        positions=() if rope is None else (("rope", _sin_and_cos),),
        attention=_attention,
        reads=reads,
    )


def _accept(part: str, modules: Iterable[nn.Module], names: tuple[str, ...]) -> None:
    """Raise for modules of other classes, which may compute differently or mix tokens."""
    for module in modules:
        if type(module).__name__ not in names:
            raise TypeError(f"{part} is a {type(module).__name__}; accepted of timm are {', '.join(names)}")


def _sin_and_cos(rope: torch.Tensor, take: Callable) -> torch.Tensor:
    """Sines and cosines of one block, [N, 2 * head_dim] or of each head [heads, N, 2 * head_dim], for packed tokens."""
    sin, cos = (half.movedim(-2, 0).flatten(1) for half in rope.chunk(2, -1))  # [N, heads or 1 * head_dim]
    taken = (take(sin, 0.0), take(cos, 1.0))
    return torch.cat([half.unflatten(1, (*rope.shape[:-2], -1)).movedim(0, -2) for half in taken], -1)


def _turned(tokens: torch.Tensor, rope: torch.Tensor, halves: bool) -> torch.Tensor:
    """Queries or keys [S, heads, T, head_dim], rotated by `rope` in pairs of neighbours or of the two halves."""
    sin, cos = rope.chunk(2, -1)
    if halves:
        first, second = tokens.chunk(2, -1)
        across = torch.cat((-second, first), -1)
    else:
        across = torch.stack((-tokens[..., 1::2], tokens[..., ::2]), -1).flatten(-2)
    return tokens * cos + across * sin


def _through(module: nn.Module, part: str, tokens: torch.Tensor) -> torch.Tensor:
    """`tokens` through a part of `module` that not every release of timm has."""
    return getattr(module, part)(tokens) if hasattr(module, part) else tokens


def _attention(
    module: nn.Module,
    attend: Callable,
    x: torch.Tensor,
    rope: torch.Tensor | None = None,
    attn_mask: None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """`Anatomy.attention` of those in ATTENTIONS, [S, T, D] -> [S, T, D]."""
    if getattr(module, "qkv", None) is None:
        query, key, value = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    else:
        qkv = module.qkv(x)
        if getattr(module, "q_bias", None) is not None:
            qkv = qkv + torch.cat((module.q_bias, module.k_bias, module.v_bias))
        query, key, value = qkv.chunk(3, -1)
    head_dim = query.shape[-1] // module.num_heads
    query, key, value = (
        projected.unflatten(-1, (-1, head_dim)).transpose(1, 2) for projected in (query, key, value)
    )  # [S, heads, T, head_dim]
    query, key = _through(module, "q_norm", query), _through(module, "k_norm", key)
    if rope is not None:
        prefix = x.shape[1] - rope.shape[-2]  # none when packed: then it has rows of its own
        halves = getattr(module, "rotate_half", False)
        query, key = (
            torch.cat((tokens[:, :, :prefix], _turned(tokens[:, :, prefix:], rope, halves)), 2).type_as(value)
            for tokens in (query, key)
        )
    if key.shape[1] < module.num_heads:
        key, value = (tokens.repeat_interleave(module.num_heads // key.shape[1], 1) for tokens in (key, value))
    outputs, _ = attend(query, key, value, None, scaling=module.scale)
    outputs = _through(module, "norm", outputs.flatten(2))
    if getattr(module, "gate", None) is not None:
        outputs = outputs * module.gate(x).sigmoid()
    return module.proj_drop(module.proj(outputs))

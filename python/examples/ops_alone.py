"""The ops without a model: attention over S streams in which only the tokens that changed are computed.

    python ops_alone.py

What is not computed goes stale, so the cosine to dense attention falls until everything is computed again.
"""

import torch
import torch.nn.functional as F

from neuroflow_kernels import attend_rows, ema_gate_, linear_rows, scatter_kv_, scatter_rows_

STREAMS, TOKENS, HEADS, HEAD_DIM = 2, 196, 4, 16
WIDTH = HEADS * HEAD_DIM


class SparseAttention:
    """Self-attention whose keys, values and outputs stay from frame to frame."""

    def __init__(self, qkv: torch.Tensor, out: torch.Tensor) -> None:
        self.qkv, self.out = qkv, out  # [3 * D, D], [D, D]
        self.reference = None
        self.key, self.value, self.output = torch.zeros(3, STREAMS, TOKENS, WIDTH)

    def __call__(self, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Tokens [S, N, D] of the next frame -> outputs [S, N, D] and the share of tokens that were computed."""
        first = self.reference is None
        self.reference = tokens.clone() if first else self.reference
        rule = {"budget": TOKENS} if first else {"threshold": 0.02}
        _, index, cu_seqlens, packed = ema_gate_(tokens, self.reference, decay=0.0, **rule)
        scatter_rows_(self.reference, packed, index, cu_seqlens)  # what a token was when it was last computed
        query, key, value = linear_rows(packed, self.qkv).unflatten(1, (3, HEADS, HEAD_DIM)).unbind(1)
        scatter_kv_(self.key, self.value, key, value, index, cu_seqlens)
        keys, values = (cache.unflatten(2, (HEADS, HEAD_DIM)) for cache in (self.key, self.value))
        attended = attend_rows(query, keys, values, cu_seqlens=cu_seqlens)  # [M, heads, head_dim]
        scatter_rows_(self.output, linear_rows(attended.flatten(1), self.out), index, cu_seqlens)
        return self.output, len(packed) / (STREAMS * TOKENS)


def dense(tokens: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    query, key, value = (tokens @ qkv.T).unflatten(2, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2) @ out.T


@torch.inference_mode()
def main() -> None:
    generator = torch.Generator().manual_seed(0)
    qkv, out = (torch.randn(rows, WIDTH, generator=generator) / WIDTH**0.5 for rows in (3 * WIDTH, WIDTH))
    attention, tokens = SparseAttention(qkv, out), torch.randn(STREAMS, TOKENS, WIDTH, generator=generator)
    for frame in range(8):
        tokens[:, 10 * frame : 10 * frame + 12] = torch.randn(STREAMS, 12, WIDTH, generator=generator)
        found, computed = attention(tokens)
        cosine = F.cosine_similarity(found, dense(tokens, qkv, out), dim=2).mean()
        print(f"frame {frame}: {computed:.1%} of tokens computed, cosine to dense {cosine:.4f}")


if __name__ == "__main__":
    main()

import torch
import torch.nn.functional as F

from .tower import Tower

FLOOR = 4


class Published(Tower):
    """NeuroFlow as it was published: architectures B and C, in eager torch.

    A patch is active where 1 - cosine of its embedding, positions included, to the moving average of its embeddings
    lies above `threshold`; at least 4 patches are. The blocks run on the active tokens alone. C scatters what they give
    into the last output of every token, and the head sees all of them; in B it sees the active ones only. A CLS token
    is always active, so that its output is the same in both. With `threshold` 0 every patch is active.

    Not reproduced: B's distillation.

    Source: Schmitt 2026, EMA-Gated Temporal Sequence Compression in Vision Transformers, architectures B and C.
    """

    def __init__(self, model, threshold, arch="C", decay=0.01):
        super().__init__(model)
        self.threshold, self.arch, self.decay = threshold, arch, decay
        self.reset()

    def reset(self):
        self.reference = None  # [N, D]
        self.outputs = None  # [1, T, D]

    @torch.inference_mode()
    def __call__(self, pixels):
        tokens = self.embed(pixels)
        leading = torch.arange(self.prefix, device=tokens.device)
        index = torch.cat((leading, self.active(tokens[0, self.prefix :]) + self.prefix))
        packed = tokens.index_select(1, index)
        for block in self.blocks:
            packed = block(packed)
        outputs = self.norm(packed)
        if self.arch == "B":
            return self.pool(outputs)
        if index.numel() == tokens.shape[1]:
            self.outputs = outputs
        else:
            self.outputs = self.outputs.index_copy(1, index, outputs)
        return self.pool(self.outputs)

    def active(self, h):
        """The active patches, ascending, by their embeddings h [N, D]; moves the reference on."""
        if self.threshold == 0 or self.reference is None or self.reference.shape != h.shape:
            self.reference = h.clone()
            return torch.arange(len(h), device=h.device)
        surprise = 1 - F.cosine_similarity(h, self.reference, dim=-1)
        self.reference = (1 - self.decay) * self.reference + self.decay * h
        index = (surprise > self.threshold).nonzero()[:, 0]
        if len(index) < FLOOR:
            index = surprise.topk(min(FLOOR, len(h))).indices.sort().values
        return index

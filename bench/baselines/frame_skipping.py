import torch

from .tower import Tower


class FrameSkipping(Tower):
    """Every `every`-th frame is encoded, the others repeat its embedding: what needs no method at all."""

    def __init__(self, model, every):
        super().__init__(model)
        self.every = every
        self.reset()

    def reset(self):
        self.frames = 0
        self.embedding = None

    @torch.inference_mode()
    def __call__(self, pixels):
        if self.frames % self.every == 0:
            tokens = self.embed(pixels)
            for block in self.blocks:
                tokens = block(tokens)
            self.embedding = self.pool(self.norm(tokens))
        self.frames += 1
        return self.embedding

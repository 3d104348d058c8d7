import torch
import torch.nn.functional as F

from .tower import Tower


class PixelGate(Tower):
    """A patch is encoded where its pixels differ from those at its last encoding; the others keep their last output.

    A patch is active where the mean absolute difference, in units of the model's input, is `threshold` or more: at 0
    all are. The blocks run on the active tokens, and CLS, alone; where no patch is active, the last embedding is
    repeated. It is the gate of a motion detector before the reuse of `Published`'s C; it follows no paper.
    """

    def __init__(self, model, threshold):
        super().__init__(model)
        self.threshold = threshold
        self.reset()

    def reset(self):
        self.reference = None  # pixels of each patch [N, 3 * patch * patch]
        self.outputs = None  # [1, T, D]
        self.embedding = None

    @torch.inference_mode()
    def __call__(self, pixels):
        window = self.anatomy.projection.kernel_size
        patches = F.unfold(pixels, window, stride=window)[0].T  # [N, 3 * patch * patch]
        first = self.reference is None
        if first:
            self.reference = patches.clone()
            index = torch.arange(len(patches), device=pixels.device)
        else:
            difference = (patches - self.reference).abs().mean(1)
            index = (difference >= self.threshold).nonzero()[:, 0]
            if len(index) == 0:
                return self.embedding
            self.reference[index] = patches[index]
        leading = torch.arange(self.prefix, device=pixels.device)
        index = torch.cat((leading, index + self.prefix))
        tokens = self.embed(pixels).index_select(1, index)
        for block in self.blocks:
            tokens = block(tokens)
        outputs = self.norm(tokens)
        self.outputs = outputs if first else self.outputs.index_copy(1, index, outputs)
        self.embedding = self.pool(self.outputs)
        return self.embedding

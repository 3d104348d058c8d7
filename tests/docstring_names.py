"""What the examples in docstrings of `neuroflow` find defined, as a user would have it before the first line."""

import neuroflow
import torch
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel


def docstring_names():
    """New objects for one example, which may patch them and write files to the working directory."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = SiglipVisionConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=8)
    text = LlamaConfig(**sizes, num_hidden_layers=3, vocab_size=64, bos_token_id=None, eos_token_id=None)
    frames = torch.randn(1, 3, 32, 32).repeat(8, 1, 1, 1)  # one picture, in which one of 16 patches changes
    frames[1:, :, :8, :8] += 0.5 * torch.randn(7, 3, 8, 8)
    return {
        "neuroflow": neuroflow,
        "torch": torch,
        "model": SiglipVisionModel(vision).eval(),
        "frame": frames[:1],
        "frames": frames,
        "decoder": LlamaForCausalLM(text).eval(),
        "prompt": torch.arange(1, 9)[None],
    }

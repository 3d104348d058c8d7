"""What the training scripts share: the optimizer, its learning rate, and checkpoints to resume from."""

import math

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def optimizer_of(model):
    """AdamW, with weight decay on matrices only."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def set_rate(optimizer, step, steps, highest, warmup):
    """The learning rate of `step`: linear up to `highest` over the share `warmup` of the steps, then half a cosine."""
    warm = min((step + 1) / (warmup * steps), 1)
    for group in optimizer.param_groups:
        group["lr"] = highest * warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))


def save_checkpoint(path, model, optimizer, step):
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"step": str(step)})
    partial.replace(path)


def load_checkpoint(path, model, optimizer):
    """Take up what `save_checkpoint` wrote; returns its step."""
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"model.{name}"])
    state = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])

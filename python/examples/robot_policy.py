"""A robot policy that looks through two cameras with one tower, called once a camera.

    python robot_policy.py google/siglip2-base-patch16-224

The names keep the cameras apart. Without them each view would be compared with the other camera's, and nothing skipped.
"""

import sys

import neuroflow
import torch
from torch import nn
from transformers import SiglipVisionModel

STEPS = 20


class Policy(nn.Module):
    """Views of cameras, by name -> an action [1, 7]."""

    def __init__(self, tower: nn.Module, cameras: int) -> None:
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(cameras * tower.config.hidden_size, 7)

    def forward(self, views: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.head(torch.cat([self.tower(pixel_values=view).pooler_output for view in views.values()], 1))


def observe(step: int, side: int) -> dict[str, torch.Tensor]:
    """Made views [1, 3, H, W]: a still table in which a gripper moves, and a close-up of it from the wrist."""
    base, wrist = torch.rand(2, 1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    base[..., side // 4 : side // 2, 4 * step : 4 * step + side // 4] = 1
    wrist[..., : side // 8, : side // 8] = step / STEPS
    return {"base": base, "wrist": wrist}


@torch.inference_mode()
def main() -> None:
    tower = SiglipVisionModel.from_pretrained(sys.argv[1]).eval()
    policy = Policy(tower, cameras=2).eval()
    side = tower.config.image_size
    dense = [policy(observe(step, side)) for step in range(STEPS)]
    neuroflow.enable_cache(policy)  # finds the tower, wherever it lies
    for step, expected in enumerate(dense):
        views = observe(step, side)
        with neuroflow.cache_context(policy, *views):  # "base" for the tower's first call, "wrist" for its second
            action = policy(views)
        print(f"step {step}: off by {(action - expected).norm() / expected.norm():.2%} of the unpatched action")
    print(neuroflow.summary(policy))


if __name__ == "__main__":
    main()

"""A torchvision that was built for CUDA has none of its ops beside a CPU build of torch, and cannot be imported without
two of them. Here every process that imports it finds them.
"""

import importlib.machinery
import sys


class _BeforeTorchvision:
    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if not torch.cuda.is_available():
                for op in ("nms", "qnms"):
                    torch.library.define(
                        f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    )
        return None


sys.meta_path.insert(0, _BeforeTorchvision())

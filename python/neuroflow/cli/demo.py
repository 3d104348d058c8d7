"""`neuroflow demo`: the whole of it on a clip and a model that the project makes itself."""

import argparse
import contextlib
import sys

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

import neuroflow

from ..video.preprocess import Preprocessor
from ..video.results import Results
from ..video.scene import write_street
from ..video.source import Source
from . import CommandError
from .run import encode_video

SIZE = 448
SIGLIP_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
RANDOM_WEIGHTS = "The weights are random: only the speed and the share of patches skipped mean anything, not fidelity."


def demo(arguments: argparse.Namespace) -> int:
    """Carry out `neuroflow demo` and return the exit code.

    Raises:
        CommandError: the directory cannot be made.
    """
    directory = arguments.out_dir
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out-dir {directory}: cannot be made ({error.strerror}); give another") from None
    clip = directory / "street.mp4"
    print(f"drawing {clip} and making a SigLIP of base size. {RANDOM_WEIGHTS}", file=sys.stderr)
    write_street(clip, size=SIZE)
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**SIGLIP_BASE, image_size=SIZE, patch_size=16)).eval()
    with contextlib.closing(Source(str(clip))) as source:
        code = encode_video(
            source,
            model,
            Preprocessor(SIZE, SIZE),
            neuroflow.NeuroFlowConfig(),
            compare=True,
            results=Results(directory / "result.jsonl", {"source": str(clip), "model": "SigLIP base, random weights"}),
            overlay=directory / "overlay.mp4",
        )
    if code == 0:
        print(f"\n{RANDOM_WEIGHTS}\nwritten: {directory / 'overlay.mp4'}, {directory / 'result.jsonl'}")
    return code

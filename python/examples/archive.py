"""Encode every video of a folder, 16 frames a call, and write one safetensors file for each.

    python archive.py recordings/ embeddings/ google/siglip2-base-patch16-224

`neuroflow archive` does this for thousands of recordings: Parquet, --resume, and Ray for many workers.
"""

import contextlib
import sys
from pathlib import Path

import neuroflow
import torch
from neuroflow.embedding import in_clips
from neuroflow.video.clips import VIDEO_SUFFIXES
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Source
from safetensors.torch import save_file
from torch import nn
from transformers import SiglipVisionModel


@torch.inference_mode()
def encode(model: nn.Module, preprocess: Preprocessor, path: Path) -> dict[str, torch.Tensor]:
    """The embeddings [T, D] of a recording's frames, and the share of patches that each skipped [T]."""
    embeddings, skipped = [], []
    with contextlib.closing(Source(str(path))) as source, neuroflow.cache_context(model, path.name):
        for clip in in_clips(map(preprocess, source)):  # the first frame alone, then [16, 3, H, W]
            embeddings.append(model(pixel_values=clip).pooler_output)
            skipped += [report.skipped for report in neuroflow.last_pass(model)]
    neuroflow.reset_cache(model, path.name)  # gives the stream's memory back
    return {"embeddings": torch.cat(embeddings), "skipped": torch.tensor(skipped)}


def main() -> None:
    recordings, out, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    model = SiglipVisionModel.from_pretrained(name).eval()
    side = model.config.image_size
    preprocess = Preprocessor.from_pretrained(name, Preprocessor(side, side))
    neuroflow.enable_cache(model)
    out.mkdir(exist_ok=True)
    for path in sorted(each for each in recordings.iterdir() if each.suffix in VIDEO_SUFFIXES):
        found = encode(model, preprocess, path)
        save_file(found, out / f"{path.name}.safetensors")
        print(f"{path.name}: {len(found['skipped'])} frames, {found['skipped'].mean():.1%} of patches skipped")


if __name__ == "__main__":
    main()

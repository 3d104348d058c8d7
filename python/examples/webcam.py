"""A webcam, a file or a network camera through a SigLIP tower: what each frame encodes, and how long that takes.

    python webcam.py 0 google/siglip2-base-patch16-224
    python webcam.py rtsp://camera/stream google/siglip2-base-patch16-224

Live sources give their newest frame, so a slow model drops frames and never falls behind. Ctrl-C ends it.
"""

import contextlib
import sys
import time

import neuroflow
import torch
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Source
from transformers import SiglipVisionModel


@torch.inference_mode()
def main() -> None:
    address, path = sys.argv[1:]
    model = SiglipVisionModel.from_pretrained(path).eval()
    side = model.config.image_size
    preprocess = Preprocessor.from_pretrained(path, Preprocessor(side, side))
    neuroflow.enable_cache(model)
    camera = neuroflow.stream(model, "webcam")
    source = Source(address)
    with contextlib.closing(source), contextlib.suppress(KeyboardInterrupt):
        for frame in source:
            pixels = preprocess(frame)  # [1, 3, H, W]
            begin = time.perf_counter()
            embedding = camera(pixel_values=pixels).pooler_output  # noqa: F841 - [1, D], yours to use
            milliseconds = 1e3 * (time.perf_counter() - begin)
            (report,) = neuroflow.last_pass(model)
            why = f", key frame: {report.key_frame}" if report.key_frame else ""
            print(f"{frame.time:8.2f} s: {report.skipped:.1%} skipped, {milliseconds:.1f} ms{why}")
    if source.stopped:
        print(source.stopped, file=sys.stderr)
    print(neuroflow.summary(model))


if __name__ == "__main__":
    main()

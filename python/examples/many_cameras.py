"""Many cameras through one model, the frames that wait in one pass; `neuroflow serve` is this loop behind HTTP.

python many_cameras.py google/siglip2-base-patch16-224 rtsp://one/stream rtsp://two/stream
"""

import queue
import sys
import threading
from collections.abc import Callable

import neuroflow
import torch
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Source
from transformers import SiglipVisionModel


@torch.inference_mode()
def serve(tower: torch.nn.Module, requests: queue.Queue, reply: Callable, most: int = 16) -> None:
    """Encode requests (camera, number, frame [3, H, W]) of a queue, up to None: reply(camera, number, embedding)."""
    neuroflow.enable_cache(tower, streams=neuroflow.StreamCache(max_streams=64, max_bytes=8 * 2**30, idle_seconds=60))
    held = []  # at most one request, which begins the next pass
    while (request := held.pop() if held else requests.get()) is not None:
        batch = {request[0]: request}
        while len(batch) < most and not held and not requests.empty():
            request = requests.get()
            if request is None or request[0] in batch:  # the end, or a second frame of a camera
                held.append(request)
            else:
                batch[request[0]] = request
        cameras, numbers, frames = zip(*batch.values(), strict=True)
        output = neuroflow.encode(tower, torch.stack(frames), cameras, frame_ids=numbers)
        for camera, number, embedding in zip(cameras, numbers, output.pooler_output, strict=True):
            reply(camera, number, embedding)


def main() -> None:
    path, *cameras = sys.argv[1:]
    model, requests = SiglipVisionModel.from_pretrained(path).eval(), queue.Queue(maxsize=64)

    def read(camera: str) -> None:
        preprocess = Preprocessor.from_pretrained(path, Preprocessor(224, 224))
        for frame in Source(camera):
            requests.put((camera, frame.index, preprocess(frame)[0]))

    def read_all() -> None:
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        requests.put(None)

    readers = [threading.Thread(target=read, args=[camera], daemon=True) for camera in cameras]
    threading.Thread(target=read_all, daemon=True).start()
    serve(model, requests, lambda camera, number, embedding: print(camera, number, f"{embedding.norm():.2f}"))


if __name__ == "__main__":
    main()

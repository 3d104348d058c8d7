"""The still of the overlay in the README: one frame of a clip beside its surprise and the patches that were encoded.

`python -m bench.still CLIP --frame 363`: the package's tower over the frames before it, and what `neuroflow run
--overlay` shows of that one. It goes to python/guide/overlay.jpg; whose clip it is of is in overlay.txt beside it.
"""

import argparse
import collections
import contextlib
import itertools
from pathlib import Path

import neuroflow
from neuroflow.cli.encoding import caption
from neuroflow.street import load_street
from neuroflow.video.ahead import prepare
from neuroflow.video.overlay import PANEL_HEIGHT, PANEL_WIDTH, fitted, panels, scaled
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Source, every
from neuroflow.video.stream import encode_stream
from PIL import Image

BEFORE = 30  # frames, of which the first is the key frame
QUALITY = 88  # of the JPEG


def still(source, number, height, width):
    """The overlay [height, width, 3] uint8 of a source's frame, at an input of such a size.

    Raises:
        ValueError: the source has no such frame, or it is a key frame, which has nothing to show.
    """
    model, _ = load_street()
    neuroflow.enable_cache(model)
    frames = itertools.islice(every(source, 1, max(number - BEFORE, 0)), min(number, BEFORE) + 1)
    last = collections.deque(encode_stream(prepare(frames, Preprocessor(height, width)), model), maxlen=1)
    encoded = last[0] if last else None
    if encoded is None or encoded.record.frame != number or encoded.key_frame is not None:
        raise ValueError(f"frame {number} of {source.address} is not there, or a key frame; give another")
    frame = encoded.prepared.frame
    size = fitted(frame.size, PANEL_HEIGHT, PANEL_WIDTH)
    region = scaled(encoded.prepared.region, frame.size, size)
    # Its latency says more of what else the machine did than of the frame.
    text = caption(encoded.record).partition("    NeuroFlow")[0]
    return panels(frame.rgb(*size), encoded.active, encoded.surprise, text, region)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clip", help="a video file")
    parser.add_argument("--frame", type=int, required=True, help="its number, from 0")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 352), metavar=("W", "H"), help="of the input")
    parser.add_argument("--out", type=Path, default=Path("python/guide/overlay.jpg"))
    arguments = parser.parse_args()
    width, height = arguments.size
    with contextlib.closing(Source(arguments.clip)) as source:
        image = Image.fromarray(still(source, arguments.frame, height, width))
    image.save(arguments.out, quality=QUALITY, optimize=True)
    print(f"{arguments.out}: {image.width}x{image.height}, {arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

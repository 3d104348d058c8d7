"""Small recordings of a still texture across which a square moves, and what an archive of them holds."""

from fractions import Fraction
from pathlib import Path

import numpy as np
from neuroflow.video.encode import VideoWriter


def write_recording(path, frames, seed=0, cuts=()):
    """A file of 48x64 frames; from each frame of `cuts` on, another texture."""
    random = np.random.default_rng(seed)
    path.parent.mkdir(exist_ok=True, parents=True)
    with VideoWriter(path, Fraction(10)) as writer:
        for number in range(frames):
            if number == 0 or number in cuts:
                texture = random.integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            image = texture.copy()
            image[16:32, 4 * (number % 12) : 4 * (number % 12) + 16] = 255
            writer.write(image)
    return path


def held(directory):
    """The bytes of every file of an archive by name."""
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}

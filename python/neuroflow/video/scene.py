"""A street that the project draws itself: static camera, textured background, sensor noise, a few moving objects."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .encode import VideoWriter

RATE = Fraction(30)
SUPERSAMPLING = 4


def draw_street(frames: int = 120, size: int = 448, seed: int = 0) -> Iterator[np.ndarray]:
    """A few seconds of a street: two cars and a van drive past, a person walks on the far pavement.

    The same arguments give the same frames. Yields [size, size, 3] uint8.
    """
    random = np.random.default_rng(seed)
    scale = size / 448
    background = _background(size, random)
    # picture, first left edge, bottom edge, pixels a frame; all for a picture of 448 pixels
    traffic = [
        (_car((172, 44, 40), 84, 34, scale), -70.0, 338.0, 3.1),
        (_car((36, 84, 168), 92, 36, scale, mirrored=True), 430.0, 392.0, -4.3),
        (_van((226, 222, 208), 104, 54, scale), -560.0, 338.0, 4.7),
    ]
    for number in range(frames):
        picture = background.copy()
        _paste(picture, _person(number, scale), (330 - 0.9 * number) * scale, 268 * scale)
        for sprite, left, bottom, speed in traffic:
            _paste(picture, sprite, (left + speed * number) * scale, bottom * scale)
        picture += random.standard_normal(picture.shape, dtype=np.float32) * 1.6
        yield picture.clip(0, 255).astype(np.uint8)


def write_street(path: Path, frames: int = 120, size: int = 448, seed: int = 0) -> None:
    """`draw_street` encoded as an MP4 of 30 frames a second."""
    with VideoWriter(path, RATE) as writer:
        for image in draw_street(frames, size, seed):
            writer.write(image)


def _texture(size: int, random: np.random.Generator, coarsest: int) -> np.ndarray:
    """Noise of every wavelength up to size / coarsest, [size, size], in about -1 to 1."""
    noise = np.zeros((size, size), np.float32)
    cells, weight = coarsest, 0.4
    while cells <= size:
        layer = Image.fromarray(random.uniform(-1, 1, (cells, cells)).astype(np.float32))
        noise += weight * np.asarray(layer.resize((size, size), Image.Resampling.BICUBIC))
        cells, weight = cells * 2, weight * 0.9
    return noise


def _canvas(width: float, height: float, scale: float) -> tuple[Image.Image, ImageDraw.ImageDraw, float]:
    pixels = scale * SUPERSAMPLING
    image = Image.new("RGBA", (round(width * pixels), round(height * pixels)))
    return image, ImageDraw.Draw(image), pixels


def _sprite(image: Image.Image) -> np.ndarray:
    """Colour multiplied by coverage, and coverage 0 to 1: [height, width, 4] float32."""
    small = np.asarray(image.reduce(SUPERSAMPLING), np.float32)
    coverage = small[..., 3:] / 255
    return np.concatenate([small[..., :3] * coverage, coverage], 2)


def _paste(picture: np.ndarray, sprite: np.ndarray, left: float, bottom: float) -> None:
    """Lay a sprite into picture, at a fraction of a pixel across."""
    whole = int(np.floor(left))
    part = np.float32(left - whole)
    moved = np.pad(sprite * (1 - part), ((0, 0), (0, 1), (0, 0)))
    moved[:, 1:] += sprite * part
    top = round(bottom) - sprite.shape[0]
    start, stop = max(whole, 0), min(whole + moved.shape[1], picture.shape[1])
    if start >= stop:
        return
    area = picture[top : top + moved.shape[0], start:stop]
    moved = moved[:, start - whole : stop - whole]
    area *= 1 - moved[..., 3:]
    area += moved[..., :3]


def _car(paint: tuple[int, int, int], width: int, height: int, scale: float, mirrored: bool = False) -> np.ndarray:
    image, draw, p = _canvas(width, height, scale)
    dark = tuple(channel * 6 // 10 for channel in paint)
    w, h = width * p, height * p
    draw.ellipse((0.03 * w, 0.86 * h, 0.97 * w, h), fill=(20, 20, 22, 150))
    draw.polygon([(0.18 * w, 0.46 * h), (0.31 * w, 0.05 * h), (0.66 * w, 0.05 * h), (0.82 * w, 0.46 * h)], fill=paint)
    draw.rounded_rectangle((0.01 * w, 0.40 * h, 0.99 * w, 0.84 * h), 0.12 * h, fill=paint)
    draw.rectangle((0.02 * w, 0.68 * h, 0.98 * w, 0.80 * h), fill=dark)
    glass = (46, 58, 70)
    draw.polygon([(0.24 * w, 0.43 * h), (0.33 * w, 0.12 * h), (0.47 * w, 0.12 * h), (0.47 * w, 0.43 * h)], fill=glass)
    draw.polygon([(0.50 * w, 0.43 * h), (0.50 * w, 0.12 * h), (0.64 * w, 0.12 * h), (0.76 * w, 0.43 * h)], fill=glass)
    draw.line((0.485 * w, 0.42 * h, 0.485 * w, 0.78 * h), fill=dark, width=round(p))
    draw.rectangle((0.96 * w, 0.48 * h, 0.99 * w, 0.58 * h), fill=(250, 240, 190))
    draw.rectangle((0.01 * w, 0.48 * h, 0.035 * w, 0.58 * h), fill=(200, 30, 30))
    _wheels(draw, (0.22 * w, 0.78 * w), 0.82 * h, 0.18 * h)
    return _sprite(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image)


def _van(paint: tuple[int, int, int], width: int, height: int, scale: float) -> np.ndarray:
    image, draw, p = _canvas(width, height, scale)
    w, h = width * p, height * p
    draw.ellipse((0.02 * w, 0.90 * h, 0.98 * w, h), fill=(20, 20, 22, 150))
    draw.rounded_rectangle((0.01 * w, 0.02 * h, 0.74 * w, 0.90 * h), 0.04 * h, fill=paint)
    draw.polygon(
        [(0.70 * w, 0.16 * h), (0.86 * w, 0.16 * h), (0.97 * w, 0.50 * h), (0.99 * w, 0.90 * h), (0.70 * w, 0.90 * h)],
        fill=paint,
    )
    draw.polygon(
        [(0.77 * w, 0.22 * h), (0.85 * w, 0.22 * h), (0.93 * w, 0.48 * h), (0.77 * w, 0.48 * h)], fill=(46, 58, 70)
    )
    draw.rectangle((0.06 * w, 0.30 * h, 0.68 * w, 0.48 * h), fill=(34, 120, 84))
    draw.rectangle((0.01 * w, 0.80 * h, 0.99 * w, 0.88 * h), fill=(70, 70, 72))
    _wheels(draw, (0.20 * w, 0.80 * w), 0.88 * h, 0.12 * h)
    return _sprite(image)


def _wheels(draw: ImageDraw.ImageDraw, centres: tuple[float, ...], height: float, radius: float) -> None:
    for centre in centres:
        for share, colour in ((1.0, (24, 24, 26)), (0.5, (160, 162, 166))):
            reach = radius * share
            draw.ellipse((centre - reach, height - reach, centre + reach, height + reach), fill=colour)


def _person(number: int, scale: float) -> np.ndarray:
    """A walker of 46 pixels, its legs and arms swinging with a stride of 26 frames."""
    image, draw, p = _canvas(26, 48, scale)
    swing = np.sin(2 * np.pi * number / 26)
    draw.ellipse((4 * p, 45 * p, 22 * p, 48 * p), fill=(20, 20, 22, 120))
    for side, colour in ((1, (34, 38, 58)), (-1, (44, 48, 72))):
        draw.line((13 * p, 27 * p, (13 + 6 * side * swing) * p, 46 * p), fill=colour, width=round(4 * p))
        draw.line((13 * p, 14 * p, (13 - 5 * side * swing) * p, 27 * p), fill=(150, 60, 34), width=round(3 * p))
    draw.rounded_rectangle((9 * p, 11 * p, 17 * p, 29 * p), 3 * p, fill=(196, 84, 46))
    draw.ellipse((9.5 * p, 2 * p, 16.5 * p, 10 * p), fill=(222, 178, 148))
    draw.chord((9.5 * p, 1.5 * p, 16.5 * p, 9 * p), 180, 360, fill=(52, 36, 26))
    return _sprite(image)


def _background(size: int, random: np.random.Generator) -> np.ndarray:
    """Sky, houses with shops, two trees, pavements and a road: [size, size, 3] float32."""
    scale = size / 448
    image, draw, p = _canvas(448, 448, scale)

    def box(left: float, top: float, right: float, bottom: float, colour: tuple[int, int, int]) -> None:
        draw.rectangle((left * p, top * p, right * p - 1, bottom * p - 1), fill=colour)

    for row in range(230):
        fade = row / 230
        box(0, row, 448, row + 1, (round(120 + 95 * fade), round(172 + 50 * fade), round(226 + 8 * fade)))
    houses = [  # left, right, roof, wall
        (0, 96, 62, (158, 92, 72)),
        (96, 182, 96, (206, 188, 150)),
        (182, 286, 44, (150, 150, 158)),
        (286, 366, 84, (176, 120, 84)),
        (366, 448, 58, (196, 198, 186)),
    ]
    for left, right, roof, wall in houses:
        _house(box, left, right, roof, wall, random)
    box(0, 232, 448, 274, (172, 168, 160))
    for left in range(0, 448, 28):
        box(left, 232, left + 1, 270, (146, 142, 136))
    box(0, 250, 448, 251, (146, 142, 136))
    box(0, 270, 448, 275, (198, 196, 190))
    box(0, 275, 448, 404, (74, 75, 79))
    box(0, 279, 448, 280, (196, 190, 120))
    for left in range(-10, 448, 56):
        box(left, 343, left + 30, 346, (214, 212, 204))
    box(0, 404, 448, 410, (206, 204, 198))
    box(0, 410, 448, 448, (164, 160, 152))
    for left in range(-20, 448, 44):
        draw.line((left * p, 448 * p, (left + 12) * p, 410 * p), fill=(138, 134, 128), width=round(p))
    for trunk, crown in ((118, 34), (398, 30)):
        box(trunk - 4, 176, trunk + 4, 262, (84, 64, 46))
        for _ in range(60):
            x, y = trunk + random.normal(0, crown / 2.4), 158 + random.normal(0, crown / 2.4)
            r, tint = random.uniform(7, 13), round(random.uniform(-20, 20))
            draw.ellipse(((x - r) * p, (y - r) * p, (x + r) * p, (y + r) * p), fill=(58 + tint, 98 + tint, 48 + tint))
    box(228, 120, 232, 268, (50, 54, 58))
    box(216, 116, 244, 121, (50, 54, 58))

    flat = np.asarray(image.convert("RGB").reduce(SUPERSAMPLING), np.float32)[:size, :size]
    rough = np.full((size, 1), 12, np.float32)
    rough[: round(232 * scale)] = 16
    rough[round(275 * scale) : round(404 * scale)] = 14
    sky = flat[..., 2:] > flat[..., :1] + 15
    amplitude = np.where(sky[..., 0], 5, rough)
    return flat + amplitude[..., None] * _texture(size, random, 14)[..., None]


def _house(
    box: Callable[..., None], left: int, right: int, roof: int, wall: tuple[int, int, int], random: np.random.Generator
) -> None:
    dark = tuple(channel * 7 // 10 for channel in wall)
    box(left, roof, right, 232, wall)
    for course in range(roof + 6, 188, 6):
        box(left, course, right, course + 1, tuple(channel * 9 // 10 for channel in wall))
    box(left, roof, right, roof + 6, dark)
    box(right - 2, roof, right, 232, dark)
    count = (right - left) // 26
    gap = (right - left) / count
    for top in range(roof + 18, 166, 36):
        for column in range(count):
            x = left + gap * (column + 0.5)
            glass = (228, 206, 140) if random.random() < 0.2 else (62, 76, 92)
            box(x - 8, top - 2, x + 8, top + 24, (222, 220, 212))
            box(x - 6, top, x + 6, top + 21, glass)
            box(x - 6, top + 10, x + 6, top + 11, (222, 220, 212))
            box(x - 0.5, top, x + 0.5, top + 21, (222, 220, 212))
    awning = [(150, 44, 44), (40, 96, 82), (52, 72, 130)][round(random.uniform(0, 2))]
    box(left + 4, 198, right - 26, 230, (52, 60, 68))
    box(left + 8, 204, right - 30, 226, (104, 118, 124))
    box(right - 20, 196, right - 6, 232, (76, 54, 40))
    for stripe in range(left + 2, right - 24, 8):
        box(stripe, 188, stripe + 4, 199, awning)
        box(stripe + 4, 188, min(stripe + 8, right - 22), 199, (226, 222, 212))

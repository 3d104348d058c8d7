"""The subjects of the drawn scenes: twelve classes of distinct shape, in any paint and at any size."""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 4
Colour = tuple[int, int, int]
TYRE, RIM, GLASS, STEEL = (24, 24, 26), (168, 170, 174), (46, 58, 70), (90, 92, 96)


@dataclass(frozen=True)
class Look:
    """What distinguishes a subject from others of its class; `shape` is six numbers from 0 to 1."""

    subject: str
    paint: Colour
    second: Colour
    shape: tuple[float, ...]


@dataclass(frozen=True)
class Kind:
    """A class of subject.

    Attributes:
        paint: draws it, heading right, in units of its height.
        aspect: width / height.
        height: usual height, relative to the picture's.
        flies: it stays in the upper part of the picture.
        stride: distance in one turn of its wheels, legs or wings, relative to its height.
    """

    paint: Callable[["Pen", Look, float], None]
    aspect: float
    height: float
    flies: bool = False
    stride: float = 1.0


class Pen:
    """Draws on a transparent image in units of its height, from the top left."""

    def __init__(self, aspect: float, height: float) -> None:
        self.width = aspect
        self._unit = height * SUPERSAMPLING
        self.image = Image.new("RGBA", (max(round(aspect * self._unit), 1), max(round(self._unit), 1)))
        self._draw = ImageDraw.Draw(self.image)

    def box(self, left: float, top: float, right: float, bottom: float, fill: tuple, corner: float = 0) -> None:
        edges = [edge * self._unit for edge in (left, top, right, bottom)]
        self._draw.rounded_rectangle(edges, corner * self._unit, fill=fill)

    def disc(self, x: float, y: float, across: float, fill: tuple, down: float | None = None) -> None:
        """An ellipse around x, y with radii `across` and `down`; a circle without the latter."""
        down = across if down is None else down
        self._draw.ellipse([edge * self._unit for edge in (x - across, y - down, x + across, y + down)], fill=fill)

    def ring(self, x: float, y: float, radius: float, width: float, fill: tuple) -> None:
        edges = [edge * self._unit for edge in (x - radius, y - radius, x + radius, y + radius)]
        self._draw.ellipse(edges, outline=fill, width=max(round(width * self._unit), 1))

    def polygon(self, fill: tuple, *points: tuple[float, float]) -> None:
        self._draw.polygon([(x * self._unit, y * self._unit) for x, y in points], fill=fill)

    def line(self, fill: tuple, width: float, *points: tuple[float, float]) -> None:
        scaled = [(x * self._unit, y * self._unit) for x, y in points]
        self._draw.line(scaled, fill=fill, width=max(round(width * self._unit), 1), joint="curve")

    def wheel(self, x: float, y: float, radius: float, phase: float) -> None:
        self.disc(x, y, radius, TYRE)
        self.disc(x, y, radius * 0.6, RIM)
        for spoke in range(3):
            dx, dy = _towards(phase + spoke / 6, radius * 0.55)
            self.line(TYRE, radius * 0.12, (x - dx, y - dy), (x + dx, y + dy))

    def shadow(self) -> None:
        self.disc(self.width / 2, 0.97, 0.47 * self.width, (18, 18, 20, 140), 0.03)


def random_colour(
    random: np.random.Generator,
    saturation: tuple[float, float] = (0, 0.9),
    value: tuple[float, float] = (0.25, 0.95),
    hue: tuple[float, float] = (0, 1),
) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(random.uniform(*hue), random.uniform(*saturation), random.uniform(*value))
    return round(255 * red), round(255 * green), round(255 * blue)


def shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(round(channel * factor), 255) for channel in colour)
    return red, green, blue


def random_look(subject: str, random: np.random.Generator) -> Look:
    shape = tuple(random.random(6).tolist())
    return Look(subject, random_colour(random), random_colour(random), shape)


def draw_subject(look: Look, height: float, phase: float, tilt: float, turn: float) -> np.ndarray:
    """Draw a subject as a sprite.

    Args:
        look: its look.
        height: height when upright, in pixels.
        phase: of its wheels, legs or wings, in turns.
        tilt: in degrees, anticlockwise.
        turn: cosine of its turn about the vertical; -1 heads left.
    """
    kind = KINDS[look.subject]
    pen = Pen(kind.aspect, height)
    kind.paint(pen, look, phase)
    image = pen.image
    if turn < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if abs(turn) < 1:
        image = image.resize((max(round(image.width * abs(turn)), 1), image.height), Image.Resampling.BILINEAR)
    if tilt:
        image = image.rotate(tilt, Image.Resampling.BILINEAR, expand=True)
    return sprite(image)


def sprite(image: Image.Image) -> np.ndarray:
    """Premultiplied colour and coverage, 0 to 1, of an RGBA image: [height, width, 4] float32."""
    small = np.asarray(image.reduce(SUPERSAMPLING), np.float32)
    coverage = small[..., 3:] / 255
    return np.concatenate([small[..., :3] * coverage, coverage], 2)


def paste(picture: np.ndarray, sprite: np.ndarray, left: float, top: float) -> float:
    """Paste a sprite into picture [H, W, 3] float32 at sub-pixel positions; returns the share of it that is inside."""
    column, row = int(np.floor(left)), int(np.floor(top))
    across, down = np.float32(left - column), np.float32(top - row)
    moved = np.pad(sprite * (1 - across), ((0, 1), (0, 1), (0, 0)))
    moved[:-1, 1:] += sprite * across
    if down:
        moved[1:] = moved[1:] * (1 - down) + moved[:-1] * down
        moved[0] *= 1 - down
    height, width = picture.shape[:2]
    first, last = max(row, 0), min(row + moved.shape[0], height)
    start, stop = max(column, 0), min(column + moved.shape[1], width)
    if first >= last or start >= stop:
        return 0.0
    whole = moved[..., 3].sum()
    moved = moved[first - row : last - row, start - column : stop - column]
    area = picture[first:last, start:stop]
    area *= 1 - moved[..., 3:]
    area += moved[..., :3]
    return float(moved[..., 3].sum() / whole)


def _towards(turns: float, length: float) -> tuple[float, float]:
    return length * cos(2 * pi * turns), length * sin(2 * pi * turns)


def _car(pen: Pen, look: Look, phase: float) -> None:
    w, v, paint = pen.width, look.shape, look.paint
    roof, rear = 0.08 + 0.08 * v[0], 0.12 + 0.16 * v[1]
    pen.shadow()
    pen.polygon(paint, (rear * w, 0.5), ((rear + 0.1) * w, roof), ((0.58 + 0.08 * v[2]) * w, roof), (0.8 * w, 0.5))
    pen.box(0.01 * w, 0.44, 0.99 * w, 0.84, paint, 0.12)
    pen.box(0.02 * w, 0.7, 0.98 * w, 0.79, shade(paint, 0.6))
    pen.polygon(
        GLASS, ((rear + 0.06) * w, 0.46), ((rear + 0.12) * w, roof + 0.07), (0.46 * w, roof + 0.07), (0.46 * w, 0.46)
    )
    pen.polygon(
        GLASS, (0.5 * w, 0.46), (0.5 * w, roof + 0.07), ((0.56 + 0.08 * v[2]) * w, roof + 0.07), (0.73 * w, 0.46)
    )
    pen.box(0.95 * w, 0.5, 0.99 * w, 0.6, (250, 240, 190))
    pen.box(0.01 * w, 0.5, 0.04 * w, 0.6, (200, 30, 30))
    for x in (0.21 * w, 0.79 * w):
        pen.wheel(x, 0.8, 0.17, phase)


def _van(pen: Pen, look: Look, phase: float) -> None:
    w, v, paint = pen.width, look.shape, look.paint
    nose = 0.72 + 0.06 * v[0]
    pen.shadow()
    pen.box(0.01 * w, 0.04, nose * w, 0.88, paint, 0.05)
    pen.polygon(
        paint, ((nose - 0.05) * w, 0.06), (0.85 * w, 0.16), (0.97 * w, 0.5), (0.99 * w, 0.88), ((nose - 0.05) * w, 0.88)
    )
    pen.polygon(GLASS, (nose * w, 0.14), (0.84 * w, 0.2), (0.93 * w, 0.48), (nose * w, 0.48))
    if v[1] < 0.5:
        pen.box(0.06 * w, 0.3, 0.64 * w, 0.46, look.second)
    else:
        pen.disc(0.34 * w, 0.4, 0.16, look.second)
    pen.box(0.01 * w, 0.8, 0.99 * w, 0.87, (70, 70, 72))
    pen.line(shade(paint, 0.6), 0.015, (0.66 * w, 0.1), (0.66 * w, 0.8))
    for x in (0.2 * w, 0.8 * w):
        pen.wheel(x, 0.84, 0.14, phase)


def _bus(pen: Pen, look: Look, phase: float) -> None:
    w, v, paint = pen.width, look.shape, look.paint
    pen.shadow()
    pen.box(0.005 * w, 0.05, 0.995 * w, 0.87, paint, 0.08)
    pen.box(0.005 * w, 0.58 + 0.08 * v[0], 0.995 * w, 0.68 + 0.1 * v[0], look.second)
    panes = 5 + round(2 * v[1])
    for pane in range(panes):
        left = 0.03 + 0.83 * pane / panes
        pen.box(left * w, 0.17, (left + 0.83 / panes - 0.02) * w, 0.48, GLASS, 0.02)
    pen.box(0.88 * w, 0.15, 0.985 * w, 0.55, GLASS, 0.03)
    door = (0.42 + 0.2 * v[2]) * w
    pen.box(door, 0.5, door + 0.06 * w, 0.84, shade(paint, 0.5))
    for x in (0.18 * w, 0.8 * w):
        pen.wheel(x, 0.85, 0.13, phase)


def _truck(pen: Pen, look: Look, phase: float) -> None:
    w, v, paint = pen.width, look.shape, look.paint
    pen.shadow()
    pen.box(0.01 * w, 0.74, 0.97 * w, 0.84, STEEL)
    if v[0] < 0.65:
        pen.box(0.01 * w, 0.04 + 0.06 * v[1], 0.66 * w, 0.76, look.second, 0.01)
        for rib in range(1, 6):
            pen.line(shade(look.second, 0.8), 0.015, (0.11 * rib * w, 0.1), (0.11 * rib * w, 0.74))
    else:
        pen.box(0.01 * w, 0.48, 0.66 * w, 0.76, look.second)
        heap = (120, 96, 70)
        pen.polygon(heap, (0.04 * w, 0.49), (0.2 * w, 0.26), (0.36 * w, 0.2), (0.52 * w, 0.3), (0.63 * w, 0.49))
    pen.box(0.71 * w, 0.26, 0.9 * w, 0.82, paint, 0.04)
    pen.box(0.85 * w, 0.5, 0.99 * w, 0.82, paint, 0.05)
    pen.polygon(GLASS, (0.77 * w, 0.32), (0.87 * w, 0.32), (0.9 * w, 0.52), (0.77 * w, 0.52))
    pen.box(0.68 * w, 0.14, 0.695 * w, 0.7, RIM)
    for x in (0.12 * w, 0.27 * w, 0.83 * w):
        pen.wheel(x, 0.84, 0.14, phase)


def _rider(pen: Pen, look: Look, seat: tuple, hands: tuple, foot: tuple, helmet: Colour) -> None:
    """A person who sits at `seat`, holds on at `hands` and has a foot at `foot`."""
    (x, y), skin = seat, (214, 170, 140)
    neck, knee = (x + 0.1, y - 0.3), ((x + foot[0]) / 2 + 0.14, (y + foot[1]) / 2 - 0.08)
    pen.line(shade(look.second, 0.5), 0.08, seat, knee, foot)
    pen.line(look.second, 0.13, seat, neck)
    pen.line(look.second, 0.06, neck, ((neck[0] + hands[0]) / 2, neck[1] + 0.16), hands)
    pen.disc(neck[0] + 0.05, neck[1] - 0.1, 0.075, skin)
    pen.disc(neck[0] + 0.04, neck[1] - 0.13, 0.075, helmet, 0.05)


def _motorcycle(pen: Pen, look: Look, phase: float) -> None:
    w, v, paint = pen.width, look.shape, look.paint
    pen.shadow()
    for x in (0.2 * w, 0.8 * w):
        pen.disc(x, 0.78, 0.19, TYRE)
        pen.wheel(x, 0.78, 0.17, phase)
    pen.line(STEEL, 0.06, (0.8 * w, 0.78), (0.66 * w, 0.38))
    pen.box(0.36 * w, 0.6, 0.6 * w, 0.82, STEEL, 0.05)
    pen.line(RIM, 0.05, (0.56 * w, 0.84), (0.16 * w, 0.84))
    pen.polygon(paint, (0.42 * w, 0.62), (0.44 * w, 0.48), (0.68 * w, 0.42), (0.72 * w, 0.56), (0.6 * w, 0.66))
    pen.polygon(shade(paint, 0.7), (0.1 * w, 0.5), (0.2 * w, 0.46), (0.46 * w, 0.54), (0.42 * w, 0.64), (0.2 * w, 0.58))
    pen.disc(0.73 * w, 0.46, 0.06, (250, 240, 190))
    if v[0] < 0.75:
        _rider(pen, look, (0.36 * w, 0.5), (0.66 * w, 0.38), (0.5 * w, 0.82), shade(paint, 0.9))
    if v[1] < 0.4:
        pen.box(0.04 * w, 0.3, 0.2 * w, 0.48, look.second, 0.03)


def _bicycle(pen: Pen, look: Look, phase: float) -> None:
    w, v = pen.width, look.shape
    frame, crank = look.paint, (0.46 * w, 0.76)
    pen.shadow()
    for x in (0.22 * w, 0.78 * w):
        pen.ring(x, 0.76, 0.22, 0.035, TYRE)
        for spoke in range(4):
            dx, dy = _towards(phase + spoke / 8, 0.19)
            pen.line(RIM, 0.01, (x - dx, 0.76 - dy), (x + dx, 0.76 + dy))
    seat, head = (0.38 * w, 0.5), (0.68 * w, 0.46)
    pen.line(frame, 0.03, (0.22 * w, 0.76), seat, head, crank, seat)
    pen.line(frame, 0.03, (0.22 * w, 0.76), crank)
    pen.line(frame, 0.03, (0.78 * w, 0.76), head, (0.67 * w, 0.38), (0.74 * w, 0.36))
    pen.line(TYRE, 0.04, (0.33 * w, 0.49), (0.43 * w, 0.49))
    dx, dy = _towards(phase, 0.09)
    if v[0] < 0.75:
        _rider(pen, look, (0.38 * w, 0.46), (0.7 * w, 0.38), (crank[0] + dx, crank[1] + dy), look.paint)
    pen.line(STEEL, 0.025, (crank[0] - dx, crank[1] - dy), (crank[0] + dx, crank[1] + dy))


def _person(pen: Pen, look: Look, phase: float) -> None:
    w, v = pen.width, look.shape
    x, swing = w / 2, sin(2 * pi * phase)
    skin = shade((236, 196, 164), 0.45 + 0.55 * v[0])
    trousers, dark = shade(look.second, 0.7), shade(look.paint, 0.75)
    pen.shadow()
    for side, colour in ((-1, shade(trousers, 0.8)), (1, trousers)):
        foot = x + 0.15 * side * swing
        pen.line(colour, 0.085, (x, 0.56), ((x + foot) / 2 + 0.03, 0.76), (foot, 0.95))
        pen.line((40, 36, 34), 0.05, (foot - 0.03, 0.955), (foot + 0.06, 0.955))
    hand = (x + 0.16 * swing, 0.52) if v[1] < 0.7 else (x + 0.12 + 0.05 * swing, 0.1)
    pen.line(dark, 0.06, (x, 0.27), (x - 0.12 * swing - 0.04, 0.42), (x - 0.16 * swing, 0.52))
    pen.box(x - 0.09, 0.2, x + 0.09, 0.6, look.paint, 0.05)
    if v[2] < 0.3:
        pen.polygon(look.paint, (x - 0.08, 0.5), (x + 0.08, 0.5), (x + 0.14, 0.76), (x - 0.14, 0.76))
    if v[3] < 0.35:
        pen.box(x - 0.17, 0.24, x - 0.07, 0.46, look.second, 0.03)
    pen.line(dark, 0.06, (x, 0.27), (x + 0.05 + 0.08 * swing, 0.38), hand)
    pen.disc(*hand, 0.03, skin)
    pen.disc(x + 0.01, 0.11, 0.075, skin, 0.09)
    hair = shade((120, 90, 60), 0.3 + v[4])
    pen.disc(x - 0.015, 0.065, 0.08, look.second if v[5] < 0.3 else hair, 0.055)


def _dog(pen: Pen, look: Look, phase: float) -> None:
    w, v = pen.width, look.shape
    swing, coat = sin(2 * pi * phase), shade((196, 150, 100), 0.35 + 0.85 * v[0])
    dark = shade(coat, 0.7)
    pen.shadow()
    for hip, side, colour in ((0.26, -1, dark), (0.66, 1, dark), (0.3, 1, coat), (0.7, -1, coat)):
        foot = hip * w + 0.13 * side * swing
        pen.line(colour, 0.1, (hip * w, 0.6), (foot, 0.95))
    pen.line(coat, 0.08, (0.2 * w, 0.46), (0.08 * w, 0.36 - 0.08 * swing), (0.04 * w, 0.16 - 0.08 * v[1]))
    pen.disc(0.48 * w, 0.52, 0.3 * w, coat, 0.17 + 0.05 * v[2])
    pen.line(coat, 0.2, (0.7 * w, 0.48), (0.8 * w, 0.26))
    pen.disc(0.82 * w, 0.24, 0.15, coat, 0.13)
    pen.polygon(coat, (0.84 * w, 0.17), (0.99 * w, 0.26), (0.98 * w, 0.34), (0.82 * w, 0.36))
    pen.disc(0.975 * w, 0.28, 0.03, TYRE)
    if v[3] < 0.5:
        pen.polygon(dark, (0.74 * w, 0.16), (0.8 * w, 0.16), (0.76 * w, 0.4), (0.71 * w, 0.36))
    else:
        pen.polygon(dark, (0.75 * w, 0.17), (0.77 * w, 0.0), (0.83 * w, 0.14))
    pen.disc(0.85 * w, 0.21, 0.022, TYRE)
    pen.line(look.paint, 0.06, (0.715 * w, 0.34), (0.79 * w, 0.42))
    if v[4] < 0.4:
        pen.disc(0.42 * w, 0.46, 0.1 * w, shade(coat, 0.6), 0.08)


def _bird(pen: Pen, look: Look, phase: float) -> None:
    w, v, paint = pen.width, look.shape, look.paint
    lift = 0.42 * sin(2 * pi * phase)
    dark, tip = shade(paint, 0.65), 0.5 - lift
    pen.polygon(dark, (0.46 * w, 0.5), (0.62 * w, 0.5), (0.5 * w, tip + 0.06), (0.36 * w, tip))
    pen.polygon(dark, (0.26 * w, 0.48), (0.28 * w, 0.58), (0.02 * w, 0.64), (0.06 * w, 0.52), (0.01 * w, 0.44))
    pen.disc(0.5 * w, 0.54, 0.28 * w, paint, 0.11 + 0.04 * v[0])
    pen.disc(0.52 * w, 0.58, 0.22 * w, shade(paint, 1.35), 0.07)
    pen.disc(0.8 * w, 0.46, 0.1, paint if v[1] < 0.6 else dark)
    pen.polygon((236, 170, 50), (0.85 * w, 0.42), (0.99 * w, 0.48), (0.85 * w, 0.52))
    pen.disc(0.82 * w, 0.44, 0.02, TYRE)
    pen.polygon(shade(paint, 0.8), (0.38 * w, 0.52), (0.64 * w, 0.52), (0.44 * w, tip), (0.24 * w, tip - 0.02))


def _sign(pen: Pen, look: Look, phase: float) -> None:
    w, v = pen.width, look.shape
    x, y, r = w / 2, 0.27, 0.25
    edge = ((196, 28, 34), (30, 80, 170), (220, 150, 20))[int(3 * v[0])]
    face = (244, 242, 234) if v[1] < 0.6 else (248, 208, 60)
    pen.box(x - 0.025, 0.3, x + 0.025, 0.9, STEEL)
    pen.box(x - 0.17, 0.86, x + 0.17, 0.91, (70, 70, 72))
    for wheel in (x - 0.14, x + 0.14):
        pen.wheel(wheel, 0.94, 0.055, phase)
    corners = (3, 4, 8, 40)[int(4 * v[2])]
    turn = {3: -0.25, 4: 0.0, 8: 1 / 16, 40: 0.0}[corners]
    for radius, colour in ((r, edge), (0.72 * r, face)):
        points = (_towards(turn + corner / corners, radius) for corner in range(corners))
        pen.polygon(colour, *((x + dx, y + dy) for dx, dy in points))
    if v[3] < 0.5:
        pen.box(x - 0.025, y - 0.1, x + 0.025, y + 0.04, TYRE)
        pen.disc(x, y + 0.085, 0.025, TYRE)
    else:
        pen.line(TYRE, 0.045, (x - 0.08, y + 0.05), (x, y - 0.06), (x + 0.08, y + 0.05))


def _ball(pen: Pen, look: Look, phase: float) -> None:
    x = pen.width / 2
    pen.shadow()
    pen.disc(x, 0.49, 0.46, shade(look.paint, 0.55))
    pen.disc(x, 0.49, 0.44, look.paint)
    if look.shape[0] < 0.5:
        for part in range(3):
            start = phase + part / 3
            points = (_towards(start + step / 36, 0.42) for step in range(7))
            pen.polygon(look.second, (x, 0.49), *((x + dx, 0.49 + dy) for dx, dy in points))
        pen.disc(x, 0.49, 0.1, (240, 240, 236))
    else:
        for part in range(6):
            dx, dy = _towards(phase + part / 6, 0.28 if part else 0)
            pen.disc(x + dx, 0.49 + dy, 0.1, look.second)
    pen.disc(x - 0.16, 0.3, 0.07, (250, 250, 248))


def _balloon(pen: Pen, look: Look, phase: float) -> None:
    x, v, paint = pen.width / 2, look.shape, look.paint
    sway = 0.05 * sin(2 * pi * phase)
    if v[0] < 0.6:
        pen.line((210, 208, 200), 0.02, (x, 0.62), (x + sway, 0.76), (x - sway, 0.88), (x + sway, 0.99))
        pen.disc(x, 0.31, 0.245, paint, 0.3)
        pen.polygon(shade(paint, 0.8), (x, 0.59), (x - 0.05, 0.67), (x + 0.05, 0.67))
        pen.disc(x - 0.09, 0.2, 0.05, shade(paint, 1.6), 0.08)
        return
    for side in (-0.13, 0.13):
        pen.line(TYRE, 0.015, (x + 1.3 * side, 0.5), (x + 0.6 * side, 0.86))
    pen.polygon(paint, (x - 0.25, 0.42), (x + 0.25, 0.42), (x + 0.08, 0.74), (x - 0.08, 0.74))
    pen.disc(x, 0.31, 0.285, paint, 0.3)
    pen.disc(x, 0.31, 0.17, look.second, 0.3)
    pen.disc(x, 0.31, 0.07, paint, 0.3)
    pen.box(x - 0.09, 0.85, x + 0.09, 0.98, (130, 92, 52), 0.02)


KINDS = {
    "car": Kind(_car, 2.4, 0.18),
    "van": Kind(_van, 1.95, 0.23),
    "bus": Kind(_bus, 2.5, 0.25),
    "truck": Kind(_truck, 2.3, 0.25),
    "motorcycle": Kind(_motorcycle, 1.45, 0.27),
    "bicycle": Kind(_bicycle, 1.4, 0.29, stride=1.3),
    "person": Kind(_person, 0.55, 0.4, stride=0.6),
    "dog": Kind(_dog, 1.4, 0.22),
    "bird": Kind(_bird, 1.5, 0.22, flies=True),
    "sign": Kind(_sign, 0.6, 0.38, stride=0.35),
    "ball": Kind(_ball, 1.0, 0.19, stride=3.0),
    "balloon": Kind(_balloon, 0.6, 0.38, flies=True),
}

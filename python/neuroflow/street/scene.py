"""Labelled scenes that the project draws: one subject of a known class, on a trajectory, in front of a camera."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..video.encode import VideoWriter
from .sprites import KINDS, SUPERSAMPLING, Colour, Look, draw_subject, paste, random_colour, random_look, shade, sprite

RATE = Fraction(30)
CLASSES = tuple(KINDS)
TRAJECTORIES = ("local", "traversal", "arc", "oscillation", "stop-and-go")
CAMERAS = ("static", "noise", "exposure", "pan", "cut")
# Steps at which a subject is redrawn: of a wheel's turn, of its turn about the vertical, and in degrees of tilt.
PHASES, TURNS, DEGREES = 12, 20, 1.5
PLANTS, SKIES = (0.06, 0.42), ((0.5, 0.68), (0.5, 0.68), (0.03, 0.14))
SCENES_PER_SEED = 1_000_000


@dataclass(frozen=True)
class Scene:
    """What to draw: names from CLASSES, TRAJECTORIES and CAMERAS, and a seed for the rest.

    Trajectories: "local", waving, bobbing and turning in place; "traversal", across the picture and out of it; "arc",
    across, up and down; "oscillation", to and fro; "stop-and-go", across with halts. Cameras: "static"; "noise", static
    with a noisier sensor; "exposure", with drifting brightness; "pan"; "cut", a cut to another place, where the subject
    continues or one of another class appears.

    Raises:
        ValueError: an unknown name, or a negative seed.
    """

    subject: str
    trajectory: str
    camera: str
    seed: int

    def __post_init__(self) -> None:
        for name, known in (("subject", CLASSES), ("trajectory", TRAJECTORIES), ("camera", CAMERAS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted is one of {', '.join(known)}")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; accepted is 0 or more")


def scenes(count: int, seed: int = 0, *, held_out: bool = False) -> list[Scene]:
    """Scenes of every class, trajectory and camera in turn; 300 contain every combination once.

    Training and held-out scenes share no seed, and so no background.

    Raises:
        ValueError: a count below 1 or above SCENES_PER_SEED, or a negative seed.
    """
    if not 1 <= count <= SCENES_PER_SEED:
        raise ValueError(f"count is {count}; accepted is 1 to {SCENES_PER_SEED}")
    if seed < 0:
        raise ValueError(f"seed is {seed}; accepted is 0 or more")
    random = np.random.default_rng([seed, held_out])
    subjects, trajectories, cameras = (random.permutation(names).tolist() for names in (CLASSES, TRAJECTORIES, CAMERAS))
    return [
        Scene(
            subjects[number % len(subjects)],
            trajectories[number % len(trajectories)],
            cameras[(number + number // len(trajectories)) % len(cameras)],
            2 * (seed * SCENES_PER_SEED + number) + held_out,
        )
        for number in range(count)
    ]


def draw_scene(scene: Scene, frames: int = 120, size: int = 224) -> Iterator[tuple[np.ndarray, int]]:
    """Draw a scene's frames [size, size, 3] uint8, each with its label; the same arguments give the same frames.

    A label is an index into CLASSES, or -1 if less than half of the subject is in view.

    Raises:
        ValueError: fewer than 2 frames, or a size below 64 or odd.
    """
    stage = Stage(scene, frames, size)
    return (stage.draw(number) for number in range(frames))


def write_scene(path: Path, scene: Scene, frames: int = 120, size: int = 224) -> list[int]:
    """Write `draw_scene` as an MP4 at 30 frames a second, and return the labels."""
    labels = []
    with VideoWriter(path, RATE) as writer:
        for image, label in draw_scene(scene, frames, size):
            writer.write(image)
            labels.append(label)
    return labels


# A moving thing: frame number -> its sprite, and its left and top in the background's pixels.
Stirring = Callable[[int], tuple[np.ndarray, float, float]]


@dataclass(frozen=True)
class Motion:
    """A subject's centre in each frame, relative to the picture's size, and its pose there; all [frames]."""

    x: np.ndarray
    y: np.ndarray
    phase: np.ndarray
    tilt: np.ndarray
    turn: np.ndarray


@dataclass(frozen=True)
class Act:
    """A background [size, width, 3], the moving things in it, and the subject in front of it."""

    background: np.ndarray
    stirring: list[Stirring]
    look: Look
    height: float
    motion: Motion


class Stage:
    """A scene, prepared so that any frame can be drawn.

    Args:
        scene: what to draw.
        frames: number of frames.
        size: height and width of a frame, in pixels.

    Raises:
        ValueError: fewer than 2 frames, or a size below 64 or odd.
    """

    def __init__(self, scene: Scene, frames: int = 120, size: int = 224) -> None:
        if frames < 2:
            raise ValueError(f"frames is {frames}; accepted is 2 or more")
        if size < 64 or size % 2:
            raise ValueError(f"size is {size}; accepted is an even number, 64 or more")
        random = np.random.default_rng(scene.seed)
        self._seed, self._size = scene.seed, size
        self._noise = random.uniform(5, 9) if scene.camera == "noise" else random.uniform(1, 2)
        number = np.arange(frames)
        self._exposure = np.ones(frames, np.float32)
        if scene.camera == "exposure":
            turns = random.uniform(0.6, 1.2) * number / max(frames, 90) + random.random()
            self._exposure = (1 + random.uniform(0.2, 0.4) * np.sin(2 * np.pi * turns)).astype(np.float32)
        self._pan = np.zeros(frames)
        if scene.camera == "pan":
            travel = random.uniform(0.3, 0.9) * size
            self._pan = travel * np.abs((number * random.uniform(0.003, 0.008) + 2 * random.random()) % 2 - 1)
        width = size + int(self._pan.max()) + 1
        look = random_look(scene.subject, random)
        self._cut = frames
        if scene.camera == "cut":
            self._cut = min(max(round(random.uniform(0.35, 0.65) * frames), 1), frames - 1)
        self._acts = [_act(look, scene.trajectory, self._cut, size, width, random)]
        if scene.camera == "cut":
            if random.random() < 0.5:
                others = [name for name in CLASSES if name != scene.subject]
                look = random_look(others[random.integers(len(others))], random)
            self._acts.append(_act(look, scene.trajectory, frames - self._cut, size, width, random))
        self._sprites: dict[tuple, np.ndarray] = {}

    def draw(self, number: int) -> tuple[np.ndarray, int]:
        """Frame `number`, [size, size, 3] uint8, and its label."""
        size = self._size
        act, moment = self._moment(number)
        left = int(self._pan[number])
        part = np.float32(self._pan[number] - left)
        picture = act.background[:, left : left + size] * (1 - part)
        picture += act.background[:, left + 1 : left + size + 1] * part
        for thing in act.stirring:
            image, x, y = thing(number)
            paste(picture, image, x - self._pan[number], y)
        x, y, _, _ = self.box(number)
        share = paste(picture, self._subject(act, moment), x, y)
        picture *= self._exposure[number]
        grain = _grain(size)
        start = np.random.default_rng([self._seed, number]).integers(grain.size - picture.size)
        picture += np.float32(self._noise) * grain[start : start + picture.size].reshape(picture.shape)
        label = CLASSES.index(act.look.subject) if share >= 0.5 else -1
        return picture.clip(0, 255).astype(np.uint8), label

    def box(self, number: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the subject in frame `number`, in pixels; it may lie outside the frame."""
        act, moment = self._moment(number)
        height, width = self._subject(act, moment).shape[:2]
        x, y = act.motion.x[moment] * self._size, act.motion.y[moment] * self._size
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2

    def _moment(self, number: int) -> tuple[Act, int]:
        """The act that frame `number` belongs to, and its index there."""
        return (self._acts[0], number) if number < self._cut else (self._acts[1], number - self._cut)

    def _subject(self, act: Act, moment: int) -> np.ndarray:
        phase = round(act.motion.phase[moment] * PHASES) % PHASES
        tilt, turn = round(act.motion.tilt[moment] / DEGREES), round(act.motion.turn[moment] * TURNS)
        key = (act.look, act.height, phase, tilt, turn)
        if key not in self._sprites:
            self._sprites[key] = draw_subject(act.look, act.height, phase / PHASES, tilt * DEGREES, turn / TURNS)
        return self._sprites[key]


@functools.cache
def _grain(size: int) -> np.ndarray:
    """Normal noise for twice a picture's pixels; each frame takes its own part of it."""
    return np.random.default_rng(0).standard_normal(2 * size * size * 3, dtype=np.float32)


def _act(look: Look, trajectory: str, frames: int, size: int, width: int, random: np.random.Generator) -> Act:
    kind = KINDS[look.subject]
    height = kind.height * random.uniform(0.8, 1.3)
    horizon = random.uniform(0.42, 0.6)
    background, stirring = _background(size, width, horizon, random)
    motion = _motion(look.subject, trajectory, frames, height, horizon, random)
    return Act(background, stirring, look, height * size, motion)


def _motion(
    subject: str, trajectory: str, frames: int, height: float, horizon: float, random: np.random.Generator
) -> Motion:
    kind = KINDS[subject]
    width = height * kind.aspect
    time = np.arange(frames) / frames
    seconds = np.arange(frames) / float(RATE)
    tilt, turn = np.zeros(frames), np.full(frames, random.choice([-1.0, 1.0]))
    lowest = 0.6 if kind.flies else 0.96
    highest = 0.05 + height if kind.flies else max(horizon + 0.08, 0.06 + height)
    y = np.full(frames, random.uniform(highest, max(highest, lowest)) - height / 2)
    if trajectory == "local":
        rate, start = random.uniform(0.3, 0.9), random.random()
        beat = np.sin(2 * np.pi * (rate * seconds + start))
        x = random.uniform(0.5 * width, 1 - 0.5 * width) + random.uniform(0.008, 0.03) * beat
        y = y + random.uniform(0.004, 0.02) * np.cos(2 * np.pi * (2 * rate * seconds + start))
        tilt = random.uniform(2, 9) * beat
        turn = turn * (1 - random.uniform(0, 0.4) * (0.5 + 0.5 * np.sin(np.pi * (rate * seconds + start))))
    elif trajectory == "oscillation":
        reach = random.uniform(0.12, 0.24)
        swings = 2 * np.pi * (random.uniform(0.2, 0.45) * seconds + random.random())
        x = random.uniform(max(0.45 * width, reach), min(1 - 0.45 * width, 1 - reach)) + reach * np.sin(swings)
        turn = np.where(np.cos(swings) < 0, -1.0, 1.0)
    else:
        run = time
        if trajectory == "stop-and-go":
            halts = random.uniform(0.15, 0.85, 2 if random.random() < 0.5 else 3)
            speed = np.clip(np.abs(time[:, None] - halts) / 0.04 - 2, 0, 1).min(1)
            run = speed.cumsum() / speed.sum()
        if trajectory == "arc":
            x = random.uniform(0.1, 0.25) + random.uniform(0.5, 0.65) * time
            rise = random.uniform(0.15, 0.35) * 4 * time * (1 - time)
            y = np.maximum(y - rise, 0.4 * height) if not kind.flies else y + rise * 0.7
            tilt = random.uniform(4, 10) * (1 - 2 * time) * (-1 if kind.flies else 1)
        else:
            margin = 0.55 * width
            x = -margin + (1 + 2 * margin) * run
        turn = np.abs(turn)
        if random.random() < 0.5:
            x, turn, tilt = 1 - x, -turn, -tilt
    travelled = np.hypot(np.diff(x, prepend=x[0]), np.diff(y, prepend=y[0])).cumsum() / (height * kind.stride)
    if subject == "bird":
        travelled = travelled + 2.2 * seconds
    if subject == "ball" and trajectory != "local":
        y = y - 0.08 * np.abs(np.sin(np.pi * travelled))
    return Motion(x, y, travelled + random.random(), tilt, turn)


def _texture(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Noise of every wavelength below a twelfth of the height, [height, width], in about -1 to 1."""
    noise = np.zeros((height, width), np.float32)
    cells, weight = 12, 0.4
    while cells <= height:
        layer = Image.fromarray(random.uniform(-1, 1, (cells, cells * width // height)).astype(np.float32))
        noise += weight * np.asarray(layer.resize((width, height), Image.Resampling.BILINEAR))
        cells, weight = cells * 2, weight * 0.9
    return noise


class _Canvas:
    """A picture in the making, its coordinates by its height."""

    def __init__(self, size: int, width: int) -> None:
        self.width = width / size
        self._unit = size * 2
        self.image = Image.new("RGB", (width * 2, size * 2))
        self._draw = ImageDraw.Draw(self.image)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        self._draw.rectangle([round(edge * self._unit) for edge in (left, top, right, bottom)], fill=fill)

    def polygon(self, fill: Colour, points: list[tuple[float, float]]) -> None:
        self._draw.polygon([(x * self._unit, y * self._unit) for x, y in points], fill=fill)


def _background(
    size: int, width: int, horizon: float, random: np.random.Generator
) -> tuple[np.ndarray, list[Stirring]]:
    """A street, a park or open country under a sky, [size, width, 3] float32; and what stirs in it."""
    canvas = _Canvas(size, width)
    sky = random_colour(random, (0.05, 0.5), (0.55, 0.95), SKIES[random.integers(len(SKIES))])
    for band in range(40):
        top = horizon * band / 40
        canvas.box(0, top, canvas.width, horizon, shade(sky, 0.85 + 0.3 * band / 40))
    setting = random.choice(["street", "park", "country"])
    _ground(canvas, setting, horizon, random)
    if setting == "street":
        left = -random.uniform(0, 0.15)
        while left < canvas.width:
            right = left + random.uniform(0.16, 0.34)
            _house(canvas, left, right, random.uniform(0.04, 0.65 * horizon), horizon, random)
            left = right + random.choice([0.0, 0.0, 0.06])
    else:
        for _ in range(2 if setting == "park" else 3):
            _hill(canvas, horizon, random)

    flat = np.asarray(canvas.image.reduce(2), np.float32)
    roughness = np.full((size, 1, 1), random.uniform(5, 9), np.float32)
    roughness[round(horizon * size) :] = random.uniform(8, 18)
    picture = flat + roughness * _texture(size, width, random)[..., None]
    stirring = []
    for _ in range(random.integers(0, 4)):
        x = random.uniform(0, width)
        stirring.append(_tree(picture, x, horizon * size, size, bool(random.random() < 0.4), random))
    if random.random() < 0.5:
        stirring.append(_cloud(width, size, horizon, random))
    if setting == "street" and random.random() < 0.4:
        stirring.append(_window(width, size, horizon, random))
    # The light of the day.
    light = np.float32(random.uniform(0.7, 1.1) * random.uniform(0.93, 1.07, 3))
    return (picture * light).astype(np.float32), [thing for thing in stirring if thing is not None]


def _ground(canvas: _Canvas, setting: str, horizon: float, random: np.random.Generator) -> None:
    right = canvas.width
    if setting == "street":
        pavement = shade((180, 176, 168), random.uniform(0.7, 1.1))
        kerb, far = horizon + random.uniform(0.05, 0.1), random.uniform(0.86, 0.95)
        road = shade((84, 85, 90), random.uniform(0.7, 1.4))
        canvas.box(0, horizon, right, 1, pavement)
        canvas.box(0, kerb, right, far, road)
        canvas.box(0, kerb, right, kerb + 0.01, shade(pavement, 1.15))
        dash, lane = random.uniform(0.05, 0.12), (kerb + far) / 2
        for number in range(int(right / dash / 2) + 1):
            canvas.box(2 * number * dash, lane, (2 * number + 1) * dash, lane + 0.008, shade(road, 2.4))
        return
    low = horizon + random.uniform(0.15, 0.3)
    canvas.box(0, horizon, right, 1, random_colour(random, (0.15, 0.5), (0.35, 0.7), PLANTS))
    canvas.box(0, low, right, low + random.uniform(0.08, 0.3), random_colour(random, (0.0, 0.3), (0.3, 0.75), PLANTS))


def _hill(canvas: _Canvas, horizon: float, random: np.random.Generator) -> None:
    steps = np.linspace(0, canvas.width, 40)
    wave = np.sin(steps * random.uniform(2, 7) + random.uniform(0, 6)) + 0.4 * np.sin(steps * random.uniform(9, 20))
    line = horizon - random.uniform(0.03, 0.12) - 0.05 * wave
    points = list(zip(steps.tolist(), line.tolist(), strict=True))
    canvas.polygon(
        random_colour(random, (0.1, 0.5), (0.3, 0.65), (0.06, 0.65)), [*points, (canvas.width, horizon), (0, horizon)]
    )


def _house(canvas: _Canvas, left: float, right: float, roof: float, ground: float, random: np.random.Generator) -> None:
    wall = random_colour(random, (0.05, 0.5), (0.4, 0.9), (-0.05, 0.17))
    frame, glass = shade(wall, random.choice([0.6, 1.3])), random_colour(random, (0.1, 0.5), (0.2, 0.6))
    canvas.box(left, roof, right, ground, wall)
    canvas.box(left, roof, right, roof + 0.015, shade(wall, 0.7))
    canvas.box(right - 0.006, roof, right, ground, shade(wall, 0.7))
    across, down = random.uniform(0.025, 0.045), random.uniform(0.04, 0.07)
    columns = max(int((right - left) / (across * 2)), 1)
    gap = (right - left) / columns
    rows = int((ground - roof - 0.1) / (down * 1.6))
    for row in range(rows):
        top = roof + 0.03 + row * down * 1.6
        for column in range(columns):
            x = left + gap * (column + 0.5) - across / 2
            canvas.box(x - 0.004, top - 0.004, x + across + 0.004, top + down + 0.004, frame)
            canvas.box(x, top, x + across, top + down, (236, 214, 150) if random.random() < 0.15 else glass)
    canvas.box(left + 0.02, ground - 0.07, right - 0.07, ground - 0.01, shade(glass, 0.8))
    canvas.box(right - 0.055, ground - 0.08, right - 0.02, ground, shade(wall, 0.45))


def _tree(
    picture: np.ndarray, x: float, foot: float, size: int, sways: bool, random: np.random.Generator
) -> Stirring | None:
    """A tree in the picture, or only its trunk, with a crown that sways."""
    across, rise = random.uniform(0.08, 0.15) * size, random.uniform(0.16, 0.3) * size
    foot += random.uniform(0, 0.05) * size
    trunk = max(round(0.02 * size), 2)
    picture[round(foot - rise) : round(foot), max(round(x), 0) : max(round(x) + trunk, 0)] = (84, 64, 46)
    pixels = SUPERSAMPLING
    image = Image.new("RGBA", (round(2 * across * pixels), round(2 * across * pixels)))
    draw = ImageDraw.Draw(image)
    leaves = random_colour(random, (0.25, 0.6), (0.3, 0.6), PLANTS)
    middles = random.normal(0, 0.36, (45, 2)).clip(-0.8, 0.8)
    for (dx, dy), reach, tint in zip(middles, random.uniform(0.1, 0.2, 45), random.uniform(0.7, 1.3, 45), strict=True):
        edges = [(1 + edge) * across * pixels for edge in (dx - reach, dy - reach, dx + reach, dy + reach)]
        draw.ellipse(edges, fill=shade(leaves, tint))
    crown, left, top = sprite(image), x + trunk / 2 - across, foot - rise - across
    if not sways:
        paste(picture, crown, left, top)
        return None
    reach, rate, start = random.uniform(0.5, 2), random.uniform(0.01, 0.03), random.random()
    return lambda number: (crown, left + reach * np.sin(2 * np.pi * (rate * number + start)), top)


def _cloud(width: int, size: int, horizon: float, random: np.random.Generator) -> Stirring:
    across, pixels = random.uniform(0.15, 0.3) * size, SUPERSAMPLING
    image = Image.new("RGBA", (round(2 * across * pixels), round(across * pixels)))
    draw = ImageDraw.Draw(image)
    for _ in range(9):
        x, y, reach = random.uniform(0.4, 1.6), random.uniform(0.4, 0.6), random.uniform(0.15, 0.38)
        edges = [edge * across * pixels for edge in (x - reach, y - reach * 0.8, x + reach, y + reach * 0.8)]
        draw.ellipse(edges, fill=(240, 240, 244, 150))
    left, top, speed = random.uniform(0, width), random.uniform(0, 0.3) * horizon * size, random.uniform(-0.3, 0.3)
    cloud = sprite(image)
    return lambda number: (cloud, left + speed * number, top)


def _window(width: int, size: int, horizon: float, random: np.random.Generator) -> Stirring:
    """A lit window that flickers."""
    across, down = round(0.05 * size), round(0.08 * size)
    left, top = random.uniform(0, width - across), random.uniform(0.3, 0.7) * horizon * size
    lit = np.ones((down, across, 4), np.float32)
    lit[..., :3] = (240, 220, 160)
    levels = random.uniform(0.2, 1, 64).astype(np.float32)
    return lambda number: (lit * np.float32([*levels[number // 5 % 64].repeat(3), 1]), left, top)

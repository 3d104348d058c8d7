"""How good a motion mask the gate's surprise makes: patch-level F1 on CDnet's highway clip.

`python -m bench.studies.highway` compares the gate, by signal and reference, with OpenCV's MOG2 and with plain frame
differencing, all on the grid of the package's tower. A patch counts as moving if at least a quarter of its pixels move;
shadows do not count. Patches that lie mostly outside the region of interest, or whose ground truth is mostly unknown,
are left out. Each method gives one number per patch. Its threshold and update rate are those that score best on the
first third of the masks; the rest are scored. "Around" adds the numbers of the 3 x 3 patches around each patch, as
`neuroflow.objects.motion` does. MOG2 is left out where OpenCV is not installed.
"""

import argparse
import math
from contextlib import closing
from importlib.util import find_spec

import numpy as np
import torch
from neuroflow import NeuroFlowConfig
from neuroflow.engine.projection import patch_windows, project_windows
from neuroflow.objects import motion
from neuroflow.street import load_street
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Source
from PIL import Image
from tqdm import tqdm

from bench.tables import begin, find, share, table, write
from neuroflow_kernels import ema_surprise_

OUTSIDE, UNKNOWN, MOVING = 85, 170, 255  # pixels of a mask
LEAST_MOVING, MOST_UNKNOWN = 0.25, 0.5
CANDIDATES = 200  # thresholds
FAST = NeuroFlowConfig.fast_decay
DECAYS = [{"ema_decay": each} for each in (0.002, 0.005, 0.01, 0.02, 0.05)]
REFERENCES = {
    "refreshed": [{"threshold": each} for each in (0.02, 0.05, 0.1, 0.2, 0.4)],
    "previous": [{}],
    "ema": DECAYS,
    "dual": DECAYS,
}


class Signals:
    """What the gate of a tower compares of each patch, by the name of the signal, [1, N, D]."""

    def __init__(self, model):
        self.embeddings, self.position = model.embeddings, None

    def __call__(self, pixels):
        projection = self.embeddings.patch_embedding
        windows = patch_windows(projection, pixels)
        projected = project_windows(projection, windows)
        if self.position is None:
            self.position = self.embeddings(pixels, interpolate_pos_encoding=True) - projected
        return {"patch": projected, "embedding": projected + self.position, "pixel": windows}


class Gate:
    """Surprise of every frame [rows, columns], by the op and the rule of the engine, which would encode as well."""

    def __init__(self, signal, reference, settings):
        self.signal, self.reference, self.settings = signal, reference, settings
        self.held = None

    def __call__(self, signals, picture):
        h = signals[self.signal].contiguous()
        if self.held is None:
            self.held, self.fast = h.clone(), h.clone()
        decay = {"refreshed": 0.0, "previous": 1.0}.get(self.reference, self.settings.get("ema_decay"))
        surprise = ema_surprise_(h, self.held, decay)
        if self.reference == "refreshed":
            active = surprise > self.settings["threshold"]
            self.held[active] = h[active]
        elif self.reference == "dual":
            surprise = torch.maximum(surprise, ema_surprise_(h, self.fast, FAST))
        side = math.isqrt(h.shape[1])
        return surprise.clamp_min(0).view(side, side)


class Patches:
    """Means of [height, width] over the patches of a grid that need not divide it."""

    def __init__(self, height, width, side):
        self.side = side
        rows, columns = np.arange(height) * side // height, np.arange(width) * side // width
        self.patch = (rows[:, None] * side + columns).ravel()
        self.pixels = np.bincount(self.patch, minlength=side**2)

    def __call__(self, values):
        sums = np.bincount(self.patch, weights=values.ravel(), minlength=self.side**2)
        return torch.from_numpy((sums / self.pixels).reshape(self.side, self.side)).float()


class Difference:
    """Mean absolute difference of a patch's pixels to the last frame's, 0 to 1."""

    def __init__(self, patches):
        self.patches, self.last = patches, None

    def __call__(self, signals, picture):
        last, self.last = self.last, picture.astype(np.float32).mean(2) / 255
        return self.patches(np.zeros_like(self.last) if last is None else np.abs(self.last - last))


class Mog2:
    """Share of a patch's pixels that OpenCV's MOG2 calls foreground, shadows apart where it looks for them."""

    def __init__(self, patches, shadows):
        import cv2

        cv2.setNumThreads(1)
        self.patches, self.subtractor = patches, cv2.createBackgroundSubtractorMOG2(detectShadows=shadows)

    def __call__(self, signals, picture):
        return self.patches(self.subtractor.apply(np.ascontiguousarray(picture[..., ::-1])) == 255)


def truth(masks, inside, patches):
    """What moves, and what is scored, bool [K, rows, columns] both."""
    moving = torch.stack([patches(mask == MOVING) for mask in masks]) >= LEAST_MOVING
    unclear = [patches((mask == UNKNOWN) | (mask == OUTSIDE) | ~inside) for mask in masks]
    return moving, torch.stack(unclear) <= MOST_UNKNOWN


def f1(found, moving, scored):
    """F1, precision and recall over the scored patches, of what is found to move."""
    found, moving = found & scored, moving & scored
    hits = (found & moving).sum().item()
    precision, recall = hits / max(found.sum().item(), 1), hits / max(moving.sum().item(), 1)
    return 2 * precision * recall / max(precision + recall, 1e-9), precision, recall


def rate(numbers, moving, scored, train):
    """The threshold that is best on the first `train` masks, its F1 there, and F1, precision and recall on the rest."""
    candidates = numbers[:train][scored[:train]].quantile(torch.linspace(0.6, 0.999, CANDIDATES)).unique().tolist()
    found = {each: f1(numbers[:train] > each, moving[:train], scored[:train])[0] for each in candidates}
    threshold = max(found, key=found.get)
    rest = f1(numbers[train:] > threshold, moving[train:], scored[train:])
    return {"threshold": threshold, "f1_chosen_on": found[threshold]} | dict(
        zip(("f1", "precision", "recall"), rest, strict=True)
    )


def methods(patches):
    """(name, signal, given) -> a method, which maps `Signals` and picture [h, w, 3] to [rows, columns]."""
    made = {}
    for signal in ("patch", "embedding", "pixel"):
        for reference, several in REFERENCES.items():
            for settings in several:
                given = " ".join(f"{key} {value}" for key, value in settings.items())
                made[reference, signal, given] = Gate(signal, reference, settings)
    made["frame difference", "pixel", ""] = Difference(patches)
    if find_spec("cv2"):
        for shadows in (True, False):
            made["MOG2", "pixel", f"shadows {'on' if shadows else 'off'}"] = Mog2(patches, shadows)
    return made


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=448, help="of the tower's input, in pixels (default: 448)")
    arguments = parser.parse_args()
    size, machine = arguments.size, begin("studies/highway")
    with np.load(find("highway/masks.npz")) as file:
        numbers_of, masks = file["frame"].tolist(), file["mask"]
    inside = np.asarray(Image.open(find("highway/roi.png")).convert("L")) > 0
    height, width = masks.shape[1:]
    model, _ = load_street()
    patches = Patches(height, width, size // model.config.patch_size)
    moving, scored = truth(masks, inside, patches)
    made, compared = methods(patches), Signals(model)
    maps = {key: [] for key in made}
    preprocess = Preprocessor(size, size)
    with closing(Source(str(find("highway/highway.avi")))) as source:
        for frame in tqdm(source, total=numbers_of[-1] + 1, unit="frame"):
            signals, picture = compared(preprocess(frame)), frame.rgb(height, width)
            for key, method in made.items():
                found = method(signals, picture)
                if frame.index in numbers_of:
                    maps[key].append(found)
            if frame.index == numbers_of[-1]:
                break
    train = len(masks) // 3
    rows = []
    for (name, signal, given), found in maps.items():
        found = torch.stack(found)
        for around in (False, True):
            numbers = torch.stack([motion(each) for each in found]) if around else found
            row = {"method": name, "signal": signal, "given": given, "around": around}
            rows.append(row | rate(numbers, moving, scored, train))
    text = text_of(rows, size, len(masks), train, share(moving[scored].float().mean().item()))
    write("studies/highway", machine, {"size": size, "masks": len(masks), "chosen_on": train}, rows, text)
    print(text)


def text_of(rows, size, masks, train, moves):
    best = {}
    for row in rows:
        key = (row["method"], row["signal"], row["around"])
        if key not in best or row["f1_chosen_on"] > best[key]["f1_chosen_on"]:
            best[key] = row
    lines = [
        [
            f"gate, {row['method']}" if row["method"] in REFERENCES else row["method"],
            row["signal"],
            "yes" if row["around"] else "",
            row["given"],
            f"{row['threshold']:.3g}",
            *(f"{row[name]:.3f}" for name in ("f1", "precision", "recall", "f1_chosen_on")),
        ]
        for row in sorted(best.values(), key=lambda row: -row["f1"])
    ]
    names = ["method", "signal", "around", "setting", "threshold", "F1", "precision", "recall", "F1 on the first third"]
    about = __doc__.partition("\n\n")[2].strip()
    return (
        f"# The gate as a motion mask: CDnet highway\n\n{about}\n\n{size} px, {masks} masks, the first {train} of them "
        f"for choosing; {moves} of the scored patches move.\n\n{table(names, lines)}"
    )


if __name__ == "__main__":
    main()

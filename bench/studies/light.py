"""Key frames when the light changes: `python -m bench.studies.light`.

An ImageNet ViT-Ti at 224 px at the default settings, with `cut_light` and without it. Three photographs lose their
colours at once, as when a camera switches to infrared; one regains its contrast over 60 frames, as when fog lifts; and
the first 120 frames of each real clip, where `cut_light` should change nothing. Cosines are those of the CLS feature to
the unpatched model's.
"""

import dataclasses

import numpy as np
import torch
from neuroflow import NeuroFlowConfig
from PIL import Image

from bench.studies.protocol import load_classifier, read_clip, run
from bench.tables import begin, cosine, find, share, table, write

PHOTOGRAPHS = ("0350_ibex.jpg", "0100_black_swan.jpg", "0250_siberian_husky.jpg")
SIDE, FRAMES = 224, 120
GREY = torch.tensor((0.299, 0.587, 0.114))


def photograph(name):
    """A photograph [1, 3, SIDE, SIDE] from -1 to 1."""
    picture = Image.open(find("imagenet256") / name).convert("RGB").resize((SIDE, SIDE))
    return torch.from_numpy(np.asarray(picture).astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


def scenes():
    """The name and the frames [T, 3, SIDE, SIDE] of each scene."""
    for name in PHOTOGRAPHS:
        day = photograph(name)
        night = torch.einsum("schw,c->shw", day, GREY)[:, None].expand_as(day)
        yield f"{name}, grey from the 6th of 25", torch.cat([day] * 5 + [night] * 20)
    day = photograph(PHOTOGRAPHS[0])
    yield f"{PHOTOGRAPHS[0]}, fog lifts", torch.cat([day * (0.05 + 0.95 * step / 59) for step in range(60)])
    for path in sorted(find("videos").iterdir()):
        yield path.stem, read_clip(path, SIDE, FRAMES)


@torch.inference_mode()
def measure(model, unpatched, frames, config):
    expected = torch.cat([unpatched.vit(part).last_hidden_state[:, 0] for part in frames.split(30)])
    (found,) = run(model, [frames], config)
    cosines = torch.nn.functional.cosine_similarity(found.embeddings, expected)[1:]
    skipped = found.skipped[1:].mean().item()
    return {
        "key_frames": found.key_frames,
        "skipped": skipped,
        "least": cosines.min().item(),
        "mean": cosines.mean().item(),
    }


def main():
    machine = begin("studies/light")
    model, unpatched = load_classifier()
    with_light = NeuroFlowConfig()
    without = dataclasses.replace(with_light, cut_light=None)
    rows, lines = [], []
    for name, frames in scenes():
        row = {"scene": name, "frames": len(frames)}
        for key, config in (("without", without), ("with", with_light)):
            row[key] = measure(model, unpatched, frames, config)
        figures = ((row["without"][of], row["with"][of]) for of in ("key_frames", "skipped", "least", "mean"))
        texts = (map(show, pair) for show, pair in zip((str, share, cosine, cosine), figures, strict=True))
        lines.append([name, *(text for pair in texts for text in pair)])
        print(*lines[-1], sep="  ", flush=True)
        rows.append(row)
    names = ["scene", "key frames, without", "with", "skipped, without", "with"]
    names += ["lowest cosine, without", "with", "mean cosine, without", "with"]
    text = f"# Changing light\n\n{__doc__.partition(chr(10) * 2)[2].strip()}\n\n{table(names, lines)}"
    write("studies/light", machine, {"cut_light": with_light.cut_light}, rows, text)


if __name__ == "__main__":
    main()

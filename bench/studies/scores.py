"""Ways to score a patch that were tried, compared at equal tokens: `python -m bench.studies.scores`.

An ImageNet ViT-Ti at 224 px over the first 120 frames of four clips, architecture E, with the threshold found per clip.
Each candidate replaces `neuroflow.engine.scores.staleness`; everything else stays the same.
"""

import argparse

import neuroflow
import torch
import torch.nn.functional as F
from neuroflow.engine import scores
from tqdm import tqdm

from bench.studies.protocol import embeddings, gate_of, large_clips, load_classifier, read_clip, run_at_skip, score
from bench.tables import begin, cosine, share, table, write

SIZE, FRAMES = 224, 120
SKIPS = (0.84,)
STALENESS = scores.staleness
EXACT = 0.002  # of the skip rate, as candidates differ by little


def around(surprise, grid, side=3):
    return F.avg_pool2d(surprise.view(1, 1, *grid), side, 1, side // 2, count_include_pad=False).flatten()


def neighbours(surprise, age, attention, grid):
    return (surprise.sqrt() + 0.8 * around(surprise, grid).sqrt()).square()


def wider_neighbours(surprise, age, attention, grid):
    return (surprise.sqrt() + 0.8 * around(surprise, grid, 5).sqrt()).square()


def frame(surprise, age, attention, grid):
    drift = surprise.sqrt() + 0.8 * around(surprise, grid).sqrt() + 0.5 * surprise.mean().sqrt()
    return drift.square()


def aged(surprise, age, attention, grid):
    return frame(surprise, age, attention, grid) * (1 + age).sqrt()


def added_age(surprise, age, attention, grid):
    drift = surprise.sqrt() + 0.8 * around(surprise, grid).sqrt() + 0.02 * age.sqrt()
    return drift.square() * attention.sqrt()


def linear_age(surprise, age, attention, grid):
    return frame(surprise, age, attention, grid) * (1 + age) * attention.sqrt()


def linear_attention(surprise, age, attention, grid):
    return aged(surprise, age, attention, grid) * attention


def no_age(surprise, age, attention, grid):
    return frame(surprise, age, attention, grid) * attention.sqrt()


def saturating(surprise, age, attention, grid):
    return STALENESS(0.2 * surprise / (0.2 + surprise), age, attention, grid)


class WastedArea:
    """What a patch's error has grown to less what it was on average: what stays fresh when encoded is worth more."""

    def __init__(self):
        self.total = 0

    def __call__(self, surprise, age, attention, grid):
        error = frame(surprise, age, attention, grid)
        self.total = torch.where(age == 0, torch.zeros_like(error), self.total) + error
        return (error + 0.3 * (error * (age + 1) - self.total).clamp_min(0)) * attention.sqrt()


class AboveNoise:
    """The part of a patch's surprise that lies above a running level of its own, half of it taken off."""

    def __init__(self):
        self.level = 0

    def __call__(self, surprise, age, attention, grid):
        self.level = self.level + 0.1 * (surprise - self.level)
        return STALENESS((surprise - 0.5 * self.level).clamp_min(0), age, attention, grid)


CANDIDATES = {
    "surprise": lambda: lambda surprise, age, attention, grid: surprise,
    "+ that of 3 x 3 patches around": lambda: neighbours,
    "+ that of 5 x 5 instead": lambda: wider_neighbours,
    "+ 3 x 3 + the frame's": lambda: frame,
    "+ age": lambda: aged,
    "+ attention: staleness": lambda: STALENESS,
    "staleness, attention in full": lambda: linear_attention,
    "staleness, age in full": lambda: linear_age,
    "staleness without age": lambda: no_age,
    "staleness, age added, no frame": lambda: added_age,
    "staleness of capped surprise": lambda: saturating,
    "staleness above running noise": AboveNoise,
    "wasted area": WastedArea,
}


class Fresh:
    """A candidate that starts over with every clip: its state is of one run."""

    def __init__(self, make):
        self.make = make

    def __call__(self, surprise, age, attention, grid):
        if int(age.max()) == 0:
            self.candidate = self.make()
        return self.candidate(surprise, age, attention, grid)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    machine = begin("studies/scores")
    model, unpatched = load_classifier()
    gate = gate_of(model)
    clips = {name: read_clip(path, SIZE, FRAMES) for name, path in large_clips().items()}
    dense = {name: torch.cat([embeddings(unpatched, part) for part in clip.split(30)]) for name, clip in clips.items()}
    rows = []
    bar = tqdm(total=len(CANDIDATES) * len(SKIPS) * len(clips), unit="clip")
    for candidate, make in CANDIDATES.items():
        scores.staleness = Fresh(make)
        for skip in SKIPS:
            start = 0.1
            for name, clip in clips.items():
                config = neuroflow.NeuroFlowConfig(max_age=None, cut_share=None, cut_surprise=None)
                chosen, runs = run_at_skip(model, gate, [clip], config, skip, start, tolerance=EXACT)
                start = chosen.threshold
                figures = score([dense[name]], runs, model.classifier)
                rows.append({"candidate": candidate, "asked": skip, "clip": name, "threshold": start} | figures)
                bar.update()
    scores.staleness = STALENESS
    parts = [
        "# Patch scores at equal tokens",
        f"`python -m bench.studies.scores`. An ImageNet ViT-Ti at {SIZE} px, architecture E, on the first {FRAMES} "
        "frames of each clip, without scene cuts or an age limit. Cells are the mean and the 5th percentile of the CLS "
        "feature's cosine to dense. The threshold is found per clip.",
    ]
    for skip in SKIPS:
        lines = []
        for candidate in CANDIDATES:
            own = [row for row in rows if (row["candidate"], row["asked"]) == (candidate, skip)]
            cells = [f"{cosine(row['cosine_mean'])}, {cosine(row['cosine_p5'])}" for row in own]
            mean = sum(row["cosine_mean"] for row in own) / len(own)
            lines.append([candidate, *cells, cosine(mean), share(sum(row["skipped"] for row in own) / len(own))])
        parts.append(f"{skip:.0%} skipped:")
        parts.append(table(["score", *clips, "mean", "skipped"], lines))
    text = "\n\n".join(parts)
    write("studies/scores", machine, {"size": SIZE, "frames": FRAMES, "skips": SKIPS}, rows, text)
    print(text)


if __name__ == "__main__":
    main()

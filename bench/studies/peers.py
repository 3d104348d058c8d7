"""NeuroFlow beside other methods, each as fast as it goes at equal fidelity: `python -m bench.studies.peers`.

An ImageNet ViT-Ti on two real clips, by the protocol of `protocol.py`. For each target, a mean cosine to the unpatched
model's embeddings, every method runs at the cheapest of its settings that reaches it, and all of them are timed in
turns in one run. The settings are taken from the recorded results; `--search` finds them anew.
"""

import argparse
import json
import time

import neuroflow
import torch
import torch.nn.functional as F
from neuroflow.adapters import describe
from neuroflow.weights import copy_sharing_weights
from torch import nn
from tqdm import tqdm

from bench.baselines import STC, AttentionDropping, Eventful, FrameSkipping, PixelGate, Published, TokenMerging
from bench.studies.protocol import Run, embeddings, load_classifier, read_clip, score
from bench.tables import RESULTS, begin, cosine, find, share, table, write

CLIPS = ("degirum_Traffic.mp4", "sam2_05_default_juggle.mp4")
FRAMES = {224: 120, 448: 60}  # of each clip
TARGETS = (0.98, 0.99)
PASSES = 2  # over them, for the times
TURN = 10  # frames
OURS = "NeuroFlow E"


class Dense:
    """The unpatched model, called as the baselines are."""

    def __init__(self, model):
        self.model = model
        self.frames = 0

    def reset(self):
        """Nothing is kept between frames."""

    def __call__(self, pixels):
        self.frames += 1
        self.size = pixels.shape
        return embeddings(self.model, pixels)

    @property
    def flops(self):
        patches = patches_of(self.model, self.size)
        return flops(self.model, self.frames, patches, self.frames * (1 + patches))


class NeuroFlow:
    """The default at a threshold of its own, called as the baselines are."""

    def __init__(self, model, threshold):
        self.model = copy_sharing_weights(model)
        neuroflow.enable_cache(self.model, neuroflow.NeuroFlowConfig(threshold=threshold, dense_above=1.0))

    def reset(self):
        neuroflow.reset_cache(self.model)

    def __call__(self, pixels):
        return embeddings(self.model, pixels)

    @property
    def flops(self):
        stream = neuroflow.summary(self.model).streams["default"]
        patches = stream.active.numel()
        encoded = stream.frames * (1 + (1 - stream.skipped) * patches)
        return flops(self.model, stream.frames, patches, encoded)


def patches_of(model, size):
    """How many patches the model makes of pixels of a size [S, 3, H, W]."""
    height, width = describe(model).projection.kernel_size
    return (size[2] // height) * (size[3] // width)


def flops(model, frames, patches, encoded):
    """Of frames of so many patches, of which so many tokens in all go through the blocks and attend to all there are.

    Counted as the baselines count theirs.
    """
    anatomy = describe(model)
    linears = [module for layer in anatomy.layers for module in layer.modules() if isinstance(module, nn.Linear)]
    attended = 2 * len(anatomy.layers) * (patches + anatomy.prefix) * anatomy.last.weight.numel()
    weights = sum(linear.weight.numel() for linear in linears)
    return 2 * (frames * patches * anatomy.projection.weight.numel() + encoded * (weights + attended))


def falling(first, last, factor):
    values = [first]
    while values[-1] > last:
        values.append(float(f"{values[-1] / factor:.3g}"))
    return values


def ladders(patches):
    """For every method what makes it, and lists of its settings for frames of so many patches, from cheap to dear."""
    rising = falling(0.95, 0.02, 1.2)[::-1]  # shares of the tokens
    return {
        OURS: (NeuroFlow, [[{"threshold": value} for value in falling(10, 0.01, 1.2)]]),
        "frame skipping": (
            FrameSkipping,
            [[{"every": value} for value in (60, 40, 30, 20, 15, 12, 10, *range(8, 1, -1))]],
        ),
        "published C": (Published, [[{"threshold": value} for value in falling(0.3, 2e-5, 2)]]),
        "pixel gate": (PixelGate, [[{"threshold": value} for value in falling(0.3, 2e-3, 1.5)]]),
        "token merging": (
            TokenMerging,
            [[{"r": round(value * patches / 196)} for value in (32, 24, 20, 16, 14, 12, 10, *range(8, 0, -1))]],
        ),
        "attention dropping": (AttentionDropping, [[{"share": number / 20} for number in range(4, 20)]]),
        "STC": (STC, [[{"share": value, "period": period} for value in rising] for period in (4, 8, 16, 32, 64)]),
        "Eventful": (Eventful, [[{"count": round(value * (patches + 1))} for value in rising]]),
    }


def cheapest(ladder, reaches, start=0):
    """The place of the first setting of a ladder from `start` on that reaches a target; its length where none does.

    What is dearer than a setting that reaches it is taken to reach it too.
    """
    stop = len(ladder)
    while start < stop:
        middle = (start + stop) // 2
        if reaches(ladder[middle]):
            stop = middle
        else:
            start = middle + 1
    return stop


def reaches(contestant, clip, expected, target):
    """Whether the mean cosine over all frames but the first is `target` or more; gives up where it cannot be."""
    spare = (1 - target) * (len(clip) - 1)
    contestant(clip[:1])
    for pixels, dense in zip(clip[1:].split(1), expected[1:].split(1), strict=True):
        spare -= 1 - F.cosine_similarity(contestant(pixels), dense).item()
        if spare < 0:
            return False
    return True


def search(model, methods, clip, expected):
    """(method, target) -> its cheapest setting, by FLOPs, that reaches the target, or its dearest where none does."""
    found = {}
    bar = tqdm(total=len(methods) * len(TARGETS), unit="search")
    for name, (make, own) in methods.items():
        starts = [0] * len(own)
        for target in sorted(TARGETS):
            bar.set_postfix_str(f"{name}, {target}")
            reaching = {}  # FLOPs -> setting

            def tried(setting, make=make, target=target, reaching=reaching):
                contestant = make(model, **setting)
                enough = reaches(contestant, clip, expected, target)
                if enough:
                    reaching[contestant.flops] = setting
                return enough

            # What is too cheap for one target is too cheap for a higher one.
            starts = [cheapest(ladder, tried, start) for ladder, start in zip(own, starts, strict=True)]
            found[name, target] = reaching[min(reaching)] if reaching else own[0][-1]
            bar.update()
    return found


def measure(contestants, clip, passes):
    """The embeddings [T, D], seconds [passes, T] and FLOPs of a frame after the first of each contestant, in turns."""
    found = {name: [] for name in contestants}
    spent = {name: [] for name in contestants}
    seconds = {name: torch.empty(passes, len(clip)) for name in contestants}
    names = list(contestants)
    bar = tqdm(total=passes * len(clip), unit="frame", desc="timing")
    for number in range(passes):
        for contestant in contestants.values():
            contestant.reset()
        for start in range(0, len(clip), TURN):
            frames = range(start, min(start + TURN, len(clip)))
            for name in names:
                for frame in frames:
                    began = time.perf_counter()
                    embedding = contestants[name](clip[frame : frame + 1])
                    seconds[name][number, frame] = time.perf_counter() - began
                    if number == 0:
                        found[name].append(embedding)
                        spent[name].append(contestants[name].flops)
            names.append(names.pop(0))
            bar.update(len(frames))
    return {
        name: (torch.cat(found[name]), seconds[name], (spent[name][-1] - spent[name][0]) / (len(clip) - 1))
        for name in contestants
    }


def compare(model, methods, clip, chosen, passes):
    """The rows of one clip: dense, then for every (method, target) its setting in `chosen`."""
    contestants = {("dense", "{}"): Dense(model)}
    for (name, _), setting in chosen.items():
        key = name, json.dumps(setting)
        if key not in contestants:
            contestants[key] = methods[name][0](model, **setting)
    measured = measure(contestants, clip, passes)
    dense, dense_seconds, _ = measured["dense", "{}"]

    def row(name, setting, target):
        found, seconds, each = measured[name, json.dumps(setting)]
        # Other work only adds to a frame's time; over frames it is the mean, so that what is dear now and then counts.
        times = 1e3 * seconds[:, 1:].min(0).values
        dense_times = 1e3 * dense_seconds[:, 1:].min(0).values
        figures = score([dense], [Run(found, torch.zeros(len(found)), 0)], model.classifier)
        return {
            "peer": name,
            "setting": setting,
            "target": target,
            "reached": target is None or figures["cosine_mean"] >= target,
            **{key: figures[key] for key in ("cosine_mean", "cosine_p5", "top1", "top1_led", "frames")},
            "gflops": each / 1e9,
            "ms": times.mean().item(),
            "ms_median": times.median().item(),
            "speed": (dense_times.mean() / times.mean()).item(),
        }

    rows = [row("dense", {}, None)] + [row(name, setting, target) for (name, target), setting in chosen.items()]
    ours = {one["target"]: one["ms"] for one in rows if one["peer"] == OURS}
    return [one | {"ours_is": one["ms"] / ours[one["target"]] if one["target"] else None} for one in rows]


def text_of(rows, settings):
    """The Markdown of the rows of one size."""
    head = [
        "method",
        "setting",
        "cosine mean",
        "p5",
        "top-1 agreement",
        "GFLOPs",
        "ms a frame",
        "to dense",
        OURS + " is",
    ]

    def cells(one):
        knobs = ", ".join(f"{name} {value:g}" for name, value in one["setting"].items())
        figures = [cosine(one["cosine_mean"]), cosine(one["cosine_p5"]), share(one["top1"])]
        times = [f"{one['gflops']:.2f}", f"{one['ms']:.1f}", f"{one['speed']:.2f}x"]
        ours = "-" if one["ours_is"] is None or one["peer"] == OURS else f"{one['ours_is']:.2f}x as fast"
        return [one["peer"], knobs + ("" if one["reached"] else ", not reached"), *figures, *times, ours]

    parts = [
        f"# Methods at equal fidelity, {settings['size']} px, the first {settings['frames']} frames of each clip",
        "`python -m bench.studies.peers`. An ImageNet ViT-Ti, nothing trained, compared with the unpatched model on "
        "the same frames. Each method runs at the cheapest of its settings, by FLOPs, that reaches the target mean "
        "cosine, or at its most expensive where none does. FLOPs are those of the patch projection and the blocks' "
        f"matrix products, averaged over frames. Times are from one run in which methods take turns of {TURN} frames: "
        f"the mean over frames of each frame's shortest time in {settings['passes']} passes. The published B "
        "gives the same CLS output as C. bench/baselines describes each method and what of it is not reproduced.",
    ]
    for clip in dict.fromkeys(one["clip"] for one in rows):
        own = [one for one in rows if one["clip"] == clip]
        for target in settings["targets"]:
            asked = [cells(one) for one in own if one["target"] in (None, target)]
            parts += [f"{clip}, mean cosine {target} or more:", table(head, asked)]
    return "\n\n".join(parts)


def plot(stem, title, rows):
    """bench/results/STEM.png: for every clip, the speed of each method over its distance from dense."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    clips = list(dict.fromkeys(one["clip"] for one in rows))
    figure, axes = plt.subplots(1, len(clips), figsize=(6 * len(clips), 4.5), layout="constrained", sharey=True)
    for axis, clip in zip(axes, clips, strict=True):
        own = [one for one in rows if one["clip"] == clip and one["target"]]
        for number, name in enumerate(dict.fromkeys(one["peer"] for one in own)):
            points = sorted((1 - one["cosine_mean"], one["speed"]) for one in own if one["peer"] == name)
            line = axis.plot(*zip(*points, strict=True), marker="os^vD*<>"[number], label=name)
            line[0].set(linewidth=2.5 if name == OURS else 1)
        for target in TARGETS:
            axis.axvline(1 - target, color="grey", linewidth=0.7, linestyle=":")
        axis.axhline(1, color="grey", linewidth=0.7)
        axis.set(title=clip, xlabel="1 - mean cosine to dense", ylabel="speed, times dense", xscale="log", yscale="log")
        axis.minorticks_off()
        for ticks, places in (
            (axis.set_xticks, (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)),
            (axis.set_yticks, (1, 2, 3, 5, 10, 20, 50)),
        ):
            ticks(places, [f"{place:g}" for place in places])
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.suptitle(title, fontsize=10)
    figure.savefig(RESULTS / f"{stem}.png", dpi=110)
    plt.close(figure)


def resized(model, size):
    """The classifier with its table of positions interpolated to `size` once, so that nobody spends time on that."""
    parts = model.vit.embeddings
    tokens = torch.empty(1, (size // parts.patch_size) ** 2 + 1, model.config.hidden_size)
    with torch.no_grad():
        parts.position_embeddings = nn.Parameter(parts.interpolate_pos_encoding(tokens, size, size))
    return model


def chosen_before(stem):
    """clip -> (method, target) -> the setting in the results that are there."""
    path = RESULTS / f"{stem}.json"
    if not path.exists():
        raise SystemExit(f"{path.name} is not in {RESULTS}; python -m bench.studies.peers --search makes it")
    chosen = {}
    for one in json.loads(path.read_text())["rows"]:
        if one["target"]:
            chosen.setdefault(one["clip"], {})[one["peer"], one["target"]] = one["setting"]
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", choices=FRAMES, default=list(FRAMES))
    parser.add_argument("--search", action="store_true", help="find every method's settings anew")
    arguments = parser.parse_args()
    machines = {size: begin(f"studies/peers-{size}") for size in arguments.size}
    for size, machine in machines.items():
        stem, rows = f"studies/peers-{size}", []
        model = resized(load_classifier()[0], size)
        methods = ladders((size // model.config.patch_size) ** 2)
        before = None if arguments.search else chosen_before(stem)
        for name in CLIPS:
            clip = read_clip(find(f"videos/{name}"), size, FRAMES[size])
            if arguments.search:
                expected = torch.cat([embeddings(model, part) for part in clip.split(TURN)])
                chosen = search(model, methods, clip, expected)
            else:
                chosen = before[name]
            rows += [{"clip": name} | one for one in compare(model, methods, clip, chosen, PASSES)]
        settings = {"size": size, "frames": FRAMES[size], "passes": PASSES, "targets": TARGETS}
        text = text_of(rows, settings)
        write(stem, machine, settings, rows, text)
        plot(stem, f"ViT-Ti, {size} px: speed at equal fidelity", rows)
        print(text)


if __name__ == "__main__":
    main()

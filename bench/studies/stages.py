"""What partial frames cost in the feature maps between blocks: `python -m bench.studies.stages`.

An ImageNet ViT-Ti as a backbone of four stages, with the last norm applied to each, on the first 60 frames of four
clips, architecture E with a budget. Cells are the mean cosine of a patch's feature to the unpatched model's, key frames
left out. "again" shows one frame twice, the second time with as few patches as a frame can encode.
"""

import argparse

import neuroflow
import torch
import torch.nn.functional as F

from bench.studies.protocol import large_clips, load_classifier, read_clip
from bench.tables import begin, cosine, share, table, write

SIZE, FRAMES = 224, 60
STAGES = (3, 6, 9, 12)  # blocks
SKIPS = (0.84, 0.94)


@torch.inference_mode()
def feature_maps(model, frame):
    """[stages, N, D] of a frame [1, 3, H, W]."""
    states = model.vit(frame, output_hidden_states=True).hidden_states
    return torch.cat([model.vit.layernorm(states[stage])[:, 1:] for stage in STAGES])


def fidelity(model, unpatched, clip, config):
    """Mean cosine at each stage, and the share skipped, over the frames that are no key frames."""
    neuroflow.enable_cache(model, config)
    cosines, skipped = [], []
    for frame in clip.split(1):
        found = feature_maps(model, frame)
        active = neuroflow.last_pass(model)[0].active
        if not active.all():
            cosines.append(F.cosine_similarity(found, feature_maps(unpatched, frame), dim=2).mean(1))
            skipped.append(1 - active.float().mean().item())
    neuroflow.disable_cache(model)
    return torch.stack(cosines).mean(0).tolist(), sum(skipped) / len(skipped)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    machine = begin("studies/stages")
    model, unpatched = load_classifier()
    rows, lines = [], []
    for name, path in large_clips().items():
        clip = read_clip(path, SIZE, FRAMES)
        settings = {f"{skip:.0%}": (clip, neuroflow.NeuroFlowConfig(budget=1 - skip)) for skip in SKIPS}
        settings["again"] = clip[:1].expand(2, -1, -1, -1), neuroflow.NeuroFlowConfig(threshold=1.0, dense_above=1)
        for asked, (frames, config) in settings.items():
            cosines, skipped = fidelity(model, unpatched, frames, config)
            rows.append({"clip": name, "asked": asked, "skipped": skipped, "cosines": cosines})
            lines.append([name, asked, share(skipped), *map(cosine, cosines)])
            print(*lines[-1], sep="  ", flush=True)
    about = __doc__.partition("\n\n")[2].strip()
    names = ["clip", "asked", "skipped", *(f"block {stage}" for stage in STAGES)]
    text = f"# Feature maps\n\n{about}\n\n{table(names, lines)}"
    write("studies/stages", machine, {"size": SIZE, "frames": FRAMES}, rows, text)


if __name__ == "__main__":
    main()

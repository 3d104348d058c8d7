"""What encoding frames as a clip costs in fidelity: `python -m bench.studies.clip_fidelity`.

An ImageNet ViT-Ti at 224 px over real clips at the default settings, frame by frame and 16 frames per call. The gate's
score reads the attention that the pooled output paid each patch, and within a call it only knows what the stream knew
before the call. The threshold is the one that skips 84 % frame by frame.
"""

import statistics

import neuroflow
import torch
from neuroflow import NeuroFlowConfig

from bench.studies.protocol import embeddings, gate_of, large_clips, load_classifier, read_clip, run_at_skip
from bench.tables import begin, cosine, share, table, write

LENGTH = 16


@torch.inference_mode()
def measure():
    """The mean cosine to dense and the share skipped of each clip, frame by frame and `LENGTH` frames per call."""
    model, unpatched = load_classifier()
    gate, rows = gate_of(model), []
    for name, path in large_clips().items():
        frames = read_clip(path, 224, 120)
        dense = torch.cat([embeddings(unpatched, part) for part in frames.split(30)])
        config = NeuroFlowConfig(dense_above=1.0)
        chosen, (alone,) = run_at_skip(model, gate, [frames], config, 0.84, 0.1)
        rows.append({"clip": name, "frames": 1} | figures(alone.embeddings, alone.skipped.tolist(), dense))
        neuroflow.enable_cache(model, chosen)
        found, skipped = [], []
        with neuroflow.cache_context(model, name):
            for part in frames.split(LENGTH):
                found.append(embeddings(model, part))
                skipped += [report.skipped for report in neuroflow.last_pass(model)]
        neuroflow.disable_cache(model)
        rows.append({"clip": name, "frames": LENGTH} | figures(torch.cat(found), skipped, dense))
    return rows


def figures(found, skipped, dense):
    cosines = torch.nn.functional.cosine_similarity(found, dense)[1:]
    return {"skipped": statistics.mean(skipped[1:]), "cosine": cosines.mean().item()}


def main():
    machine = begin("studies/clip-fidelity")
    rows = measure()
    lines = [[row["clip"], str(row["frames"]), share(row["skipped"]), cosine(row["cosine"])] for row in rows]
    about = __doc__.partition("\n\n")[2].strip()
    names = ["clip", "frames per call", "skipped", "cosine to dense"]
    text = f"# Fidelity of clips of {LENGTH} frames\n\n{about}\n\n{table(names, lines)}"
    write("studies/clip-fidelity", machine, {"frames": LENGTH}, rows, text)
    print(text)


if __name__ == "__main__":
    main()

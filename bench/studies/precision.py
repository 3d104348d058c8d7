"""What `precision="bfloat16"` costs in fidelity: `python -m bench.studies.precision`.

An ImageNet ViT-Ti in float32 on the first 120 frames of four clips, architecture E at its default settings, with matrix
products of partial frames in float32 and in bfloat16. Cells are the mean and the 5th percentile of the CLS feature's
cosine to the unpatched model's. Both encode the same patches. `python -m bench.run` measures the time that it saves.
"""

import argparse

import neuroflow
import torch

from bench.studies.protocol import embeddings, large_clips, load_classifier, read_clip, run, score
from bench.tables import begin, cosine, share, table, write

SIZE, FRAMES = 224, 120
PRECISIONS = ("model", "bfloat16")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    machine = begin("studies/precision")
    model, unpatched = load_classifier()
    rows, lines = [], []
    for name, path in large_clips().items():
        clip = read_clip(path, SIZE, FRAMES)
        with torch.inference_mode():
            dense = torch.cat([embeddings(unpatched, part) for part in clip.split(30)])
        cells = []
        for precision in PRECISIONS:
            runs = run(model, [clip], neuroflow.NeuroFlowConfig(precision=precision))
            figures = score([dense], runs, model.classifier)
            rows.append({"clip": name, "precision": precision} | figures)
            cells.append(f"{cosine(figures['cosine_mean'])}, {cosine(figures['cosine_p5'])}")
        lines.append([name, share(figures["skipped"]), *cells])
        print(*lines[-1], sep="  ", flush=True)
    about = __doc__.partition("\n\n")[2].strip()
    text = f"# Products in bfloat16\n\n{about}\n\n{table(['clip', 'skipped', 'float32', 'bfloat16'], lines)}"
    write("studies/precision", machine, {"size": SIZE, "frames": FRAMES}, rows, text)


if __name__ == "__main__":
    main()

"""The drawn benchmark: how often the package's tower names the subject of held-out scenes, dense and patched.

`python bench/street.py --scenes 50 --arch E C`: a table by trajectory, one by camera and one by class for each
architecture, with NeuroFlow's other settings as they are by default.
"""

import argparse
import tempfile
from pathlib import Path

import neuroflow
from neuroflow.cli.demo import format_scores, score_scene
from neuroflow.cli.run import copy_sharing_weights
from neuroflow.models import load_street
from neuroflow.video.scene import CAMERAS, CLASSES, TRAJECTORIES, scenes
from tqdm import tqdm

from neuroflow_kernels.env import describe


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=50, help="of 120 frames each")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of scenes")
    parser.add_argument("--arch", nargs="+", default=["E"])
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--max-age", type=int)
    arguments = parser.parse_args()
    facts = describe()
    print("  ".join(f"{name} {facts[name]}" for name in ("processor", "threads", "torch", "transformers")))
    for arch in arguments.arch:
        model, classes = load_street()
        dense = copy_sharing_weights(model)
        config = neuroflow.NeuroFlowConfig(arch=arch, threshold=arguments.threshold, max_age=arguments.max_age)
        neuroflow.enable_cache(model, config)
        scored = []
        with tempfile.TemporaryDirectory() as scratch:
            for scene in tqdm(scenes(arguments.scenes, arguments.seed, held_out=True), unit="scene"):
                scored += score_scene(scene, Path(scratch, "scene.mp4"), model, dense, classes)
        print(f"\n{config}")
        for field, names in (("trajectory", TRAJECTORIES), ("camera", CAMERAS), ("subject", CLASSES)):
            print(format_scores(scored, field, names), flush=True)


if __name__ == "__main__":
    main()

"""What a video costs inside vLLM: `python -m bench.vllm_video`, in an environment that has it (`make bench-vllm`).

Qwen2.5-VL and Qwen3-VL with a tower of ViT-S's size and random weights are asked about clips of a fixed camera: a still
scene with sensor noise, and the same with one object that moves. Each row is a process of its own; "ms" is the tower's
time for one video, the median of all of them with the 20th and the 80th percentile, and "tokens" is what the language
model reads of it. Efficient video sampling (EVS) is vLLM's own: it drops tokens behind the tower. The cosine is that of
the tower's tokens to those of the same tower where nothing is skipped.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import neuroflow
import torch
from neuroflow.patch import run_unpatched

from bench.tables import begin, table, write
from bench.vllm_models import clip, load, prompt, save

TOWER = {"depth": 12, "hidden_size": 384, "num_heads": 6, "intermediate_size": 1536}
ROWS, COLUMNS, FRAMES = 8, 10, 32  # in merged tokens, and two frames are one step in time
SKIPPED = 0.84
STEPS = FRAMES // 2
WARM_UP = 3  # videos, which also find out which kernels are fast, and from which share on dense is
BUDGET = 1 - SKIPPED * STEPS / (STEPS - 1)  # the first step is a key frame
PRUNED = 0.5
AT_RATE = {"budget": BUDGET, "max_age": None}
VARIANTS = {
    "vLLM": {},
    f"vLLM, EVS at {PRUNED}": {"pruned": PRUNED},
    "NeuroFlow, default settings": {"settings": {}},
    f"NeuroFlow at {SKIPPED:.0%}": {"settings": AT_RATE},
    f"NeuroFlow at {SKIPPED:.0%}, EVS at {PRUNED}": {"settings": AT_RATE, "pruned": PRUNED},
}
CLIPS = {"still": False, "one object": True}


def measure(folder, family, repeats, settings=None, pruned=None):
    """A row for each of CLIPS, of a model in this process."""
    from vllm import SamplingParams

    llm = load(folder, hf_overrides={} if settings is None else {"neuroflow": settings}, video_pruning_rate=pruned)
    if pruned is not None:  # which the load_model of vLLM's runner for CPUs leaves out, and that for GPUs does
        llm.collective_rpc(lambda worker: setattr(worker.model_runner, "is_multimodal_pruning_enabled", True))
    (tower,) = llm.apply_model(lambda model: model.visual)
    forward, calls = tower.forward, []

    def timed(*args, **kwargs):
        start = time.perf_counter()
        output = forward(*args, **kwargs)
        calls.append((args, kwargs, output, time.perf_counter() - start))
        return output

    tower.forward = timed
    rows = []
    for name, moving in CLIPS.items():
        milliseconds, seconds, skipped, cosines = [], [], [], []
        for repeat in range(-WARM_UP, repeats):
            calls.clear()
            start = time.perf_counter()
            video = prompt(clip(family, FRAMES, ROWS, COLUMNS, WARM_UP + repeat, moving=moving))
            (answer,) = llm.generate([video], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
            if repeat < 0:
                continue
            seconds.append(time.perf_counter() - start)
            ((args, kwargs, output, taken),) = calls
            milliseconds.append(1e3 * taken)
            if settings is not None:
                reports = neuroflow.last_pass(tower)
                skipped.append(statistics.mean(report.skipped for report in reports))
                with torch.inference_mode():
                    dense = run_unpatched(tower, forward, *args, **kwargs)
                cosines.append(torch.cosine_similarity(output, dense, dim=1).mean().item())
        fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
        rows.append(
            {
                "clip": name,
                "ms": statistics.median(milliseconds),
                "p20": fifths[0],
                "p80": fifths[-1],
                "request s": statistics.median(seconds),
                "tokens": answer.prompt_token_ids.count(llm.model_config.hf_config.video_token_id),
                "skipped": statistics.mean(skipped) if skipped else None,
                "cosine": statistics.mean(cosines) if cosines else None,
            }
        )
    return rows


def apart(family, variant, folder, repeats):
    """The rows of a variant, measured in a process of its own, where plain vLLM loads no plugin."""
    given = {"folder": folder, "family": family, "repeats": repeats} | VARIANTS[variant]
    plugins = "neuroflow" if "settings" in VARIANTS[variant] else ""
    environment = os.environ | {"VLLM_PLUGINS": plugins, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "bench.vllm_video", "--measure", json.dumps(given)]
    with tempfile.TemporaryFile("w+") as log:
        ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        if ran.returncode:
            log.seek(0)
            raise SystemExit(f"{family}, {variant}: {log.read()[-2000:]}")
    (found,) = (line for line in ran.stdout.splitlines() if line.startswith("[{"))
    return [{"family": family, "variant": variant} | row for row in json.loads(found)]


def line_of(row):
    share = "" if row["skipped"] is None else f"{row['skipped']:.1%}"
    cosine = "" if row["cosine"] is None else f"{row['cosine']:.4f}"
    times = f"{row['ms']:.0f} ({row['p20']:.0f} to {row['p80']:.0f})"
    return [*(row[name] for name in ("family", "clip", "variant")), share, cosine, times, f"{row['tokens']}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="videos of each clip")
    parser.add_argument("--out", default="vllm", help="the stem of the files in bench/results, or a path's")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(**arguments.measure)))
        return
    import vllm

    machine, rows = begin(arguments.out), []
    machine["vllm"] = vllm.__version__
    with tempfile.TemporaryDirectory() as folder:
        for family in ("qwen2.5-vl", "qwen3-vl"):
            save(family, Path(folder, family), **TOWER)
            for variant in VARIANTS:
                rows += apart(family, variant, str(Path(folder, family)), arguments.repeats)
                print(*map(line_of, rows[-len(CLIPS) :]), sep="\n", flush=True)
    names = ["family", "clip", "variant", "skipped", "cosine", "tower ms", "tokens"]
    about = __doc__.partition("\n\n")[2].strip()
    text = f"# A video inside vLLM\n\n{about}\n\n{table(names, map(line_of, rows))}"
    settings = {"tower": TOWER, "frames": FRAMES, "merged tokens": [ROWS, COLUMNS], "repeats": arguments.repeats}
    write(arguments.out, machine, settings, rows, text)


if __name__ == "__main__":
    main()

"""The `neuroflow` command: its options, and errors as one line."""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import CommandError

RUN_DESCRIPTION = """\
Encode a video with a vision transformer, re-encoding only the patches that changed, and report what that saved and,
with --compare, what it cost.

SOURCE is a video file, a directory of images (taken in name order), a webcam (0, /dev/video0) or an rtsp:// or http://
address. Files give every frame, decoded and resized a few frames ahead while the model works; live sources give the
newest, until --max-frames or Ctrl-C ends them. The report's pipeline line says where the time of a frame went.
MODEL is a Hugging Face id or a local directory; its vision tower is used: SigLIP, SigLIP 2 of fixed resolution, CLIP,
ViT, DeiT, I-JEPA, ViT-MAE, DINOv2, DINOv3, AIMv2, InternVL, SAM or ViTDet, alone or in a larger model such as LLaVA.
Without --model a small SigLIP that comes with the package is used: it downloads nothing and knows the drawn scenes of
`neuroflow demo`.
"""

RUN_EXAMPLES = """\
examples:
  neuroflow run clip.mp4 --compare
  neuroflow run clip.mp4 --model google/siglip2-base-patch16-224 --compare
  neuroflow run clip.mp4 --model ./my-vit --out result.parquet --overlay overlay.mp4
  neuroflow run rtsp://camera/stream --model ./my-vit --device cuda --dtype float16 --max-frames 1000
  neuroflow run clip.mp4 --model ./my-vit --out result.jsonl --resume
  neuroflow run clip.mp4 --model ./my-vit --config config.json
"""

CALIBRATE_DESCRIPTION = """\
Find the threshold that gives a wanted fidelity, or a wanted share of patches skipped, on your own footage, and write
the configuration that `neuroflow run --config` loads.

The frames are kept in memory, 0.6 MB each at 224 px, and go through the model 14 times or less.
SOURCE is a video file or a directory of images, MODEL as for `neuroflow run`.
"""

CALIBRATE_EXAMPLES = """\
examples:
  neuroflow calibrate clip.mp4 --target-fidelity 0.99 --out config.json
  neuroflow calibrate clip.mp4 --model ./my-vit --target-skip 0.84 --max-age 60 --out config.json
"""


TRACK_DESCRIPTION = """\
Follow what moves in a video: patches that differ from a slow background become components, which an embedding each and
their places turn into tracks. It takes a camera that stands still, no detector and no training.

SOURCE is as for `neuroflow run`, MODEL too, of those with an output token for each patch. A component has at least 2
patches, so that small things need a larger --size. Tracks depend on every frame before: a run that is stopped writes
neither file, and starts over.
"""

TRACK_EXAMPLES = """\
examples:
  neuroflow track clip.mp4 --out tracks.json --overlay overlay.mp4
  neuroflow track clip.mp4 --model ./my-siglip --labels texts.safetensors --size 640x352 --out tracks.json

--labels FILE holds a tensor `embeddings` [K, D] and, in its metadata, `names`, a JSON list of K:
  safetensors.torch.save_file({"embeddings": texts}, "texts.safetensors", {"names": json.dumps(names)})
"""

DISTILL_DESCRIPTION = """\
Teach a tower to give, from the active patches of a frame, what it gives for the whole one. The student is of any
architecture: B, which without training keeps little of the output; C at the same number of patches, which has the
others in its cache and reaches more; or E.

What is trained are weights for partial frames. Whole ones, as key frames are, are encoded with the model's own, so that
of these nothing is lost. What stands in front of the first block is never trained, as the gate reads it.

VIDEOS is a directory; one video in five, by name, is held out, and after every epoch the mean cosine of the student to
the unpatched teacher is measured there. On other videos a student may do worse than untrained: --outside is a directory
of such, whose last frames are to be known, and epochs that know too few of them are not chosen. In folders named like
the model's classes (a classes.safetensors beside its weights, as the package's own has) those are known that are named
rightly; otherwise those whose embedding by the student is nearest to the teacher's of the same video.
The best weights are written, with the settings of the gate: `neuroflow run --weights FILE` takes both.
"""

DISTILL_EXAMPLES = """\
examples:
  neuroflow distill videos/ --arch C --outside others/ --out street-c.safetensors
  neuroflow distill videos/ --arch C --outside others/ --out street-c.safetensors --resume
  neuroflow distill videos/ --model ./my-vit --train last-4 --rate 5e-6 --epochs 3 --device cuda --out b.safetensors
  neuroflow run clip.mp4 --weights street-c.safetensors --compare
"""

EVAL_VIDEO_DESCRIPTION = """\
Name labelled clips without training on them, with the unpatched model and with every architecture and threshold side by
side, from the same decoded frames: top-1, top-3, their 95 % intervals, patches skipped and cosine to dense.

FOLDER is laid out as UCF-101: a folder for each class, named after it, that holds its clips, video files or directories
of images. A clip is named by the mean embedding of its first frames, which are consecutive (or --stride apart), not
spread over it: a gate compares each frame with the one before. Classes are embedded by the model's own text tower
(SigLIP, SigLIP 2 of fixed resolution, CLIP), or come from a file. Without --model it is the package's own tower and its
classes. A damaged clip is reported and left out.
"""

EVAL_VIDEO_EXAMPLES = """\
examples:
  neuroflow eval video UCF-101 --testlist testlist01.txt --model google/siglip-base-patch16-224 --preset published
  neuroflow eval video clips --model ./my-siglip --arch C E --threshold 0.05 0.1 --template "a photo of {}." "{}"
  neuroflow eval video clips --model ./my-vit --classes classes.npz --out result.json --plots plots
  neuroflow eval video clips --model ./my-vit --classes classes.npz --out result.json --resume
"""

EVAL_LAWS_DESCRIPTION = """\
Measure on one clip what reuse does to a model, by architecture: saturation (fidelity over patches skipped), degradation
(fidelity as positions are stretched to larger inputs), active shift beside staleness of the cache, the representation
gap by block, the entropy of the pooling head's attention, and how stable the cached tokens are where the gate calls for
a patch and where it does not.

SOURCE is a video file or a directory of images, MODEL as for `neuroflow run`. Saturation goes through all thresholds,
the other laws take the first. The frames are kept in memory.
"""

EVAL_LAWS_EXAMPLES = """\
examples:
  neuroflow eval laws clip.mp4 --model ./my-siglip --preset published --arch C E --plots plots
  neuroflow eval laws clip.mp4 --model ./my-siglip --threshold 0.1 0.05 0.2 --sizes 224 448 672 --out laws.json
"""


EVAL_LLM_DESCRIPTION = """\
Let layers of a language model repeat what they gave the step before where a gate layer's attention output hardly
changed, and measure what that loses and saves.

MODEL is a Phi-3, Llama, Qwen2, Qwen3 or GPT-2, with its tokenizer. Each FILE is a class of prompt, named by its file
name: code.txt, structured.txt, prose.txt. Windows of it go through token by token, as in decoding. For every pair of
gate and cached layers and every threshold: the share of steps in which the cached layers repeat, percentiles of the
gate's cosine, perplexity beside dense, drift (the share of tokens that differ from the plain model's when it continues
the first half of each window greedily), divergence of the last hidden state (the distance to dense as a share of its
length), and milliseconds a token, both in turns.
"""

EVAL_LLM_EXAMPLES = """\
examples:
  neuroflow eval llm --model microsoft/Phi-3-mini-4k-instruct --text code.txt structured.txt prose.txt --dtype bfloat16
  neuroflow eval llm --model ./my-llama --text prose.txt --pairs 1:12 3:5 --thresholds 0.7 0.9 --out result.json
  neuroflow eval llm --model ./my-llama --text prose.txt --pairs 1:8,9,10 --target mlp --out result.json --resume
"""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0, 2 after bad input, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    warnings.showwarning = _show_warning
    try:
        # Late, so that --help and mistakes in the options answer at once.
        from ..video.results import ResultError
        from ..video.source import SourceError

        if arguments.command == "demo":
            from .demo import demo as command
        elif arguments.command == "calibrate":
            from .calibrate import calibrate as command
        elif arguments.command == "eval" and arguments.evaluation == "video":
            from .eval import video as command
        elif arguments.command == "eval" and arguments.evaluation == "laws":
            from .eval import laws_of_reuse as command
        elif arguments.command == "eval":
            from .eval_llm import eval_llm as command
        elif arguments.command == "distill":
            from .distill import distill as command
        elif arguments.command == "track":
            from .track import track as command
        else:
            from .run import run as command
    except ModuleNotFoundError as error:
        if error.name not in ("av", "PIL", "scipy"):
            raise
        print(f"neuroflow: error: {error.name} is missing; install the video extra: neuroflow[video]", file=sys.stderr)
        return 2
    try:
        return command(arguments)
    except (CommandError, ResultError, SourceError) as error:
        print(f"neuroflow: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="neuroflow", description="Vision transformers over video, at the cost of what changed.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{run,calibrate,distill,eval,track,demo}")
    _add_run(commands)
    _add_calibrate(commands)
    _add_distill(commands)
    _add_eval(commands)
    _add_track(commands)
    demo = commands.add_parser(
        "demo",
        help="draw labelled scenes, classify them dense and patched, show the table",
        description="Draw labelled scenes, encode them with the tower that comes with the package, dense and patched "
        "side by side, and print how often each names the subject, what was skipped and the time; then the speed of a "
        "SigLIP of base size and random weights. Written: the scenes, overlay.mp4 and result.jsonl of one of them.",
    )
    demo.add_argument("--out-dir", type=Path, default=Path("demo"), metavar="DIR", help="where to (default: demo)")
    return parser


def _add_run(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser(
        "run",
        help="encode a video with a model",
        description=RUN_DESCRIPTION,
        epilog=RUN_EXAMPLES,
    )
    _add_model(run)
    run.add_argument(
        "--weights", type=Path, metavar="FILE", help="what `distill` wrote: weights for partial frames, and their gate"
    )
    run.add_argument("--compare", action="store_true", help="run the unpatched model beside it: dense times, fidelity")
    gate = _add_gate(run)
    gate.add_argument("--threshold", type=float, metavar="T", help="encode patches of a higher score; 0 encodes all")
    gate.add_argument(
        "--budget", type=float, metavar="K", help="instead: the K of the highest score, a count or a share < 1"
    )
    _add_frames(run, None, "stop after N frames")
    output = run.add_argument_group("what is written")
    output.add_argument(
        "--out", type=Path, metavar="FILE", help="each frame's embedding, skip and timing: .jsonl, .npz or .parquet"
    )
    output.add_argument("--overlay", type=Path, metavar="FILE", help="an .mp4 of frames beside their active patches")
    output.add_argument("--resume", action="store_true", help="continue the unfinished --out of the same command")


def _add_calibrate(commands: argparse._SubParsersAction) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="find the threshold for a fidelity or a skip rate",
        description=CALIBRATE_DESCRIPTION,
        epilog=CALIBRATE_EXAMPLES,
    )
    _add_model(calibrate)
    target = calibrate.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--target-fidelity", type=_share, metavar="F", help="mean cosine to the unpatched model's embeddings, below 1"
    )
    target.add_argument("--target-skip", type=_share, metavar="S", help="instead: mean share of patches skipped")
    calibrate.add_argument("--out", type=Path, required=True, metavar="FILE", help="the configuration to write, JSON")
    _add_gate(calibrate)
    _add_frames(calibrate, 120, "of N frames at most (default: 120)")


def _add_track(commands: argparse._SubParsersAction) -> None:
    track = commands.add_parser(
        "track",
        help="follow what moves",
        description=TRACK_DESCRIPTION,
        epilog=TRACK_EXAMPLES,
    )
    _add_model(track)
    motion = track.add_argument_group("what moves")
    motion.add_argument(
        "--threshold",
        type=_above_zero,
        default=1.6,
        metavar="T",
        help="patches of more motion move: lower finds fainter things, and more noise (default: 1.6)",
    )
    motion.add_argument(
        "--ema-decay",
        type=_share,
        default=0.01,
        metavar="A",
        help="weight of a new frame in the background: what stops is kept for about 1/A frames (default: 0.01)",
    )
    motion.add_argument("--labels", type=Path, metavar="FILE", help="embeddings to name objects by, .safetensors")
    _add_frames(track, None, "stop after N frames")
    output = track.add_argument_group("what is written")
    output.add_argument("--out", type=Path, metavar="FILE", help="boxes and tracks, .json")
    output.add_argument("--overlay", type=Path, metavar="FILE", help="an .mp4 of the frames under boxes and ids")


def _add_distill(commands: argparse._SubParsersAction) -> None:
    distill = commands.add_parser(
        "distill",
        help="train a tower to do with the active patches alone",
        description=DISTILL_DESCRIPTION,
        epilog=DISTILL_EXAMPLES,
    )
    distill.add_argument("videos", type=Path, metavar="VIDEOS", help="directory of videos to learn from")
    distill.add_argument("--outside", type=Path, metavar="DIR", help="videos of other things, by class or alone")
    distill.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    distill.add_argument("--resume", action="store_true", help="continue the unfinished --out of the same command")
    _add_loading(distill)
    distill.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the products in training; weights are float32 (default: bfloat16 on a GPU, else float32)",
    )
    training = distill.add_argument_group("training", "defaults are DistillationConfig's")
    training.add_argument("--arch", help="active (B), dual (C), context (E), midlayer (D) or mlp (A) (default: active)")
    training.add_argument("--train", metavar="WHAT", help="head, last-K (blocks, and the head) or all (default: all)")
    training.add_argument("--epochs", type=_count, metavar="N", help="times through all videos (default: 12)")
    training.add_argument("--rate", type=float, metavar="R", help="learning rate (default: 1e-4)")
    training.add_argument("--batch", type=_count, metavar="N", help="frames of a step (default: 128)")
    training.add_argument("--clips", type=_count, metavar="N", help="videos that a step's are from (default: 32)")
    training.add_argument("--strides", type=_count, metavar="N", help="videos give every 1st to Nth frame (default: 4)")
    training.add_argument(
        "--thresholds",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="a video's is drawn between these (default: 0.02 0.5)",
    )
    training.add_argument(
        "--skip",
        type=_share,
        metavar="S",
        help="share of patches skipped in evaluation, and by the result (default: 0.9)",
    )
    training.add_argument(
        "--forgetting", type=float, metavar="F", help="share of --outside that may be forgotten (default: 0.01)"
    )
    training.add_argument(
        "--patience", type=_count, metavar="N", help="end after N epochs in a row that forget more (default: 3)"
    )
    training.add_argument("--seed", type=int, metavar="N", help="of every draw (default: 0)")
    _add_frames(distill, 300, "of N frames of a video at most (default: 300)")


def _add_eval(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="measure what reuse costs: accuracy on labelled clips, the laws of reuse, language models",
        description="Measure what reuse costs.",
    )
    evaluations = evaluate.add_subparsers(dest="evaluation", required=True, metavar="{video,laws,llm}")
    video = evaluations.add_parser(
        "video",
        help="top-1 and top-3 on labelled clips, dense beside every architecture",
        description=EVAL_VIDEO_DESCRIPTION,
        epilog=EVAL_VIDEO_EXAMPLES,
    )
    _add_model(video, "FOLDER", "class folders that hold clips")
    video.add_argument("--testlist", type=Path, metavar="FILE", help="the clips that count, one a line: Class/clip.avi")
    video.add_argument(
        "--classes", type=Path, metavar="FILE", help=".npz or .safetensors with names and embeddings [C, D] of classes"
    )
    template = "a video of a person doing {}."
    video.add_argument(
        "--template",
        type=_template,
        nargs="+",
        default=[template],
        metavar="T",
        help=f"prompts with {{}} for the class, averaged (default: {template!r})",
    )
    _add_systems(video)
    _add_frames(video, 16, "the first N of each clip (default: 16)")
    _add_findings(video)
    laws = evaluations.add_parser(
        "laws",
        help="what reuse does to fidelity, tokens, blocks and pooling head, on one clip",
        description=EVAL_LAWS_DESCRIPTION,
        epilog=EVAL_LAWS_EXAMPLES,
    )
    _add_model(laws)
    laws.add_argument(
        "--sizes",
        type=_size,
        nargs="+",
        metavar="WxH",
        help="of the degradation law (default: the model's own, and twice that)",
    )
    _add_systems(laws)
    _add_frames(laws, 32, "of N frames at most (default: 32)")
    _add_findings(laws)
    _add_eval_llm(evaluations)


def _add_eval_llm(evaluations: argparse._SubParsersAction) -> None:
    llm = evaluations.add_parser(
        "llm",
        help="perplexity and drift of a language model whose layers repeat themselves between decode steps",
        description=EVAL_LLM_DESCRIPTION,
        epilog=EVAL_LLM_EXAMPLES,
    )
    llm.add_argument("--model", required=True, metavar="MODEL", help="Hugging Face id or local directory")
    llm.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help="a text for each class of prompt, UTF-8"
    )
    llm.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    llm.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="default: float32")
    bypass = llm.add_argument_group("what repeats, and when", "every pair at every threshold")
    bypass.add_argument(
        "--pairs",
        type=_layers,
        nargs="+",
        metavar="G:C",
        help="gate layer and cached layers, 1:24 or 1:24,31, counted from 0; where C lies before G it goes by the last "
        "step's decision (default: 1 with the layer at three quarters, and with the last)",
    )
    bypass.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        default=[0.65, 0.7, 0.8, 0.9],
        metavar="T",
        help="repeat where the cosine is at least this (default: 0.65 0.7 0.8 0.9)",
    )
    bypass.add_argument(
        "--target", default="attention", choices=("attention", "mlp"), help="what repeats (default: attention)"
    )
    length = llm.add_argument_group("how much is read")
    length.add_argument(
        "--tokens", type=_window, default=256, metavar="N", help="tokens of a window of text (default: 256)"
    )
    length.add_argument("--windows", type=_count, default=4, metavar="N", help="windows of each text (default: 4)")
    length.add_argument(
        "--new-tokens", type=_count, default=64, metavar="N", help="continue each prompt so far (default: 64)"
    )
    output = llm.add_argument_group("what is written")
    output.add_argument("--out", type=Path, metavar="FILE", help="a .json file of it all, with divergence by layer")
    output.add_argument("--resume", action="store_true", help="continue the --out of the same command")


def _add_systems(command: argparse.ArgumentParser) -> None:
    systems = command.add_argument_group("what is compared with dense", "every architecture at every threshold")
    base = systems.add_mutually_exclusive_group()
    base.add_argument(
        "--preset", choices=("published",), help="the published gate, as C at 0.05, 0.1 and 0.2 unless given otherwise"
    )
    base.add_argument(
        "--config", type=Path, metavar="FILE", help="settings that `calibrate` or NeuroFlowConfig.save wrote"
    )
    systems.add_argument(
        "--arch", nargs="+", help="context (E), dual (C), active (B), mlp (A), midlayer (D) (default: C E)"
    )
    systems.add_argument(
        "--threshold", type=float, nargs="+", metavar="T", help="encode patches of a higher score; 0 encodes all"
    )


def _add_findings(command: argparse.ArgumentParser) -> None:
    output = command.add_argument_group("what is written")
    output.add_argument("--out", type=Path, metavar="FILE", help="a .json file of everything that was found")
    output.add_argument("--resume", action="store_true", help="continue the --out of the same command")
    output.add_argument("--plots", type=Path, metavar="DIR", help="pictures, with matplotlib (the bench extra)")


def _add_model(
    command: argparse.ArgumentParser, source: str = "SOURCE", what: str = "file, directory, webcam or address"
) -> None:
    command.add_argument("source", metavar=source, help=what)
    dtypes = ("float32", "bfloat16", "float16")
    command.add_argument("--dtype", default="float32", choices=dtypes, help="default: float32")
    _add_loading(command)


def _add_loading(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", metavar="MODEL", help="Hugging Face id or local directory (default: the package's own)"
    )
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    command.add_argument(
        "--size", type=_size, metavar="WxH", help="input size in pixels, 448 or 640x384 (default: the model's own)"
    )


def _add_gate(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    gate = command.add_argument_group("which patches are encoded", "defaults are NeuroFlowConfig's")
    gate.add_argument(
        "--config", type=Path, metavar="FILE", help="settings that `calibrate` or NeuroFlowConfig.save wrote"
    )
    gate.add_argument("--arch", help="context (E), dual (C), active (B), mlp (A) or midlayer (D) (default: context)")
    gate.add_argument("--floor", type=int, metavar="N", help="encode at least N patches (default: 4)")
    gate.add_argument("--max-age", type=int, metavar="N", help="encode every patch once in N frames (default: 128)")
    gate.add_argument("--refresh", help="by a key frame, or rolling, a few patches a frame (default: key)")
    gate.add_argument("--score", help="staleness, or surprise alone (default: staleness)")
    gate.add_argument("--signal", help="patch, before the positional embedding, embedding or pixel (default: patch)")
    gate.add_argument("--reference", help="compare with refreshed, previous, ema or dual (default: refreshed)")
    gate.add_argument(
        "--ema-decay", type=float, metavar="A", help="weight of a new frame in the ema; implies --reference ema"
    )
    gate.add_argument(
        "--dilation", type=int, metavar="N", help="encode patches up to N from an active one (default: 0)"
    )
    gate.add_argument(
        "--normalise-motion",
        action="store_const",
        const=True,
        help="take the frame's mean surprise off: moving cameras",
    )
    gate.add_argument(
        "--precision", help="of what is encoded in part of a float32 model: model or bfloat16 (default: model)"
    )
    return gate


def _add_frames(command: argparse.ArgumentParser, most: int | None, most_help: str) -> None:
    frames = command.add_argument_group("which frames")
    frames.add_argument("--stride", type=_count, default=1, metavar="N", help="every Nth frame (default: 1)")
    frames.add_argument("--max-frames", type=_count, default=most, metavar="N", help=most_help)
    frames.add_argument(
        "--max-pixels",
        type=_count,
        default=178_956_970,
        metavar="N",
        help="refuse frames of more pixels (default: 178956970)",
    )


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number between 0 and 1")


def _above_zero(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")


def _template(text: str) -> str:
    if "{}" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} has no {{}} for the class")
    return text


def _layers(text: str) -> tuple[int, tuple[int, ...]]:
    """A gate layer and the layers that repeat."""
    gate, colon, cached = text.partition(":")
    numbers = [gate, *cached.split(",")]
    if not colon or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no pair of layers; give 1:24 or 1:24,31")
    return int(gate), tuple(map(int, numbers[1:]))


def _window(text: str) -> int:
    count = int(text)
    if count < 4:
        raise argparse.ArgumentTypeError(f"{text} is not 4 or more")
    return count


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return count


def _size(text: str) -> tuple[int, int]:
    """Width and height."""
    sides = [int(side) if side.isdecimal() else 0 for side in text.lower().split("x")]
    if len(sides) > 2 or 0 in sides:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give 448 or 640x384")
    return sides[0], sides[-1]


if __name__ == "__main__":
    sys.exit(main())

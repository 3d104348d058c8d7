"""Qwen2.5-VL and Qwen3-VL of any size with random weights, saved as vLLM loads them, and clips to ask them about.

`python -m bench.vllm_models '{"folder": ..., "prompts": [...], ...}'` asks one in a process of its own; see `answers`.
"""

import json
import os
import sys

import numpy as np
import torch

SPECIAL = ("<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
LANGUAGE = HEADS | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
VISION = {"depth": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 128}
KINDS = {"qwen2.5-vl": "Qwen2_5_VL", "qwen3-vl": "Qwen3VL"}
CELL = {"qwen2.5-vl": 28, "qwen3-vl": 32}  # pixels along a side of what is merged to one token
GREEDY = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import Qwen2TokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(BPE({letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end, *others = SPECIAL
    return Qwen2TokenizerFast(
        tokenizer_object=made, eos_token=end, pad_token=end, additional_special_tokens=list(others)
    )


def made(family, language=None, **vision):
    """A model of `family` with random weights; `language` and `vision`: fields of its configurations."""
    import transformers

    torch.manual_seed(0)
    end, start, stop, image, video = byte_tokenizer().convert_tokens_to_ids(list(SPECIAL))
    ids = {"image_token_id": image, "video_token_id": video}
    ids |= {"vision_start_token_id": start, "vision_end_token_id": stop}
    text = LANGUAGE | {"max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": end} | (language or {})
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    kind, tower = KINDS[family], {"patch_size": CELL[family] // 2}
    if family == "qwen2.5-vl":
        tower |= {"window_size": 112, "fullatt_block_indexes": [3], "tokens_per_second": 2}
    else:
        tower |= {"deepstack_visual_indexes": [1, 2], "num_position_embeddings": 256}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=VISION | tower | vision, tie_word_embeddings=False, **ids
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval().float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight[0].numel() ** -0.5)
    return model


def save(family, folder, **fields):
    """Save what `made` makes in a folder, with a tokenizer of bytes."""
    import transformers

    most, patch = {"shortest_edge": 4 * 32 * 32, "longest_edge": 64 * 448 * 448}, CELL[family] // 2
    if family == "qwen2.5-vl":
        videos = transformers.Qwen2VLVideoProcessor(size=most)
    else:
        videos = transformers.Qwen3VLVideoProcessor(size=most, patch_size=patch)
    images = transformers.Qwen2VLImageProcessor(size=most, patch_size=patch)
    processor = getattr(transformers, f"{KINDS[family]}Processor")(images, byte_tokenizer(), videos, chat_template="")
    made(family, **fields).save_pretrained(folder)
    processor.save_pretrained(folder)


def clip(family, frames, rows, columns, seed=0, noise=2, moving=True):
    """Frames uint8 [T, H, W, 3] of one picture with sensor noise, in which a square of one merged token may wander."""
    cell, generator = CELL[family], np.random.default_rng(seed)
    picture = generator.integers(0, 256, (rows, columns, 3)).repeat(cell, 0).repeat(cell, 1)
    shown = picture + generator.normal(0, noise, (frames, *picture.shape))
    for time, frame in enumerate(shown if moving else ()):
        top, left = cell * (time // 2 % rows), cell * (time // 2 * 2 % columns)
        frame[top : top + cell, left : left + cell] = generator.integers(0, 256, 3)
    return shown.clip(0, 255).astype(np.uint8)


def prompt(*videos, image=None, **fields):
    """What vLLM takes for videos [T, H, W, 3] and, in front of them, an image [H, W, 3]."""
    data = {}
    if videos:
        data["video"] = [(video, _metadata(len(video))) for video in videos]
    text = "Look at what comes here: " + "<|vision_start|><|video_pad|><|vision_end|>" * len(videos) + "What?"
    if image is not None:
        from PIL import Image

        data["image"] = [Image.fromarray(image)]
        text = "<|vision_start|><|image_pad|><|vision_end|>" + text
    return {"prompt": text, "multi_modal_data": data, **fields}


def _metadata(frames):
    return {
        "fps": 2.0,
        "duration": frames / 2,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }


def load(folder, **options):
    """A small LLM on the CPU."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 8192, "max_num_seqs": 4, "seed": 0}
    return LLM(str(folder), **usual | options)


def answers(folder, family, prompts, **options):
    """The tokens that a model gives greedily, [[int]].

    Args:
        prompts: of each, the arguments of `clip` for its videos, and of its image by the name "image".
        options: of `load`.
    """
    from vllm import SamplingParams

    llm = load(folder, **options)
    given = [
        prompt(
            *(clip(family, *video) for video in each.get("videos", [])),
            image=clip(family, 1, *each["image"])[0] if "image" in each else None,
        )
        for each in prompts
    ]
    outputs = llm.generate(given, SamplingParams(**GREEDY), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    print(json.dumps(answers(**json.loads(sys.argv[1]))))

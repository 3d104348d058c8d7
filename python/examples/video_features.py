"""Ask a video language model about each chunk of a camera, with features that a tower of its own computes.

    python video_features.py Qwen/Qwen3-VL-4B-Instruct street.mp4 "What happens?"

The language model stays as it is (transformers >= 5.20): the tower may run elsewhere, and knows what it saw last.
"""

import copy
import sys

import neuroflow
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

CHUNK = 16  # frames


@torch.inference_mode()
def video_features(
    tower: nn.Module, pixels: torch.Tensor, grid: torch.Tensor, stream: str
) -> BaseModelOutputWithPooling:
    """What `generate` takes for a video: patches [T * H * W, values] with their grid [1, 3], T, H and W."""
    with neuroflow.cache_context(tower, stream):
        output = tower(pixels, grid_thw=grid, return_dict=True)
    output.pooler_output = (output.pooler_output,)  # of each video
    if output.get("deepstack_features") is not None:
        output.deepstack_features = [(features,) for features in output.deepstack_features]
    return output


def main() -> None:
    path, clip, question = sys.argv[1:]
    model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(path)
    tower = neuroflow.enable_cache(copy.deepcopy(model.model.visual))
    from neuroflow.video.source import Source

    source = Source(clip)
    frames = [frame for number, frame in enumerate(source) if number % round(source.rate) == 0]  # one a second
    asked = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    for start in range(0, len(frames), CHUNK):
        inputs = processor(text=text, videos=[frames[start : start + CHUNK]], return_tensors="pt")
        pixels = inputs.pop("pixel_values_videos")
        video = video_features(tower, pixels, inputs["video_grid_thw"], "camera")
        tokens = model.generate(**inputs, mm_encoder_outputs={"video": video}, max_new_tokens=64)
        answer = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        skipped = sum(report.skipped for report in neuroflow.last_pass(tower)) / len(neuroflow.last_pass(tower))
        print(f"{start} s, {skipped:.0%} skipped: {answer}")


if __name__ == "__main__":
    main()

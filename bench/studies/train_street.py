"""Train the tower of `neuroflow.street.STREET` on drawn scenes.

`OMP_NUM_THREADS=1 python -m bench.studies.train_street` trains a SigLIP tower against a table of class embeddings,
scored by cosine: first on 112-pixel windows around the subject, which keep the scale and position of the whole
picture's patches at a quarter of the cost, then on whole pictures. A run that was stopped resumes from its last
checkpoint, on the batches that it would have seen.
"""

import argparse
import io
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from neuroflow import adapters
from neuroflow.street import STREET, load_street
from neuroflow.street.scene import CLASSES, Stage, scenes, write_scene
from neuroflow.video.preprocess import Preprocessor
from neuroflow.video.source import Source
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import SiglipVisionConfig, SiglipVisionModel

from bench.studies.training import load_checkpoint, optimizer_of, save_checkpoint, set_rate

SIZE, PATCH, SIDE, WINDOW = 224, 16, 14, 7
BATCH, FRAMES_OF_SCENE, FRAMES = 64, 4, 120
TOWER = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3}
NORMALISATION = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "do_normalize": True}


class Batches(torch.utils.data.Dataset):
    """Batch `step`: pixels [B, 3, side, side], the row and column of their first patch [B, 2], labels [B], and the
    share of each patch that lies in the subject's box [B, N].
    """

    def __init__(self, steps, windowed):
        self.scenes, self.windowed = scenes(steps * BATCH // FRAMES_OF_SCENE), windowed

    def __len__(self):
        return len(self.scenes) * FRAMES_OF_SCENE // BATCH

    def __getitem__(self, step):
        random = np.random.default_rng([1, step])
        count = BATCH // FRAMES_OF_SCENE
        # Two windows of each picture: drawing it takes as long as learning from one.
        side, views = (WINDOW, 2) if step < self.windowed else (SIDE, 1)
        pixels, places, labels, shares = [], [], [], []
        for scene in self.scenes[step * count : (step + 1) * count]:
            stage = Stage(scene, FRAMES, SIZE)
            for view in range(FRAMES_OF_SCENE):
                if view % views == 0:
                    number, image, label = visible_frame(stage, random)
                left, top, right, bottom = (edge / PATCH for edge in stage.box(number))
                middle = np.array([top + bottom, left + right]) / 2
                place = np.round(middle - side / 2 + random.uniform(-2.5, 2.5, 2)).clip(0, SIDE - side).astype(int)
                rows, columns = place[:, None] + np.arange(side)
                down = (np.minimum(rows + 1, bottom) - np.maximum(rows, top)).clip(0, 1)
                across = (np.minimum(columns + 1, right) - np.maximum(columns, left)).clip(0, 1)
                row, column = place * PATCH
                window = image[row : row + side * PATCH, column : column + side * PATCH]
                pixels.append(augmented(window, random))
                places.append(place)
                labels.append(label)
                shares.append(np.outer(down, across).ravel().astype(np.float32))
        return (*(torch.from_numpy(np.stack(column)) for column in (pixels, places, labels, shares)),)


def visible_frame(stage, random):
    """The number, picture and label of a frame that shows its subject."""
    while True:
        number = int(random.integers(FRAMES))
        image, label = stage.draw(number)
        if label >= 0:
            return number, image, label


def augmented(image, random):
    """[H, W, 3] uint8 -> [3, H, W] uint8 with the marks of compression, another exposure and noise."""
    if random.random() < 0.7:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(random.integers(25, 95)))
        image = np.asarray(Image.open(file))
    picture = image.astype(np.float32)
    if random.random() < 0.5:
        picture = picture * np.float32(random.uniform(0.6, 1.35)) + np.float32(random.uniform(-20, 20))
    if random.random() < 0.3:
        picture += np.float32(random.uniform(1, 8)) * random.standard_normal(picture.shape, dtype=np.float32)
    return picture.clip(0, 255).astype(np.uint8).transpose(2, 0, 1)


def cosine_filters():
    """[192, 3, 16, 16]: 8 x 8 cosines of brightness and of two differences of colour, fine ones of greater weight.

    A patch projection that begins with these has edges in its tokens from the first step, where one of random filters
    has little more than the mean colour.
    """
    places = (torch.arange(PATCH) + 0.5) * math.pi / PATCH
    waves = torch.cos(torch.arange(8)[:, None] * places) * (2 / PATCH) ** 0.5
    waves[0] /= 2**0.5
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])
    colours = F.normalize(colours, dim=1)
    frequency = torch.hypot(torch.arange(8.0)[:, None], torch.arange(8.0))
    weight = 0.4 * (1 + frequency)[:, :, None, None] ** 0.75
    patterns = weight * waves[:, None, :, None] * waves[None, :, None, :]  # [8, 8, 16, 16]
    return (colours[:, None, None, :, None, None] * patterns[:, :, None]).flatten(0, 2)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = SiglipVisionModel(SiglipVisionConfig(**TOWER, image_size=SIZE, patch_size=PATCH))
        with torch.no_grad():
            self.tower.get_input_embeddings().weight.copy_(cosine_filters())
            # Blocks that begin by adding little leave the patches' own content to be seen through them.
            for layer in adapters.describe(self.tower).layers:
                for module in layer.modules():
                    if isinstance(module, nn.Linear):
                        module.weight.normal_(std=0.02)
        self.classes = nn.Parameter(torch.randn(len(CLASSES), TOWER["hidden_size"]) * 0.05)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(10.0)))
        # While it learns it names each patch of the subject as well, which tells it where to look; this is not kept.
        self.patches = nn.Linear(TOWER["hidden_size"], len(CLASSES) + 1)

    def forward(self, pixels, places):
        """Scores of pictures [B, C] and of their patches [B, N, C + 1], the last for none."""
        anatomy = adapters.describe(self.tower)
        tokens = anatomy.projection(pixels.float() / 127.5 - 1).flatten(2).transpose(1, 2)
        steps = torch.arange(pixels.shape[2] // PATCH)
        rows, columns = (place[:, None] + steps for place in places.unbind(1))
        positions = (rows[:, :, None] * SIDE + columns[:, None]).flatten(1)
        tokens = tokens + anatomy.tower.embeddings.position_embedding(positions)
        for layer in anatomy.layers:
            tokens = layer(tokens, None)
        tokens = anatomy.last(tokens)
        pooled = anatomy.pool[0](tokens).float()
        cosine = F.normalize(pooled, dim=1) @ F.normalize(self.classes, dim=1).T
        return self.log_temperature.exp().clamp(max=50) * cosine, self.patches(tokens).float()


def train(arguments):
    torch.manual_seed(0)
    model = Classifier().train()
    optimizer = optimizer_of(model)
    checkpoint = arguments.checkpoint
    start = load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else 0
    loader = torch.utils.data.DataLoader(
        Batches(arguments.steps, arguments.windowed),
        batch_size=None,
        sampler=range(start, arguments.steps),
        num_workers=1,
        prefetch_factor=16,
    )
    bar = tqdm(loader, initial=start, total=arguments.steps, unit="batch", mininterval=10)
    running = accuracy = None
    for step, (pixels, places, labels, shares) in enumerate(bar, start):
        set_rate(optimizer, step, arguments.steps, arguments.rate, warmup=0.05)
        with torch.autocast("cpu", torch.bfloat16):
            scores, of_patches = model(pixels, places)
        targets = F.one_hot(labels, len(CLASSES) + 1)[:, None] * shares[:, :, None]
        targets[..., -1] = 1 - shares
        # The patches of the subject are the fewer.
        weight = torch.where(shares > 0.3, 3.0, 1.0)
        loss_of_patches = (
            F.cross_entropy(of_patches.flatten(0, 1), targets.flatten(0, 1), reduction="none") * weight.flatten()
        ).mean()
        loss = F.cross_entropy(scores, labels, label_smoothing=0.05) + loss_of_patches
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = (scores.argmax(1) == labels).float().mean().item()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        accuracy = right if accuracy is None else 0.98 * accuracy + 0.02 * right
        bar.set_postfix_str(f"loss {running:.3f}, top-1 {accuracy:.1%}", refresh=False)
        if (step + 1) % 100 == 0:
            save_checkpoint(checkpoint, model, optimizer, step + 1)
    print(f"training loss {running:.3f}, top-1 {accuracy:.1%} (moving averages over about 50 batches)")
    return model


def save(model, directory):
    """As a Hugging Face directory in float16, with the class embeddings beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    model.tower.half().save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(NORMALISATION, indent=2) + "\n")
    tensors = {"embeddings": model.classes.detach(), "temperature": model.log_temperature.detach().exp().clamp(max=50)}
    save_file(tensors, directory / "classes.safetensors", {"names": json.dumps(CLASSES)})


@torch.inference_mode()
def held_out_top1(directory, count):
    """How many frames of `count` held-out scenes, after H.264, score their own class highest, and of how many."""
    model, head = load_street(directory)
    preprocess, right = Preprocessor(SIZE, SIZE), []
    with tempfile.TemporaryDirectory() as scratch:
        clip = Path(scratch, "scene.mp4")
        for scene in tqdm(scenes(count, held_out=True), unit="scene"):
            labels = write_scene(clip, scene, FRAMES, SIZE)
            frames = [frame for frame in Source(str(clip)) if frame.index % 10 == 5 and labels[frame.index] >= 0]
            pooled = model(pixel_values=torch.cat([preprocess(frame) for frame in frames])).pooler_output
            found = head.scores(pooled).argmax(1).tolist()
            right += [found[place] == labels[frame.index] for place, frame in enumerate(frames)]
    return sum(right), len(right)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4600, help="batches in all")
    parser.add_argument("--windowed", type=int, default=4200, help="of these, the first so many on windows")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--checkpoint", type=Path, default=Path("train_street.safetensors"))
    parser.add_argument("--out", type=Path, default=STREET, help="the directory to write")
    parser.add_argument("--scenes", type=int, default=150, help="held-out scenes to score at the end")
    arguments = parser.parse_args()
    save(train(arguments), arguments.out)
    right, count = held_out_top1(arguments.out, arguments.scenes)
    print(f"held-out top-1 {right / count:.1%} of {count} frames, {arguments.scenes} scenes")


if __name__ == "__main__":
    main()

"""The vision towers of Qwen2.5-VL and Qwen3-VL: windows, merge order and deepstack."""

import copy

import neuroflow
import pytest
import torch
from models import PATCH, QWEN, clip, exact, inputs, tiny
from neuroflow.adapters import describe
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeVisionConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("qwen2.5-vl", "qwen3-vl")
SIZE = (64, 96)  # 8 x 12 patches, in windows of 4 x 4


def merged(output):
    """The merged tokens and then the deepstack features, as every version of transformers returns them."""
    if isinstance(output, tuple):
        return [output[0], *output[1]]
    if isinstance(output, torch.Tensor):
        return [output]
    return [output.pooler_output, *(output.get("deepstack_features") or [])]


def encoded(model, family, frames, *streams):
    with torch.inference_mode(), neuroflow.cache_context(model, *streams):
        return merged(model(**inputs(family, frames)))


class Plain:
    """A tower under C or E written down once more, with its own forward only as far as the first block."""

    def __init__(self, model, family, arch, blend):
        self.model, self.family, self.arch, self.blend, self.memory = copy.deepcopy(model), family, arch, blend, {}

    def first_block(self, model, frame):
        """What `model` hands to its first block, and the ends of the segments within which each block attends."""
        calls = []
        hooks = [
            block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
            for block in model.blocks
        ]
        model(**inputs(self.family, frame[None]))
        for hook in hooks:
            hook.remove()
        (tokens,), kwargs = calls[0]
        return tokens, kwargs["position_embeddings"], [of["cu_seqlens"] for _, of in calls]

    def order(self, frame):
        """The row-major patch at each token, read off a picture of patch numbers."""
        model = copy.deepcopy(self.model)
        if hasattr(model, "pos_embed"):
            model.pos_embed.weight.zero_()
        model.patch_embed.register_forward_hook(lambda _, args, output: args[0][:, :1].expand_as(output))
        rows, columns = (length // PATCH for length in frame.shape[1:])
        numbers = torch.arange(rows * columns, dtype=frame.dtype).view(rows, columns)
        picture = numbers.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1).expand(3, -1, -1)
        return self.first_block(model, picture)[0][:, 0].round().long()

    def remember(self, name, rows, fresh, blend=1.0):
        if name not in self.memory:  # a key frame
            self.memory[name] = fresh.clone()
        self.memory[name][rows] += blend * (fresh - self.memory[name][rows])
        return self.memory[name]

    def __call__(self, frame, active):
        model, order = self.model, self.order(frame)
        tokens, (cos, sin), segments = self.first_block(model, frame)
        rows = active.flatten()[order].nonzero()[:, 0]
        x, cos, sin = tokens[rows], cos[rows, None].float(), sin[rows, None].float()
        features = []
        for layer, block in enumerate(model.blocks):
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(1, (3, 4, 16)).unbind(1)  # [rows, heads, head_dim]
            q, k = (self.turned(each.float(), cos, sin).to(x.dtype) for each in (q, k))
            seen = rows
            if self.arch == "E":
                k, v = self.remember(("k", layer), rows, k), self.remember(("v", layer), rows, v)
                seen = torch.arange(len(tokens))
            segment = torch.bucketize(torch.arange(len(tokens)), segments[layer][1:], right=True)
            apart = segment[rows, None] != segment[seen]
            scores = torch.einsum("qhd,khd->hqk", q, k) / 4
            weights = scores.masked_fill(apart, -torch.inf).softmax(-1)
            x = x + block.attn.proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
            x = x + block.mlp(block.norm2(x))
            if layer in getattr(model, "deepstack_visual_indexes", ()):
                merger = model.deepstack_merger_list[model.deepstack_visual_indexes.index(layer)]
                features.append(merger(self.remember(("deep", layer), rows, x, self.blend)))
        blocks = model.merger(self.remember("output", rows, x, self.blend))
        return [blocks[order[::4].argsort()], *features]  # from window order to that of the blocks

    @staticmethod
    def turned(heads, cos, sin):
        return heads * cos + torch.cat((-heads[..., 8:], heads[..., :8]), -1) * sin


@pytest.mark.parametrize(("arch", "blend"), [("C", 1.0), ("E", 1.0), ("E", 0.5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_partial_frame_equals_the_slow_way(family, arch, blend):
    model, frames = tiny(family, 64).double(), clip(frames=4, size=SIZE, changed=9).double()
    with torch.inference_mode():
        plain = Plain(model, family, arch, blend)
        neuroflow.enable_cache(model, exact(arch=arch, threshold=1e-4, blend=blend))
        for number, frame in enumerate(frames):
            ours = encoded(model, family, frame[None], "a")
            active = neuroflow.summary(model).streams["a"].active
            changed = (
                (frame != frames[number - 1]).any(0).unflatten(1, (-1, PATCH)).unflatten(0, (-1, PATCH)).any(3).any(1)
            )
            assert torch.equal(active, changed if number else torch.ones_like(changed))
            for mine, theirs in zip(ours, plain(frame, active), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("arch", "ACDE")
@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_different_sizes_in_one_pass(family, arch):
    sizes = {"a": SIZE, "b": (48, 48), "c": (32, 80)}
    clips = {name: clip(frames=3, size=size, changed=5).double() for name, size in sizes.items()}
    model = tiny(family).double()
    neuroflow.enable_cache(model, exact(arch=arch, threshold=1e-4))
    alone = {name: [encoded(model, family, frame[None], name) for frame in frames] for name, frames in clips.items()}
    neuroflow.reset_cache(model)
    for number in range(3):
        together = encoded(model, family, [frames[number] for frames in clips.values()], *clips)
        for part, whole in enumerate(together):
            expected = torch.cat([alone[name][number][part] for name in clips])
            torch.testing.assert_close(whole, expected, rtol=0, atol=1e-9)
    skipped = [stream.skipped for stream in neuroflow.summary(model).streams.values()]
    assert skipped == pytest.approx([(2 - 10 / patches) / 3 for patches in (96, 36, 40)])


def test_the_tower_of_the_model_with_experts_is_the_same():
    model = tiny("qwen3-vl")
    config = Qwen3VLMoeVisionConfig(
        **{name: getattr(model.config, name) for name in (*QWEN, "deepstack_visual_indexes")},
        num_position_embeddings=36,
    )
    other = Qwen3VLMoeVisionModel(config).eval()
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        neuroflow.enable_cache(each, exact(threshold=1e-4))
    for frame in clip(frames=3):
        ours, theirs = (encoded(each, "qwen3-vl", frame[None], "a") for each in (other, model))
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_takes_a_tower_and_what_it_takes(family):
    model, frames = tiny(family), clip(frames=2)
    neuroflow.enable_cache(model)
    given = inputs(family, frames)
    with torch.inference_mode():
        output = neuroflow.encode(model, given.pop("hidden_states"), ["a", "b"], **given)
    neuroflow.reset_cache(model)
    assert all(map(torch.equal, merged(output), encoded(model, family, frames, "a", "b")))
    torch.testing.assert_close(describe(model).embedding(output), merged(output)[0].mean(0)[None])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_refused(family):
    model, given = tiny(family), inputs(family, clip(frames=2))
    with pytest.raises(ValueError, match=r"arch is 'active'.*accepted"):
        neuroflow.enable_cache(model, exact(arch="B"))
    neuroflow.enable_cache(model)
    with pytest.raises(ValueError, match=r"grid_thw holds \[1, 3, 24\].*multiples of 2"):
        model(given["hidden_states"], grid_thw=torch.tensor([[1, 3, 24]]))
    assert neuroflow.summary(model).streams == {}


def test_pixels_are_no_signal_where_their_order_is_another():
    with pytest.raises(ValueError, match=r"signal is 'pixel'.*accepted"):
        neuroflow.enable_cache(tiny("qwen2.5-vl"), exact(signal="pixel"))
    model, frames = tiny("qwen3-vl"), clip(frames=2)
    neuroflow.enable_cache(model, exact(signal="pixel", threshold=1e-4))
    for frame in frames:
        encoded(model, "qwen3-vl", frame[None], "a")
    assert int(neuroflow.summary(model).streams["a"].active.sum()) == 4

"""torch.compile around a patched tower, and numbers of tokens that are few enough to compile for."""

import neuroflow
import pytest
import torch
from models import clip, exact, tiny
from neuroflow.adapters import describe
from torch._dynamo.utils import counters


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = tiny("siglip")
        self.head = torch.nn.Linear(64, 10)

    def forward(self, pixels):
        return self.head(self.tower(pixel_values=pixels * 0.5 + 0.1).pooler_output.relu())


@pytest.fixture
def dynamo():
    torch.compiler.reset()
    counters.clear()
    yield counters
    torch.compiler.reset()


@pytest.mark.parametrize("arch", "ABCDE")
def test_what_is_around_the_tower_is_compiled_once(arch, dynamo):
    model = Classifier()
    frames = [frame[None] for changed in (2, 7, 11) for frame in clip(frames=2, changed=changed)]
    with torch.inference_mode():
        neuroflow.enable_cache(model, exact(arch=arch, threshold=1e-4))
        expected = [model(frame) for frame in frames]
        neuroflow.reset_cache(model)
        compiled = torch.compile(model, backend="aot_eager")
        assert torch.equal(compiled(frames[0]), expected[0])
        graphs = dynamo["stats"]["unique_graphs"]
        assert graphs == 2  # in front of the tower, and after it
        for frame, theirs in zip(frames[1:], expected[1:], strict=True):
            assert torch.equal(compiled(frame), theirs)
        assert dynamo["stats"]["unique_graphs"] == graphs


def test_a_whole_graph_is_refused_with_the_reason(dynamo):
    model = Classifier()
    neuroflow.enable_cache(model)
    with pytest.raises(Exception, match="decided frame by frame"):
        torch.compile(model, backend="eager", fullgraph=True)(clip(frames=1))


@pytest.mark.parametrize("strict", [True, False])
def test_an_export_is_refused_with_the_reason(strict, dynamo):
    model = Classifier()
    neuroflow.enable_cache(model)
    with pytest.raises(Exception, match="decided frame by frame"):
        torch.export.export(model, (clip(frames=1),), strict=strict)
    assert not neuroflow.summary(model).streams


@pytest.mark.parametrize("arch", "BCE")
def test_a_ladder_bounds_the_numbers_of_tokens(arch):
    """Also of several streams together, with CLS tokens on top; and a ladder only ever adds patches."""
    frames = {name: clip(frames=6, seed=seed, changed=4 * seed + 1) for seed, name in enumerate("abc")}
    model, lengths, active = tiny("vit"), [], {}
    describe(model).layers[1].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    for ladder in (None, (8, 12, 24)):
        neuroflow.enable_cache(model, exact(arch=arch, threshold=1e-4, ladder=ladder))
        lengths.clear()
        for time in range(6):
            neuroflow.encode(model, torch.stack([own[time] for own in frames.values()]), list(frames))
            streams = neuroflow.summary(model).streams.values()
            active[ladder, time] = torch.stack([stream.active for stream in streams])
        neuroflow.disable_cache(model)
    assert lengths == [37] + [24 + 3] * 5  # the first is of [3, 37, D]
    assert all((active[None, time] <= active[(8, 12, 24), time]).all() for time in range(6))

"""Which way the rows of partial frames are multiplied, and that each gives what the others give."""

import neuroflow
import pytest
import torch
from models import clip, exact, inputs, tiny
from neuroflow.adapters import describe
from neuroflow.engine import kernels

from neuroflow_kernels import use_backend, ways
from neuroflow_kernels.ways import ATTENTION, LINEAR

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def prefer(monkeypatch):
    """Let a way be the fastest, others taking `gain` as long, and count the calls that served to find that out."""
    monkeypatch.setattr(ways, "COUNTED", 1)
    tried = []

    def prefer(way, gain=10.0):
        class Preferring(ways.Choice):
            def note(self, taken, seconds, counts=True):
                tried.append(taken)
                super().note(taken, 1e-3 * (1 if taken == way else gain), counts)

        monkeypatch.setattr(kernels, "Choice", Preferring)
        return tried

    return prefer


def run(model, family, frames, **settings):
    neuroflow.enable_cache(model, exact(**{"threshold": 1e-4} | settings))
    with torch.no_grad():
        return [describe(model).embedding(model(**inputs(family, frame[None]))) for frame in frames]


@pytest.mark.parametrize("arch", ["A", "C", "E"])
@pytest.mark.parametrize("family", ["siglip", "dinov3", "vit"])
@pytest.mark.parametrize("way", ["rows", "torch", "packed", "products"])
def test_each_way_gives_what_torch_gives(prefer, way, family, arch):
    model, frames = tiny(family), clip(frames=5)
    expected = run(model, family, frames, arch=arch, kernels="torch")
    neuroflow.disable_cache(model)
    prefer(way)
    found = run(model, family, frames, arch=arch, kernels="measured")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    chosen = neuroflow.summary(model).kernels
    # Attention is of all tokens in A, which is none of ours, and its products are no way through a linear layer.
    assert way in chosen.values() or (way == "products" and arch == "A")


def test_ways_take_turns_until_the_fastest_is_known(prefer):
    tried = prefer("torch")
    model, frames = tiny("siglip"), clip(frames=8)
    run(model, "siglip", frames[:4], kernels="measured")
    assert {"rows", "torch", "packed", "products"} == set(tried)
    tried.clear()
    with torch.no_grad():
        for frame in frames[4:]:
            model(**inputs("siglip", frame[None]))
    # The projection and the pooling head, which come once a frame, may still not know.
    assert len(tried) <= 4 * 4


def test_another_number_of_threads_is_another_case(prefer, one_thread):
    prefer("torch")
    model, frames = tiny("siglip"), clip(frames=8)
    run(model, "siglip", frames[:4], kernels="measured")
    torch.set_num_threads(2)
    with torch.no_grad():
        for frame in frames[4:]:
            model(**inputs("siglip", frame[None]))
    torch.set_num_threads(1)
    assert {case.threads for case in neuroflow.summary(model).kernels} == {1, 2}


def test_packed_weights_must_be_worth_their_memory(prefer):
    model, frames = tiny("siglip"), clip(frames=12)  # the head's layers come once a frame
    prefer("packed", gain=1.1)
    run(model, "siglip", frames, kernels="measured")
    summary = neuroflow.summary(model)
    assert "packed" not in summary.kernels.values() and summary.packed_bytes == 0
    neuroflow.disable_cache(model)
    prefer("packed", gain=1.2)
    run(model, "siglip", frames, kernels="measured")
    summary = neuroflow.summary(model)
    linears = [module.weight for module in describe(model).layers[0].modules() if isinstance(module, torch.nn.Linear)]
    assert summary.packed_bytes >= 4 * sum(weight.nbytes for weight in linears)
    assert "packed" in str(summary) and "MiB of packed weights" in str(summary)
    assert "linear 64 -> 64, float32, from" in str(summary)


@pytest.mark.parametrize("precision", ["model", "bfloat16"])
@pytest.mark.parametrize("inference", [True, False])
def test_new_weights_are_packed_anew(prefer, inference, precision):
    """Those of which torch does not count the changes are not packed."""
    prefer("packed")
    settings = {"arch": "B", "precision": precision}  # which keeps nothing of a frame
    with torch.inference_mode(inference), torch.no_grad():
        model = tiny("siglip")
        frames = clip(frames=8)
        run(model, "siglip", frames[:5], kernels="measured", **settings)
        assert ("packed" in neuroflow.summary(model).kernels.values()) is not inference
        for layer in describe(model).layers:
            layer.mlp.fc1.weight.mul_(2)
        found = [model(pixel_values=frame[None]).pooler_output for frame in frames[5:]]
        neuroflow.disable_cache(model)
        expected = run(model, "siglip", frames[4:], kernels="torch", **settings)
    rounding = 1e-5 if precision == "model" else 5e-2
    # Where the change was noticed, the first frame behind it was a key frame.
    for ours, theirs in list(zip(found, expected[1:], strict=True))[0 if inference else 1 :]:
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("only", ["rows", "torch"])
def test_one_way_alone_is_not_measured(prefer, monkeypatch, only):
    tried, taken = prefer("packed"), []
    for table in (LINEAR, ATTENTION):
        for name, way in table.items():
            monkeypatch.setitem(table, name, lambda *given, name=name, way=way: taken.append(name) or way(*given))
    model = tiny("siglip")
    run(model, "siglip", clip(frames=3), kernels=only)
    assert not tried and not neuroflow.summary(model).kernels
    assert set(taken) == ({"rows"} if only == "rows" else set())


@pytest.mark.parametrize("dtype, backend", [(torch.float64, "auto"), (torch.float32, "reference")])
def test_where_there_is_no_choice_nothing_is_measured(prefer, dtype, backend):
    tried = prefer("packed")
    model = tiny("siglip").to(dtype)
    with use_backend(backend):
        run(model, "siglip", clip(frames=3).to(dtype), kernels="measured")
    assert not tried


def test_what_is_measured_otherwise_explores_nothing(prefer):
    """It takes the way of the nearest number of rows, and the first there is where none is known."""
    tried = prefer("torch")
    mine, module = kernels.Kernels(), torch.nn.Linear(8, 8)
    with torch.no_grad():
        layer = mine.layer(module, module.forward, torch.ones(1, 4, 8), torch.float32)
        for _ in range(6):
            mine.multiply(layer, torch.ones(1, 40, 8))
        assert mine.trying and set(mine.fastest().values()) == {"torch"}
        tried.clear()
        mine.exploring, mine.trying = False, False
        with pytest.MonkeyPatch.context() as patch:
            taken = []
            for name, way in LINEAR.items():
                patch.setitem(LINEAR, name, lambda *given, name=name, way=way: taken.append(name) or way(*given))
            mine.multiply(layer, torch.ones(1, 400, 8))
            other = torch.nn.Linear(8, 16)
            mine.multiply(mine.layer(other, other.forward, torch.ones(1, 4, 8), torch.float32), torch.ones(1, 4, 8))
    assert taken[0] == "torch" and taken[1] == kernels.linear_ways(torch.float32)[0]
    assert not tried and not mine.trying

"""Which way the rows of partial frames are multiplied, and that each gives what the others give."""

import neuroflow
import pytest
import torch
from models import clip, exact, inputs, tiny
from neuroflow.adapters import describe
from neuroflow.engine import kernels
from neuroflow.patch import engine_of

from neuroflow_kernels import use_backend
from neuroflow_kernels.ways import ATTENTION, LINEAR

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def prefer(monkeypatch):
    """Let a way be the fastest by far, and count what is measured."""
    measured = []

    def prefer(way, gain=10.0):
        def seconds_of(ways):
            measured.append(ways)
            for run in ways.values():
                run(0)
            return {each: 1.0 if each == way else gain for each in ways}

        monkeypatch.setattr(kernels, "seconds_of", seconds_of)
        return measured

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
    assert chosen and all(name in (way, "rows") for name in chosen.values())
    assert way in chosen.values() or (way == "products" and arch == "A")  # whose attention is of all tokens


def test_a_case_is_measured_once(prefer):
    measured = prefer("torch")
    model, frames = tiny("siglip"), clip(frames=6)
    run(model, "siglip", frames[:3], kernels="measured")
    count = len(measured)
    # 5 shapes of linear layers with the projection, and attention; of frames with the same number of new patches.
    assert count == len(neuroflow.summary(model).kernels) > 0
    with torch.no_grad():
        for frame in frames[3:]:
            model(**inputs("siglip", frame[None]))
    assert len(measured) == count


def test_packed_weights_must_be_worth_their_memory(prefer):
    model, frames = tiny("siglip"), clip(frames=3)
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
        frames = clip(frames=6)
        run(model, "siglip", frames[:3], kernels="measured", **settings)
        assert ("packed" in neuroflow.summary(model).kernels.values()) is not inference
        for layer in describe(model).layers:
            layer.mlp.fc1.weight.mul_(2)
        found = [model(pixel_values=frame[None]).pooler_output for frame in frames[3:]]
        neuroflow.disable_cache(model)
        expected = run(model, "siglip", frames[2:], kernels="torch", **settings)
    rounding = 1e-5 if precision == "model" else 5e-2
    # Where the change was noticed, the first frame behind it was a key frame.
    for ours, theirs in list(zip(found, expected[1:], strict=True))[0 if inference else 1 :]:
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("only", ["rows", "torch"])
def test_one_way_alone_is_not_measured(prefer, monkeypatch, only):
    measured, taken = prefer("packed"), []
    for table in (LINEAR, ATTENTION):
        for name, way in table.items():
            monkeypatch.setitem(table, name, lambda *given, name=name, way=way: taken.append(name) or way(*given))
    model = tiny("siglip")
    run(model, "siglip", clip(frames=3), kernels=only)
    assert not measured and not neuroflow.summary(model).kernels
    assert set(taken) == ({"rows"} if only == "rows" else set())


@pytest.mark.parametrize("dtype, backend", [(torch.float64, "auto"), (torch.float32, "reference")])
def test_where_there_is_no_choice_nothing_is_measured(prefer, dtype, backend):
    measured = prefer("packed")
    model = tiny("siglip").to(dtype)
    with use_backend(backend):
        run(model, "siglip", clip(frames=3).to(dtype), kernels="measured")
    assert not measured


def test_an_interrupted_measurement_is_made_up_for(prefer, monkeypatch):
    model, frames = tiny("siglip"), clip(frames=4)

    def interrupted(ways):
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "seconds_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, "siglip", frames[:2], kernels="measured")
    prefer("torch")
    with torch.no_grad():
        for frame in frames[2:]:
            model(pixel_values=frame[None])
    assert set(neuroflow.summary(model).kernels.values()) == {"torch"}
    assert engine_of(model).kernels.seconds > 0

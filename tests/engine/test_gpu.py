"""What only a GPU can show: recorded frames equal launched ones there, without waits, growth or chance."""

import neuroflow
import pytest
import torch
from models import clip, exact, inputs, tiny
from neuroflow.engine import graphs
from neuroflow.patch import engine_of

from neuroflow_kernels import compact, ema_gate_, unavailable, use_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LADDER = (4, 8, 16)


def config(**settings):
    return exact(**{"threshold": 1e-4, "floor": 2, "ladder": LADDER} | settings)


def patched(family, **settings):
    model = tiny(family).to("cuda")
    neuroflow.enable_cache(model, config(**settings))
    return model


def encoded(model, family, frames, names=("default",)):
    with torch.inference_mode(), neuroflow.cache_context(model, *names):
        return neuroflow.adapters.describe(model).embedding(model(**inputs(family, frames)))


def recorded(model):
    return [encoder for group in engine_of(model).graphs.groups.values() for encoder in group.encoders.values()]


@pytest.fixture(autouse=True)
def never_dense(monkeypatch):
    """A tiny model's graphs may well be slower than its dense pass, and are to be tested all the same."""
    timed = graphs.seconds
    monkeypatch.setattr(graphs, "seconds", lambda work, device: min(timed(work, device), 0.0))


@pytest.mark.parametrize("arch", ["A", "B", "C", "D", "E"])
@pytest.mark.parametrize("family", ["siglip", "vit", "dinov2 with registers", "dinov3"])
def test_recorded_frames_equal_launched_ones(family, arch):
    frames = clip(frames=8, changed=5).to("cuda")[:, None]
    results = []
    for launch in ("eager", "graph"):
        model = patched(family, arch=arch, launch=launch)
        results.append(torch.cat([encoded(model, family, frame) for frame in frames]))
        if launch == "graph":
            assert [encoder.calls for encoder in recorded(model)] == [7]
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", ["C", "E"])
def test_streams_of_one_graph_equal_streams_alone(arch):
    clips = torch.stack([clip(frames=8, seed=seed, changed=8) for seed in range(4)], 1).to("cuda")
    model = patched("siglip", arch=arch, ladder=(8, 16, 32, 64))
    together = torch.stack([encoded(model, "siglip", frames, tuple(range(4))) for frames in clips])
    for stream in range(4):
        alone = patched("siglip", arch=arch, ladder=(8,))
        own = torch.stack([encoded(alone, "siglip", frames[stream : stream + 1]) for frames in clips])
        torch.testing.assert_close(together[:, stream : stream + 1], own, rtol=1e-3, atol=1e-4)


def test_a_frame_waits_for_one_number_and_takes_no_memory():
    model, frames = patched("siglip"), clip(frames=12, changed=5).to("cuda")[:, None]
    for frame in frames[:6]:
        encoded(model, "siglip", frame)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")  # of what torch waits for; the graph's own number is none of that
    try:
        for frame in frames[6:]:
            encoded(model, "siglip", frame)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
    assert neuroflow.summary(model).graph_bytes > 0


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_thousand_repeats_are_equal_bit_for_bit(backend):
    reason = unavailable(backend, "cuda")
    if reason is not None:
        pytest.skip(reason)
    generator = torch.Generator("cuda").manual_seed(0)
    h = torch.randn(3, 3136, 768, generator=generator, device="cuda", dtype=torch.bfloat16)
    moved = h + 0.3 * torch.randn(h.shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    surprise = torch.rand(3, 12544, generator=generator, device="cuda").mul_(64).round_()  # with many ties

    def once():
        ema = moved.clone()
        gate = ema_gate_(h, ema, decay=0.1, threshold=0.04, floor=8, rows=9408)
        return *gate, ema, *compact(surprise, threshold=60.0), *compact(surprise, budget=1000)

    with use_backend(backend):
        first = once()
        for _ in range(1000):
            assert all(torch.equal(one, other) for one, other in zip(once(), first, strict=True))

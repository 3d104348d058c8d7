"""Promises 2, 3 and 4: streams do not touch each other, and a stream recovers from whatever happens to it."""

import threading

import neuroflow
import pytest
import torch
from models import clip, exact, inputs, naflex, tiny
from neuroflow.engine import projection
from neuroflow.engine.projection import project_windows

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHITECTURES = ("A", "B", "C", "D", "E")


def pooled(model, family, frames, streams):
    with torch.inference_mode(), neuroflow.cache_context(model, *streams):
        output = model(**inputs(family, frames))
    return neuroflow.adapters.describe(model).embedding(output)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("family", ["siglip", "siglip2", "vit"])
def test_batched_streams_equal_streams_alone(family, arch):
    """Three streams that change by different amounts; one joins late, so key and partial frames share a batch."""
    clips = {name: clip(frames=5, seed=i, changed=3 * i + 1) for i, name in enumerate("abc")}
    config = exact(arch=arch, threshold=1e-4, floor=2)
    model = tiny(family).double()
    neuroflow.enable_cache(model, config)
    alone = {n: [pooled(model, family, f[None], [n]) for f in c[n == "c" :].double()] for n, c in clips.items()}
    seen_alone = {n: s.active for n, s in neuroflow.summary(model).streams.items()}
    neuroflow.reset_cache(model)
    together = {name: [] for name in clips}
    for t in range(5):
        names = ["a", "b"] if t == 0 else ["c", "a", "b"]
        result = pooled(model, family, torch.stack([clips[name][t] for name in names]).double(), names)
        for name, row in zip(names, result.split(1), strict=True):
            together[name].append(row)
    for name in clips:
        assert torch.equal(neuroflow.summary(model).streams[name].active, seen_alone[name])
        torch.testing.assert_close(torch.cat(together[name]), torch.cat(alone[name]), rtol=0, atol=1e-10)


def test_encode_is_a_batch_in_a_context():
    model, frames = tiny("siglip"), clip(frames=4)
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    first = neuroflow.encode(model, frames[:2], stream_ids=["a", "b"]).pooler_output
    neuroflow.reset_cache(model)
    assert torch.equal(first, pooled(model, "siglip", frames[:2], ["a", "b"]))


def test_streams_and_frames_must_match():
    model, frames = tiny("siglip"), clip(frames=3)
    neuroflow.enable_cache(model)
    with pytest.raises(ValueError, match="pixel_values is None"):
        model(pixel_values=None)
    with pytest.raises(ValueError, match="accepted is at least one name"):
        neuroflow.encode(model, frames[:2], stream_ids=[])
    with pytest.raises(ValueError, match="3 frames were encoded; accepted is a multiple of 2"):
        neuroflow.encode(model, frames, stream_ids=["a", "b"])


def test_reset():
    model, frames = tiny("siglip"), clip(frames=3)
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    for frame in frames[:2]:
        pooled(model, "siglip", frame[None].repeat(2, 1, 1, 1), ["a", "b"])
    kept = neuroflow.summary(model).streams["b"]
    neuroflow.reset_cache(model, "a")
    assert list(neuroflow.summary(model).streams) == ["b"]
    assert neuroflow.summary(model).streams["b"].frames == kept.frames
    pooled(model, "siglip", frames[2:], ["a"])
    assert neuroflow.summary(model).streams["a"].key_frames == 1
    with pytest.raises(KeyError, match="'z'; known are"):
        neuroflow.reset_cache(model, "z")
    neuroflow.reset_cache(model)
    assert neuroflow.summary(model).streams == {}


@pytest.mark.parametrize("family", ["siglip", "siglip2", "vit"])
def test_a_size_change_is_a_key_frame(family):
    """Also between sizes with the same number of patches."""
    model, square, wide, tall = tiny(family), clip(), clip(size=(32, 64)), clip(size=(64, 32))
    dense = [pooled_dense(model, family, frames[1:2]) for frames in (square, wide, tall)]
    neuroflow.enable_cache(model, exact(threshold=0.5))
    pooled(model, family, square[:1], ["a"])
    with pytest.warns(RuntimeWarning, match="stream 'a' changed from 6x6 .* to 4x8 .* key frame"):
        pooled(model, family, wide[:1], ["a"])
    with pytest.warns(RuntimeWarning, match="4x8 .* to 8x4"):
        torch.testing.assert_close(pooled(model, family, tall[1:2], ["a"]), dense[2], rtol=1e-5, atol=1e-6)
    stream = neuroflow.summary(model).streams["a"]
    assert (stream.frames, stream.key_frames, stream.grid) == (3, 3, (8, 4))


def pooled_dense(model, family, frames):
    with torch.inference_mode():
        return neuroflow.adapters.describe(model).embedding(model(**inputs(family, frames)))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("family", ["siglip", "vit"])
def test_nan_pixels_are_gone_one_clean_frame_later(family, arch):
    """And the stream beside it never sees them."""
    model, frames = tiny(family), clip()
    broken = frames.clone()
    broken[2, :, 3:5, 3:5] = torch.nan
    config = exact(arch=arch, threshold=1e-4)
    neuroflow.enable_cache(model, config)
    expected = [pooled(model, family, frame[None], ["clean"]) for frame in frames]
    neuroflow.reset_cache(model)
    for t in range(6):
        both = pooled(model, family, torch.stack((frames[t], broken[t])), ["clean", "broken"])
        torch.testing.assert_close(both[:1], expected[t], rtol=1e-5, atol=1e-5)
        assert both[1].isfinite().all() == (t != 2)
    streams = neuroflow.summary(model).streams
    assert (streams["broken"].nonfinite, streams["clean"].nonfinite) == (1, 0)
    assert (streams["broken"].key_frames, streams["clean"].key_frames) == (2, 1)


def test_nan_in_the_first_frame():
    model, frames = tiny("siglip"), clip(frames=2)
    neuroflow.enable_cache(model)
    with pytest.warns(RuntimeWarning, match="stream 'a': a frame holds NaN or Inf"):
        assert pooled(model, "siglip", torch.full_like(frames[:1], torch.nan), ["a"]).isnan().all()
    assert pooled(model, "siglip", frames[1:], ["a"]).isfinite().all()
    assert neuroflow.summary(model).streams["a"].nonfinite == 1


def test_a_frame_that_fails_half_way_makes_the_next_a_key_frame():
    model, frames = tiny("siglip"), clip(frames=4)
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    pooled(model, "siglip", frames[:1], ["a"])

    def fail(*_):
        raise MemoryError

    hook = neuroflow.adapters.describe(model).layers[2].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        pooled(model, "siglip", frames[1:2], ["a"])
    hook.remove()
    after = pooled(model, "siglip", frames[2:3], ["a"])
    assert neuroflow.summary(model).streams["a"].key_frames == 2
    neuroflow.disable_cache(model)
    torch.testing.assert_close(after, pooled_dense(model, "siglip", frames[2:3]), rtol=1e-5, atol=1e-6)


def test_bad_arguments_cost_nothing():
    model, frames = tiny("vit"), clip(frames=3)
    model.embeddings.mask_token = torch.nn.Parameter(torch.zeros(1, 1, 64))
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    pooled(model, "vit", frames[:1], ["a"])
    with pytest.raises(ValueError, match="bool_masked_pos is given"), neuroflow.cache_context(model, "a"):
        model(frames[1:2], bool_masked_pos=torch.zeros(1, 36, dtype=torch.bool))
    pooled(model, "vit", frames[2:], ["a"])
    assert neuroflow.summary(model).streams["a"].key_frames == 1


NAFLEX = {"wide": (32, 64), "tall": (56, 24), "square": (48, 48)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_frames_of_different_shapes_in_one_padded_batch(arch):
    """SigLIP 2 NaFlex: each stream as by itself, where nothing is padded."""
    clips = {name: clip(size=size, seed=9, changed=5).double() for name, size in NAFLEX.items()}
    model = tiny("siglip2").double()
    neuroflow.enable_cache(model, exact(arch=arch, threshold=1e-4))
    alone = {
        name: [pooled(model, "siglip2", frame[None], [name]) for frame in frames] for name, frames in clips.items()
    }
    neuroflow.reset_cache(model)
    for time in range(6):
        with torch.inference_mode(), neuroflow.cache_context(model, *clips):
            output = model(**naflex([frames[time] for frames in clips.values()]))
        for stream, name in enumerate(clips):
            expected = alone[name][time]
            torch.testing.assert_close(output.pooler_output[stream : stream + 1], expected, rtol=0, atol=1e-10)
    assert {name: stream.grid for name, stream in neuroflow.summary(model).streams.items()} == {
        "wide": (4, 8),
        "tall": (7, 3),
        "square": (6, 6),
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_padding_is_the_unpatched_models_at_threshold_zero(arch):
    model = tiny("siglip2")
    arguments = naflex([clip(frames=1, size=size)[0] for size in NAFLEX.values()])
    with torch.inference_mode():
        dense = model(**arguments)
        neuroflow.enable_cache(model, exact(arch=arch, threshold=0))
        with neuroflow.cache_context(model, *NAFLEX):
            ours = model(**arguments)
    mask = arguments["pixel_attention_mask"].bool()
    assert (ours.pooler_output - dense.pooler_output).abs().max() <= 1e-5 * dense.pooler_output.abs().max()
    difference = (ours.last_hidden_state - dense.last_hidden_state)[mask].abs().max()
    assert difference <= 1e-5 * dense.last_hidden_state[mask].abs().max()
    if arch != "A":  # whose attention runs on padding too
        assert not ours.last_hidden_state[~mask].any()


@pytest.mark.parametrize("refresh", ["key", "rolling"])
def test_no_cached_token_is_older_than_max_age(refresh):
    model, still = tiny("siglip"), clip(frames=1)
    neuroflow.enable_cache(model, exact(threshold=0.02, max_age=5, refresh=refresh, floor=0))
    last_encoded = torch.zeros(36)
    for t in range(16):
        pooled(model, "siglip", still, ["a"])
        active = neuroflow.summary(model).streams["a"].active.flatten()
        if refresh == "key":
            assert active.sum() == (36 if t % 5 == 0 else 1)
        else:
            assert t == 0 or active.sum() <= 15  # 36 patches, two in five a frame at most
        last_encoded[active] = t
        assert t - last_encoded.min() < 5


@pytest.mark.parametrize(("budget", "count"), [(7, 7), (0.25, 9), (1, 1), (10_000, 36)])
def test_budget(budget, count):
    model, frames = tiny("siglip"), clip(frames=2)
    neuroflow.enable_cache(model, exact(budget=budget, floor=0))
    for frame in frames:
        pooled(model, "siglip", frame[None], ["a"])
    assert neuroflow.summary(model).streams["a"].active.sum() == count


@pytest.mark.parametrize("signal", ["patch", "embedding"])
@pytest.mark.parametrize("reference", ["refreshed", "ema"])
def test_the_gate_follows_its_definition(signal, reference):
    """Active sets and references against the definition, patch by patch, over a clip with gradual change."""
    model = tiny("vit").double()
    with torch.no_grad():
        model.embeddings.position_embeddings.mul_(4)  # enough to hide some of the change
    start, end = clip(frames=2, changed=12).double()
    frames = [torch.lerp(start, end, share) for share in (0, 0.05, 0.1, 0.3, 0.35, *[1] * 8)]
    config = exact(threshold=0.02, ema_decay=0.3, floor=0, signal=signal, reference=reference)
    neuroflow.enable_cache(model, config)
    kept, counts = None, []
    for frame in frames:
        pooled(model, "vit", frame[None], ["a"])
        with torch.no_grad():
            h = model.embeddings.patch_embeddings(frame[None])[0]
            h = h + model.embeddings.position_embeddings[0, 1:] if signal == "embedding" else h
        kept = h if kept is None else kept
        expected = 1 - torch.cosine_similarity(h, kept) > 0.02 if counts else torch.ones(36, dtype=torch.bool)
        assert torch.equal(neuroflow.summary(model).streams["a"].active.flatten(), expected)
        kept = torch.lerp(kept, h, 0.3) if reference == "ema" else torch.where(expected[:, None], h, kept)
        counts.append(int(expected.sum()))
    assert max(counts[1:]) > counts[-1] == 0


def test_bfloat16_moving_average_keeps_small_steps():
    model, frames = tiny("siglip").bfloat16(), clip(frames=2).bfloat16()
    neuroflow.enable_cache(model, exact(reference="ema", ema_decay=0.001))
    pooled(model, "siglip", frames[:1], ["a"])
    state = neuroflow.adapters.describe(model).tower._neuroflow_engine.streams["a"]
    before = state.tensors["reference"].clone()
    pooled(model, "siglip", frames[1:], ["a"])
    changed = state.active
    assert (state.tensors["reference"] != before)[0, changed].float().mean() > 0.99


def test_contexts_are_local_to_a_thread():
    model, frames = tiny("siglip"), clip(frames=12)
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    expected = [pooled(model, "siglip", frame[None], ["alone"]) for frame in frames]
    results = {}

    def run(name):
        results[name] = [pooled(model, "siglip", frame[None], [name]) for frame in frames]

    threads = [threading.Thread(target=run, args=(f"thread {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for outputs in results.values():
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)


def test_another_dtype_starts_over():
    """Also with weights that are not counted as changed, as those made in inference mode are not."""
    frames = clip(frames=3)
    with torch.inference_mode():
        model = tiny("siglip")
        neuroflow.enable_cache(model, exact(threshold=1e-4))
        pooled(model, "siglip", frames[:1], ["a"])
        model.double()
        with pytest.warns(RuntimeWarning, match="changed from 6x6 patches, torch.float32"):
            changed = [pooled(model, "siglip", frame[None].double(), ["a"]) for frame in frames[1:]]
        fresh = [pooled(model, "siglip", frame[None].double(), ["b"]) for frame in frames[1:]]
    assert torch.equal(torch.cat(changed), torch.cat(fresh)) and changed[0].dtype == torch.float64


def test_what_is_returned_never_changes_afterwards():
    model, frames = tiny("siglip"), clip(frames=4)
    neuroflow.enable_cache(model, exact(arch="C", threshold=1e-4))
    outputs = [model(pixel_values=frame[None]).last_hidden_state for frame in frames[:3]]
    kept = [output.clone() for output in outputs]
    model(pixel_values=frames[3:])
    assert all(torch.equal(ours, copy) for ours, copy in zip(outputs, kept, strict=True))


def test_inference_mode_and_no_grad_may_alternate():
    model, frames = tiny("siglip"), clip(frames=4)
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    frames[0] = torch.nan  # so that the next frame, outside of inference mode, fills the same caches again
    for t, frame in enumerate(frames):
        with torch.inference_mode(t % 2 == 0):
            output = model(pixel_values=frame[None]).pooler_output
        assert not output.requires_grad


def test_summary_shows_the_surprise_of_the_last_frame(tmp_path):
    model, frames = tiny("siglip"), clip(frames=4, changed=9)
    neuroflow.enable_cache(model, exact(threshold=1e-4, floor=0, max_age=3))
    for t, frame in enumerate(frames):
        model(pixel_values=frame[None])
        stream = neuroflow.summary(model).streams["default"]
        if t in (0, 3):
            assert stream.surprise.isnan().all()
        else:
            assert torch.equal(stream.surprise > 1e-4, stream.active) and stream.active.sum() == 9
    neuroflow.save_state(model, tmp_path / "state")
    neuroflow.load_state(model, tmp_path / "state")
    assert neuroflow.summary(model).streams["default"].surprise.isnan().all()


def test_summary_counts_and_prints():
    model, frames = tiny("siglip"), clip(frames=5, changed=9)
    neuroflow.enable_cache(model, exact(threshold=1e-4, floor=0))
    for frame in frames:
        pooled(model, "siglip", frame[None], ["cam-7"])
    summary = neuroflow.summary(model)
    stream = summary.streams["cam-7"]
    assert stream.skipped == pytest.approx(4 / 5 * 27 / 36)
    # projection, reference, output, keys and values of 4 blocks, and 8x8 pixels of 3 colours, in float32; age in int32,
    # active in bool and surprise in float32
    assert summary.state_bytes == stream.state_bytes == 36 * 64 * 4 * (3 + 2 * 4) + 36 * 8 * 8 * 3 * 4 + 36 * 9
    assert "cam-7: 5 frames (1 key), grid 6x6, 60.0% of patches skipped" in str(summary)


def test_unchanged_patches_are_projected_once(monkeypatch):
    model, frames = tiny("siglip"), clip(frames=3, changed=4)
    frames = torch.stack([frames[0], frames[1], frames[1], frames[2], -frames[2], frames[2]])
    projected = []

    def counting(convolution, windows):
        projected.append(windows.numel() // windows.shape[-1])
        return project_windows(convolution, windows)

    monkeypatch.setattr(projection, "project_windows", counting)
    neuroflow.enable_cache(model, neuroflow.NeuroFlowConfig(threshold=0))
    found = [pooled(model, "siglip", frame[None], ["a"]) for frame in frames]
    assert projected == [36, 4, 4, 36, 36]
    neuroflow.disable_cache(model)
    for frame, ours in zip(frames, found, strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(ours, model(pixel_values=frame[None]).pooler_output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(48, 48), (8, 8), (8, 48)])
def test_the_caller_may_fill_one_buffer_again_and_again(size):
    model, frames = tiny("siglip"), clip(frames=4, size=size, changed=1)
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    fresh = [inputs("siglip", frame[None].clone()) for frame in frames]
    buffer = torch.empty(1, 3, *size)
    for names, given in (("a", fresh), ("b", [inputs("siglip", buffer)] * 4)):
        results = []
        for frame, arguments in zip(frames, given, strict=True):
            buffer.copy_(frame)
            with torch.no_grad(), neuroflow.cache_context(model, names):
                results.append(model(**arguments).pooler_output)
        if names == "a":
            expected = results
    assert torch.equal(torch.cat(results), torch.cat(expected))


def test_a_stream_holds_no_more_than_it_says():
    """Of a batch, a stream keeps its own pixels only, not the memory of all."""
    model, frames = tiny("siglip"), clip(frames=3)
    neuroflow.enable_cache(model)
    neuroflow.encode(model, frames, stream_ids=["a", "b", "c"])
    engine = vars(neuroflow.adapters.describe(model).tower)["_neuroflow_engine"]
    for _, state in engine.streams.items():
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.held()}
        assert sum(held.values()) == state.state_bytes

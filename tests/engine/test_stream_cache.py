"""Many streams: limits and eviction, gaps, saving and loading, threads and tasks, and a long mixed run."""

import asyncio
import gc
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import weakref
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import neuroflow
import pytest
import torch
from models import FAMILIES, clip, exact, inputs, tiny
from neuroflow.adapters import describe
from neuroflow.patch import engine_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import SiglipVisionConfig, SiglipVisionModel


def encode(model, frames, names, frame_ids=None):
    with torch.inference_mode():
        return neuroflow.encode(model, frames, names, frame_ids, interpolate_pos_encoding=True).pooler_output


def patched(streams=None, dtype=torch.float64, **config):
    model = tiny("siglip").to(dtype)
    neuroflow.enable_cache(model, exact(threshold=1e-4, **config), streams)
    return model


def open_streams(model):
    return list(neuroflow.summary(model).streams)


def test_the_least_recently_used_stream_is_closed():
    cache = neuroflow.StreamCache(max_streams=3)
    model, frames = patched(cache), clip(frames=3).double()
    for name in "abc":
        encode(model, frames[:1], [name])
    encode(model, frames[1:2], ["a"])
    kept = []
    hook = describe(model).layers[0].register_forward_pre_hook(lambda *_: kept.append(len(cache)))
    encode(model, frames[:1], ["d"])
    hook.remove()
    assert kept == [2]  # with the one that opens, three
    assert open_streams(model) == ["c", "a", "d"]
    encode(model, frames[1:], ["b", "c"])
    assert open_streams(model) == ["d", "b", "c"]
    assert neuroflow.summary(model).streams["b"].frames == 1
    with pytest.raises(ValueError, match="max_streams is 3; accepted is at least 4"):
        encode(model, torch.cat([frames, frames[:1]]), list("wxyz"))
    assert open_streams(model) == ["d", "b", "c"]


def test_streams_never_hold_more_than_max_bytes():
    small, large = clip(frames=1).double(), clip(frames=1, size=(64, 96)).double()
    model = patched()
    encode(model, small, ["a"])
    encode(model, large, ["b"])
    sizes = {name: stream.state_bytes for name, stream in neuroflow.summary(model).streams.items()}
    neuroflow.disable_cache(model)
    limit = sizes["b"] + sizes["a"]
    cache = neuroflow.StreamCache(max_bytes=limit)
    neuroflow.enable_cache(model, exact(threshold=1e-4), cache)
    for name in "abc":
        encode(model, small, [name])
    assert open_streams(model) == ["a", "b", "c"]
    assert cache.state_bytes == 3 * sizes["a"]
    held = []
    hook = describe(model).layers[0].register_forward_pre_hook(lambda *_: held.append(cache.state_bytes))
    encode(model, large, ["a"])  # grows: room is made first
    hook.remove()
    assert max(held) + sizes["b"] - sizes["a"] <= limit
    assert cache.state_bytes <= limit
    assert open_streams(model) == ["c", "a"]
    assert neuroflow.summary(model).limit_bytes == limit
    assert f"of at most {limit / 2**20:.1f} MiB" in str(neuroflow.summary(model))
    encode(model, small, ["c"])
    with pytest.raises(
        ValueError, match=f"max_bytes is {limit}; accepted is at least {2 * sizes['b']}, the size of the 2"
    ):
        encode(model, torch.cat([large, large]), ["x", "y"])
    encode(model, small, ["c"])
    assert open_streams(model) == ["c"]


def test_idle_streams_are_closed(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    model, frames = patched(neuroflow.StreamCache(idle_seconds=10)), clip(frames=1).double()
    encode(model, frames, ["a"])
    now += 6
    encode(model, frames, ["b"])
    now += 6
    encode(model, frames, ["b"])
    assert open_streams(model) == ["b"]


@pytest.mark.parametrize("limit", ["max_streams", "max_bytes", "idle_seconds"])
def test_limits_are_above_zero(limit):
    with pytest.raises(ValueError, match=f"{limit} is 0; accepted is None or a number above 0"):
        neuroflow.StreamCache(**{limit: 0})


def test_other_limits_need_a_model_that_is_not_patched():
    cache = neuroflow.StreamCache(max_streams=2)
    model = patched(cache)
    neuroflow.enable_cache(model, exact(threshold=1e-4), cache)
    with pytest.raises(RuntimeError, match="with another StreamCache"):
        neuroflow.enable_cache(model, exact(threshold=1e-4), neuroflow.StreamCache())


def test_a_gap_in_frame_ids_makes_a_key_frame():
    model, frames = patched(), clip(frames=6).double()
    active = []
    with pytest.warns(RuntimeWarning, match="stream 'a': frames are missing or out of order"):
        for frame, frame_id in zip(frames, (7, 8, 10, 11, 11, 12), strict=True):
            encode(model, frame[None], ["a"], [frame_id])
            active.append(int(neuroflow.summary(model).streams["a"].active.sum()))
    assert active == [36, 4, 36, 4, 36, 4]
    with pytest.raises(ValueError, match="frame_ids holds 2 numbers for 1 streams"):
        encode(model, frames[:1], ["a"], [1, 2])


@pytest.mark.parametrize("arch", "ABCDE")
def test_a_loaded_stream_goes_on_where_it_was_saved(arch, tmp_path):
    model, frames = patched(arch=arch), clip(frames=6).double()
    other = clip(frames=6, seed=1, size=(32, 64)).double()
    for frame, wide in zip(frames[:3], other, strict=False):
        encode(model, frame[None], ["cam-1"])
        encode(model, wide[None], [2])
    neuroflow.save_state(model, tmp_path / "state.safetensors")
    expected = [encode(model, frame[None], ["cam-1"]) for frame in frames[3:]]
    second = patched(arch=arch)
    encode(second, frames[:1], ["kept"])
    encode(second, frames[:1], ["cam-1"])
    assert neuroflow.load_state(second, tmp_path / "state.safetensors") == ["cam-1", 2]
    assert open_streams(second) == ["kept", "cam-1", 2]
    for frame, pooled in zip(frames[3:], expected, strict=True):
        torch.testing.assert_close(encode(second, frame[None], ["cam-1"]), pooled, rtol=0, atol=1e-10)
    encode(second, other[3:4], [2])
    streams = neuroflow.summary(second).streams
    assert [(streams[name].frames, streams[name].key_frames) for name in ("cam-1", 2)] == [(6, 1), (4, 1)]
    assert int(streams[2].active.sum()) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_what_any_family_saves_is_what_it_loads(family, tmp_path):
    model, frames, path = tiny(family), clip(frames=3), tmp_path / "state"
    for arch in FAMILIES[family].architectures:
        neuroflow.enable_cache(model, exact(arch=arch, threshold=1e-4, reference="dual" if arch == "D" else "ema"))
        with torch.inference_mode():
            for name in (1, "b"):
                for frame in frames[:2]:
                    with neuroflow.cache_context(model, name):
                        model(**inputs(family, frame[None]))
            neuroflow.save_state(model, path)
            neuroflow.load_state(model, path)
            path.write_bytes(bytes(100))  # which is no longer the streams' concern
            with neuroflow.cache_context(model, 1):
                model(**inputs(family, frames[2:]))
        (report,) = neuroflow.last_pass(model)
        assert report.key_frame is None and neuroflow.summary(model).streams[1].frames == 3, arch
        neuroflow.disable_cache(model)


def test_one_stream_may_be_saved():
    model = patched()
    encode(model, clip(frames=2).double(), ["a", "b"])
    with pytest.raises(KeyError, match="stream is 'c'; open are"):
        neuroflow.save_state(model, "never.safetensors", ["c"])
    assert not os.path.exists("never.safetensors")


def test_only_the_same_model_and_configuration_take_a_state(tmp_path):
    path, frames = tmp_path / "state.safetensors", clip(frames=1).double()
    model = patched()
    encode(model, frames, ["a"])
    neuroflow.save_state(model, path, ["a"])
    other_weights = patched()
    with torch.no_grad():
        next(other_weights.parameters()).add_(1e-6)
    for refusing, condition in ((other_weights, "weights"), (patched(floor=3), "configuration")):
        encode(refusing, frames, ["kept"])
        with pytest.raises(ValueError, match=f"its {condition} is"):
            neuroflow.load_state(refusing, path)
        assert open_streams(refusing) == ["kept"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"state\.safetensors: cannot be read"):
        neuroflow.load_state(model, path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"state\.safetensors: cannot be read"):
        neuroflow.load_state(model, path)
    with pytest.raises(ValueError, match="cannot be read"):
        neuroflow.load_state(model, tmp_path / "absent.safetensors")
    encode(model, frames, [("a", "tuple")])
    with pytest.raises(ValueError, match="accepted is a string or an integer"):
        neuroflow.save_state(model, path)


def test_a_state_that_cannot_be_written_leaves_the_old_one(tmp_path):
    model, path = patched(), tmp_path / "state.safetensors"
    encode(model, clip(frames=1).double(), ["a"])
    neuroflow.save_state(model, path)
    before = path.read_bytes()
    (tmp_path / "state.safetensors.partial").mkdir()
    encode(model, clip(frames=1, seed=2).double(), ["a"])
    with pytest.raises((OSError, Exception)):
        neuroflow.save_state(model, path)
    assert path.read_bytes() == before
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["streams"])[0]["frames"] == 1
    assert load_file(path)


def test_threads_share_a_model():
    """Each its own streams, and two of them the same one, whose frames then come one after another."""
    model, frames = patched(), clip(frames=6).double()
    expected = [encode(model, frame[None], ["alone"]) for frame in frames]
    neuroflow.reset_cache(model)

    def run(name):
        torch.set_num_threads(1)
        return [encode(model, frame[None], [name]) for frame in frames]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, ["a", "b", "c", "d", "shared", "shared"]))
    for result in results[:4]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, expected, strict=True))
    assert neuroflow.summary(model).streams["shared"].frames == 12


def test_a_stream_in_use_is_waited_for():
    model, frames = patched(), clip(frames=2).double()
    encode(model, frames[:1], ["a"])
    entered, go_on = threading.Event(), threading.Event()

    def pause(*_):
        entered.set()
        assert go_on.wait(10)

    hook = describe(model).layers[1].register_forward_pre_hook(pause)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(encode, model, frames[1:], ["a"])
        assert entered.wait(10)
        hook.remove()
        second = pool.submit(encode, model, frames[1:], ["a"])
        third = pool.submit(neuroflow.reset_cache, model, "a")
        for _ in range(5):
            encode(model, frames[:1], ["b"])  # others go on
        assert not second.done()
        assert not third.done()
        go_on.set()
        for waiting in (first, second, third):
            waiting.result(10)
    assert open_streams(model)[0] == "b"


def test_saving_waits_its_turn(tmp_path):
    """Behind the frame at hand, and not until a stream that is never idle is."""
    model, frames, done, stop = patched(), clip(frames=2).double(), [], threading.Event()
    encode(model, frames[:1], ["a"])

    def never_idle():
        while not stop.is_set():
            encode(model, frames[1:], ["a"])
            done.append(None)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(never_idle)
        try:
            for number in range(10):
                before = len(done)
                with engine_of(model).streams.held(["a"]):
                    assert len(done) - before <= 4  # the frame at hand, and what is quick in between
                neuroflow.save_state(model, tmp_path / str(number))
        finally:
            stop.set()
        running.result(10)


NOT_IN_A_PASS = {
    "reset_cache": lambda model, path: neuroflow.reset_cache(model),
    "save_state": neuroflow.save_state,
    "load_state": neuroflow.load_state,
    "disable_cache": lambda model, path: neuroflow.disable_cache(model),
    "called within its own pass": lambda model, path: encode(model, clip(frames=1).double(), ["b"]),
}


@pytest.mark.parametrize("name", NOT_IN_A_PASS)
def test_what_would_wait_for_its_own_pass_says_so(name, tmp_path):
    model, frames = patched(), clip(frames=4).double()
    expected = [encode(model, frame[None], ["a"]) for frame in frames]
    neuroflow.reset_cache(model)
    found = [encode(model, frames[:1], ["a"])]
    neuroflow.save_state(model, tmp_path / "state")

    def call(*_):
        neuroflow.summary(model)
        with pytest.raises(RuntimeError, match=f"{name}.*accepted is"):
            NOT_IN_A_PASS[name](model, tmp_path / "state")

    hook = describe(model).layers[1].register_forward_pre_hook(call)
    found += [encode(model, frame[None], ["a"]) for frame in frames[1:3]]
    hook.remove()
    found.append(encode(model, frames[3:], ["a"]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:neuroflow")
def test_a_model_may_be_patched_and_unpatched_while_threads_use_it(one_thread):
    model, frames, stop = tiny("siglip").double(), clip(frames=4).double(), threading.Event()
    with torch.inference_mode():
        dense = [model(pixel_values=frame[None]).pooler_output for frame in frames]

    def use(seed):
        chance = random.Random(seed)
        with torch.inference_mode():
            while not stop.is_set():
                number = chance.randrange(4)
                found = model(pixel_values=frames[number][None]).pooler_output
                assert torch.cosine_similarity(found, dense[number]) > 0.8

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(5) as pool:
            running = [pool.submit(use, seed) for seed in range(3)]
            try:
                for _ in range(60):
                    neuroflow.enable_cache(model, exact(threshold=1e-4))
                    twice = [pool.submit(neuroflow.disable_cache, model) for _ in range(2)]
                    for each in twice:
                        each.result(20)
            finally:
                stop.set()
            for each in running:
                each.result(20)
    finally:
        sys.setswitchinterval(interval)
    assert "forward" not in vars(describe(model).tower)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_while_a_thread_is_in_a_pass(one_thread):
    """The child has no such thread, which would end the pass."""
    model, frames = patched(), clip(frames=2).double()
    expected = encode(model, frames[:1], ["a"])
    entered, go_on = threading.Event(), threading.Event()

    def pause(*_):
        entered.set()
        assert go_on.wait(20)

    hook = describe(model).layers[1].register_forward_pre_hook(pause)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(encode, model, frames[1:], ["a"])
        assert entered.wait(10)
        hook.remove()
        child = os.fork()
        if not child:
            right = False
            try:
                signal.alarm(20)  # ends what hangs
                found = encode(model, frames[:1], ["a"])  # after a frame that failed, a key frame
                neuroflow.reset_cache(model)
                right = torch.allclose(found, expected, rtol=0, atol=1e-10)
            finally:
                os._exit(not right)
        go_on.set()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        running.result(10)


def test_tasks_have_contexts_of_their_own():
    model, frames = patched(), clip(frames=4).double()

    async def run(name):
        with neuroflow.cache_context(model, name):
            for frame in frames:
                await asyncio.sleep(0)
                model(pixel_values=frame[None])

    async def all_of_them():
        await asyncio.gather(*(run(name) for name in "abc"))

    with torch.inference_mode():
        asyncio.run(all_of_them())
    assert {name: stream.frames for name, stream in neuroflow.summary(model).streams.items()} == dict.fromkeys("abc", 4)


SIZES = [(48, 48), (32, 64)]


def small(hidden_size=32, layers=1):
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_attention_heads": 2}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, num_hidden_layers=layers, image_size=48, patch_size=8)).eval()


@pytest.mark.parametrize(("frames", "max_age"), [(40, 8), pytest.param(200, 32, marks=pytest.mark.slow)])
def test_sixty_four_streams_at_random_are_sixty_four_streams_alone(one_thread, frames, max_age):
    """In passes of random streams, with resets, changes of size and frames with NaN among them."""
    chance, streams = random.Random(0), 64
    model = small(layers=2)
    stills = [clip(frames=8, size=size, changed=3) for size in SIZES]
    scripts = []  # of each stream: (event, frame) in order
    for _ in range(streams):
        size, script = chance.randrange(2), []
        for _ in range(frames):
            event = chance.choices(["", "reset", "resize", "nan"], [97, 1, 1, 1])[0]
            size = 1 - size if event == "resize" else size
            frame = stills[size][chance.randrange(8)]
            if event == "nan":
                frame = frame.clone()
                frame[:, 3, 5] = torch.nan
            script.append((event, frame))
        scripts.append(script)

    def run(passes):
        """passes: lists of streams, each of whose next frames are encoded together -> pooled outputs by stream."""
        neuroflow.enable_cache(model, exact(threshold=1e-4, max_age=max_age))
        at, results = [0] * streams, [[] for _ in range(streams)]
        for members in passes:
            for stream in members:
                if scripts[stream][at[stream]][0] == "reset" and stream in open_streams(model):
                    neuroflow.reset_cache(model, stream)
            of_size = {}
            for stream in members:
                frame = scripts[stream][at[stream]][1]
                of_size.setdefault(frame.shape, []).append((stream, frame))
            for batch in of_size.values():
                pooled = encode(model, torch.stack([frame for _, frame in batch]), [stream for stream, _ in batch])
                for (stream, _), row in zip(batch, pooled, strict=True):
                    results[stream].append(row)
            for stream in members:
                at[stream] += 1
        neuroflow.disable_cache(model)
        return [torch.stack(rows) for rows in results]

    mixed, left = [], {stream: frames for stream in range(streams)}
    while left:
        members = chance.sample(sorted(left), min(len(left), chance.randint(8, 32)))
        mixed.append(members)
        for stream in members:
            left[stream] -= 1
        left = {stream: count for stream, count in left.items() if count}
    with pytest.warns(RuntimeWarning):
        together = run(mixed)
        alone = run([[stream] for stream in range(streams) for _ in range(frames)])
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, equal_nan=True)


def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_flat_over_thousands_of_streams(one_thread):
    """Not one object more for every other stream, nor 2 kB, where a stream holds 51."""
    model, frame = small(), clip(frames=1)
    neuroflow.enable_cache(model, exact(threshold=1e-4))
    seen = []
    for cycle in range(2_000):
        encode(model, frame, [cycle])
        neuroflow.reset_cache(model, cycle)
        if cycle in (499, 1_999):
            seen.append((resident(), sys.getallocatedblocks()))
    assert not open_streams(model)
    (size, objects), (later_size, later_objects) = seen
    assert later_objects - objects < 750
    assert later_size - size < 2_000 * 1_500


@pytest.mark.parametrize("family", FAMILIES)
def test_disabling_gives_memory_back_at_once(family):
    """Also of a cache that the caller keeps, and without a garbage collector that looks for circles."""
    model, cache = tiny(family), neuroflow.StreamCache()
    gc.disable()
    try:
        neuroflow.enable_cache(model, exact(threshold=1e-4), cache)
        for frames in (clip(frames=1), clip(frames=2)):  # one of a stream, and a clip
            with torch.inference_mode():
                model(**inputs(family, frames))
        states = [state for _, state in cache.items()]
        held = [engine_of(model), *states, *(tensor for state in states for tensor in state.held())]
        left = [weakref.ref(each) for each in held]
        del states, held
        assert len(left) > 5
        neuroflow.disable_cache(model)
        assert [each() for each in left if each() is not None] == [] and not len(cache)
    finally:
        gc.enable()


def growth_of_forty_streams():
    """Of a cache that keeps twelve: what the process grew by, and what summary said to expect, after each; bytes."""
    torch.set_num_threads(1)
    model, frame = small(hidden_size=128, layers=4), clip(frames=1, size=(256, 256))
    neuroflow.enable_cache(model, exact(threshold=1e-4), neuroflow.StreamCache(max_streams=12))
    encode(model, frame, ["first"])
    first, before = neuroflow.summary(model).streams["first"].state_bytes, resident()
    seen = []
    for name in range(40):
        encode(model, frame, [name])
        seen.append((resident() - before, neuroflow.summary(model).limit_bytes - first))
    assert neuroflow.summary(model).limit_bytes == neuroflow.summary(model).state_bytes == 12 * first
    return seen


def test_memory_stays_below_what_summary_states():
    # In a process of its own, without what other tests left in the heap.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        seen = pool.submit(growth_of_forty_streams).result()
    assert all(grown <= 1.02 * stated for grown, stated in seen)  # allocators round up to pages
    assert seen[-1][1] > 70e6

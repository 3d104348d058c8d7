"""The service without HTTP: what goes through the model together, in which order, and what is refused."""

import asyncio
import contextlib
import threading

import neuroflow
import numpy as np
import pytest
import torch
from models import exact
from neuroflow.serve.service import Full, Service
from neuroflow.video.preprocess import Preprocessor
from transformers import SiglipVisionConfig, SiglipVisionModel

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CAMERAS = ("door", "yard", "dock")


def tower():
    torch.manual_seed(0)
    return SiglipVisionModel(SiglipVisionConfig(**TINY, image_size=32, patch_size=8)).eval()


def camera(seed, frames=6):
    """Frames [T, 3, 32, 32] of a still scene in which one patch changes from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    clip = torch.randn(1, 3, 32, 32, generator=generator).repeat(frames, 1, 1, 1)
    for number in range(1, frames):
        clip[number:, :, 8:16, 8 * (number % 4) : 8 * (number % 4) + 8] = torch.randn(3, 8, 8, generator=generator)
    return clip


def expected(clip, name="alone"):
    """Embeddings and reports of a stream that is alone with a model, frame by frame."""
    model = neuroflow.enable_cache(tower(), exact(threshold=0.01))
    outcomes = []
    with torch.inference_mode():
        for frame in clip:
            embedding = neuroflow.encode(model, frame[None], [name]).pooler_output[0].numpy()
            outcomes.append((embedding, neuroflow.last_pass(model)[0]))
    return outcomes


@contextlib.asynccontextmanager
async def running(limits=None, **settings):
    streams = neuroflow.StreamCache(**{"max_streams": 4, "idle_seconds": 60} | (limits or {}))
    model = neuroflow.enable_cache(tower(), exact(threshold=0.01), streams=streams)
    service = Service(model, Preprocessor(32, 32), streams, **settings)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


def finished(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))


def decoded(pixels):
    return lambda: pixels


class Gate:
    """Holds the service's thread of the model until it is opened, so that what comes meanwhile waits."""

    def __init__(self, service):
        self._open = threading.Event()
        self._held = service._encoder.submit(self._open.wait)

    def open(self):
        self._open.set()


def same(answers, outcomes):
    assert len(answers) == len(outcomes)
    for answer, (embedding, report) in zip(answers, outcomes, strict=True):
        np.testing.assert_allclose(answer.embedding, embedding, atol=1e-5)
        assert answer.key_frame == report.key_frame
        assert answer.active == report.active.sum()


def test_frames_that_arrive_together_are_one_pass_and_equal_each_camera_alone():
    clips = {name: camera(seed) for seed, name in enumerate(CAMERAS)}

    async def go():
        async with running(window_ms=50) as service:
            answers = {name: [] for name in CAMERAS}
            for number in range(6):
                sent = [service.encode(name, decoded(clips[name][number][None])) for name in CAMERAS]
                for name, got in zip(CAMERAS, await asyncio.gather(*sent), strict=True):
                    answers[name] += got
            return answers

    answers = finished(go())
    for name in CAMERAS:
        same(answers[name], expected(clips[name]))
        assert [answer.frame for answer in answers[name]] == list(range(6))
        assert all(answer.together == 3 for answer in answers[name])
    assert 0 < np.mean([answer.skipped for answer in answers["door"]]) < 1


def test_a_backlog_keeps_each_streams_order_and_gives_streams_turns():
    clips = {name: camera(seed) for seed, name in enumerate(CAMERAS)}

    async def go():
        async with running(most=4) as service:
            gate = Gate(service)
            # One camera sends all it has before the others send anything; one of its frames is slow to decode.
            slow = threading.Event()

            def late():
                slow.wait()
                return clips["door"][1][None]

            order = [("door", number) for number in range(6)] + [("yard", 0), ("dock", 0)]
            sent = [
                asyncio.create_task(
                    service.encode(name, late if (name, number) == ("door", 1) else decoded(clips[name][number][None]))
                )
                for name, number in order
            ]
            await asyncio.sleep(0)
            gate.open()
            await asyncio.gather(sent[0], *sent[6:])
            assert not any(task.done() for task in sent[1:6])
            slow.set()
            answers = await asyncio.gather(*sent)
            return [answer for each in answers[:6] for answer in each], answers[6:]

    door, others = finished(go())
    same(door, expected(clips["door"]))
    assert [answer.frame for answer in door] == list(range(6))
    assert max(answer.together for answer in door) <= 4
    for name, answers in zip(CAMERAS[1:], others, strict=True):
        same(answers, expected(clips[name][:1]))


def test_no_stream_has_its_second_turn_before_the_others_had_their_first():
    async def go():
        async with running(most=2) as service:
            gate, order = Gate(service), []

            async def send(name):
                await service.encode(name, decoded(camera(0)[:1]))
                order.append(name)

            tasks = [asyncio.create_task(send(name)) for name in CAMERAS for _ in range(2)]
            await asyncio.sleep(0)
            gate.open()
            await asyncio.gather(*tasks)
            return order

    order = finished(go())
    assert set(order[:3]) == set(order[3:]) == set(CAMERAS)


def test_a_clip_in_one_request_equals_its_frames():
    clip = camera(3)

    async def go():
        async with running(most=4) as service:
            return await service.encode("door", decoded(clip[:1])) + await service.encode("door", decoded(clip[1:]))

    same(finished(go()), expected(clip))


def test_who_looks_during_a_pass_sees_the_patches_of_the_frame_before():
    clip = camera(0)

    async def go():
        async with running() as service:
            for frame in clip[:3]:
                await service.encode("door", decoded(frame[None]))
            encoded, looked, embedding_of = threading.Event(), threading.Event(), service._embedding_of

            def held(output):
                encoded.set()
                looked.wait()
                return embedding_of(output)

            service._embedding_of = held
            later = asyncio.create_task(service.encode("door", decoded(clip[3][None])))
            await asyncio.to_thread(encoded.wait)
            try:
                during = service.status("door")
            finally:
                looked.set()
            await later
            return during, service.status("door")

    for status, (_, report) in zip(asyncio.run(go()), expected(clip)[2:4], strict=True):
        assert status.history[-1].skipped == report.skipped
        assert torch.equal(status.summary.active, report.active)
        assert torch.equal(status.summary.surprise, report.surprise)


def test_a_full_queue_refuses_and_one_stream_has_a_quarter_of_it():
    clip = camera(0, 12)

    async def go():
        async with running(queue=8, limits={"max_streams": 8}) as service:
            gate = Gate(service)
            sent = [asyncio.create_task(service.encode("door", decoded(clip[n][None]))) for n in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(Full, match=r"2 requests are waiting, 2 of them for this stream"):
                await service.encode("door", decoded(clip[2][None]))
            others = [f"cam-{number}" for number in range(6)]
            sent += [asyncio.create_task(service.encode(name, decoded(clip[:1]))) for name in others]
            await asyncio.sleep(0)
            with pytest.raises(Full, match=r"8 requests are waiting") as full:
                await service.encode("late", decoded(clip[:1]))
            assert full.value.retry_after >= 0
            gate.open()
            await asyncio.gather(*sent)
            assert "late" not in [status.stream for status in service.streams()]
            return await service.encode("door", decoded(clip[2][None]))

    same(finished(go()), expected(clip)[2:3])


def test_clips_that_wait_are_bounded_by_their_frames():
    clip = camera(0, 6)

    async def go():
        async with running(queue=8) as service:
            gate = Gate(service)
            sent = [asyncio.create_task(service.encode(name, decoded(clip))) for name in CAMERAS]
            done, waiting = await asyncio.wait(sent, return_when=asyncio.FIRST_EXCEPTION)
            gate.open()
            answers = await asyncio.gather(*waiting)
            return [task.exception() for task in done], answers, service.streams()

    [refusal], answers, streams = finished(go())
    assert isinstance(refusal, Full) and "12 frames are waiting" in str(refusal)
    for each in answers:
        same(each, expected(clip))
    assert len(streams) == 2


def test_what_fails_fails_alone():
    clip = camera(0)

    async def go():
        async with running(window_ms=50) as service:
            await service.encode("door", decoded(clip[:1]))

            def broken():
                raise ValueError("no picture")

            sent = {
                "door": decoded(clip[1][None]),
                "yard": broken,
                "dock": decoded(torch.zeros(1, 1, 32, 32)),  # grey, which the tower does not take
            }
            tasks = [service.encode(name, decode) for name, decode in sent.items()]
            door, yard, dock = await asyncio.gather(*tasks, return_exceptions=True)
            assert str(yard) == "no picture" and isinstance(dock, Exception)
            after = await service.encode("door", decoded(clip[2][None]))
            return [status.stream for status in service.streams()], door + after

    names, answers = finished(go())
    assert names == ["door"]
    same(answers, expected(clip)[1:3])


def test_a_repeated_number_is_answered_again_and_a_gap_is_a_key_frame():
    clip = camera(0)

    async def go():
        async with running() as service:
            first = await service.encode("door", decoded(clip[:1]), 7)
            gate = Gate(service)
            pair = [asyncio.create_task(service.encode("door", decoded(clip[1][None]), 8)) for _ in range(2)]
            await asyncio.sleep(0)
            gate.open()
            waited = await asyncio.gather(*pair)
            again = await service.encode("door", decoded(clip[5][None]), 8)
            lost = await service.encode("door", decoded(clip[3][None]), 10)
            unnumbered = await service.encode("door", decoded(clip[4][None]))
            return first, waited, again, lost, unnumbered, service.streams()[0].summary.frames

    first, waited, again, lost, unnumbered, frames = finished(go())
    outcomes = expected(clip[:2])
    same(first + waited[0], outcomes)
    assert waited[0] == waited[1] == again
    assert frames == 4
    assert (lost[0].frame, lost[0].key_frame) == (10, "gap")
    assert (unnumbered[0].frame, unnumbered[0].key_frame) == (11, None)


def test_new_streams_push_none_out_that_is_in_use():
    clip = camera(0)

    async def go():
        async with running({"max_streams": 2, "idle_seconds": 1000}) as service:
            for name in ("door", "yard"):
                await service.encode(name, decoded(clip[:1]))
            with pytest.raises(Full, match="2 streams are open"):
                await service.encode("dock", decoded(clip[:1]))
            service._streams["door"].used -= 2000
            service._cache["door"].used -= 2000
            await service.encode("dock", decoded(clip[:1]))
            await service.close("dock")
            with pytest.raises(KeyError):
                await service.close("dock")
            return [status.stream for status in service.streams()]

    assert finished(go()) == ["yard"]


def test_streams_outlive_the_service(tmp_path):
    clip = camera(0)

    async def first():
        async with running(state=tmp_path) as service:
            gate = Gate(service)
            waiting = asyncio.create_task(service.encode("door", decoded(clip[:2])))
            await asyncio.sleep(0)
            gate.open()
            stopping = asyncio.create_task(service.stop())
            await asyncio.sleep(0)
            with pytest.raises(Full, match="stopping"):
                await service.encode("door", decoded(clip[2][None]))
            await stopping
            return await waiting

    async def second():
        async with running(state=tmp_path) as service:
            return await service.encode("door", decoded(clip[2:]))

    answers = finished(first()) + finished(second())
    same(answers, expected(clip))
    assert [answer.frame for answer in answers] == list(range(6))
    (tmp_path / "streams.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="all streams start over"):
        assert finished(second())[0].key_frame == "first"

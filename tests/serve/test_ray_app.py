"""Ray Serve: where frames of a stream go, what is known of all replicas together, and a replica that is killed."""

import pickle
from pathlib import Path

import httpx
import neuroflow
import numpy as np
import pytest
import yaml

pytestmark = pytest.mark.ray
pytest.importorskip("ray")

from neuroflow.serve import ray_app  # noqa: E402
from neuroflow.serve.service import Full  # noqa: E402

from bench import serve_ray  # noqa: E402

TOKEN = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def address():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEUROFLOW_TOKEN", "secret")
        with serve_ray.cluster(2) as address:
            yield address


@pytest.fixture
def client(address):
    with httpx.Client(base_url=address, headers=TOKEN, timeout=serve_ray.PATIENCE) as client:
        yield client


def test_frames_stay_at_the_replica_that_holds_their_stream(client):
    pixels = serve_ray.clip(0, 3)
    by_path = [f"path-{number}" for number in range(8)]
    by_header = [f"header-{number}" for number in range(8)]
    for number, frame in enumerate(pixels):
        for stream in by_path:
            found = serve_ray.send(client, stream, number, frame).answer
            assert found["key_frame"] == (None if number else "first")
        for stream in by_header:
            found = serve_ray.send(client, stream, number, frame, {"X-Session-Id": "site"}).answer
            assert found["key_frame"] == (None if number else "first")
    replica_of = serve_ray.open_streams(client)
    assert {*by_path, *by_header} <= set(replica_of)
    assert len({replica_of[stream] for stream in by_path}) == 2
    assert len({replica_of[stream] for stream in by_header}) == 1
    assert client.get("/v1/streams/path-0").json()["frames"] == 3
    metrics = client.get("/metrics?by=stream").text
    for stream, replica in replica_of.items():
        [line] = [
            line
            for line in metrics.splitlines()
            if f'stream_frames_total{{replica="{replica}",stream="{stream}"' in line
        ]
        assert line.endswith(" 3.0")
    assert metrics.count("# TYPE neuroflow_frames_total counter") == 1
    for stream in by_path:
        assert client.delete(f"/v1/streams/{stream}").status_code == 204
    assert not {*by_path} & set(serve_ray.open_streams(client))


@pytest.mark.parametrize("path", ["/v1/streams", "/metrics", "/v1/streams/door"])
def test_a_token_is_asked_for(address, path):
    assert httpx.get(address + path, timeout=serve_ray.PATIENCE).status_code == 401


def test_another_deployment_reaches_a_stream(client):
    from ray import serve

    pixels = serve_ray.clip(1, 4)
    handle = serve.get_deployment_handle("Encoder", "neuroflow").options(session_id="handle")
    answers = handle.encode.remote("handle", pixels[:2].numpy(), 0).result()
    sent = [serve_ray.send(client, "handle", number, pixels[number]) for number in (2, 3)]
    sent = [*({**vars(answer), "stream": "handle"} for answer in answers), *(each.answer for each in sent)]
    assert serve_ray.differences(pixels, [serve_ray.Sent(answer, 0.0, 0) for answer in sent]) <= serve_ray.TOLERANCE
    assert [answer["key_frame"] for answer in sent] == ["first", None, None, None]
    with pytest.raises(ValueError, match=r"pixels is \[1, 3, 64, 65\]; accepted is \[T, 3, 64, 64\]"):
        handle.encode.remote("handle", np.zeros((1, 3, 64, 65), np.float32)).result()


def test_a_refusal_reaches_another_process():
    full = pickle.loads(pickle.dumps(Full("4 requests wait; slow down", 2.0)))
    assert (str(full), full.retry_after) == ("4 requests wait; slow down", 2.0)


def test_streams_of_a_killed_replica_go_on_elsewhere(address):
    clips = {f"camera-{number}": serve_ray.clip(number, 20) for number in range(8)}
    row = serve_ray.summary(clips, serve_ray.play(address, clips, rate=10.0, headers=TOKEN))
    print(row)
    assert not list(serve_ray.faults(row))
    assert row["streams of the killed replica"] > 0
    assert row["answered"] == 8 * 20


def test_settings(monkeypatch, tmp_path):
    neuroflow.NeuroFlowConfig(threshold=0.3).save(tmp_path / "gate.json")
    monkeypatch.setenv("NEUROFLOW_MODEL", "some/model")
    monkeypatch.setenv("NEUROFLOW_CONFIG", str(tmp_path / "gate.json"))
    settings = ray_app.Settings.model_validate({"size": "640x384", "queue": "8", "max_replicas": "2"})
    assert (settings.model, settings.size, settings.max_replicas) == ("some/model", (640, 384), 2)
    assert ray_app.Settings(size=448).size == (448, 448)
    built = ray_app.app(settings)._bound_deployment
    assert built.init_args[1].threshold == 0.3
    assert built._deployment_config.autoscaling_config.max_replicas == 2
    for wrong in ({"size": "0x3"}, {"sise": 448}, {"queue": 0}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ray_app.Settings.model_validate(wrong)


def test_the_example_is_valid():
    from ray.serve.schema import ServeDeploySchema

    written = yaml.safe_load(Path(ray_app.__file__).with_name("serve.yaml").read_text())
    [application] = ServeDeploySchema.model_validate(written).applications
    ray_app.Settings.model_validate(application.args)
    assert [each.name for each in application.deployments] == [ray_app.Encoder.name]
    assert application.import_path == f"{ray_app.app.__module__}:{ray_app.app.__name__}"

"""The service on Ray Serve: replicas of one application, with all frames of a stream going to the same replica.

  serve run neuroflow.serve.ray_app:app model=google/siglip2-base-patch16-224
  serve run serve.yaml

Routes and answers are those of `neuroflow serve`. `routing.StreamRouter` chooses the replica by the header
x-session-id, or by the stream in the path. When replicas come, go or die, some streams move. A stream that moves starts
over with a key frame at its new replica, which has no state for it, and then continues as before. For the same reason a
replica saves nothing when it stops: it answers what it has accepted, and its streams start over elsewhere.

Requests that a replica was working on when it died get a 500, or in rare cases no answer, because Ray passes the
request on without its body. Clients should resend a frame that was not answered within a few seconds, with its number
as `frame`.

GET /v1/streams and /metrics cover all replicas and name them. A stream that moved is listed where it is now.

NEUROFLOW_TOKEN is read when the application is built, and passed to every replica. Without it only clients that address
the proxy as localhost are answered, as in `neuroflow serve`.
"""

import argparse
import itertools
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Query, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator
from ray import cloudpickle, serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig

import neuroflow

from ..cli.common import gate_config, load_model
from ..cli.options import size
from . import routing
from .app import MAX_BODY, MAX_PIXELS, OpenStream, create_app, summary
from .service import Answer, Service

TARGET = 8  # requests per replica, waiting ones included, above which another replica is added
REPLICA_SECONDS = 5.0  # time in which every replica has to report

# Proxies get the class by value, and so import neither neuroflow nor torch.
cloudpickle.register_pickle_by_value(routing)


class Settings(BaseModel):
    """Arguments of `app`, given as `key=value` to `serve run`, or under `args` in its file. All have defaults.

    Paths of models and weights are those of the machines that replicas run on; the `config` file is read once.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(
        default_factory=lambda: os.environ.get("NEUROFLOW_MODEL"),
        description="Hugging Face id or directory; else NEUROFLOW_MODEL, else the model in the package",
    )
    config: Path | None = Field(
        default_factory=lambda: os.environ.get("NEUROFLOW_CONFIG"),
        validate_default=True,
        description="file written by NeuroFlowConfig.save or `calibrate`; else NEUROFLOW_CONFIG, else the defaults",
    )
    weights: Path | None = Field(None, description="file written by `neuroflow distill`")
    size: tuple[int, int] | None = Field(None, description="input width and height, such as 448 or 640x384")
    device: str = Field("cpu", description="cpu, or cuda for one GPU per replica")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_streams: PositiveInt = Field(64, description="maximum number of open streams per replica")
    max_bytes: PositiveInt | None = Field(None, description="maximum memory of their state, in bytes")
    idle_seconds: PositiveFloat = Field(300.0, description="idle time after which a stream makes room for a new one")
    window_ms: PositiveFloat = Field(5.0, description="time a frame waits for those of other streams")
    most: PositiveInt = Field(16, description="maximum number of frames in a pass")
    queue: PositiveInt = Field(64, description="requests that may wait at a replica; more get a 503")
    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = Field(4, description="maximum, while many requests wait")
    max_body: PositiveInt = Field(MAX_BODY, description="maximum size of a request, in bytes")
    max_pixels: PositiveInt = Field(MAX_PIXELS, description="maximum number of pixels in an image")

    @field_validator("size", mode="before")
    @classmethod
    def _read_size(cls, value: object) -> object:
        try:
            return size(str(value)) if isinstance(value, str | int) else value
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error)) from None


class LocatedStream(OpenStream):
    """An open stream, and the replica that holds it."""

    replica: str


class LocatedStreams(BaseModel):
    """All open streams."""

    streams: list[LocatedStream]


@serve.deployment(
    # The next check finds a dead replica; until then its streams are served elsewhere, but it is not replaced.
    health_check_period_s=1.0,
    request_router_config=RequestRouterConfig(
        request_router_class=routing.StreamRouter,
        request_router_kwargs={"num_virtual_nodes": 100, "num_fallback_replicas": 1},
    ),
)
@serve.ingress()
class Encoder:
    """A replica: the service with its own model.

    Args:
        settings: the arguments of `app`.
        config: which patches are encoded.
        token: token that clients must send.
    """

    def __init__(self, settings: Settings, config: neuroflow.NeuroFlowConfig, token: str | None) -> None:
        self._settings, self._token = settings, token
        streams = neuroflow.StreamCache(settings.max_streams, settings.max_bytes, settings.idle_seconds)
        model, self._preprocess = load_model(argparse.Namespace(**settings.model_dump()))
        neuroflow.enable_cache(model, config, streams=streams, weights=settings.weights)
        self._service = Service(
            model,
            self._preprocess,
            streams,
            window_ms=settings.window_ms,
            most=settings.most,
            queue=settings.queue,
        )
        self._replica = serve.get_replica_context().replica_tag

    def __serve_build_asgi_app__(self) -> FastAPI:
        settings = self._settings
        app = create_app(self._service, token=self._token, max_body=settings.max_body, max_pixels=settings.max_pixels)

        async def get_streams() -> Response:
            """All open streams, of all replicas."""
            held = itertools.chain(*await self._everywhere("own_streams"))
            # A stream that moved stays open in its old place until it has been idle for too long.
            latest = {each["stream"]: each for each in sorted(held, key=lambda each: -each["idle_seconds"])}
            return JSONResponse({"streams": [latest[name] for name in sorted(latest)]})

        async def get_metrics(by: Annotated[str | None, Query(pattern="^stream$")] = None) -> Response:
            """Metrics of all replicas for Prometheus; `?by=stream` adds metrics for each stream."""
            text = labelled(dict(await self._everywhere("own_metrics", by == "stream")))
            return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

        replace(app, "/v1/streams", get_streams, response_model=LocatedStreams)
        replace(app, "/metrics", get_metrics, response_class=Response)
        return app

    async def encode(self, stream: str, pixels: np.ndarray, frame: int | None = None) -> list[Answer]:
        """Encode the next frames of a stream, for other deployments.

        Call it through a handle: `handle.options(session_id=stream).encode.remote(...)`.

        Args:
            stream: its name, and the session's.
            pixels: the model's input, [T, 3, height, width], float32 or float16.
            frame: number of the first frame, as in `Service.encode`.

        Returns:
            an answer for each frame.

        Raises:
            Full: no room right now.
            ValueError: `pixels` has another shape.
        """
        size = (3, self._preprocess.height, self._preprocess.width)
        if pixels.ndim != 4 or not len(pixels) or pixels.shape[1:] != size:
            raise ValueError(f"pixels is {list(pixels.shape)}; accepted is [T, {', '.join(map(str, size))}], T >= 1")
        frames = torch.tensor(pixels, dtype=torch.float32)
        return await self._service.encode(stream, lambda: frames, frame)

    async def own_streams(self) -> list[dict[str, Any]]:
        """The streams of this replica."""
        return [{**summary(status), "replica": self._replica} for status in self._service.streams()]

    async def own_metrics(self, by_stream: bool) -> tuple[str, bytes]:
        """This replica's name and metrics."""
        summaries = {status.stream: status.summary for status in self._service.streams()}
        return self._replica, self._service.metrics.text(summaries, self._service.state_bytes, by_stream)

    async def check_health(self) -> None:
        """Ray replaces a replica whose check raises.

        Raises:
            RuntimeError: it no longer accepts frames.
        """
        if not self._service.running:
            raise RuntimeError("the service has ended; replace this replica")

    async def _everywhere(self, method: str, *arguments: object) -> list[Any]:
        """The results of `method` from all live replicas."""
        replica = serve.get_replica_context()
        handle = serve.get_deployment_handle(replica.deployment, replica.app_name)
        response = handle.broadcast(method, *arguments)
        try:
            results = await response.results_async(timeout_s=REPLICA_SECONDS, return_exceptions=True)
        except TimeoutError:
            reason = f"a replica did not answer in {REPLICA_SECONDS:g} seconds; try again"
            raise HTTPException(503, reason, {"Retry-After": "1"}) from None
        living = [result for result in results if not isinstance(result, RayActorError)]
        for result in living:
            if isinstance(result, BaseException):
                raise result
        return living


def app(args: Settings) -> serve.Application:
    """Build the application, for `serve run` and `serve.run`.

    Args:
        args: the settings; Ray makes them from key=value arguments.

    Returns:
        the application.

    Raises:
        CommandError: settings that cannot be read.

    Example:
        >>> from ray import serve  # doctest: +SKIP
        >>> from neuroflow.serve.ray_app import Settings, app  # doctest: +SKIP
        >>> handle = serve.run(app(Settings(model="./my-vit", max_replicas=8)))  # doctest: +SKIP
    """
    config = gate_config(argparse.Namespace(preset=None, config=args.config, weights=args.weights))
    deployment = Encoder.options(
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": TARGET,
        },
        # Requests that wait in the service count as ongoing for Ray, so it is the service that refuses them, with a
        # reason. What arrives faster than Ray passes it on is bounded too.
        max_ongoing_requests=2 * args.queue,
        max_queued_requests=args.max_replicas * args.queue,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(args.device.startswith("cuda"))},
    )
    return deployment.bind(args, config, os.environ.get("NEUROFLOW_TOKEN") or None)


def replace(app: FastAPI, path: str, endpoint: Any, **settings: Any) -> None:
    """Serve GET requests for a path from another endpoint, with the same access rules."""
    [route] = [route for route in app.routes if isinstance(route, APIRoute) and route.path == path]
    app.routes.remove(route)
    app.get(path, dependencies=route.dependencies, **settings)(endpoint)


class Families(Collector):
    """A collector of given metrics."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def labelled(texts: dict[str, bytes]) -> bytes:
    """Merge the metrics of several replicas into one text, in which each value is labelled with its replica."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                merged.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(Families(list(families.values())))
    return generate_latest(registry)

"""The service over HTTP: its routes, and the limits on a request."""

import asyncio
import base64
import contextlib
import hashlib
import io
import math
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path as FilePath
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from .bodies import BodyError, array, picture, video
from .service import Answer, Full, Past, Service, StreamStatus

MAX_BODY = 16 * 2**20
MAX_PIXELS = 33_177_600  # 8K
MAX_FRAMES = 64  # in one request
BODY_SECONDS = 30.0  # time in which a request's body has to arrive
BODIES = 512 * 2**20  # bytes of all bodies being received
PICTURES = ("image/jpeg", "image/png", "image/webp")
VIDEOS = ("video/mp4", "video/webm", "video/x-matroska")
NPY = "application/x-npy"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
PAGE = FilePath(__file__).with_name("page.html")

Stream = Annotated[
    str,
    Path(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$",
        description="1 to 128 characters: letters and digits, and . _ : - after the first",
    ),
]
Number = Annotated[
    int | None,
    Query(
        ge=0,
        lt=2**53,
        description="Frame number, counted by the client: a repeated one is not encoded again, a gap makes a key frame",
    ),
]


class Frame(BaseModel):
    """The result for one frame; `service.Answer` documents the fields."""

    frame: int
    embedding: list[float | None]
    skipped: float
    active: int
    patches: int
    key_frame: str | None
    ms: float
    waited_ms: float
    together: int


class StreamFrame(Frame):
    """The result for one frame, with the name of its stream."""

    stream: str


class Clip(BaseModel):
    """The results for several frames of a stream."""

    stream: str
    frames: list[Frame]


class OpenStream(BaseModel):
    """An open stream; `skipped` is the share of patches that were not encoded."""

    stream: str
    frames: int
    key_frames: int
    skipped: float
    state_bytes: int
    idle_seconds: float


class OpenStreamDetail(OpenStream):
    """An open stream, with the patches of its last frame and its recent frames, oldest first."""

    grid: list[int]
    active: list[list[int]]
    surprise: list[list[float | None]]
    history: list[Past]


class Streams(BaseModel):
    """All open streams."""

    streams: list[OpenStream]


class Arriving:
    """Limits on the bodies that are being received.

    Args:
        max_body: maximum size of one body, in bytes.
        seconds: time in which a body has to arrive.
        most: maximum size of all bodies together, in bytes.
    """

    def __init__(self, max_body: int, seconds: float = BODY_SECONDS, most: int = BODIES) -> None:
        self._max_body, self._seconds, self._most = max_body, seconds, max(most, max_body)
        self._held = 0

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """Read a request's body, which counts until the block ends.

        Raises:
            HTTPException: it is too large or too slow, or too much is arriving already.
        """
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body:
            raise self._too_large()
        chunks: list[bytes] = []
        own = 0
        try:
            try:
                async with asyncio.timeout(self._seconds):
                    async for chunk in request.stream():
                        own += len(chunk)
                        self._held += len(chunk)
                        if own > self._max_body:
                            raise self._too_large()
                        if self._held > self._most:
                            raise HTTPException(503, "too many requests are arriving; try again", {"Retry-After": "1"})
                        chunks.append(chunk)
            except ClientDisconnect:
                raise HTTPException(400, "the client disconnected before the body was complete") from None
            except TimeoutError:
                raise HTTPException(408, f"the body took more than {self._seconds:g} seconds; send it faster") from None
            yield b"".join(chunks)
        finally:
            self._held -= own

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body is larger than {self._max_body:,} bytes; send a smaller picture or clip")


def create_app(
    service: Service,
    *,
    token: str | None = None,
    max_body: int = MAX_BODY,
    max_pixels: int = MAX_PIXELS,
    max_frames: int = MAX_FRAMES,
) -> FastAPI:
    """The service as an ASGI application, which starts and stops it.

    Args:
        service: a service that is not yet started.
        token: token that clients must send as `Authorization: Bearer`. None accepts any client that addresses this
            machine as localhost, which rules out pages from other sites in a local browser.
        max_body: maximum size of a request's body, in bytes.
        max_pixels: maximum number of pixels in an image or a video frame.
        max_frames: maximum number of frames in a request.

    Returns:
        the application.

    Example:
        >>> from neuroflow.serve.app import create_app
        >>> from neuroflow.serve.service import Service
        >>> from neuroflow.video.preprocess import Preprocessor
        >>> streams = neuroflow.StreamCache(max_streams=64)
        >>> model = neuroflow.enable_cache(model, streams=streams)
        >>> app = create_app(Service(model, Preprocessor(32, 32), streams))
        >>> app.title
        'NeuroFlow'
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    async def require_token(request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        right = token is None or secrets.compare_digest(given.strip().encode(), token.encode())
        if not right or (token is not None and kind.lower() != "bearer"):
            raise HTTPException(401, "no valid token; send Authorization: Bearer", {"WWW-Authenticate": "Bearer"})

    app = FastAPI(
        title="NeuroFlow",
        description="Embeddings of camera frames, at the cost of what changed.",
        lifespan=lifespan,
    )
    if token is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK), www_redirect=False)
    arriving = Arriving(max_body)
    page = PAGE.read_text(encoding="utf-8")
    policy = page_policy(page)
    guarded: dict[str, Any] = {"dependencies": [Depends(require_token)]}
    size = (3, service.preprocess.height, service.preprocess.width)

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
        service.metrics.refused.labels(str(error.status_code)).inc()
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where, accepted = first["loc"][-1], first["msg"][:1].lower() + first["msg"][1:]
        return await refused(request, HTTPException(422, f"{where}: {accepted}"))

    async def encode(stream: str, frame: int | None, decode: Callable[[], torch.Tensor]) -> list[Answer]:
        try:
            return await service.encode(stream, decode, frame)
        except BodyError as error:
            raise HTTPException(error.status, str(error)) from None
        except Full as full:
            after = str(math.ceil(max(full.retry_after, 1.0)))
            raise HTTPException(503, str(full), {"Retry-After": after}) from None
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise HTTPException(500, f"the frame was not encoded: {reason:.300}") from error

    def of_pictures(bodies: list[bytes]) -> torch.Tensor:
        return torch.cat([picture(body, service.preprocess, max_pixels) for body in bodies])

    @app.post("/v1/streams/{stream}/frames", response_model=StreamFrame, **guarded)
    async def post_frame(stream: Stream, request: Request, frame: Number = None) -> Response:
        """Encode a stream's next frame: a JPEG, PNG or WebP, or the model's input as npy, [3, height, width]."""
        async with arriving.body(request) as body:
            kind = media_type(request.headers.get("content-type", ""))
            if kind == NPY:
                answers = await encode(stream, frame, lambda: array(body, size))
            elif kind in PICTURES:
                answers = await encode(stream, frame, lambda: picture(body, service.preprocess, max_pixels))
            else:
                raise HTTPException(415, f"the body is {kind!r:.80}; accepted are {', '.join((*PICTURES, NPY))}")
        (answer,) = answers
        if NPY in request.headers.get("accept", ""):
            return npy(answer.embedding, answers, stream)
        return JSONResponse({"stream": stream, **fields(answer)})

    @app.post("/v1/streams/{stream}/clips", response_model=Clip, **guarded)
    async def post_clip(stream: Stream, request: Request, frame: Number = None) -> Response:
        """Encode a stream's next frames in one pass.

        They are sent as images in order (multipart/form-data), as a short video, or as the model's input in npy,
        [T, 3, height, width].
        """
        async with arriving.body(request) as body:
            kind = media_type(request.headers.get("content-type", ""))
            if kind == NPY:
                answers = await encode(stream, frame, lambda: array(body, size, max_frames))
            elif kind in VIDEOS:
                answers = await encode(stream, frame, lambda: video(body, service.preprocess, max_pixels, max_frames))
            elif kind == "multipart/form-data":
                pictures = await parts(request, body, max_frames)

                answers = await encode(stream, frame, lambda: of_pictures(pictures))
            else:
                accepted = ", ".join((*VIDEOS, "multipart/form-data", NPY))
                raise HTTPException(415, f"the body is {kind!r:.80}; accepted are {accepted}")
        if NPY in request.headers.get("accept", ""):
            return npy(np.stack([answer.embedding for answer in answers]), answers, stream)
        return JSONResponse({"stream": stream, "frames": [fields(answer) for answer in answers]})

    @app.get("/v1/streams", response_model=Streams, **guarded)
    async def get_streams() -> Response:
        """All open streams."""
        return JSONResponse({"streams": [summary(status) for status in service.streams()]})

    @app.get("/v1/streams/{stream}", response_model=OpenStreamDetail, **guarded)
    async def get_stream(stream: Stream) -> Response:
        """One stream: the patches of its last frame, and its recent frames."""
        with open_stream(stream):
            status = service.status(stream)
        surprise = status.summary.surprise
        return JSONResponse(
            {
                **summary(status),
                "grid": list(status.summary.grid),
                "active": status.summary.active.int().tolist(),
                "surprise": [finite(row) for row in surprise.tolist()],
                "history": [vars(past) for past in status.history],
            }
        )

    @app.get("/v1/streams/{stream}/picture", response_class=Response, **guarded)
    async def get_picture(stream: Stream) -> Response:
        """The model's last input from a stream, as JPEG.

        Images are kept only while somebody asks for them: the answer is 204 until the next frame after a first request.
        """
        with open_stream(stream):
            shown = service.picture(stream)
        if shown is None:
            return Response(status_code=204, headers={"Cache-Control": "no-store"})
        file = io.BytesIO()
        Image.fromarray(shown).save(file, "JPEG", quality=90)
        return Response(file.getvalue(), media_type="image/jpeg", headers={"Cache-Control": "no-store"})

    @app.delete("/v1/streams/{stream}", status_code=204, **guarded)
    async def delete_stream(stream: Stream) -> None:
        """Forget a stream; its next frame is a key frame."""
        with open_stream(stream):
            await service.close(stream)

    @app.get("/metrics", response_class=Response, **guarded)
    async def get_metrics(by: Annotated[str | None, Query(pattern="^stream$")] = None) -> Response:
        """Metrics for Prometheus; `?by=stream` adds metrics for each stream."""
        summaries = {status.stream: status.summary for status in service.streams()}
        text = service.metrics.text(summaries, service.state_bytes, by == "stream")
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/healthz")
    async def get_health() -> dict[str, str]:
        """200 while the process is alive."""
        return {"status": "alive"}

    @app.get("/readyz")
    async def get_readiness() -> dict[str, str]:
        """200 while the service accepts frames."""
        if not service.running:
            raise HTTPException(503, "the service is starting or stopping", {"Retry-After": "1"})
        return {"status": "ready"}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def get_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    return app


def page_policy(page: str) -> str:
    """A Content-Security-Policy that lets the page run its own script and contact this server, and nothing else."""
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def media_type(header: str) -> str:
    """The media type in a Content-Type header, without parameters."""
    return header.partition(";")[0].strip().lower()


async def parts(request: Request, body: bytes, most: int) -> list[bytes]:
    """The images in a form, in order.

    Raises:
        HTTPException: it is not a form, or holds no images or too many.
    """
    request._body = body  # already read; Starlette's parser takes it from here
    async with request.form(max_files=most, max_fields=0) as form:
        files = [value for _, value in form.multi_items() if not isinstance(value, str)]
        if not files:
            raise HTTPException(400, "the form holds no file; send images in order, each as a file")
        return [await file.read() for file in files]


@contextlib.contextmanager
def open_stream(stream: str) -> Iterator[None]:
    """Answer 404 if the block raises KeyError because a stream is not open."""
    try:
        yield
    except KeyError:
        raise HTTPException(404, f"stream {stream} is not open; GET /v1/streams lists those that are") from None


def fields(answer: Answer) -> dict[str, Any]:
    return {**vars(answer), "embedding": finite(answer.embedding.tolist())}


def finite(values: list[float]) -> list[float | None]:
    """Values with None (null) in place of NaN and Inf, which JSON does not have."""
    return values if math.isfinite(sum(values)) else [value if math.isfinite(value) else None for value in values]


def npy(embeddings: np.ndarray, answers: list[Answer], stream: str) -> Response:
    """Embeddings [D] or [T, D] as npy; the other fields are in headers, one value per frame."""
    file = io.BytesIO()
    np.save(file, embeddings)
    headers = {"X-NeuroFlow-Stream": stream}
    for name in ("frame", "skipped", "active", "patches", "key_frame", "ms", "waited_ms", "together"):
        values = [getattr(answer, name) for answer in answers]
        texts = ["" if value is None else f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        headers["X-NeuroFlow-" + name.replace("_", "-").title()] = ", ".join(texts)
    return Response(file.getvalue(), media_type=NPY, headers=headers)


def summary(status: StreamStatus) -> dict[str, Any]:
    known = status.summary
    return {
        "stream": status.stream,
        "frames": known.frames,
        "key_frames": known.key_frames,
        "skipped": known.skipped,
        "state_bytes": known.state_bytes,
        "idle_seconds": status.idle_seconds,
    }

"""The routes: HTTP in, runtime calls out. `create_app` takes any Runtime, so tests pass one with the fake engine."""

import asyncio
import importlib.metadata
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.background import BackgroundTask

from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.events import Result
from fewstep.runtime.local import Model, Runtime
from fewstep.runtime.request import MAX_PROMPT_CHARS, spec_steps
from fewstep.runtime.ticket import Ticket

from . import errors, streaming
from .gate import Gate
from .health import Health
from .metrics import Meters
from .pictures import Encoded, Store, account, encoded
from .settings import Settings
from .wire import GenerateBody, ImagesBody, Job, find_model, generate_job, images_job

PAGE = Path(__file__).parent / "page"
_PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
router = APIRouter()


@dataclass(frozen=True)
class Service:
    """What the routes of one app share."""

    runtime: Runtime
    settings: Settings
    health: Health
    meters: Meters
    store: Store
    pool: ThreadPoolExecutor
    started_unix_s: int

    def submit(self, job: Job) -> Ticket:
        try:
            return self.runtime.submit(job.request, job.model)
        except InvalidRequest as error:
            raise job.renamed(error) from error

    async def make(self, job: Job, request: Request) -> tuple[Result, Encoded]:
        """Run a job to encoded pictures; a caller who hangs up ends it."""
        result = await streaming.result(self.runtime, self.submit(job), request)
        return result, await self.encode(result, job)

    async def encode(self, result: Result, job: Job) -> Encoded:
        files = await encoded(self.pool, result, job)
        self.meters.encoded(files.encode_s)
        return files


def create_app(runtime: Runtime, settings: Settings = Settings()) -> FastAPI:  # noqa: B008
    """The web application over a runtime, which stays the caller's to close. It warms up once it is served."""
    health = Health()
    pool = ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="encode")
    meters = Meters(runtime, health)
    store = Store(settings.stored_bytes, settings.stored_s)
    service = Service(runtime, settings, health, meters, store, pool, int(time.time()))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(health.warm(runtime))
        yield
        health.drain()
        warming.cancel()
        pool.shutdown()

    version = importlib.metadata.version("fewstep")
    app = FastAPI(title="fewstep", version=version, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(Gate, settings=settings, count=meters.response)
    app.include_router(router)
    app.mount("/page", StaticFiles(directory=PAGE))
    errors.install(app)
    return app


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.get("/", include_in_schema=False)
async def page() -> Response:
    return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": _PAGE_POLICY})


@router.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, Any]:
    return _service(request).health.check()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    content, media_type = _service(request).meters.render()
    return Response(content, media_type=media_type)


@router.get("/pictures/{name}")
async def picture(name: str, request: Request) -> Response:
    """A picture made with `response_format: "url"`; its name is the permission to see it."""
    file = _service(request).store.get(name, time.monotonic())
    return Response(file, media_type=MEDIA[name.rpartition(".")[2]], headers={"Cache-Control": "private, max-age=3600"})


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    service = _service(request)
    return {"object": "list", "data": [_model_card(service, name) for name in service.runtime.models]}


@router.get("/v1/models/{name}")
async def model(name: str, request: Request) -> dict[str, Any]:
    service = _service(request)
    return _model_card(service, find_model(name, service.runtime.models))


def _model_card(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started_unix_s, "owned_by": "fewstep"}


@router.get("/v1/info")
async def info(request: Request) -> dict[str, Any]:
    """What each model allows, for clients that build their controls from it."""
    service = _service(request)
    return {
        "server": "fewstep",
        "version": request.app.version,
        "models": [_model_info(m) for m in service.runtime.models.values()],
        "limits": {
            "max_n": service.settings.max_n,
            "max_prompt_chars": MAX_PROMPT_CHARS,
            "max_body_bytes": service.settings.max_body_bytes,
        },
    }


def _model_info(model: Model) -> dict[str, Any]:
    spec = model.spec
    return {
        "name": model.name,
        "engine": model.engine_name,
        "control": model.has_control,
        "steps": list(spec.steps),
        "max_steps": spec.spacing.max_steps if spec.spacing else None,
        "default_steps": spec_steps(None, spec),
        "sizes": [list(size) for size in spec.sizes],
        "spec": spec.to_json(),
    }


@router.post("/v1/images/generations")
async def images(body: ImagesBody, request: Request) -> Response:
    service = _service(request)
    job = images_job(body, service.runtime.models)
    result, files = await service.make(job, request)
    if body.response_format == "url":
        names = [service.store.put(file, job.format, time.monotonic()) for file in files.files]
        data = [{"url": str(request.url_for("picture", name=name))} for name in names]
    else:
        data = [{"b64_json": text} for text in files.base64()]
    height, width = result.pictures[0].shape[:2]
    reply = {
        "created": int(time.time()),
        "data": [{**entry, "seed": seed} for entry, seed in zip(data, result.seeds, strict=True)],
        "size": f"{width}x{height}",
        "output_format": job.format,
        "background": "opaque",
        **account(result, files),
    }
    return JSONResponse(reply, headers={"x-fewstep-seed": str(result.seeds[0])})


@router.post("/v1/generate")
async def generate(body: GenerateBody, request: Request) -> Response:
    """Pictures with seeds, timings and notes; as server-sent events with progress if the caller accepts those."""
    service = _service(request)
    job = generate_job(body, service.runtime.models)
    if "text/event-stream" in request.headers.get("accept", ""):
        ticket = service.submit(job)
        forget = BackgroundTask(service.runtime.cancel, ticket.id)  # where the caller left before the first event
        return StreamingResponse(_progress(service, job, ticket), media_type="text/event-stream", background=forget)
    result, files = await service.make(job, request)
    return JSONResponse(_native(result, files, job))


async def _progress(service: Service, job: Job, ticket: Ticket) -> AsyncIterator[str]:
    async def finished(result: Result) -> dict[str, Any]:
        return _native(result, await service.encode(result, job), job)

    def failed(error: Exception) -> dict[str, Any]:
        return errors.answer(error)[1]

    stream = streaming.events(service.runtime, ticket)
    async for frame in streaming.server_sent(stream, finished, failed):
        yield frame


def _native(result: Result, files: Encoded, job: Job) -> dict[str, Any]:
    height, width = result.pictures[0].shape[:2]
    pictures = [{"b64": b, "seed": seed} for b, seed in zip(files.base64(), result.seeds, strict=True)]
    return {"pictures": pictures, "format": job.format, "width": width, "height": height, **account(result, files)}

"""The application: routes of every API over one runtime. `create_app` takes any, so tests pass a fake engine's."""

import asyncio
import importlib.metadata
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.middleware.cors import CORSMiddleware

from fewstep.runtime.service.local import Runtime

from . import errors, live, routes_a1111, routes_models, routes_native, routes_openai
from .account import Account
from .gate import Gate
from .health import Health
from .jobs import Jobs
from .keys import KeyRing
from .metrics import Meters
from .pictures import Store
from .provenance import signatory
from .quota import Callers
from .service import Service, service_of
from .sessions import Sessions
from .settings import Settings
from .traces import Traces
from .visit import Door

PAGE = Path(__file__).parent / "page"
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
router = APIRouter()


def create_app(runtime: Runtime, settings: Settings = Settings()) -> FastAPI:  # noqa: B008
    """The web application over a runtime, which stays the caller's to close. It warms up once it is served."""
    health = Health(runtime)
    pool = ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="encode")
    meters = Meters(runtime, health)
    store = Store(settings.stored_bytes, settings.stored_s)
    callers = Callers(KeyRing(settings.api_keys, Path(settings.key_file) if settings.key_file else None))
    version = importlib.metadata.version("fewstep")
    signer = signatory(settings, version)
    jobs = Jobs(settings.stored_bytes, settings.stored_s)
    account = Account(meters, Traces() if settings.traces == "otlp" else None)
    door = Door(runtime, callers, settings.max_queue, meters.decided, lambda: account.reply_s)
    service = Service(
        runtime=runtime,
        settings=settings,
        health=health,
        meters=meters,
        store=store,
        pool=pool,
        started_unix_s=int(time.time()),
        callers=callers,
        door=door,
        account=account,
        signatory=signer,
        jobs=jobs,
        sessions=Sessions(),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(health.warm())
        yield
        health.drain()
        warming.cancel()
        await jobs.close()
        pool.shutdown()
        account.close()

    app = FastAPI(title="fewstep", version=version, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(Gate, settings=settings, callers=callers, account=account)
    if settings.origins:  # outside the gate: a browser asks without a key whether it may ask
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-fewstep-seed", "retry-after"],
        )
    for api in (routes_native, routes_openai, routes_a1111, routes_models):
        app.router.routes.extend(api.router.routes)
    app.router.routes.extend(router.routes)  # not `include_router`: routes inside one are looked for twice per call
    meters.add(live.install(app, settings))
    app.mount("/page", StaticFiles(directory=PAGE))
    errors.install(app)
    return app


@router.get("/", include_in_schema=False)
async def page() -> Response:
    return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": _PAGE_POLICY})


@router.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, Any]:
    return service_of(request).health.check()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    content, media_type = service_of(request).meters.render()
    return Response(content, media_type=media_type)


@router.get("/pictures/{name}")
async def picture(name: str, request: Request) -> Response:
    """A picture made with `response_format: "url"`; its name is the permission to see it."""
    file = service_of(request).store.get(name, time.monotonic())
    return Response(file, media_type=MEDIA[name.rpartition(".")[2]], headers={"Cache-Control": "private, max-age=3600"})

"""The native API: every knob of the runtime, and progress as server-sent events."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask

from fewstep.runtime.events import Result
from fewstep.runtime.local import Model
from fewstep.runtime.request import MAX_PROMPT_CHARS, spec_steps
from fewstep.runtime.ticket import Ticket

from . import errors, streaming
from .pictures import Encoded, account
from .service import Service, service_of
from .wire import GenerateBody, Job, generate_job

router = APIRouter()


@router.get("/v1/info")
async def info(request: Request) -> dict[str, Any]:
    """What each model allows, for clients that build their controls from it."""
    service = service_of(request)
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


@router.post("/v1/generate")
async def generate(body: GenerateBody, request: Request) -> Response:
    """Pictures with seeds, timings and notes; as server-sent events with progress if the caller accepts those."""
    service = service_of(request)
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

"""The native API: every knob of the runtime, progress as server-sent events, and jobs that outlive their connection."""

import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response, StreamingResponse
from starlette.background import BackgroundTask

from fewstep.runtime.engine import DENOISER_IMAGE_PROMPT, ENCODER, IMAGE_PROMPT
from fewstep.runtime.sampling.events import Failed, Finished, Progress, Result
from fewstep.runtime.sampling.request import MAX_PROMPT_CHARS, spec_steps
from fewstep.runtime.service.local import Model
from fewstep.runtime.service.ticket import Ticket

from . import errors, streaming
from .errors import Refused
from .jobs import Entry, Told
from .json_routes import JSONReply, JSONRoute
from .pictures import Encoded, account, preview_file
from .service import Service, caller_of, service_of
from .wire import Job
from .wire_native import GenerateBody, generate_job

router = APIRouter(route_class=JSONRoute)
MAX_EVENT_DIGITS = 18
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255)]
LastEventId = Annotated[str | None, Header()]


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
    spec, offers = model.spec, model.offers
    return {
        "name": model.name,
        "engine": model.engine_name,
        "control": model.has_control,
        "control_kinds": list(spec.control_kinds),
        "edit": ENCODER in offers.roles,
        "image_prompt": {IMAGE_PROMPT, DENOISER_IMAGE_PROMPT} <= offers.roles,
        "negative_mode": offers.negative,
        "loras": list(offers.loras),
        "steps": list(spec.steps),
        "max_steps": spec.spacing.max_steps if spec.spacing else None,
        "default_steps": spec_steps(None, spec),
        "sizes": [list(size) for size in spec.sizes],
        "spec": spec.to_json(),
    }


@router.post("/v1/generate")
async def generate(body: GenerateBody, request: Request, idempotency_key: IdempotencyKey = None) -> Response:
    """Pictures with seeds, timings and notes; as server-sent events with progress if the caller accepts those.

    With an Idempotency-Key it is a job: it goes on when the caller leaves, and the same call again gets its result.
    """
    service = service_of(request)
    job = await _read(service, body)
    streamed = "text/event-stream" in request.headers.get("accept", "")
    if idempotency_key is not None:
        entry, headers = _begin(service, job, body, request, idempotency_key)
        if streamed:
            return _stream(_frames(entry, -1), headers=headers)
        told = await entry.outcome()
        return JSONReply(told.data, told.status, {**told.headers, **headers})
    if streamed:
        ticket = service.submit(job)
        forget = BackgroundTask(service.runtime.cancel, ticket.id)  # where the caller left before the first event
        return _stream(_told_frames(service, job, ticket), background=forget)
    result, files = await service.make(job, request)
    return JSONReply(_reply(result, files, job))


@router.post("/v1/jobs", status_code=202)
async def begin_job(body: GenerateBody, request: Request, idempotency_key: IdempotencyKey = None) -> Response:
    """Begin a job and return at once: its id, under which it can be looked up, followed and cancelled."""
    service = service_of(request)
    entry, headers = _begin(service, await _read(service, body), body, request, idempotency_key)
    return JSONReply(entry.status(), 202, {**headers, "Location": f"/v1/jobs/{entry.id}"})


@router.get("/v1/jobs/{job_id}")
async def look_up_job(job_id: str, request: Request) -> dict[str, Any]:
    """Its status: queued, running with its last progress, finished with the result, failed or cancelled."""
    return service_of(request).jobs.find(job_id, caller_of(request)).status()


@router.get("/v1/jobs/{job_id}/events")
async def follow_job(job_id: str, request: Request, last_event_id: LastEventId = None) -> Response:
    """Its events from the first on, or from the one after `Last-Event-ID`. Leaving ends nothing."""
    entry = service_of(request).jobs.find(job_id, caller_of(request))
    return _stream(_frames(entry, _after(last_event_id or "")))


@router.delete("/v1/jobs/{job_id}")
async def cancel_job(job_id: str, request: Request) -> dict[str, Any]:
    """Cancel it. One that has ended is forgotten, pictures and all."""
    service = service_of(request)
    entry = service.jobs.find(job_id, caller_of(request))
    if entry.ended:
        service.jobs.forget(entry)
    else:
        service.runtime.cancel(entry.id)
        await entry.outcome()
    return {key: value for key, value in entry.status().items() if key != "result"}


def _after(given: str) -> int:
    """The number in a `Last-Event-ID`; -1, so from the first event on, where it is no number of ours.

    Errors: `Refused` 400 where it has more digits than any number of events.
    """
    if not (given.isascii() and given.isdigit()):
        return -1
    if len(given) > MAX_EVENT_DIGITS:
        said = f"Last-Event-ID has {len(given)} digits; send the id of an event, of at most {MAX_EVENT_DIGITS}"
        raise Refused(400, "invalid_value", said, param="Last-Event-ID")
    return int(given)


async def _read(service: Service, body: GenerateBody) -> Job:
    models = service.runtime.models
    return await service.aside(generate_job, body, models) if body.has_pictures() else generate_job(body, models)


def _begin(
    service: Service, job: Job, body: GenerateBody, request: Request, key: str | None
) -> tuple[Entry, dict[str, str]]:
    """(a job begun, or the one that the key began before; headers that say which)."""
    owner = caller_of(request)
    digest = hashlib.sha256(body.model_dump_json().encode()).hexdigest()
    if key is not None and (before := service.jobs.replay((owner, key), digest)) is not None:
        return before, {"Idempotency-Replayed": "true"}
    ticket = service.submit(job)
    named = None if key is None else (owner, key)
    entry = Entry(ticket.id, owner, job.model, int(time.time()), named, digest)
    service.jobs.start(entry, _told(service, job, ticket))
    return entry, {}


async def _told(service: Service, job: Job, ticket: Ticket) -> AsyncIterator[Told]:
    """`progress` per step, then one of `finished` or `failed`."""
    async with aclosing(streaming.events(service.runtime, ticket)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Progress):
                yield Told("progress", await _progress(service, event))
            elif isinstance(event, Failed):
                yield _failed(event.error)
            elif isinstance(event, Finished):
                try:
                    last = Told("finished", _reply(event.result, await service.encode(event.result, job), job))
                except Exception as error:
                    last = _failed(error)
                yield last


async def _progress(service: Service, event: Progress) -> dict[str, Any]:
    said = {"picture": event.picture, "step": event.step, "steps": event.steps}
    if event.preview is None:
        return said
    return {**said, "preview_b64": await service.aside(preview_file, event.preview, "png")}


def _failed(error: Exception) -> Told:
    status, body, headers = errors.answer(error)
    return Told("failed", body, status, headers)


async def _told_frames(service: Service, job: Job, ticket: Ticket) -> AsyncIterator[str]:
    async with aclosing(_told(service, job, ticket)) as stream:  # type: ignore[type-var]
        async for told in stream:
            yield streaming.frame(told.name, told.data)


async def _frames(entry: Entry, after: int) -> AsyncIterator[str]:
    async for number, told in entry.follow(after):
        yield streaming.frame(told.name, told.data, number)


def _stream(
    frames: AsyncIterator[str], headers: dict[str, str] | None = None, background: BackgroundTask | None = None
) -> Response:
    headers = {**streaming.HEADERS, **(headers or {})}
    return StreamingResponse(frames, media_type="text/event-stream", headers=headers, background=background)


def _reply(result: Result, files: Encoded, job: Job) -> dict[str, Any]:
    height, width = result.pictures[0].shape[:2]
    pictures = [{"b64": b, "seed": seed} for b, seed in zip(files.base64(), result.seeds, strict=True)]
    return {"pictures": pictures, "format": job.format, "width": width, "height": height, **account(result, files)}

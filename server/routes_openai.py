"""OpenAI's images API: models, generations and edits, whole or streamed."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from pydantic import ValidationError
from starlette.background import BackgroundTask
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect

from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.events import Failed, Finished, Progress, Result
from fewstep.runtime.service.ticket import Ticket

from . import streaming
from .errors import Refused, answer
from .json_routes import JSONReply, JSONRoute
from .pictures import account, preview_file
from .service import Service, service_of
from .wire import Job, find_model
from .wire_openai import EditsBody, ImagesBody, Upload, edits_job, images_job, named_quality

router = APIRouter(route_class=JSONRoute)
MAX_FILES, MAX_FIELDS, MAX_FIELD_BYTES = 17, 64, 2**20
USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""Clients read it of every event; nothing is billed by the token here."""
_FILE = {"type": "string", "format": "binary"}


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    service = service_of(request)
    return {"object": "list", "data": [model_card(service, name) for name in service.runtime.models]}


@router.get("/v1/models/{name}")
async def model(name: str, request: Request) -> dict[str, Any]:
    service = service_of(request)
    return model_card(service, find_model(name, service.runtime.models))


def model_card(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started_unix_s, "owned_by": "fewstep"}


@router.post("/v1/images/generations")
async def images(body: ImagesBody, request: Request) -> Response:
    service = service_of(request)
    return await _answer(service, images_job(body, service.runtime.models), body, request, "image_generation")


def _edits_schema() -> dict[str, Any]:
    """The form of an edit, for the schema: its files are read by hand, because `image` comes under two names."""
    schema = EditsBody.model_json_schema()
    files = {"image": _FILE, "image[]": {"type": "array", "items": _FILE}, "mask": _FILE}
    schema["properties"] |= files
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@router.post("/v1/images/edits", openapi_extra=_edits_schema())
async def edits(request: Request) -> Response:
    """Multipart: `image` or `image[]`, perhaps a `mask`, and the fields of `EditsBody`."""
    service = service_of(request)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(400, "invalid_type", "the body must be sent as multipart/form-data")
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
            fields, pictures, mask = await _read_form(form)
    except ClientDisconnect:  # nobody reads the answer, but the log says whose fault it was, as of JSON bodies
        raise Refused(400, "invalid_request", "the caller left before the form was whole") from None
    try:
        body = EditsBody.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]) from error
    job = await service.aside(edits_job, body, pictures, mask, service.runtime.models)
    return await _answer(service, job, body, request, "image_edit")


async def _read_form(form: FormData) -> tuple[dict[str, str], list[Upload], Upload | None]:
    """(text fields, pictures in order, mask).

    Errors: `InvalidRequest` for a part that is a file and should be text, or the other way round, or came twice.
    """
    fields: dict[str, str] = {}
    pictures: list[Upload] = []
    mask = None
    for name, part in form.multi_items():
        is_file = name in ("image", "image[]", "mask")
        if isinstance(part, UploadFile) is not is_file:
            raise InvalidRequest(name, f"{name} is sent as {'text' if is_file else 'a file'}; send it the other way")
        if name in fields or (name == "mask" and mask is not None):
            raise InvalidRequest(name, f"{name} is given twice; send it once")
        if not isinstance(part, UploadFile):
            fields[name] = part
        elif name == "mask":
            mask = Upload(name, await part.read())
        else:
            pictures.append(Upload(name, await part.read()))
    return fields, pictures, mask


async def _answer(service: Service, job: Job, body: ImagesBody, request: Request, kind: str) -> Response:
    if body.stream:
        ticket = service.submit(job)
        forget = BackgroundTask(service.runtime.cancel, ticket.id)  # where the caller left before the first event
        frames = _streamed(service, job, ticket, body, kind)
        return StreamingResponse(frames, media_type="text/event-stream", headers=streaming.HEADERS, background=forget)
    result, files = await service.make(job, request)
    if body.response_format == "url":
        names = [service.store.put(file, job.format, time.monotonic()) for file in files.files]
        data = [{"url": str(request.url_for("picture", name=name))} for name in names]
    else:
        data = [{"b64_json": text} for text in files.base64()]
    reply = {
        "created": int(time.time()),
        "data": [{**entry, "seed": seed} for entry, seed in zip(data, result.seeds, strict=True)],
        **_about(result, job, body),
        **account(result, files),
    }
    return JSONReply(reply, headers={"x-fewstep-seed": str(result.seeds[0])})


def _about(result: Result, job: Job, body: ImagesBody) -> dict[str, Any]:
    height, width = result.pictures[0].shape[:2]
    return {"size": f"{width}x{height}", **_form(job, body)}


def _form(job: Job, body: ImagesBody) -> dict[str, Any]:
    return {"quality": named_quality(body.quality), "background": "opaque", "output_format": job.format}


async def _streamed(service: Service, job: Job, ticket: Ticket, body: ImagesBody, kind: str) -> AsyncIterator[str]:
    """Previews as `partial_image`, then one `completed` per picture, or one `error`."""
    width, height = job.request.width or 0, job.request.height or 0
    sent: dict[int, int] = {}
    async with aclosing(streaming.events(service.runtime, ticket)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Progress) and event.preview is not None:
                if event.step not in partial_steps(event.steps, body.partial_images or 0):
                    continue
                index = sent[event.picture] = sent.get(event.picture, -1) + 1
                file = await service.aside(preview_file, event.preview, job.format, (width, height))
                data = {"b64_json": file, "size": f"{width}x{height}", "partial_image_index": index}
                data["picture"] = event.picture
                yield _frame(f"{kind}.partial_image", {**_form(job, body), **data})
            elif isinstance(event, Failed):
                yield _failed(event.error)
            elif isinstance(event, Finished):
                try:
                    files = await service.encode(event.result, job)
                except Exception as error:
                    yield _failed(error)
                    return
                for number, text in enumerate(files.base64()):
                    data = {"b64_json": text, "picture": number, "seed": event.result.seeds[number], "usage": USAGE}
                    yield _frame(f"{kind}.completed", {**_about(event.result, job, body), **data})


def partial_steps(steps: int, partial: int) -> set[int]:
    """Which of the steps 1 to `steps` are shown as the `partial` pictures before the last one, evenly spread."""
    return {-(-steps * (i + 1) // (partial + 1)) for i in range(partial)}


def _frame(name: str, data: dict[str, Any]) -> str:
    return streaming.frame(name, {"type": name, "created_at": int(time.time()), **data})


def _failed(error: Exception) -> str:
    return streaming.frame("error", {"type": "error", **answer(error)[1]})

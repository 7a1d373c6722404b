"""OpenAI's images API: models and generations."""

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from .pictures import account
from .service import Service, service_of
from .wire import ImagesBody, find_model, images_job

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    service = service_of(request)
    return {"object": "list", "data": [_model_card(service, name) for name in service.runtime.models]}


@router.get("/v1/models/{name}")
async def model(name: str, request: Request) -> dict[str, Any]:
    service = service_of(request)
    return _model_card(service, find_model(name, service.runtime.models))


def _model_card(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started_unix_s, "owned_by": "fewstep"}


@router.post("/v1/images/generations")
async def images(body: ImagesBody, request: Request) -> Response:
    service = service_of(request)
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

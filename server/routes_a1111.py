"""The part of AUTOMATIC1111's web UI API that Open WebUI, SillyTavern and plugins call.

Its clients believe in one job and one model at a time. Here progress, interrupt and options are each caller's own.
"""

import json
import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request

from fewstep.runtime.errors import Cancelled, InvalidRequest
from fewstep.runtime.sampling.events import Result
from fewstep.runtime.sampling.images import PARAMETERS, read_metadata
from fewstep.runtime.sampling.infotext import read_infotext

from . import streaming
from .pictures import metadata, preview_file
from .service import Service, caller_of, service_of
from .sessions import Running, Seat
from .units import models_of
from .uploads import file_bytes
from .wire import Body as StrictBody
from .wire import find_model
from .wire_a1111 import A1111Body, Call, Img2ImgBody, a1111_job, model_of

router = APIRouter(tags=["a1111"])
TaskId = Annotated[str | None, Query()]
_NOT_SENT_BACK = ("alwayson_scripts", "override_settings")


@router.post("/sdapi/v1/txt2img")
async def txt2img(body: A1111Body, request: Request) -> dict[str, Any]:
    return await _make(body, request)


@router.post("/sdapi/v1/img2img")
async def img2img(body: Img2ImgBody, request: Request) -> dict[str, Any]:
    return await _make(body, request)


async def _make(body: A1111Body, request: Request) -> dict[str, Any]:
    service = service_of(request)
    seat = service.sessions.of(caller_of(request))
    call = await service.aside(a1111_job, body, seat.model, service.runtime.models, seat.live_previews)
    result = await _run(service, call, seat, body.force_task_id or "", request)
    files = await service.encode(result, call.job)
    images = files.base64() if body.send_images else []
    return {"images": images, "parameters": _sent(body), "info": json.dumps(_info(result, call, body))}


def _sent(body: A1111Body) -> dict[str, Any]:
    """The call's own settings, without its scripts, and without its pictures unless they are asked for."""
    sent = {name: getattr(body, name) for name in type(body).model_fields if name not in _NOT_SENT_BACK}
    if isinstance(body, Img2ImgBody) and not body.include_init_images:
        sent |= {"init_images": None, "mask": None}
    return sent


async def _run(service: Service, call: Call, seat: Seat, task_id: str, request: Request) -> Result:
    """The result of a job that its caller may ask after and interrupt meanwhile."""
    ticket = service.submit(call.job)
    run = Running(ticket.id, task_id, call.job.request.n)
    ticket.listen(run.note)
    seat.running.append(run)
    try:
        return await streaming.result(service.runtime, ticket, request)
    except Cancelled:
        seat.left(run, time.monotonic())
        raise
    finally:
        seat.running.remove(run)


def _info(result: Result, call: Call, body: A1111Body) -> dict[str, Any]:
    """What A1111 calls the processed object, in the fields that clients read."""
    job, count = call.job, len(result.seeds)
    request = job.request
    height, width = result.pictures[0].shape[:2]
    texts = [metadata(result, job, seed)[PARAMETERS] for seed in result.seeds]
    negative = request.negative_prompt or ""
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * count,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * count,
        "seed": result.seeds[0],
        "all_seeds": list(result.seeds),
        "width": width,
        "height": height,
        "sampler_name": job.sampler,
        "cfg_scale": result.guidance,
        "steps": result.steps,
        "batch_size": body.batch_size,
        "sd_model_name": result.model,
        "sd_model_hash": None,
        "denoising_strength": None if request.edit is None else request.edit.strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "notes": [*call.notes, *result.notes],
    }


@router.get("/sdapi/v1/progress")
async def progress(request: Request, task_id: TaskId = None, skip_current_image: bool = False) -> dict[str, Any]:
    """The caller's own job that has run longest, or the one sent with this `force_task_id`."""
    service = service_of(request)
    run = service.sessions.of(caller_of(request)).current(task_id)
    preview = None if run is None or skip_current_image else run.preview
    image = None if preview is None else await service.aside(preview_file, preview, "png")
    return {
        "progress": 0.0 if run is None else run.progress,
        "eta_relative": 0.0 if run is None else run.eta_s(time.monotonic()),
        "state": _state(run),
        "current_image": image,
        "textinfo": None,
    }


def _state(run: Running | None) -> dict[str, Any]:
    begun = "0" if run is None else time.strftime("%Y%m%d%H%M%S", time.localtime(run.begun_unix_s))
    return {
        "skipped": False,
        "interrupted": run is not None and run.interrupted,
        "job": "" if run is None else run.task_id,
        "job_count": 0 if run is None else 1,
        "job_timestamp": begun,
        "job_no": 0,
        "sampling_step": 0 if run is None else run.step,
        "sampling_steps": 0 if run is None else run.steps,
    }


@router.post("/sdapi/v1/interrupt")
async def interrupt(request: Request, task_id: TaskId = None) -> dict[str, Any]:
    """End the caller's own job, as `progress` finds it; nobody else's."""
    service = service_of(request)
    run = service.sessions.of(caller_of(request)).interrupt(task_id, time.monotonic())
    if run is not None:
        service.runtime.cancel(run.ticket_id)
    return {}


@router.get("/sdapi/v1/options")
async def options(request: Request) -> dict[str, Any]:
    return _options(service_of(request), service_of(request).sessions.of(caller_of(request)))


@router.post("/sdapi/v1/options")
async def set_options(request: Request, changes: Annotated[dict[str, Any], Body()]) -> None:
    """Set the caller's own model, or whether `progress` shows pictures. What is sent back as it was changes nothing."""
    service = service_of(request)
    seat = service.sessions.of(caller_of(request))
    now = _options(service, seat)
    for name, value in changes.items():
        if name not in ("sd_model_checkpoint", "live_previews_enable") and now.get(name, value) != value:
            raise InvalidRequest(name, f"{name} is {str(value)[:40]!r}; it is fixed here: leave it out")
        if name not in now:
            raise InvalidRequest(name, f"{name} is not an option here; they are {', '.join(now)}")
    if (model := changes.get("sd_model_checkpoint")) is not None:
        seat.model = model_of(model, service.runtime.models)
    if type(previews := changes.get("live_previews_enable", seat.live_previews)) is not bool:
        raise InvalidRequest("live_previews_enable", "live_previews_enable must be true or false")
    seat.live_previews = previews


def _options(service: Service, seat: Seat) -> dict[str, Any]:
    models = service.runtime.models
    return {
        "sd_model_checkpoint": seat.model if seat.model in models else find_model(None, models),
        "sd_checkpoint_hash": "",
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
        "live_previews_enable": seat.live_previews,
    }


@router.get("/sdapi/v1/sd-models")
async def sd_models(request: Request) -> list[dict[str, Any]]:
    unknown = {"hash": None, "sha256": None, "config": None}
    return [
        {"title": name, "model_name": name, "filename": name, **unknown} for name in service_of(request).runtime.models
    ]


@router.get("/sdapi/v1/samplers")
async def samplers(request: Request) -> list[dict[str, Any]]:
    """A model has the sampler that it was made with; these are those of the models served."""
    names = sorted({model.spec.sampler for model in service_of(request).runtime.models.values()})
    return [{"name": name, "aliases": [], "options": {}} for name in names]


@router.get("/sdapi/v1/schedulers")
async def schedulers() -> list[dict[str, Any]]:
    automatic = {"name": "automatic", "label": "Automatic", "aliases": None}
    return [{**automatic, "default_rho": -1, "need_inner_model": False}]


@router.get("/sdapi/v1/upscalers")
async def upscalers() -> list[dict[str, Any]]:
    return [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 4}]


@router.get("/sdapi/v1/loras")
async def loras(request: Request) -> list[dict[str, Any]]:
    """Those that the bundles register; a prompt asks for one by `<lora:name:weight>`."""
    names = {name for model in service_of(request).runtime.models.values() for name in model.offers.loras}
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in sorted(names)]


@router.get("/sdapi/v1/latent-upscale-modes")
@router.get("/sdapi/v1/sd-vae")
@router.get("/sdapi/v1/sd-modules")
async def none_here() -> list[dict[str, Any]]:
    """Lists that are empty here: a model has the decoder it was made with, and there is no second pass."""
    return []


class PngInfoBody(StrictBody):
    """`POST /sdapi/v1/png-info`."""

    image: str


@router.post("/sdapi/v1/png-info")
async def png_info(body: PngInfoBody, request: Request) -> dict[str, Any]:
    """How a picture was made, from the text in its file."""
    items = await service_of(request).aside(read_metadata, file_bytes(body.image, "image"))
    text = items.get(PARAMETERS, "")
    return {"info": text, "items": items, "parameters": read_infotext(text) if text else {}}


@router.get("/controlnet/version")
async def controlnet_version() -> dict[str, int]:
    """The API version of sd-webui-controlnet whose units are understood."""
    return {"version": 3}


@router.get("/controlnet/model_list")
async def controlnet_models(request: Request) -> dict[str, Sequence[str]]:
    models = [model for model in service_of(request).runtime.models.values() if model.has_control]
    return {"model_list": sorted({name for model in models for name in models_of(model)})}


@router.get("/controlnet/module_list")
async def controlnet_modules() -> dict[str, Any]:
    """Preprocessors: none; the picture to follow is sent as it is."""
    return {"module_list": ["none"], "module_detail": {}}

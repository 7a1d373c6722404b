"""From a request to pictures, plainly: check it, then its steps one after the other, nothing shared, no threads.

This loop is the definition; the scheduled one (`runtime.service.local`) is tested equal to it.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.models.bundle import Bundle
from fewstep.models.spec import SamplerSpec

from ..engine import Engine
from .edits import Source, clip_pixels, latent_mask, picture_tensor
from .events import Result, Timings
from .inflight import Canvas, Live, Part
from .plan import Plan
from .request import GenerateRequest, Limits, resolve
from .request_methods import is_plain
from .rng import NoiseStream
from .served import Served, serve
from .text import Bare, Prompts
from .work import PREPARE, decode_rows, step_rows


def admit(
    model: Served,
    request: GenerateRequest,
    limits: Limits | None = None,
    begun_s: float = 0.0,
    models: Mapping[str, Served] | None = None,
    change: Callable[[Plan], Plan] | None = None,
) -> Live:
    """Check a request and prepare all that needs no engine. models: all that are served here, by name. change: made to
    its plan (rows given to experts).

    Errors: `InvalidRequest` naming the field.
    """
    models = models or {}
    offers = None if is_plain(request) else model.offers(models)
    request = resolve(request, model.spec, limits or Limits(), offers)
    plan = model.plan(request, offers.models if offers else None)
    if change is not None:
        plan = change(plan)
    notes: list[str] = []
    parts = {model.name: _part(model, request, request.prompt, None in plan.avoiding, notes)}
    for name in plan.models:
        read = request.edit.prompt if request.edit is not None and name == request.invert else request.prompt
        parts[name] = _part(models.get(name, model), request, read, name in plan.avoiding, notes)
    device = model.engine.capabilities.device
    edge = None if request.control is None else edge_tensor(request.control.edge).to(device)
    source = None if request.edit is None and request.image_prompt is None else _source(request, model, device)
    shape = latent_shape(request, model.spec)
    canvases = []
    for i in range(request.n):
        noise = NoiseStream(request.seed + i)
        start = noise.draw(shape).to(device)
        x = start if plan.start_scale == 1.0 else start * plan.start_scale
        canvases.append(Canvas(request.seed + i, noise, x, start=start))
    return Live(model, request, plan, parts, tuple(dict.fromkeys(notes)), edge, source, canvases, begun_s)


def _part(model: Served, request: GenerateRequest, read: str, avoids: bool, notes: list[str]) -> Part:
    """What a model needs for its rows of a plan: the text that they read and, where some avoid one, that; `notes` gets
    what the user should know about them."""
    texts: tuple[str, ...] = (read, negative_text(request, model.spec)) if avoids else (read,)
    embedded = {}
    for text, where in zip(texts, ("prompt", "negative_prompt"), strict=False):
        notes += model.prompts.tokens(text, where).notes
        if (found := model.prompts.embeddings.get(text)) is not None:
            embedded[text] = found
    device = model.engine.capabilities.device
    fixed = {name: value.to(device) for name, value in size_conditions(request, model.spec).items()}
    return Part(model, texts, fixed, embedded)


def _source(request: GenerateRequest, model: Served, device: str) -> Source:
    """The pictures that a request brings, as tensors."""
    source, edit, prompt = Source(layers=model.image_layers), request.edit, request.image_prompt
    if edit is not None:
        source.picture = picture_tensor(edit.image).to(device)
        source.mask = None if edit.mask is None else latent_mask(edit.mask, model.spec.latent.factor).to(device)
    if prompt is not None:
        source.pixels = clip_pixels(prompt.image, model.image_side).to(device)
    return source


def negative_text(request: GenerateRequest, spec: SamplerSpec) -> str:
    """The negative prompt, empty where there is none, as the model's text inputs read it."""
    text = request.negative_prompt or ""
    return Bare(text) if any(read.keep is not None for read in spec.text) else text


def finished(live: Live, now_s: float) -> Result:
    """The result of a request whose pictures are all there."""
    pictures = tuple(canvas.picture for canvas in live.canvases if canvas.picture is not None)
    if len(pictures) != len(live.canvases):
        raise ValueError("a picture is missing")
    started = live.begun_s if live.started_s is None else live.started_s
    spent = live.spent_s
    timings = Timings(
        queue_s=started - live.begun_s,
        text_s=spent["text"],
        denoise_s=spent["denoise"],
        decode_s=spent["decode"],
        total_s=now_s - live.begun_s,
        predicted_s=live.predicted_s,
    )
    request = live.request
    assert request.guidance is not None
    seeds = tuple(canvas.seed for canvas in live.canvases)
    return Result(
        pictures, seeds, len(live.plan.rows), request.guidance, live.plan.nfe, live.model.name, live.notes, timings
    )


def run_request(
    engine: Engine,
    bundle: Bundle,
    request: GenerateRequest,
    *,
    prompts: Prompts | None = None,
    watch: Callable[[int, int, Tensor], None] | None = None,
    models: Mapping[str, Served] | None = None,
) -> Result:
    """A whole request by the dull loop, in the calling thread. `watch(picture, k, x)` sees each latent after k rows,
    what it begins with as 0.

    prompts: to keep embeddings between calls; made anew without it. models: others that may take part, by name.

    Errors: `InvalidRequest` naming the field; `EngineFailed`.
    """
    model = serve(bundle, engine, prompts or Prompts(bundle, capacity=8))
    live = admit(model, request, begun_s=time.monotonic(), models={**(models or {}), model.name: model})
    live.started_s = time.monotonic()
    for work in live.before:
        _timed(live, work.kind, lambda w=work: PREPARE[w.role](live.parts[w.model].model, [live]))  # type: ignore[misc]
    for number, canvas in enumerate(live.canvases):
        _timed(live, "denoise", lambda n=number, c=canvas: _run_rows(live, c, n, watch))  # type: ignore[misc]
        (error,) = _timed(live, "decode", lambda c=canvas: decode_rows(model, [(live, c)]))  # type: ignore[misc]
        if error is not None:
            raise error
    return finished(live, time.monotonic())


def _run_rows(live: Live, canvas: Canvas, number: int, watch: Callable[[int, int, Tensor], None] | None) -> None:
    """The dull loop: one picture, its rows one after the other, nothing shared."""
    if watch is not None:
        watch(number, 0, canvas.x)
    for row in live.plan.rows:
        (error,) = step_rows(live.part(row).model, [(live, canvas)])
        if error is not None:
            raise error
        if watch is not None:
            watch(number, canvas.step, canvas.x)


def edge_tensor(edge: Any) -> Tensor:
    """[H, W, 3] uint8 array -> [3, H, W] float32 in [0, 1]."""
    return torch.tensor(edge, dtype=torch.float32).permute(2, 0, 1).contiguous() / 255.0


def latent_shape(request: GenerateRequest, spec: SamplerSpec) -> tuple[int, int, int]:
    """[C, h, w] of a resolved request."""
    if request.width is None or request.height is None:
        raise ValueError("latent_shape takes a resolved request")
    factor = spec.latent.factor
    return spec.latent.channels, request.height // factor, request.width // factor


def size_conditions(request: GenerateRequest, spec: SamplerSpec) -> dict[str, Tensor]:
    """What the network is told of a resolved request's size, without batch: `size_ids` as `spec.size_ids` says."""
    if spec.size_ids is None:
        return {}
    height, width = float(request.height or 0), float(request.width or 0)
    ids = {"sdxl": (height, width, 0.0, 0.0, height, width), "pixart": (height, width, height / width)}
    return {"size_ids": torch.tensor(ids[spec.size_ids])}


def _timed(live: Live, stage: str, call: Callable[[], Any]) -> Any:
    start = time.monotonic()
    out = call()
    live.spent_s[stage] += time.monotonic() - start
    return out

"""From a request to pictures, plainly: check it, then its steps one after the other, nothing shared, no threads.

This loop is the definition; the scheduled one (`runtime.local`) is tested equal to it.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.models.bundle import Bundle
from fewstep.models.spec import SamplerSpec

from .engine import Engine
from .errors import EngineFailed, InvalidRequest
from .events import Result, Timings
from .plan import Plan
from .request import GenerateRequest, Limits, resolve
from .rng import NoiseStream
from .step import Conditions, Features, History, RowState, advance
from .text import Bare, Prompts
from .work import Canvas, Live, Served, decode_rows, encode_texts


def admit(model: Served, request: GenerateRequest, limits: Limits | None = None, begun_s: float = 0.0) -> Live:
    """Check a request and prepare all that needs no engine.

    Errors: `InvalidRequest` naming the field.
    """
    request = resolve(request, model.spec, limits or Limits())
    if request.control is not None and not model.has_control:
        raise InvalidRequest(
            "control", f"control needs a ControlNet or an adapter; model {model.name!r} has none: leave it out"
        )
    plan = model.plan(request)
    texts: tuple[str, ...] = (request.prompt,)
    if any(row.pair for row in plan.rows):
        texts = (request.prompt, negative_text(request, model.spec))
    notes: list[str] = []
    for text, where in zip(texts, ("prompt", "negative_prompt"), strict=False):
        notes += model.prompts.tokens(text, where).notes
    device = model.engine.capabilities.device
    edge = None if request.control is None else edge_tensor(request.control.edge).to(device)
    fixed = {name: value.to(device) for name, value in size_conditions(request, model.spec).items()}
    shape = latent_shape(request, model.spec)
    canvases = []
    for i in range(request.n):
        noise = NoiseStream(request.seed + i)
        canvases.append(Canvas(request.seed + i, noise, (noise.draw(shape) * plan.start_scale).to(device)))
    found = {text: model.prompts.embeddings.get(text) for text in texts}
    embedded = {text: value for text, value in found.items() if value is not None}
    return Live(model, request, plan, texts, tuple(dict.fromkeys(notes)), edge, fixed, canvases, embedded, begun_s)


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
    )
    request = live.request
    assert request.guidance is not None
    seeds = tuple(canvas.seed for canvas in live.canvases)
    steps = len(live.plan.rows)
    return Result(pictures, seeds, steps, request.guidance, live.plan.nfe, live.model.name, live.notes, timings)


def run_plan(
    engine: Engine,
    spec: SamplerSpec,
    plan: Plan,
    *,
    seed: int,
    cond: Conditions,
    shape: tuple[int, ...],
    uncond: Conditions | None = None,
    edge: Tensor | None = None,
    kind: int | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The dull loop: one picture's latent [C, h, w], its steps one after the other, nothing shared.

    shape: the latent's, without batch. cond, uncond: named conditions without batch (ctx [L, D], ...); edge [3, H, W]
    in [0, 1], and its kind as in `RowState`. `watch(k, x)` sees the latent after k steps, the start noise as 0.

    Errors: `EngineFailed` where the engine breaks or an output is not finite.
    """
    noise, history, features = NoiseStream(seed), History(), Features()
    x = (noise.draw(shape) * plan.start_scale).to(engine.capabilities.device)
    if watch is not None:
        watch(0, x)
    for row in plan.rows:
        state = RowState(row, x, cond, noise, uncond, edge, history, kind, features)
        (outcome,) = advance(engine, [state], spec)
        if isinstance(outcome, EngineFailed):
            raise outcome
        x = outcome
        if watch is not None:
            watch(row.index + 1, x)
    return x


def run_request(
    engine: Engine,
    bundle: Bundle,
    request: GenerateRequest,
    *,
    prompts: Prompts | None = None,
    watch: Callable[[int, int, Tensor], None] | None = None,
) -> Result:
    """A whole request by the dull loop, in the calling thread. `watch(picture, k, x)` sees each latent after k steps.

    prompts: to keep embeddings between calls; made anew without it.

    Errors: `InvalidRequest` naming the field; `EngineFailed`.
    """
    model = Served(bundle.name, bundle.spec, engine, prompts or Prompts(bundle, capacity=8))
    live = admit(model, request, begun_s=time.monotonic())
    live.started_s = time.monotonic()
    if live.missing:
        _timed(live, "text", lambda: encode_texts(model, [live]))
    for number, canvas in enumerate(live.canvases):
        seen = None if watch is None else _watching(watch, number)
        shape = tuple(canvas.x.shape)
        contexts: dict[str, Any] = {"cond": live.cond, "uncond": live.uncond, "kind": live.kind}
        canvas.x = _timed(
            live,
            "denoise",
            lambda c=canvas, s=shape, k=contexts, w=seen: run_plan(  # type: ignore[misc]
                engine, model.spec, live.plan, seed=c.seed, shape=s, edge=live.edge, watch=w, **k
            ),
        )
        (error,) = _timed(live, "decode", lambda c=canvas: decode_rows(model, [(live, c)]))  # type: ignore[misc]
        if error is not None:
            raise error
    return finished(live, time.monotonic())


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


def _watching(watch: Callable[[int, int, Tensor], None], number: int) -> Callable[[int, Tensor], None]:
    return lambda k, x: watch(number, k, x)


def _timed(live: Live, stage: str, call: Callable[[], Any]) -> Any:
    start = time.monotonic()
    out = call()
    live.spent_s[stage] += time.monotonic() - start
    return out

"""Shares of work on checked requests: encode texts, advance rows, decode pictures, each in one engine call.

Both loops are made of these: the dull one (`runtime.loop`) gives them one picture at a time, the scheduled one
(`runtime.local`) whatever the scheduler put together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.models.roles import picture_role, picture_steps
from fewstep.models.spec import SamplerSpec

from .engine import (
    ADAPTER,
    CONTROLNET,
    DECODER,
    DECODER_TINY,
    DENOISER_ADAPTER,
    DENOISER_CONTROL,
    TEXT,
    Engine,
)
from .errors import EngineFailed, FewstepError
from .events import Picture
from .jobs import DENOISE, Item, Work
from .plan import Plan, Row, compile_plan
from .request import GenerateRequest
from .rng import NoiseStream
from .step import Conditions, Features, History, RowState, advance, finite_rows, run_batch
from .text import Prompts

MOST_PLANS = 1000
"""Plans that a model keeps; a client may ask for any guidance scale."""


@dataclass(frozen=True)
class Served:
    """A model that can be asked: its contract, its engine, its prompts."""

    name: str
    spec: SamplerSpec
    engine: Engine
    prompts: Prompts
    _plans: dict[Any, Plan] = field(default_factory=dict, repr=False)

    def plan(self, request: GenerateRequest) -> Plan:
        """The plan of a resolved request; requests that sample alike share one."""
        control = request.control
        steered = None if control is None else (control.scale, control.start, control.end)
        key = request.steps, request.guidance, request.gamma, steered
        if key not in self._plans:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[key] = compile_plan(request, self.spec)
        return self._plans[key]

    @property
    def has_control(self) -> bool:
        roles = self.engine.capabilities.roles
        return {CONTROLNET, DENOISER_CONTROL} <= roles or {ADAPTER, DENOISER_ADAPTER} <= roles


@dataclass
class Canvas:
    """One picture on its way: its noise, its latent [C, h, w] after `step` steps, at last its pixels."""

    seed: int
    noise: NoiseStream
    x: Tensor
    history: History = field(default_factory=History)
    step: int = 0
    picture: Picture | None = None


@dataclass
class Live:
    """A checked request on its way. `texts` are the prompts it needs: its own and, under guidance, the negative one;
    `fixed` are the conditions that no text gives."""

    model: Served
    request: GenerateRequest
    plan: Plan
    texts: tuple[str, ...]
    notes: tuple[str, ...]
    edge: Tensor | None
    fixed: Conditions
    canvases: list[Canvas]
    embedded: dict[str, Conditions]
    begun_s: float
    started_s: float | None = None
    features: Features = field(default_factory=Features)
    spent_s: dict[str, float] = field(default_factory=lambda: {"text": 0.0, "denoise": 0.0, "decode": 0.0})

    @property
    def missing(self) -> list[str]:
        """Texts without an embedding yet."""
        return [text for text in self.texts if text not in self.embedded]

    @property
    def kind(self) -> int | None:
        """Which of the model's control kinds its picture is."""
        control, kinds = self.request.control, self.model.spec.control_kinds
        return None if control is None or control.kind is None else kinds.index(control.kind)

    @property
    def decoder(self) -> str:
        """The role that decodes its pictures: the tiny decoder at the step counts that the spec gives it."""
        tiny = len(self.plan.rows) in self.model.spec.tiny_decoder
        return DECODER_TINY if tiny and DECODER_TINY in self.model.engine.capabilities.roles else DECODER

    @property
    def cond(self) -> Conditions:
        return {**self.embedded[self.texts[0]], **self.fixed}

    @property
    def uncond(self) -> Conditions:
        """The other side of classifier-free guidance: the negative prompt, or nothing."""
        negative = self.embedded[self.texts[-1]]
        if self.model.spec.guidance.zero_empty and not self.texts[-1]:
            negative = {name: torch.zeros_like(value) for name, value in negative.items()}
        return {**negative, **self.fixed}


@torch.inference_mode()
def encode_texts(model: Served, lives: Sequence[Live]) -> int:
    """Give each request its embeddings, encoding every text once; returns how many were encoded."""
    fresh: dict[str, Any] = {text: model.prompts.embeddings.peek(text) for live in lives for text in live.missing}
    wanted = [text for text, value in fresh.items() if value is None]
    if wanted:
        for text, found in zip(wanted, embed(model.engine, model.prompts, wanted), strict=True):
            fresh[text] = found
            model.prompts.embeddings.put(text, found)
    for live in lives:
        live.embedded.update({text: fresh[text] for text in live.missing})
    return len(wanted)


@torch.inference_mode()
def embed(engine: Engine, prompts: Prompts, texts: Sequence[str]) -> list[Conditions]:
    """The conditions that the text role gives for each text, without batch.

    Errors: `EngineFailed` where one is not finite, or whatever the engine raises.
    """
    read = [prompts.tokens(text).feeds for text in texts]
    device = engine.capabilities.device
    feeds = {name: torch.tensor([tokens[name] for tokens in read], device=device) for name in read[0]}
    outs = [out.clone() for out in run_batch(engine, TEXT, feeds)]  # the engine may reuse its outputs
    for out in outs:
        if bad := [text for text, ok in zip(texts, finite_rows(out), strict=True) if not ok]:
            raise EngineFailed(f"engine {engine.name} gave a non-finite text embedding of {bad[0]!r}")
    return [dict(zip(engine.capabilities.text_outputs, values, strict=True)) for values in zip(*outs, strict=True)]


def step_rows(model: Served, rows: Sequence[tuple[Live, Canvas]]) -> list[EngineFailed | None]:
    """Advance each picture by one step, in one denoiser call. A picture that failed keeps its latent."""
    outcomes = advance(model.engine, [_row_state(live, canvas) for live, canvas in rows], model.spec)
    errors: list[EngineFailed | None] = []
    for (_, canvas), outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome, EngineFailed):
            errors.append(outcome)
            continue
        canvas.x = outcome
        canvas.step += 1
        errors.append(None)
    return errors


def decode_rows(model: Served, rows: Sequence[tuple[Live, Canvas]]) -> list[EngineFailed | None]:
    """Decode each picture's latent into its pixels, in one call of their decoder."""
    latents = torch.stack([canvas.x for _, canvas in rows])
    return _keep_pictures(rows, decode(model.engine, latents, rows[0][0].decoder))


@torch.inference_mode()
def paint_rows(model: Served, rows: Sequence[tuple[Live, Canvas]]) -> list[EngineFailed | None]:
    """All that requests of one step count need, from their tokens to their pixels, in one call of a `picture` role."""
    able = model.engine.capabilities
    read = [model.prompts.tokens(live.texts[0]).feeds for live, _ in rows]
    plans = [live.plan.rows for live, _ in rows]
    feeds = {name: torch.tensor([tokens[name] for tokens in read], device=able.device) for name in read[0]}
    feeds |= {name: torch.stack([live.fixed[name] for live, _ in rows]) for name in rows[0][0].fixed}
    feeds["x"] = torch.stack([canvas.x for _, canvas in rows])
    for name in ("t", "a", "b"):
        feeds[name] = torch.tensor([[getattr(row, name) for row in plan] for plan in plans], device=able.device)
    if able.takes_w:
        feeds["w"] = torch.tensor([plan[0].w for plan in plans], device=able.device)
    if len(plans[0]) > 1:
        z = [_scaled_noise(plan, canvas) for plan, (_, canvas) in zip(plans, rows, strict=True)]
        feeds["z"] = torch.stack(z).to(able.device)
    (out,) = run_batch(model.engine, picture_role(len(plans[0])), feeds)
    return _keep_pictures(rows, to_pictures(model.engine, out))


def _scaled_noise(plan: Sequence[Row], canvas: Canvas) -> Tensor:
    """c_k z_k of every step but the last, [N - 1, C, h, w], as the row-by-row form draws them.

    From a stream of their own, so that a call that breaks may be repeated.
    """
    shape, noise = tuple(canvas.x.shape), NoiseStream(canvas.seed)
    noise.draw(shape)  # what the picture begins with
    return torch.stack([row.c * noise.draw(shape) if row.c else torch.zeros(shape) for row in plan[:-1]])


def fits_one_call(live: Live) -> bool:
    """Whether a `picture` role can do all of a request: no guidance pairs, no control, no history, no last noise."""
    rows = live.plan.rows
    if picture_role(len(rows)) not in live.model.engine.capabilities.roles or live.model.spec.clip is not None:
        return False
    return not any(row.pair or row.control or row.d or row.w != rows[0].w for row in rows) and not rows[-1].c


def _keep_pictures(
    rows: Sequence[tuple[Live, Canvas]], found: Sequence[Picture | EngineFailed]
) -> list[EngineFailed | None]:
    errors: list[EngineFailed | None] = []
    for (_, canvas), picture in zip(rows, found, strict=True):
        if isinstance(picture, EngineFailed):
            errors.append(picture)
            continue
        canvas.picture = picture
        errors.append(None)
    return errors


@torch.inference_mode()
def decode(engine: Engine, latents: Tensor, role: str = DECODER) -> list[Picture | EngineFailed]:
    """Latents [B, C, h, w] as the denoiser sees them -> pictures [H, W, 3] uint8."""
    (out,) = run_batch(engine, role, {"latent": latents})
    return to_pictures(engine, out)


def to_pictures(engine: Engine, out: Tensor) -> list[Picture | EngineFailed]:
    """A decoder's output [B, 3, H, W] in [-1, 1] -> pictures [H, W, 3] uint8, rounded as diffusers does."""
    finite = finite_rows(out)
    levels = torch.mul(out, 127.5).add_(127.5).clamp_(0, 255).round_()
    pixels = levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
    return [
        picture.numpy() if ok else EngineFailed(f"engine {engine.name} decoded a non-finite picture")
        for picture, ok in zip(pixels, finite, strict=True)
    ]


def execute(model: Served, work: Work, lives: Sequence[Live]) -> tuple[list[FewstepError | None], int, bool]:
    """Run one call; (error or None per item, what was run, whether it went through at once).

    A call that breaks is repeated item by item, so that only the request at fault fails.
    """
    try:
        errors, size = _attempt(model, work, work.items, lives)
        return errors, size or work.size * (work.kind != TEXT), True
    except Exception as error:
        if len(work.items) == 1:
            return [as_engine_error(error, model.engine)], work.size, False
    errors = []
    for item, live in zip(work.items, lives, strict=True):
        try:
            errors += _attempt(model, work, [item], [live])[0]
        except Exception as error:
            errors.append(as_engine_error(error, model.engine))
    return errors, work.size, False


def _attempt(
    model: Served, work: Work, items: Sequence[Item], lives: Sequence[Live]
) -> tuple[list[FewstepError | None], int]:
    if work.kind == TEXT:
        return [None] * len(items), encode_texts(model, lives)
    rows = [(live, live.canvases[item.picture]) for item, live in zip(items, lives, strict=True)]
    run = paint_rows if picture_steps(work.role) else step_rows if work.kind == DENOISE else decode_rows
    return list(run(model, rows)), 0


def as_engine_error(error: Exception, engine: Engine) -> FewstepError:
    return error if isinstance(error, FewstepError) else EngineFailed(f"engine {engine.name} broke: {error!r}")


def _row_state(live: Live, canvas: Canvas) -> RowState:
    row = live.plan.rows[canvas.step]
    uncond = live.uncond if row.pair else None
    return RowState(row, canvas.x, live.cond, canvas.noise, uncond, live.edge, canvas.history, live.kind, live.features)

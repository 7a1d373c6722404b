"""Shares of work on checked requests: encode texts and pictures, advance rows, decode, each in one engine call.

Both loops are made of these: the dull one (`runtime.sampling.loop`) gives them one picture at a time, the scheduled one
(`runtime.service.local`) whatever the scheduler put together.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.models.roles import IMAGE_PROMPT, picture_role, picture_steps

from ..engine import DECODER, DENOISER, ENCODER, TEXT, Engine
from ..errors import EngineFailed, FewstepError
from ..schedule.jobs import DENOISE, ENCODE, Item, Work
from .edits import put_back
from .events import Picture
from .hooks import present
from .inflight import Canvas, Live, row_state
from .plan import Row
from .rng import NoiseStream
from .served import Served
from .step import Conditions, advance, finite_rows, run_batch
from .text import Prompts


def encode_texts(model: Served, lives: Sequence[Live]) -> int:
    """Give each request its embeddings, encoding every text once; returns how many were encoded."""
    parts = [live.parts[model.name] for live in lives]
    fresh: dict[str, Any] = {text: model.prompts.embeddings.peek(text) for part in parts for text in part.missing}
    wanted = [text for text, value in fresh.items() if value is None]
    if wanted:
        for text, found in zip(wanted, embed(model.engine, model.prompts, wanted), strict=True):
            fresh[text] = found
            model.prompts.embeddings.put(text, found)
    for part in parts:
        part.embedded.update({text: fresh[text] for text in part.missing})
    return len(wanted)


@torch.inference_mode()
def encode_pictures(model: Served, lives: Sequence[Live]) -> None:
    """Bring each request's own picture into latents, in one call of the encoder; its pictures begin from there.

    Errors: `EngineFailed` where a latent is not finite, or whatever the engine raises.
    """
    sources = [present(live.source, "source") for live in lives]
    pictures = torch.stack([present(source.picture, "picture") for source in sources])
    (latents,) = run_batch(model.engine, ENCODER, {"picture": pictures})
    _refuse_spoiled(model.engine, latents, "latent of an edit's picture")
    for live, source, latent in zip(lives, sources, latents, strict=True):
        source.latent = latent.clone()
        for canvas in live.canvases:
            canvas.x = canvas.x + live.plan.start_signal * source.latent


@torch.inference_mode()
def encode_prompts(model: Served, lives: Sequence[Live]) -> None:
    """Bring each request's picture prompt into tokens, in one call of the image encoder.

    Errors: as `encode_pictures`.
    """
    sources = [present(live.source, "source") for live in lives]
    pixels = torch.stack([present(source.pixels, "pixels") for source in sources])
    (tokens,) = run_batch(model.engine, IMAGE_PROMPT, {"pixels": pixels})
    _refuse_spoiled(model.engine, tokens, "embedding of a picture prompt")
    for source, found in zip(sources, tokens, strict=True):
        source.tokens = found.clone()


PREPARE: dict[str, Callable[[Served, Sequence[Live]], int | None]] = {
    TEXT: encode_texts,
    ENCODER: encode_pictures,
    IMAGE_PROMPT: encode_prompts,
}
"""What each role does for requests before their rows."""


def _refuse_spoiled(engine: Engine, out: Tensor, what: str) -> None:
    if not all(finite_rows(out)):
        raise EngineFailed(f"engine {engine.name} gave a non-finite {what}")


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
    """Advance each picture by one row, in one denoiser call of `model`. A picture that failed keeps its latent."""
    outcomes = advance(model.engine, [row_state(live, canvas) for live, canvas in rows], model.spec)
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
    errors = _keep_pictures(rows, decode(model.engine, latents, rows[0][0].decoder))
    for live, canvas in rows:
        if canvas.picture is not None and live.request.edit is not None:
            canvas.picture = put_back(canvas.picture, live.request.edit)
    return errors


@torch.inference_mode()
def paint_rows(model: Served, rows: Sequence[tuple[Live, Canvas]]) -> list[EngineFailed | None]:
    """All that requests of one step count need, from their tokens to their pixels, in one call of a `picture` role."""
    able = model.engine.capabilities
    read = [model.prompts.tokens(live.own.texts[0]).feeds for live, _ in rows]
    plans = [live.plan.rows for live, _ in rows]
    feeds = {name: torch.tensor([tokens[name] for tokens in read], device=able.device) for name in read[0]}
    feeds |= {name: torch.stack([live.own.fixed[name] for live, _ in rows]) for name in rows[0][0].own.fixed}
    feeds["x"] = torch.stack([canvas.x for _, canvas in rows])
    for name in ("t", "a", "b", *(("s",) if able.takes_s else ())):
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
    """Whether a `picture` role can do all of a request: no guidance pairs, nothing that steers, no history, no hooks,
    no last noise, no picture to begin from, and the decoder that its graph holds."""
    rows, first = live.plan.rows, live.plan.rows[0]
    if picture_role(len(rows)) not in live.model.engine.capabilities.roles or live.source is not None:
        return False
    plain = (r.role == DENOISER and not (r.pair or r.d or r.model or r.hooks) and r.w == first.w for r in rows)
    return all(plain) and not rows[-1].c and live.decoder == live.model.spec.decoder_role(len(rows))


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


def execute(work: Work, lives: Sequence[Live]) -> tuple[list[FewstepError | None], int, bool]:
    """Run one call; (error or None per item, what was run, whether it went through at once).

    A call that breaks is repeated item by item, so that only the request at fault fails.
    """
    model = lives[0].parts[work.model].model
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
    if work.kind in (TEXT, ENCODE):
        return [None] * len(items), PREPARE[work.role](model, lives) or 0
    rows = [(live, live.canvases[item.picture]) for item, live in zip(items, lives, strict=True)]
    run = paint_rows if picture_steps(work.role) else step_rows if work.kind == DENOISE else decode_rows
    return list(run(model, rows)), 0


def as_engine_error(error: Exception, engine: Engine) -> FewstepError:
    return error if isinstance(error, FewstepError) else EngineFailed(f"engine {engine.name} broke: {error!r}")

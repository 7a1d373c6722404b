"""A checked request on its way: its pictures, and what each model that works on it needs."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewstep.models.roles import IMAGE_PROMPT

from ..engine import DECODER, ENCODER
from ..schedule.jobs import DECODE, DENOISE, ENCODE, TEXT, Prepare, RowCall
from .edits import Source
from .events import Picture
from .plan import Plan, Row
from .request import GenerateRequest
from .rng import NoiseStream
from .served import Served
from .step import Conditions, Features, History, RowState


@dataclass
class Canvas:
    """One picture on its way: its noise, its latent [C, h, w] after `step` rows, at last its pixels. `start`: the noise
    it began with, before any scale."""

    seed: int
    noise: NoiseStream
    x: Tensor
    history: History = field(default_factory=History)
    step: int = 0
    picture: Picture | None = None
    start: Tensor | None = None


@dataclass
class Part:
    """What one model needs of a request. `texts`: what its rows read and, where they are guided away from one, what
    they avoid; `fixed`: the conditions that no text gives."""

    model: Served
    texts: tuple[str, ...]
    fixed: Conditions
    embedded: dict[str, Conditions]

    @property
    def missing(self) -> list[str]:
        """Texts without an embedding yet."""
        return [text for text in self.texts if text not in self.embedded]

    @property
    def cond(self) -> Conditions:
        return {**self.embedded[self.texts[0]], **self.fixed}

    @property
    def uncond(self) -> Conditions:
        """The other side of guidance: the negative prompt, or nothing."""
        negative = self.embedded[self.texts[-1]]
        if self.model.spec.guidance.zero_empty and not self.texts[-1]:
            negative = {name: torch.zeros_like(value) for name, value in negative.items()}
        return {**negative, **self.fixed}


@dataclass
class Live:
    """A checked request on its way. `parts`: what each model that evaluates its rows needs, by the model's name, its
    own first; `source`: the picture that it brings."""

    model: Served
    request: GenerateRequest
    plan: Plan
    parts: dict[str, Part]
    notes: tuple[str, ...]
    edge: Tensor | None
    source: Source | None
    canvases: list[Canvas]
    begun_s: float
    started_s: float | None = None
    predicted_s: float | None = None
    features: Features = field(default_factory=Features)
    spent_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys((TEXT, ENCODE, DENOISE, DECODE), 0.0))

    @property
    def own(self) -> Part:
        return self.parts[self.model.name]

    @property
    def before(self) -> tuple[Prepare, ...]:
        """What has to be encoded before its rows can run."""
        found = [
            Prepare(TEXT, name, TEXT, len(missing)) for name, part in self.parts.items() if (missing := part.missing)
        ]
        if self.source is not None and self.source.picture is not None and self.source.latent is None:
            found.append(Prepare(ENCODE, self.model.name, ENCODER))
        if self.source is not None and self.source.pixels is not None and self.source.tokens is None:
            found.append(Prepare(ENCODE, self.model.name, IMAGE_PROMPT))
        return tuple(found)

    @property
    def calls(self) -> tuple[RowCall, ...]:
        """What each of its rows is to the scheduler."""
        name = self.model.name
        return tuple(RowCall(row.model or name, row.role, row.evaluations) for row in self.plan.rows)

    def part(self, row: Row) -> Part:
        """What the model that evaluates this row needs."""
        return self.parts[row.model or self.model.name]

    @property
    def kind(self) -> int | None:
        """Which of the model's control kinds its picture is."""
        control, kinds = self.request.control, self.model.spec.control_kinds
        return None if control is None or control.kind is None else kinds.index(control.kind)

    @property
    def decoder(self) -> str:
        """The role that decodes its pictures: the tiny decoder at the step counts that the spec gives it."""
        role = self.model.spec.decoder_role(self.request.steps)
        return role if role in self.model.engine.capabilities.roles else DECODER


def row_state(live: Live, canvas: Canvas) -> RowState:
    """What the next row of a picture needs."""
    row = live.plan.rows[canvas.step]
    part = live.part(row)
    state = RowState(
        row,
        canvas.x,
        part.cond,
        canvas.noise,
        part.uncond if row.pair else None,
        live.edge,
        canvas.history,
        live.kind,
        live.features,
    )
    if row.hooks is None and not (row.negative or row.image or row.loras):
        return state
    avoid = part.uncond if row.negative else None
    weights = dict(row.loras)
    loras = tuple(weights.get(name, 0.0) for name in part.model.loras)
    return replace(state, source=live.source, start=canvas.start, avoid=avoid, loras=loras)

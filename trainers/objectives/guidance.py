"""Guidance distillation: one evaluation learns what two say under classifier-free guidance, at every time of the path.

Steps stay as they were and cost half. The methods differ in what of the student trains (a scale as an input, adapters
beside a frozen network, a LoRA), and in where x_t comes from (`trainers.recipes.guidance`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..parts.distances import Distance, Weight
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.times import UniformScale
from ..parts.transitions import guided, with_scale
from .consistency import Source
from .distillation import Times


@dataclass(frozen=True, kw_only=True)
class GuidanceDistillation:
    """`weight |x0_theta(x_t, t, c, w) - x0_w(x_t, t, c)|`, x0_w of `u + w (c - u)` (Meng et al. 2022, eq. 7).

    guidance: the scales drawn; a student without an input for them takes in one, so there low is high.
    """

    times: Times
    source: Source
    distance: Distance
    weight: Weight
    guidance: UniformScale

    players = ("student",)
    roles = ("student", "teacher")

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        student, count = cast["student"], batch.x0.shape[0]
        t, w = self.times.draw(student.path, count, turn), self.guidance.draw(count, turn)
        cond, teacher = with_scale(batch.cond, w), guided(cast["teacher"], batch.uncond, w)
        with torch.no_grad():
            x_t = self.source.at(teacher, batch, t, turn.noise(batch.x0), cond)
            aim = teacher.x0(x_t, t, cond)
        guess = student.x0(x_t, t, cond)
        each = self.distance(guess, aim) * self.weight(student.path, t).to(guess)
        return each.mean(), {"residual": float((guess.detach() - aim).square().mean().sqrt())}

"""Consistency distillation: one step of the teacher's ODE must not change where the student says the path ends.

Covers LCM and, by other parts, CD, TCD, PCM and relatives: pairs, source, transition, jump, target, distance, weight.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.paths import Path

from .distances import Distance, Weight
from .jumps import Jump
from .objective import Batch, Cast, Metrics, Turn
from .times import UniformScale, clean
from .transitions import NoisedData, ddim_chain, guided, with_scale


class Pairs(Protocol):
    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]: ...


def consistency_residual(
    student: Denoiser, target: Denoiser, teacher: Denoiser, jump: Jump, x_t: Tensor, t: Tensor, s: Tensor,
    cond: Condition, turn: Turn | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(student's end point from x_t, target's end point from the teacher's x_s), the second without gradient.

    Luo et al. 2023, algorithm 1: `f_theta(x_t, t)` against `f_target(x_s, s)`, `x_s = DDIM(teacher; x_t, t -> s)`.
    Both are evaluated under the same dropout masks where a turn is given.
    """
    end = torch.full_like(t, clean(student.path))
    with torch.no_grad():
        x_s = ddim_chain(teacher, x_t, (t, s), cond)
        if turn is not None:
            turn.share_dropout()
        aim = jump(target, x_s, s, end, cond)
    if turn is not None:
        turn.share_dropout()
    return jump(student, x_t, t, end, cond), aim.detach()


@dataclass(frozen=True, kw_only=True)
class ConsistencyDistillation:
    """The parts of a consistency method.

    guidance: scale given to the student and to the teacher. cfg: whether the teacher is guided by two evaluations, or
    takes the scale as an input or not at all. target: the role that answers at s, "target" (an average) or "student".
    """

    pairs: Pairs
    source: NoisedData
    jump: Jump
    distance: Distance
    weight: Weight
    guidance: UniformScale
    cfg: bool
    target: str

    players = ("student",)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("student", "teacher", self.target)))

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        path = cast["student"].path
        count = batch.x0.shape[0]
        t, s = self.pairs.draw(path, count, turn)
        w = self.guidance.draw(count, turn)
        x_t = self.source.draw(path, batch, t, turn)
        teacher = guided(cast["teacher"], batch.uncond, w) if self.cfg else cast["teacher"]
        guess, aim = consistency_residual(
            cast["student"], cast[self.target], teacher, self.jump, x_t, t, s, with_scale(batch.cond, w), turn
        )
        each = self.distance(guess, aim) * self.weight(path, t).to(guess)
        return each.mean(), {"residual": float((guess.detach() - aim).square().mean().sqrt())}

"""Continuous-time consistency (sCM, Lu & Song 2024, arXiv 2410.11081): the tangent of the consistency function is fed
back, in place of a target a step away.

With u = k x on the angle and F the student's velocity there, f = cos u - sin F is the clean estimate, and
`g = cos df/d angle = -cos^2 (F - F_T) - r cos sin (u + dF/d angle)`. The loss `|F - sg(F + g / (|g| + c))|^2` has the
gradient of consistency in the limit of neighbours; r rises from 0, at which it is plain distillation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.denoiser import expand

from ..parts.distances import Distance
from ..parts.laws import Law
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.tangent import ANGLE, Field, Tangent
from ..parts.times import UniformScale
from ..parts.transitions import guided, with_scale
from .consistency import Source


@dataclass(frozen=True, kw_only=True)
class ContinuousConsistency:
    """The parts of a continuous-time method.

    field: whose trajectories. tangent: how the derivative along them is had. warmup: share of the run over which r
    rises from 0 to 1. floor: c of the normalisation, which divides by the root mean square, so that it is the same for
    samples of any size; None leaves the tangent as it is.
    """

    times: Law
    source: Source
    field: Field
    tangent: Tangent
    distance: Distance
    guidance: UniformScale
    cfg: bool
    warmup: float = 0.1
    floor: float | None = 0.1

    players = ("student",)
    roles = ("student", "teacher")

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        student, count = cast["student"], batch.x0.shape[0]
        path = student.path
        t, w = self.times.draw(path, count, turn), self.guidance.draw(count, turn)
        cond, noise = with_scale(batch.cond, w), turn.noise(batch.x0)
        teacher = guided(cast["teacher"], batch.uncond, w) if self.cfg else cast["teacher"]

        def answer(x: Tensor, time: Tensor) -> Tensor:
            turn.share_dropout()
            return ANGLE.ask(student, x, time, cond)

        with torch.no_grad():
            x = self.source.at(teacher, batch, t, noise, cond)
            x0, eps = self.field(teacher, batch, noise, x, t, cond)
            cos, sin = ANGLE.mix(path, t)
            slope = self.tangent(answer, x, t, *ANGLE.along(path, x0, eps, t, cos * sin))
        f = answer(x, t)
        with torch.no_grad():
            g = -expand(cos**2, x) * (f - ANGLE.velocity(path, t, x0, eps))
            g = g - self.rise(turn) * (expand(cos * sin * ANGLE.scale(path, t), x) * x + slope)
            aim = f + self.normalised(g)
        return self.distance(f, aim.detach()).mean(), {"residual": float(g.square().mean().sqrt())}

    def rise(self, turn: Turn) -> float:
        """r, 0 .. 1."""
        return min(1.0, turn.progress / self.warmup) if self.warmup else 1.0

    def normalised(self, g: Tensor) -> Tensor:
        """g / (rms g + c), sample by sample."""
        if self.floor is None:
            return g
        size = g.flatten(1).square().mean(1).sqrt()
        return g / expand(size + self.floor, g)

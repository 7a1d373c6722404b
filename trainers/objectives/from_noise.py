"""Flow maps from noise alone: the student says where the teacher's trajectory from z is at any s, and no data is seen.

x_s = X(z, T -> s). Its change in s must be the teacher's velocity there: as a derivative (FreeFlow), or as one step of
the teacher (BOOT). Times are rectified flow's, seen from any path.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand

from ..parts.distances import Distance
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.tangent import FLOW, Tangent
from ..parts.times import UniformScale, clean
from ..parts.transitions import guided, pure_noise, with_scale
from ..parts.u_shape import flow_time_to_path


class NoiseAim(Protocol):
    def __call__(
        self, student: Denoiser, teacher: Denoiser, z: Tensor, t: Tensor, s: Tensor, cond: Condition, turn: Turn
    ) -> tuple[Tensor, Tensor]:
        """(the time that is asked about, the mean velocity from t down to it that the student should answer)."""
        ...


@dataclass(frozen=True)
class Displaced:
    """`u(z, s) = v(x_s, s) + (T - s) d_s u(z, s)`: a derivative in s alone (FreeFlow)."""

    tangent: Tangent

    def __call__(
        self, student: Denoiser, teacher: Denoiser, z: Tensor, t: Tensor, s: Tensor, cond: Condition, turn: Turn
    ) -> tuple[Tensor, Tensor]:
        path = student.path

        def mean_velocity(start: Tensor, low: Tensor) -> Tensor:
            turn.share_dropout()
            return FLOW.ask(student, start, t, {**cond, "s": low})

        turn.share_dropout()
        there = student.jump(z, t, s, {**cond, "s": s})
        slope = self.tangent(mean_velocity, z, s, torch.zeros_like(z), 1.0 / FLOW.pace(path, s))
        gap = FLOW.time(path, t) - FLOW.time(path, s)
        return s, FLOW.ask(teacher, there, s, cond) + expand(gap, z) * slope


@dataclass(frozen=True)
class Bootstrapped:
    """x at s - gap is the teacher's first-order step from the student's x at s (BOOT, OFTSR); gap in flow time.

    From within a gap of the path's end the step goes to clean data.
    """

    gap: float

    def __call__(
        self, student: Denoiser, teacher: Denoiser, z: Tensor, t: Tensor, s: Tensor, cond: Condition, turn: Turn
    ) -> tuple[Tensor, Tensor]:
        path = student.path
        below = FLOW.time(path, s) - self.gap
        end = FLOW.time(path, torch.full_like(s, path.end))
        to = torch.where(below > end, flow_time_to_path(path, below), torch.full_like(s, clean(path)))
        return to, stepped(student, teacher, z, t, s, to, cond, turn)


def stepped(
    student: Denoiser, teacher: Denoiser, z: Tensor, t: Tensor, s: Tensor, to: Tensor, cond: Condition, turn: Turn
) -> Tensor:
    """The mean velocity from t down to `to`: the student's to s, then the teacher's own for the rest of the way."""
    path = student.path
    far, near = (expand(FLOW.time(path, a) - FLOW.time(path, b), z) for a, b in ((t, s), (s, to)))
    turn.share_dropout()
    x0, eps = student.both(z, t, {**cond, "s": s})
    v = FLOW.ask(teacher, student.mix(x0, eps, s), s, cond)
    return (far * (eps - x0) + near * v) / (far + near)


@dataclass(frozen=True, kw_only=True)
class FromNoise:
    """`distance(u(z, T -> s), sg aim)`, s even in flow time; the batch gives conditions alone.

    last_share: of the rows that ask about clean data, which is the teacher's own step from the path's end.
    """

    aim: NoiseAim
    distance: Distance
    guidance: UniformScale
    cfg: bool
    last_share: float = 0.1

    players = ("student",)
    two_times = True
    roles = ("student", "teacher")

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        student, count = cast["student"], batch.x0.shape[0]
        path = student.path
        w = self.guidance.draw(count, turn)
        cond = with_scale(batch.cond, w)
        teacher = guided(cast["teacher"], batch.uncond, w) if self.cfg else cast["teacher"]
        z = pure_noise(path, turn.noise(batch.x0))
        t = torch.full_like(w, path.start)
        s = flow_time_to_path(path, turn.uniform(0.0, 1.0, count) * FLOW.time(path, t))
        with torch.no_grad():
            last = turn.uniform(0.0, 1.0, count) < self.last_share
            asked, aim = self.aim(student, teacher, z, t, s, cond, turn)
            end, there = torch.full_like(t, path.end), torch.full_like(t, clean(path))
            final = stepped(student, teacher, z, t, end, there, cond, turn)
            s, aim = torch.where(last, there, asked), torch.where(expand(last.to(aim), aim) > 0, final, aim)
        turn.share_dropout()
        u = FLOW.ask(student, z, t, {**cond, "s": s})
        return self.distance(u, aim.detach()).mean(), {"residual": float((u.detach() - aim).square().mean().sqrt())}

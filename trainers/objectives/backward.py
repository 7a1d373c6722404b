"""Backward distillation (Imagine Flash, Kohler et al. 2024): a teacher corrects the student on the student's own walk.

The student walks down from pure noise by its own sampler to a drawn step, so that no data leak into x_t. There its
clean estimate x^ is carried to another time gamma(t) along its own noise estimate, and what the teacher makes of that
point is the aim: of the whole picture where t is noisy, of its details where it is not (shifted reconstruction loss).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.paths import Path

from ..parts.distances import Distance
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import BackwardSimulation
from ..parts.steps import At, OdeStep
from ..parts.tangent import FLOW
from ..parts.times import UniformScale, clean
from ..parts.transitions import NoisedData, guided, with_scale
from ..parts.u_shape import flow_time_to_path


@dataclass(frozen=True)
class Shift:
    """gamma(t): in flow time `tau_T (tau / tau_T)^power`, so that the noisiest time stays and lower ones go further
    down. power = 1 shifts nothing."""

    power: float = 2.0

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        noisiest = FLOW.time(path, torch.full_like(t, path.start))
        moved = flow_time_to_path(path, noisiest * (FLOW.time(path, t) / noisiest) ** self.power)
        return torch.where(t >= path.start, t, moved)


@dataclass(frozen=True, kw_only=True)
class BackwardDistillation:
    """`distance(x^, sg teacher(alpha_g x^ + sigma_g e^))`, g = gamma(t), x^ and e^ the student's at its own x_t.

    step: the teacher's way from gamma(t) to clean data. Only the student's evaluation at t has a
    gradient, and the batch gives conditions alone.
    """

    rollout: BackwardSimulation
    shift: Shift
    step: OdeStep
    distance: Distance
    guidance: UniformScale
    cfg: bool

    players = ("student",)
    roles = ("student", "teacher")

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        student = cast["student"]
        w = self.guidance.draw(batch.x0.shape[0], turn)
        cond = with_scale(batch.cond, w)
        teacher = guided(cast["teacher"], batch.uncond, w) if self.cfg else cast["teacher"]
        x_t, t = self.rollout.reach(student, batch.x0, cond, turn)
        turn.share_dropout()
        x0, eps = student.both(x_t, t, cond)
        aim = self.aim(teacher, x0.detach(), eps.detach(), t, cond, turn)
        residual = float((x0.detach() - aim).square().mean().sqrt())
        return self.distance(x0, aim).mean(), {"residual": residual}

    @torch.no_grad()
    def aim(self, teacher: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, cond: Condition, turn: Turn) -> Tensor:
        """The teacher's sample from the student's estimates, carried to gamma(t)."""
        path = teacher.path
        low = self.shift(path, t)
        here = At(teacher.mix(x0, eps, low), low, x0, eps, cond, NoisedData())
        return self.step(teacher, here, torch.full_like(low, clean(path)), turn)

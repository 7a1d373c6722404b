"""Terms that stand beside an adversary: a teacher's estimate as the aim, without a fake score."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.models.paths import Path

from ..parts.distances import Distance, Squared, Weight
from ..parts.laws import Law
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from ..parts.times import UniformScale
from ..parts.transitions import guided


def signal(path: Path, t: Tensor) -> Tensor:
    """alpha: ADD's "exponential" weight, by which a noisy estimate counts less."""
    return path.alpha(t)


@dataclass(frozen=True, kw_only=True)
class TeacherAim:
    """`scale c(t) |x - sg teacher(alpha x + sigma n, t)|^2`, ADD's distillation loss (Sauer et al. 2023).

    The teacher looks at the student's noised sample, not at the data. Alone it shrinks what varies, since no fake score
    holds it: the adversary does.
    """

    times: Law
    weight: Weight
    guidance: UniformScale
    cfg: bool
    scale: float = 2.5
    distance: Distance = field(default_factory=Squared)

    roles = ("teacher",)

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        count = len(made.x0)
        w = self.guidance.draw(count, turn)
        teacher = guided(cast["teacher"], batch.uncond, w) if self.cfg else cast["teacher"]
        t = self.times.draw(teacher.path, count, turn)
        with torch.no_grad():
            aim = teacher.x0(made.at(teacher.path, t, turn.noise(made.x0)), t, batch.cond)
        weight = self.weight(teacher.path, t).to(aim.device, torch.float32)
        loss = (self.distance(made.x0, aim) * weight).mean()
        return self.scale * loss, {"teacher_aim": float(loss.detach())}

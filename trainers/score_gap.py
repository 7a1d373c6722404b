"""The score gap: the student's samples move along the difference of the teacher's and the fake network's estimates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .distances import Weight
from .objective import Batch, Cast, Metrics, Turn
from .rollout import Made
from .scores import carry, denoising_loss, dmd_gradient
from .times import UniformScale, UniformTimes
from .transitions import guided, without


@dataclass(frozen=True, kw_only=True)
class ScoreGap:
    """`carry(x, (mu_fake - mu_real) / mean|x - mu_real|)`, DMD's gradient of KL(q || p) at samples noised to `times`.

    guidance: the teacher's scale; cfg: whether it is applied here, or the teacher takes it in already.
    """

    times: UniformTimes
    guidance: UniformScale
    cfg: bool

    roles = ("teacher", "fake")

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        count = len(made.x0)
        w = self.guidance.draw(count, turn)
        teacher = guided(cast["teacher"], batch.uncond, w) if self.cfg else cast["teacher"]
        t = self.times.draw(teacher.path, count, turn)
        gradient = dmd_gradient(teacher, cast["fake"], made, t, turn.noise(made.x0), batch.cond)
        return carry(made.x0, gradient), {"dmd_gradient": float(gradient.square().mean().sqrt())}


@dataclass(frozen=True, kw_only=True)
class Denoise:
    """The fake network's own training: denoising score matching of the student's samples.

    guidance: the scale at which its estimate is the one that learns (Zhou et al. 2024, "Long and Short Guidance"); 0
    for a fake that is never told the condition. nulled: the share of rows that are not, so that it can be guided.
    """

    times: UniformTimes
    weight: Weight
    guidance: float = 1.0
    nulled: float = 0.0

    roles = ("fake",)

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        count = len(made.x0)
        fake = guided(cast["fake"], batch.uncond, torch.full((count,), self.guidance))
        t = self.times.draw(fake.path, count, turn)
        noise, cond = turn.noise(made.x0), batch.cond
        if self.nulled:
            cond = without(cond, batch.uncond, turn.uniform(0.0, 1.0, count) < self.nulled)
        loss = denoising_loss(fake, made, t, noise, cond, self.weight)
        return loss, {"denoising": float(loss.detach())}

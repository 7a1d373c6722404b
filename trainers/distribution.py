"""Distribution matching distillation: the student's law is pulled to the teacher's by a difference of two scores.

DMD2 (Yin et al. 2024, "Improved Distribution Matching Distillation") is this with a fake score that trains more often
than the student, a GAN term on the fake network's features, and backward simulation for several steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition

from .discriminator import Adversary, critic_loss, deceiver_loss
from .distances import Weight
from .objective import Batch, Cast, Metrics, Turn
from .rollout import BackwardSimulation
from .scores import carry, denoising_loss, dmd_gradient
from .times import UniformScale, UniformTimes
from .transitions import guided, noised


@dataclass(frozen=True, kw_only=True)
class DistributionMatching:
    """The parts of DMD2. `guidance` is the teacher's scale, which the student takes in for good."""

    rollout: BackwardSimulation
    score_times: UniformTimes
    fake_times: UniformTimes
    fake_weight: Weight
    guidance: UniformScale
    cfg: bool
    adversary: Adversary | None

    players = ("student", "fake")
    roles = ("student", "teacher", "fake")

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        return self._student(cast, batch, turn) if player == "student" else self._fake(cast, batch, turn)

    def _student(self, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        """`carry(x, (mu_fake - mu_real) / |x - mu_real|) + student_weight * softplus(-l(x_t))`."""
        x = self.rollout.run(cast["student"], batch.x0, batch.cond, turn, grad=True)
        count = x.shape[0]
        w = self.guidance.draw(count, turn)
        teacher = guided(cast["teacher"], batch.uncond, w) if self.cfg else cast["teacher"]
        t = self.score_times.draw(teacher.path, count, turn)
        gradient = dmd_gradient(teacher, cast["fake"], x, t, turn.noise(x), batch.cond)
        total = carry(x, gradient)
        metrics = {"dmd_gradient": float(gradient.square().mean().sqrt())}
        if self.adversary is not None and cast.critic is not None:
            seen, cond = _rows(self.adversary.rows(count), x, batch.cond)
            t = self.adversary.times.draw(teacher.path, len(seen), turn)
            logits = cast.critic(noised(teacher.path, seen, t, turn.noise(seen)), t, cond)
            gan = deceiver_loss(logits)
            total = total + self.adversary.student_weight * gan
            metrics["gan_student"] = float(gan.detach())
        return total, metrics

    def _fake(self, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        """Denoising score matching on fresh student samples, and the critic on data against them."""
        x = self.rollout.run(cast["student"], batch.x0, batch.cond, turn, grad=False)
        path, count = cast["fake"].path, x.shape[0]
        t = self.fake_times.draw(path, count, turn)
        total = denoising_loss(cast["fake"], x, t, turn.noise(x), batch.cond, self.fake_weight)
        metrics = {"denoising": float(total.detach())}
        if self.adversary is not None and cast.critic is not None:
            rows = self.adversary.rows(count)
            made, cond = _rows(rows, x, batch.cond)
            seen = torch.cat([batch.x0[rows], made])
            cond = {name: torch.cat([value, value]) for name, value in cond.items()}
            t = self.adversary.times.draw(path, len(seen), turn)
            real, fake = cast.critic(noised(path, seen, t, turn.noise(seen)), t, cond).chunk(2)
            gan = critic_loss(real, fake)
            total = total + self.adversary.critic_weight * gan
            right = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
            metrics |= {"gan_critic": float(gan.detach()), "critic_right": float(right)}
        return total, metrics


def _rows(rows: slice, x: Tensor, cond: Condition) -> tuple[Tensor, dict[str, Tensor]]:
    return x[rows], {name: value[rows] for name, value in cond.items()}

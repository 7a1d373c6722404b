"""The score gap: the student's samples move along the difference of the teacher's and the fake network's estimates."""

from dataclasses import dataclass

from torch import Tensor

from .distances import Weight
from .objective import Batch, Cast, Metrics, Turn
from .rollout import Made
from .scores import carry, denoising_loss, dmd_gradient
from .times import UniformScale, UniformTimes
from .transitions import guided


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
    """The fake network's own training: denoising score matching of the student's samples."""

    times: UniformTimes
    weight: Weight

    roles = ("fake",)

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        fake = cast["fake"]
        t = self.times.draw(fake.path, len(made.x0), turn)
        loss = denoising_loss(fake, made, t, turn.noise(made.x0), batch.cond, self.weight)
        return loss, {"denoising": float(loss.detach())}

"""EM distillation (Xie et al. 2024, arXiv 2405.16852): samples are corrected by Langevin steps, then learned from.

A one-step student x0 = g(z) noised to x_t = alpha g(z) + sigma e has the law q. Weighing (z, e) by p / q makes that law
the teacher's, and Langevin steps walk there, with s = grad log p - grad log q at x_t:

    e += step / 2 (sigma s - e) + sqrt(step) n          z += step' / 2 (alpha J_g(z)^T s - z) + sqrt(step') n'

The student then learns the corrected x0 at the corrected z. Of e only what s has added is kept (noise cancellation), so
the aim is g(z) + sigma / alpha c with c += step / 2 (sigma s - c). One step of e alone is the score gap's gradient.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand

from ..errors import RecipeError
from ..parts.jumps import Jump, ToClean
from ..parts.laws import Law
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from ..parts.times import UniformScale
from ..parts.transitions import guided, noised, pure_noise
from .scores import carry


@dataclass(frozen=True, kw_only=True)
class Langevin:
    """steps: K; noise_step, start_step: step sizes of e and of z, 0 for one that stays."""

    steps: int
    noise_step: float = 0.16
    start_step: float = 1.6e-5

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0.0 < self.noise_step < 2.0 or not 0.0 <= self.start_step < 2.0:
            raise RecipeError(
                f"Langevin's {self.steps} steps of size {self.noise_step} and {self.start_step} go nowhere; take at "
                "least one, of sizes between 0 and 2"
            )


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """`|g(z_K) - sg aim|^2 / 2`, z_K and the aim by K Langevin steps from a student's own (z, e) at `times`.

    guidance: the teacher's scale; cfg: whether it is applied here, or the teacher takes it in already.
    """

    times: Law
    guidance: UniformScale
    cfg: bool
    langevin: Langevin
    jump: Jump = field(default_factory=ToClean)

    roles = ("teacher", "fake")
    of_samples = False  # the student is asked anew, at the starts that Langevin's steps moved to

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        count = len(made.x0)
        w = self.guidance.draw(count, turn)
        teacher = guided(cast["teacher"], batch.uncond, w) if self.cfg else cast["teacher"]
        t = self.times.draw(teacher.path, count, turn)
        student = Student(cast["student"], self.jump, made.t, batch.cond)
        z, _, kept = self.correct(student, (teacher, cast["fake"]), made, t, turn)
        x = student(z)
        level = expand(teacher.path.level(t), x)
        moved = float((level * kept).square().mean().sqrt())
        return carry(x, -level * kept), {"correction": moved}

    def correct(
        self, student: "Student", nets: tuple[Denoiser, Denoiser], made: Made, t: Tensor, turn: Turn
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(z_K, e_K, c), each shaped as x0: start and noise where they have moved to, and what of e is the scores'."""
        path, plan = nets[0].path, self.langevin
        alpha, sigma = expand(path.alpha(t), made.x0), expand(path.sigma(t), made.x0)
        size = pure_noise(path, torch.ones_like(made.x))
        z, e = made.x.detach() / size, turn.noise(made.x0)
        kept = torch.zeros_like(made.x0)
        for _ in range(plan.steps):
            x0, vjp = student.pulled(z * size)
            gap = score_gap(nets, noised(path, x0, t, e), t, student.cond)
            kept = kept + 0.5 * plan.noise_step * (sigma * gap - kept)
            e = e + 0.5 * plan.noise_step * (sigma * gap - e) + plan.noise_step**0.5 * turn.noise(e)
            if plan.start_step:
                drift = size * vjp(alpha * gap) - z
                z = z + 0.5 * plan.start_step * drift + plan.start_step**0.5 * turn.noise(z)
        return (z * size).detach(), e, kept


@dataclass(frozen=True)
class Student:
    """A student's one step as a map of its start z."""

    net: Denoiser
    jump: Jump
    t: Tensor
    cond: Condition

    def __call__(self, z: Tensor) -> Tensor:
        return self.jump(self.net, z, self.t, torch.zeros_like(self.t), self.cond)

    def pulled(self, z: Tensor) -> tuple[Tensor, "Pullback"]:
        """(g(z), v -> J_g(z)^T v), neither with a gradient."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x0 = self(z)
        return x0.detach(), Pullback(x0, z)


@dataclass(frozen=True)
class Pullback:
    y: Tensor
    z: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(self.y, self.z, v.to(self.y))
        return found


def score_gap(nets: tuple[Denoiser, Denoiser], x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """`grad log p - grad log q = alpha / sigma^2 (mu_real - mu_fake)` at x_t, no gradient."""
    with torch.no_grad():
        real, fake = (net.x0(x_t, t, cond) for net in nets)
        path = nets[0].path
        return expand(path.alpha(t) / path.sigma(t) ** 2, real) * (real - fake)

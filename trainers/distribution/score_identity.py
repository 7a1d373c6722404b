"""Score identities: a Fisher divergence of student and teacher by what is known of it, samples and two clean estimates.

With mu_real and mu_fake at x_t of the teacher (density p) and of the fake network (density q of student samples), and
D = mu_real - mu_fake, a positive multiple of the gap of the two scores, the student minimises

    h force(D) . (mu_fake - x)  +  (1 - alpha) (h - dh/dl) force(D) . D          (h = 1: SiD, Zhou et al. 2024)

over samples x. Its gradient runs through x, through x_t and through both networks, whose weights stay. The first part
alone (alpha = 1) has half the gradient of E h |D|^2 at a law of x_t that stands still, since E u(x_t) . (mu_fake - x)
is 0 for every u; alpha = 1/2 counts also how that law moves. l = log(p / q) comes from a critic.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.models.denoiser import Condition, Denoiser, expand

from ..errors import RecipeError
from ..parts.laws import Law
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from ..parts.times import UniformScale
from ..parts.transitions import guided
from .density_ratio import log_ratio


class Force(Protocol):
    """The gradient d' of a distance on the gap D [B, C, ...]; its length is that of d' times the root of elements."""

    def __call__(self, gap: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Linear:
    """`D`, of the distance |D|^2 / 2."""

    def __call__(self, gap: Tensor) -> Tensor:
        return gap


@dataclass(frozen=True)
class Huber:
    """`D / sqrt(mean D^2 + c^2)`, of the distance sqrt(|D|^2 + c^2): a far gap pulls no harder than a near one."""

    c: float

    def __call__(self, gap: Tensor) -> Tensor:
        return gap / expand((gap.flatten(1).square().mean(1) + self.c**2).sqrt(), gap)


Weighing = Callable[[Tensor], tuple[Tensor, Tensor]]
"""l = log(p / q) [B] -> (h, dh/dl), h = r f''(r) of a divergence E_p f(r), r = q / p = exp(-l)."""


def _chi2(logit: Tensor) -> tuple[Tensor, Tensor]:
    h = 2.0 * (2.0 * logit).exp()
    return h, 2.0 * h


def _js(logit: Tensor) -> tuple[Tensor, Tensor]:
    h = logit.sigmoid()
    return h, h * (1.0 - h)


DIVERGENCES: dict[str, Weighing] = {
    "rkl": lambda logit: (torch.ones_like(logit), torch.zeros_like(logit)),
    "kl": lambda logit: (logit.exp(), logit.exp()),
    "jeffreys": lambda logit: (0.6 + 0.4 * logit.exp(), 0.4 * logit.exp()),
    "js": _js,
    "chi2": _chi2,
}
"""f(r): r log r, -log r, 0.6 of the first and 0.4 of the second, Jensen-Shannon's, (1 - r)^2 / r."""


@dataclass(frozen=True)
class RatioWeight:
    """The weight of a divergence by a critic's logit at x_t (Uni-Instruct).

    clip: bound on the logit. by_mean: over the batch's mean. released: what the authors' code takes for the ratio,
    |L| / (1 + |L|) of its loss L = log sigmoid(l), which falls where p / q grows; for comparison.
    """

    divergence: str
    clip: float = 3.0
    by_mean: bool = True
    released: bool = False

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise RecipeError(f"there is no divergence {self.divergence!r}; choose one of {', '.join(DIVERGENCES)}")

    @property
    def whole_batch(self) -> bool:
        """Whether samples look at each other, so that a batch cannot be shared out."""
        return self.by_mean

    def __call__(self, logit: Tensor) -> tuple[Tensor, Tensor]:
        """l [B] -> (h, h - dh/dl), each [B]."""
        if self.released:
            loss = softplus(-logit)
            logit = (loss / (1.0 + loss)).log()
        h, slope = DIVERGENCES[self.divergence](logit.clamp(-self.clip, self.clip))
        size = h.detach().mean().clamp(min=1e-6) if self.by_mean else 1.0
        return h / size, (h - slope) / size


@dataclass(frozen=True, kw_only=True)
class ScoreIdentity:
    """The loss above over `|x - mu_real|`, the mean of a sample's elements, where `normalised`.

    guidance: the teacher's scale; cfg: whether it is applied here, or the teacher takes it in already. fake_guidance:
    the fake's, 0 for a fake that is asked without a condition (Zero-CFG).
    """

    times: Law
    guidance: UniformScale
    cfg: bool
    alpha: float = 1.0
    fake_guidance: float = 1.0
    force: Force = field(default_factory=Linear)
    normalised: bool = True
    weight: RatioWeight | None = None

    roles = ("teacher", "fake")
    through_networks = True

    @property
    def reads_ratio(self) -> bool:
        return self.weight is not None

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        count = len(made.x0)
        w = self.guidance.draw(count, turn)
        teacher = guided(cast["teacher"], batch.uncond, w) if self.cfg else cast["teacher"]
        fake = guided(cast["fake"], batch.uncond, torch.full_like(w, self.fake_guidance))
        t = self.times.draw(teacher.path, count, turn)
        each, gap = self.each((teacher, fake), made, t, turn.noise(made.x0), batch.cond, cast)
        loss = each.mean()
        return loss, {"score_identity": float(loss.detach()), "gap": float(gap.square().mean())}

    def each(
        self, nets: tuple[Denoiser, Denoiser], made: Made, t: Tensor, noise: Tensor, cond: Condition, cast: Cast
    ) -> tuple[Tensor, Tensor]:
        """(the loss of each sample [B], the gap without gradient); nets: teacher and fake."""
        x_t = made.at(nets[0].path, t, noise)
        real, fake = estimates(nets, x_t, t, cond)
        weights = (torch.ones_like(t), torch.ones_like(t))
        if self.weight is not None:
            weights = self.weight(log_ratio(cast, x_t, t, cond))
        each = identity_loss(made.x0, real, fake, self.alpha, self.force, weights)
        if self.normalised:
            each = each / size_of(made.x0, real)
        return each, (real - fake).detach()


def estimates(nets: tuple[Denoiser, Denoiser], x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
    """The clean estimates of teacher and fake, each with its gradient in x_t."""
    return nets[0].x0(x_t, t, cond), nets[1].x0(x_t, t, cond)


def identity_loss(
    x: Tensor, real: Tensor, fake: Tensor, alpha: float, force: Force, weights: tuple[Tensor, Tensor]
) -> Tensor:
    """[B]: `h force(D) . (mu_fake - x) + (1 - alpha) (h - dh/dl) force(D) . D`, means over a sample's elements."""
    gap = real - fake
    pull = force(gap)
    h, mixed = (value.to(gap) for value in weights)
    return h * _dot(pull, fake - x) + (1.0 - alpha) * mixed * _dot(pull, gap)


def size_of(x: Tensor, real: Tensor) -> Tensor:
    """[B]: mean |x - mu_real| over a sample, at least 1e-5; no gradient."""
    return (x - real).detach().flatten(1).abs().mean(1).clamp(min=1e-5)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).mean(1)

"""Score of mixtures (Jayashankar, Ryu & Wornell 2025, arXiv 2502.09609): samples are held against a p + (1 - a) q.

The divergence is a skew Jensen-Shannon's, a in (0, 1]; at a = 1 it is the reverse KL and its gap that of DMD. With no
teacher (training, SMT) one network gives the mixture's clean estimate for every a, which it is told; with one
(distillation, SMD) a critic's logit mixes teacher and fake score.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand

from ..errors import RecipeError
from ..parts.distances import Squared, Weight
from ..parts.laws import Law
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from ..parts.times import UniformScale
from ..parts.transitions import guided, noised, with_scale
from .density_ratio import log_ratio
from .scores import carry

FINEST = 1000
"""a is one of k / 1000."""
SPAN = 7.0
"""A network is told a as the scalar w = 1 + SPAN a: its input was made for guidance scales of about 1 to 8."""


@dataclass(frozen=True)
class Shares:
    """a per sample: k / 1000 for k = 1 .. 1000; with probability `ends` one of 0, 1/2, 1 instead."""

    ends: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ends <= 1.0:
            raise RecipeError(f"ends is {self.ends}; it is a probability")

    def draw(self, count: int, turn: Turn) -> Tensor:
        a = (turn.integers(FINEST, count).double() + 1.0) / FINEST
        end = 0.5 * turn.integers(3, count).double()
        return torch.where(turn.uniform(0.0, 1.0, count) < self.ends, end, a)


@dataclass(frozen=True, kw_only=True)
class AmortisedGap:
    """SMT's student: the direction mu_0 - mu_a at the length of mu_0 - mu_1, over |x - mu_1|; mu_a at x_t for share a.

    mu_0 is the fake score and mu_1 the data's; lengths are per sample.
    """

    times: Law
    shares: Shares = Shares()

    roles = ("fake",)

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        fake, count = cast["fake"], len(made.x0)
        a, t = self.shares.draw(count, turn), self.times.draw(fake.path, count, turn)
        with torch.no_grad():
            x_t = made.at(fake.path, t, turn.noise(made.x0))
            none, some, whole = (
                fake.x0(x_t, t, told_share(batch.cond, s)) for s in (torch.zeros_like(a), a, torch.ones_like(a))
            )
            gradient = amortised_gradient(made.x0, none, some, whole)
        return carry(made.x0, gradient), {"mixture_gap": float(gradient.square().mean().sqrt())}


def told_share(cond: Condition, a: Tensor) -> dict[str, Tensor]:
    """The condition with the share a [B] in it."""
    return with_scale(cond, 1.0 + SPAN * a)


def amortised_gradient(x: Tensor, none: Tensor, some: Tensor, whole: Tensor) -> Tensor:
    """`(mu_0 - mu_a) |mu_0 - mu_1| / |mu_0 - mu_a| / mean|x - mu_1|`, norms per sample; shaped as x."""
    gap, far = none - some, none - whole
    length = (far.flatten(1).square().mean(1) / gap.flatten(1).square().mean(1).clamp(min=1e-12)).sqrt()
    size = (x - whole).flatten(1).abs().mean(1).clamp(min=1e-6)
    return gap * expand(length / size, gap)


@dataclass(frozen=True, kw_only=True)
class DenoiseMixture:
    """SMT's one network: `weight ((1 - a) |mu_a(x_t) - x|^2 + a |mu_a(y_t) - y|^2)`, x a sample and y a datum."""

    times: Law
    weight: Weight
    shares: Shares

    roles = ("fake",)

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        fake = cast["fake"]
        a = self.shares.draw(len(made.x0), turn)
        cond = told_share(batch.cond, a)

        def estimate(x_t: Tensor, t: Tensor) -> Tensor:
            return fake.x0(x_t, t, cond)

        loss = both_sides(estimate, a, made.x0, batch.x0, fake, self, turn)
        return loss, {"mixture_denoising": float(loss.detach())}


@dataclass(frozen=True, kw_only=True)
class RatioGap:
    """SMD's student: `lam (mu_fake - mu_real) / (|x - mu_real| a)`, and `deceive softplus(-(l + logit a))`.

    lam = sigmoid(l + logit a) of the critic's l = log(p / q) is the share of the mixture's density that is the data's.
    guidance: the teacher's scale; cfg: whether it is applied here, or the teacher takes it in already.
    """

    times: Law
    guidance: UniformScale
    cfg: bool
    deceive: float = 0.0
    shares: Shares = Shares()

    roles = ("teacher", "fake")
    reads_ratio = True
    through_networks = True

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        count = len(made.x0)
        teacher = _guided(self, cast, batch, turn)
        a, t = self.shares.draw(count, turn), self.times.draw(teacher.path, count, turn)
        x_t = made.at(teacher.path, t, turn.noise(made.x0))
        logit = log_ratio(cast, x_t, t, batch.cond) + a.logit().to(x_t.device)
        with torch.no_grad():
            real, fake = teacher.x0(x_t, t, batch.cond), cast["fake"].x0(x_t, t, batch.cond)
            size = (made.x0 - real).flatten(1).abs().mean(1).clamp(min=1e-6)
            gradient = (fake - real) * expand(logit.sigmoid() / (size * a.to(size)), real)
        told = {"mixture_gap": float(gradient.square().mean().sqrt())}
        loss = carry(made.x0, gradient)
        if self.deceive:
            fooled = torch.nn.functional.softplus(-logit).mean()
            loss = loss + self.deceive * fooled
            told["gan_student"] = float(fooled.detach())
        return loss, told


@dataclass(frozen=True, kw_only=True)
class FitRatio:
    """SMD's critic: `lam mu_real + (1 - lam) mu_fake` denoises samples weighted 1 - a and data weighted a.

    Only the critic learns by it: both estimates have no gradient. scale: of the whole.
    """

    times: Law
    guidance: UniformScale
    cfg: bool
    weight: Weight
    shares: Shares
    scale: float = 1.0

    roles = ("teacher", "fake")

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        teacher = _guided(self, cast, batch, turn)
        a = self.shares.draw(len(made.x0), turn)

        def estimate(x_t: Tensor, t: Tensor) -> Tensor:
            with torch.no_grad():
                real, fake = teacher.x0(x_t, t, batch.cond), cast["fake"].x0(x_t, t, batch.cond)
            return mixed(real, fake, log_ratio(cast, x_t, t, batch.cond), a)

        loss = both_sides(estimate, a, made.x0, batch.x0, teacher, self, turn)
        return self.scale * loss, {"ratio_fit": float(loss.detach())}


def mixed(real: Tensor, fake: Tensor, ratio: Tensor, a: Tensor) -> Tensor:
    """The mixture's clean estimate `lam mu_real + (1 - lam) mu_fake`, lam = sigmoid(log(p / q) + logit a)."""
    lam = expand((ratio + a.logit().to(ratio)).sigmoid(), real)
    return lam * real + (1.0 - lam) * fake


def both_sides(
    estimate: Callable[[Tensor, Tensor], Tensor],
    a: Tensor,
    x: Tensor,
    y: Tensor,
    net: Denoiser,
    law: DenoiseMixture | FitRatio,
    turn: Turn,
) -> Tensor:
    """`weight ((1 - a) |estimate(x_t) - x|^2 + a |estimate(y_t) - y|^2)`, each noised by times and noise of its own."""
    total: Tensor = torch.zeros(())
    for share, clean in ((1.0 - a, x.detach()), (a, y)):
        t = law.times.draw(net.path, len(clean), turn)
        error = Squared()(estimate(noised(net.path, clean, t, turn.noise(clean)), t), clean)
        total = total + ((share * law.weight(net.path, t)).to(error) * error).mean()
    return total


def _guided(term: RatioGap | FitRatio, cast: Cast, batch: Batch, turn: Turn) -> Denoiser:
    w = term.guidance.draw(len(batch.x0), turn)
    return guided(cast["teacher"], batch.uncond, w) if term.cfg else cast["teacher"]

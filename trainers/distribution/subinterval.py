"""Scores of a law that is not at clean data: what a fake learns from states x_s of the student, noised on to t > s.

`x_t = a x_s + b n` with a = alpha_t|s, b = sigma_t|s. Its score is `-E[n | x_t] / b`, whatever the law of x_s is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.denoiser import expand
from fewstep.models.paths import Path

from ..errors import RecipeError
from ..parts.distances import Squared, Weight
from ..parts.laws import Law
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from ..parts.score_times import Window, draw_times
from ..parts.segments import step_apart


def min_snr_5(path: Path, t: Tensor) -> Tensor:
    """min(SNR, 5), Hang et al. 2023."""
    return (path.level(t) ** -2).clamp(max=5.0)


def landing_of(made: Made) -> tuple[Tensor, Tensor]:
    """(s, x_s). Errors: `RecipeError` for a rollout whose steps end at clean data."""
    if made.s is None or made.x_s is None:
        raise RecipeError("a score within an interval needs a rollout whose steps land there; give it Segments")
    return made.s, made.x_s


def landing_aim(path: Path, made: Made, t: Tensor, noise: Tensor) -> Tensor:
    """The clean estimate whose mean given x_t belongs to the score of x_t: `(x_s - a sigma_s^2 / b n) / alpha_s`.

    Phased DMD's velocity target, `(alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 b) n - x_s / alpha_s` on the
    flow path, as a clean estimate. At s = 0 it is x_0.
    """
    s, x_s = landing_of(made)
    a, b = step_apart(path, s, t)
    pull = a * path.sigma(s) ** 2 / b.clamp(min=1e-9)
    return (x_s - expand(pull, x_s) * noise) / expand(path.alpha(s), x_s)


@dataclass(frozen=True, kw_only=True)
class DenoiseLanding:
    """`min(1 / b^2, most) weight(t) |mu_fake(x_t) - landing_aim|^2` (Phased DMD, Fan et al. 2025)."""

    times: Law | Window
    weight: Weight
    most: float = 10.0

    roles = ("fake",)

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        fake = cast["fake"]
        t, noise = draw_times(self.times, fake.path, made, turn), turn.noise(made.x0)
        with torch.no_grad():
            x_t, aim = made.at(fake.path, t, noise), landing_aim(fake.path, made, t, noise)
        b = step_apart(fake.path, landing_of(made)[0], t)[1]
        scale = self.weight(fake.path, t) * (b.clamp(min=1e-9) ** -2).clamp(max=self.most)
        gap = Squared()(fake.x0(x_t, t, batch.cond), aim)
        loss = (gap * scale.to(gap)).mean()
        return loss, {"denoising": float(loss.detach())}


@dataclass(frozen=True, kw_only=True)
class DenoiseTrajectory:
    """`iw weight(t) |mu_fake(x_t) - x0|^2`, x0 the student's own estimate at the step that led to x_s (TDM).

    Then `x_t = alpha_t x0 + sigma_t m` with a mixed noise m that is not quite normal:
    `iw = exp(-|m|^2 / 2) / exp(-|n|^2 / 2)`, means over elements, is the paper's correction.
    """

    times: Law | Window
    weight: Weight = min_snr_5

    roles = ("fake",)

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        fake, x0 = cast["fake"], made.x0.detach()
        t, noise = draw_times(self.times, fake.path, made, turn), turn.noise(made.x0)
        with torch.no_grad():
            x_t = made.at(fake.path, t, noise)
        iw = importance(fake.path, x0, x_t, t, noise)
        gap = Squared()(fake.x0(x_t, t, batch.cond), x0)
        loss = (gap * (self.weight(fake.path, t) * iw).to(gap)).mean()
        return loss, {"denoising": float(loss.detach()), "importance": float(iw.mean())}


def importance(path: Path, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """[B] `exp((mean n^2 - mean m^2) / 2)`, m the noise that takes x0 to x_t."""
    mixed = (x_t - expand(path.alpha(t), x_t) * x0) / expand(path.sigma(t), x_t)
    size = [value.double().flatten(1).square().mean(1) for value in (noise, mixed)]
    return (0.5 * (size[0] - size[1])).exp()

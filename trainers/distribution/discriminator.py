"""Adversarial parts: the terms of both sides of a GAN, whatever its critic looks at (`trainers.networks.critics`).

Logits are [B, ...], positive for real. With `Softplus` the best logit is log(p / q), so it is a density ratio.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition
from fewstep.models.paths import Path

from ..errors import RecipeError
from ..parts.gan_losses import GanLoss, Judged, Regulariser, Softplus
from ..parts.laws import Law
from ..parts.objective import Batch, Cast, Critic, Metrics, Turn
from ..parts.rollout import Made
from ..parts.transitions import noised


class Real(Protocol):
    """What the student's samples are held against, [B, C, ...] without gradient."""

    def draw(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> Tensor: ...


@dataclass(frozen=True)
class Data:
    """The batch's own samples."""

    def draw(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> Tensor:
        return batch.x0


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """Weights of the GAN terms of both sides, and what is done to samples before they are judged.

    times: noised to these; None for clean samples, as a vision network wants them. share: the part of a batch that is
    judged; judging data and samples costs the critic a second pass. same_times, same_noise: of data and samples.
    misaligned: data under a neighbour's condition are further fakes, so that the critic reads the condition
    (SANA-Sprint); neighbours of one condition are left out. told: the critic is told, as `s` of its condition, at which
    time the student's step began. Untold it compares the mixture over these times with the data, and a student may miss
    at one what it overdoes at another.
    """

    student_weight: float
    critic_weight: float
    times: Law | None
    share: float = 1.0
    loss: GanLoss = field(default_factory=Softplus)
    regularisers: tuple[Regulariser, ...] = ()
    same_times: bool = False
    same_noise: bool = False
    misaligned: bool = False
    told: bool = False
    real: Real = field(default_factory=Data)

    @property
    def whole_batch(self) -> bool:
        """Whether samples look at each other, so that a batch cannot be shared out."""
        return self.misaligned

    def __post_init__(self) -> None:
        if self.misaligned and self.loss.asks_real:
            raise RecipeError(
                f"{type(self.loss).__name__} pairs each sample with one of the data, and misaligned data have no "
                "partner; use Softplus or Hinge, or leave misaligned out"
            )

    def rows(self, count: int) -> slice:
        return slice(0, max(1, round(self.share * count)))

    def telling(self, cond: Condition, made: Made) -> dict[str, Tensor]:
        """The condition of the judged rows, with the step's time where it is told."""
        rows = self.rows(len(made.x0))
        seen = {name: value[rows] for name, value in cond.items()}
        return {**seen, "s": made.t[rows]} if self.told else seen

    def shown(self, path: Path, x: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """(what the critic is shown of x, t [B], the noise)."""
        if self.times is None:
            return x, torch.full((len(x),), path.end, dtype=torch.float64, device=x.device), torch.zeros_like(x)
        t, noise = self.times.draw(path, len(x), turn), turn.noise(x)
        return noised(path, x, t, noise), t, noise

    def beside(self, path: Path, x: Tensor, t: Tensor, noise: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """(what it is shown of other samples x, t [B]): at the same times or with the same noise where these are."""
        if self.times is None:
            return x, t
        t = t if self.same_times else self.times.draw(path, len(x), turn)
        noise = noise if self.same_noise else turn.noise(x)
        return noised(path, x, t, noise), t


@dataclass(frozen=True)
class Deceive:
    """The student's GAN term, `student_weight softplus(-l(x_t))` or another loss's, on samples as they are shown."""

    adversary: Adversary

    roles = ()

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        own, path, rows = self.adversary, cast["student"].path, self.adversary.rows(len(made.x0))
        cond, critic = own.telling(batch.cond, made), critic_of(cast)
        shown, t, noise = own.shown(path, made.x0[rows], turn)
        real = None
        if own.loss.asks_real:
            with torch.no_grad():
                data = own.real.draw(made, cast, batch, turn)[rows]
                real = critic(*own.beside(path, data, t, noise, turn), cond)
        gan = own.loss.student(critic(shown, t, cond), real)
        return own.student_weight * gan, {"gan_student": float(gan.detach())}


@dataclass(frozen=True)
class Judge:
    """The critic's own loss on data against the student's samples, each noised by times and noise of its own."""

    adversary: Adversary

    roles = ()

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        own, path, rows = self.adversary, cast["student"].path, self.adversary.rows(len(made.x0))
        told, critic = own.telling(batch.cond, made), critic_of(cast)
        data = own.real.draw(made, cast, batch, turn)[rows]
        real, t_real, noise = own.shown(path, data, turn)
        sides = [(real, t_real, told), (*own.beside(path, made.x0[rows].detach(), t_real, noise, turn), told)]
        if own.misaligned:
            shown, t, _ = own.shown(path, data, turn)
            sides.append((shown, t, {name: value.roll(1, 0) for name, value in told.items()}))
        seen, t = torch.cat([side[0] for side in sides]), torch.cat([side[1] for side in sides])
        cond = {name: torch.cat([side[2][name] for side in sides]) for name in told}
        logits = critic(seen, t, cond)
        real, fake = logits[: len(data)], logits[len(data) : 2 * len(data)]
        if own.misaligned:
            fake = torch.cat([fake, logits[2 * len(data) :][apart(told)]])
        gan = own.loss.critic(real, fake)
        right = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
        metrics = {"gan_critic": float(gan.detach()), "critic_right": float(right)}
        shows = Judged(critic, seen[: len(data)], t[: len(data)], told, real)
        theirs = slice(len(data), 2 * len(data))
        hides = Judged(critic, seen[theirs], t[theirs], told, fake[: len(data)])
        smooth = [rule.loss(shows, hides, turn) for rule in own.regularisers]
        if smooth:
            metrics["critic_slope"] = float(sum(float(value.detach()) for value in smooth))
        return own.critic_weight * sum(smooth, gan), metrics


def apart(cond: Condition) -> Tensor:
    """[B]: whether a row's condition differs from that of the row before it, whatever second time each is told."""
    rows = (value.reshape(len(value), -1) for name, value in cond.items() if name != "s")
    return torch.stack([(row != row.roll(1, 0)).any(1) for row in rows]).any(0)


def critic_of(cast: Cast) -> Critic:
    """Errors: `TypeError` where nobody judges."""
    if cast.critic is None:
        raise TypeError("an adversarial term was given a cast with no critic")
    return cast.critic

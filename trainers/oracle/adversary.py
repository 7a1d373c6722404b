"""The oracle of adversaries: the best critic is the ratio of densities, and the student is pulled to the data."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.analytic import Mixture, gaussian, log_density
from fewstep.models.denoiser import Condition
from fewstep.models.paths import VP

from ..distribution.discriminator import Deceive, Judge
from ..distribution.distribution import DistributionMatching, Term
from ..parts.gan_losses import critic_loss, deceiver_loss
from ..parts.objective import Cast
from ..parts.times import UniformScale
from ..recipes.recipe import Recipe
from .distribution import cast_of
from .world import SHIFT, Bent, Check, World, below, between, grad_of, holds, turn, world

COUNT = 512
Player = Callable[[World, Any, float], tuple[Cast, Bent]]
"""(stage, objective, offset) -> a cast whose student's samples are off by so much, and that student."""


class LogRatio(nn.Module):
    """A critic that knows the answer: `scale log(p / q) + offset`; best at (1, 0)."""

    def __init__(self, p: Mixture, q: Mixture, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.p, self.q = p, q
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        path = VP()
        alpha, sigma = path.alpha(t), path.sigma(t)
        ratio = log_density(self.p, x, alpha, sigma) - log_density(self.q, x, alpha, sigma)
        return self.scale * ratio + self.offset


def critic_checks() -> Iterator[Check]:
    """T6: with these losses the best logit is log(p / q), and the student's term pushes it up."""
    p = gaussian(torch.tensor([0.6], dtype=torch.float64), 0.8)
    q = gaussian(torch.tensor([-0.2], dtype=torch.float64), 1.1)
    levels = (torch.arange(20001, dtype=torch.float64) + 0.5) / 20001
    z = torch.special.ndtri(levels)[:, None]
    t = torch.full((len(z),), 0.0, dtype=torch.float64)
    sigma = VP().alpha(0.0), VP().sigma(0.0)
    real, fake = (sigma[0] * m + math.hypot(sigma[0] * s, sigma[1]) * z for m, s in ((0.6, 0.8), (-0.2, 1.1)))
    for scale, offset in ((1.0, 0.0), (0.5, 0.0), (2.0, 0.0), (1.0, 0.3), (1.0, -0.3)):
        critic = LogRatio(p, q, scale, offset)
        critic_loss(critic(real, t, {}), critic(fake, t, {})).backward()
        slopes = (float(grad_of(critic.scale)), float(grad_of(critic.offset)))
        if (scale, offset) == (1.0, 0.0):
            yield below("T6: slope of the critic at log(p / q)", max(map(abs, slopes)), 1e-3)
        else:
            toward = slopes[0] * (scale - 1.0) + slopes[1] * offset
            yield between(f"T6: slope beside it, scale {scale} offset {offset}", toward, 1e-3, float("inf"))
    logits = torch.tensor([-1.0, 0.5], dtype=torch.float64, requires_grad=True)
    deceiver_loss(logits).backward()
    assert logits.grad is not None
    yield holds("the student raises the logits of its samples", bool((logits.grad < 0.0).all()))


def adversary_checks(objective: Any, player: Player) -> Iterator[Check]:
    """Through a whole objective with a field `adversary`: who is real and fake, and where the student is pulled."""
    plain = replace(objective, guidance=UniformScale(1.0, 1.0))
    silent = replace(plain, adversary=None)
    yield from _sharpens(plain, player, "fake")
    yield from _pulls(plain, player, lambda cast, batch: silent.loss("student", cast, batch, turn())[0])


def deceive_checks(recipe: Recipe, objective: DistributionMatching, term: Deceive) -> Iterator[Check]:
    yield from _pulls(_unguided(objective, "student", term), cast_of)


def judge_checks(recipe: Recipe, objective: DistributionMatching, term: Judge) -> Iterator[Check]:
    judge = next(name for name, terms in objective.terms.items() if term in terms)
    plain = Judge(replace(term.adversary, regularisers=()))  # they have checks of their own, and hold a critic back
    scale = 0.5 if term.adversary.loss.is_ratio else 0.05  # a margin is kept long before the ratio is known
    yield from _sharpens(_unguided(objective, judge, plain), cast_of, judge, scale)


def _unguided(objective: DistributionMatching, player: str, term: Term) -> DistributionMatching:
    """The objective with one term alone, so at scale 1."""
    return replace(objective, terms={**dict.fromkeys(objective.terms, ()), player: (term,)})


def _sharpens(objective: Any, player: Player, judge: str, scale: float = 0.5) -> Iterator[Check]:
    """A critic that is half as sure as it should be learns to be surer: it is told who is real."""
    stage = world(VP(), "x0", mean=0.0)
    for offset in (0.6, -0.6):
        cast, critic = _judged(objective, stage, player(stage, objective, offset)[0], offset, scale)
        objective.loss(judge, cast, stage.batch(COUNT), turn(player=judge))[0].backward()
        yield holds(f"critic sharpens, student off by {offset}", float(critic.scale.grad or 0.0) < 0.0)


def _pulls(objective: Any, player: Player, without: Callable[[Cast, Any], Tensor] | None = None) -> Iterator[Check]:
    """The GAN term alone moves the student's mean back. without: the loss with no such term."""
    stage = world(VP(), "x0", mean=0.0)
    for offset in (0.6, -0.6):
        theirs, student = player(stage, objective, offset)
        cast, _ = _judged(objective, stage, theirs, offset)
        loss = objective.loss("student", cast, stage.batch(COUNT), turn())[0]
        if without is not None:
            loss = loss - without(cast, stage.batch(COUNT))
        loss.backward()
        yield holds(f"GAN term pulls the mean back, off by {offset}", float(student.offset.grad or 0.0) * offset > 0.0)


def _judged(
    objective: Any, stage: World, cast: Cast, offset: float, scale: float = 0.5
) -> tuple[Cast, LogRatio]:  # fmt: skip
    """The cast with a critic that knows the ratio of data and samples, less sure than it should be."""
    p = stage.data.moved(SHIFT)
    critic = LogRatio(p, p.moved(offset), scale=scale)
    return Cast(cast.roles, critic), critic

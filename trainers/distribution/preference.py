"""Terms that learn from which of two samples is preferred, for students that are few-step already.

Rows of a chain of twins are [first; second]; the reward, or the data, says which of each two wins.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fewstep.models.denoiser import Condition, Denoiser, expand, times
from fewstep.models.paths import Path

from ..networks.rewards import reward_of
from ..parts.chain import doubled
from ..parts.distances import Squared, Weight
from ..parts.jumps import Jump
from ..parts.laws import Law
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from ..parts.times import Grids, UniformScale
from ..parts.transitions import guided, noised
from .scores import carry, denoising_loss


def preferred(made: Made, cast: Cast, batch: Batch) -> Tensor:
    """[B]: 1 where the first twin has the higher reward, -1 where the second has, 0 where neither; no gradient."""
    with torch.no_grad():
        first, second = reward_of(cast, "reward")(made.x0, doubled(batch.cond)).chunk(2)
        return torch.sign(first - second)


def sides(made: Made, won: Tensor) -> tuple[Tensor, Tensor]:
    """(winners, losers), each [B, C, ...], of twins; `won` as from `preferred`, a draw counts as the first's."""
    first, second = made.x0.chunk(2)
    ahead = expand(won, first) >= 0
    return torch.where(ahead, first, second), torch.where(ahead, second, first)


def log_likelihood(path: Path, x0: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
    """[B]: `log N(x_s; alpha_s x0, sigma_s^2)`, mean over elements, but for its constant."""
    sigma = expand(path.sigma(s), x0)
    return -0.5 * ((x_s - expand(path.alpha(s), x0) * x0) / sigma).square().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class PairedLikelihood:
    """PSO online (Miao et al. 2024): the noisy steps of the preferred walk become likelier than those of the other.

    `-log sigmoid(beta sign (log r_1 - log r_2))`, `r = clip(p_theta / p_ref, 1 - clip, 1 + clip)` of each step's
    Gaussian, mean over steps. The reference is the teacher role; a walk's last step has no noise, and no part in it.
    """

    beta: float
    clip: float
    jump: Jump

    roles = ("teacher",)

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        won, reference, cond = preferred(made, cast, batch), cast["teacher"], doubled(batch.cond)
        losses, margins = [], []
        for step in made.before:
            with torch.no_grad():
                theirs = self.jump(reference, step.x.detach(), step.t, torch.zeros_like(step.t), cond)
            margin = won * self.margin(reference.path, step, theirs)
            losses.append(-logsigmoid(self.beta * margin).mean())
            margins.append(float(margin.detach().mean()))
        if not losses:
            raise TypeError("PairedLikelihood was given a walk of one step, which has no noisy one")
        return torch.stack(losses).mean(), {"margin": sum(margins) / len(margins), **_reward(made, cast, batch)}

    def margin(self, path: Path, step: Made, theirs: Tensor) -> Tensor:
        """[B]: log r of the first twin less that of the second."""
        assert step.s is not None and step.x_s is not None  # `Chain`
        gain = log_likelihood(path, step.x0, step.x_s, step.s) - log_likelihood(path, theirs, step.x_s, step.s)
        first, second = gain.clamp(math.log1p(-self.clip), math.log1p(self.clip)).chunk(2)
        return first - second


@dataclass(frozen=True, kw_only=True)
class PreferredPairs:
    """PSO offline: at a time of the grids, the winner's error falls below the reference's, and the loser's rises.

    `-log sigmoid(beta d)`, `d = (err_ref - err_theta)(winner) - (err_ref - err_theta)(loser)`, err the mean squared
    error of x0. winners: "reward", the better twin, or "data", the batch's own samples over the first twin
    (personalisation).
    """

    beta: float
    grids: Grids
    jump: Jump
    winners: str = "reward"

    roles = ("teacher",)

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        if self.winners == "data":
            winner, loser = batch.x0, made.x0.detach().chunk(2)[0]
        else:
            winner, loser = sides(replace(made, x0=made.x0.detach()), preferred(made, cast, batch))
        path = cast["student"].path
        asked = sorted({t for grid in self.grids.of(path).values() for t in grid})
        t = times(asked[turn.pick(torch.ones(len(asked)))], winner)
        gains = []
        for x in (winner, loser):
            x_t = noised(path, x, t, turn.noise(x))
            mine = self.error(cast["student"], x_t, x, t, batch.cond)
            with torch.no_grad():
                theirs = self.error(cast["teacher"], x_t, x, t, batch.cond)
            gains.append(theirs - mine)
        d = self.beta * (gains[0] - gains[1])
        return -logsigmoid(d).mean(), {"margin": float(d.detach().mean())}

    def error(self, denoiser: Denoiser, x_t: Tensor, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return Squared()(self.jump(denoiser, x_t, t, torch.zeros_like(t), cond), x)


@dataclass(frozen=True, kw_only=True)
class PreferenceGap:
    """Distillation-DPO (Zhao et al. 2025): scores of winners and losers against the teacher's.

    `mean sg(e_T - e_w) x_w - lose mean sg(e_T - e_l) x_l + prefer mean sg(e_w - e_l) x`, x both, at samples noised to a
    time of their own, with one noise for both; e_w and e_l are the noise estimates of two networks that learn winners
    and losers. The released code multiplies by `x_t - x`, which has no derivative in the student; here by x.

    The paper has lose 1 and no prefer: winners descend KL to the teacher, losers ascend it. Where the student's law is
    the teacher's p already, that moves samples along `-2 grad P(win | x)`, away from what is preferred, and losers have
    no bound. With lose -1 both descend, which is DMD by two networks, and `prefer` moves both along the log odds of
    winning: at rest the student's law is `p (P(win) / P(lose))^prefer`.
    """

    times: Law
    guidance: UniformScale
    cfg: bool
    lose: float = 1.0
    prefer: float = 0.0

    roles = ("teacher", "winner", "loser")

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        won = preferred(made, cast, batch)
        count = len(won)
        w = self.guidance.draw(count, turn)
        teacher = guided(cast["teacher"], batch.uncond, w) if self.cfg else cast["teacher"]
        t, noise = self.times.draw(teacher.path, count, turn), turn.noise(batch.x0)
        winner, loser = sides(made, won)
        cond = told_where(made, batch.cond, count)
        down, odds = self._gradients(teacher, cast, "winner", winner, t, noise, cond)
        up, others = self._gradients(teacher, cast, "loser", loser, t, noise, cond)
        loss = carry(winner, down + self.prefer * odds) + carry(loser, self.prefer * others - self.lose * up)
        size = float(down.square().mean().sqrt())
        return loss, {"winner_gradient": size, **_reward(made, cast, batch)}

    def _gradients(
        self, teacher: Denoiser, cast: Cast, side: str, x: Tensor, t: Tensor, noise: Tensor, cond: Condition
    ) -> tuple[Tensor, Tensor | float]:
        """(towards the teacher from this side's score, up the odds of winning)."""
        gap = preference_gradient(teacher, cast[side], x, t, noise, cond)
        odds = preference_gradient(cast["winner"], cast["loser"], x, t, noise, cond) if self.prefer else 0.0
        return gap, odds


def preference_gradient(real: Denoiser, fake: Denoiser, x: Tensor, t: Tensor, noise: Tensor, cond: Condition) -> Tensor:
    """`e_real - e_fake` at x_t, a positive multiple of the KL gradient in x; no gradient."""
    with torch.no_grad():
        x_t = noised(real.path, x, t, noise)
        return real.eps(x_t, t, cond) - fake.eps(x_t, t, cond)


def told_where(made: Made, cond: Condition, count: int) -> dict[str, Tensor]:
    """The condition with the time where the last step of twins began, as `s` [B]: samples of walks of one length and of
    another have laws of their own, and a score of their mixture would let each drift."""
    return {**cond, "s": made.t[:count]}


@dataclass(frozen=True, kw_only=True)
class DenoisePreferred:
    """The training of a network that learns winners alone, or losers alone: denoising score matching of these."""

    role: str
    times: Law
    weight: Weight

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.role,)

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        winner, loser = sides(made, preferred(made, cast, batch))
        x, fake = winner if self.role == "winner" else loser, cast[self.role]
        t = self.times.draw(fake.path, len(x), turn)
        cond = told_where(made, batch.cond, len(x))
        loss = denoising_loss(fake, Made(x, x, t), t, turn.noise(x), cond, self.weight)
        return loss, {f"{self.role}_denoising": float(loss.detach())}


def _reward(made: Made, cast: Cast, batch: Batch) -> Metrics:
    with torch.no_grad():
        return {"reward": float(reward_of(cast, "reward")(made.x0, doubled(batch.cond)).mean())}

"""Terms that take a reward: its gradient, its proxy's, and the share that each sample's other losses have.

Any distribution recipe takes them (`rewarded`): they ask of a rollout only the sample.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.models.denoiser import Condition, expand

from ..networks.rewards import reward_of
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from .distribution import Around, Term


@dataclass(frozen=True, kw_only=True)
class Favour:
    """`-scale mean R(x0)`: the student climbs the reward by its own gradient (ReFL, Xu et al. 2023).

    by: "reward", or "proxy", the player that learns to agree with it.
    """

    scale: float
    by: str = "reward"

    roles = ()
    through_networks = True

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        judged = reward_of(cast, self.by)(made.x0, batch.cond).mean()
        return -self.scale * judged, {self.by: float(judged.detach())}


@dataclass(frozen=True, kw_only=True)
class Rewarded(Around):
    """Another term, each sample's gradient times `exp(power R)`, no gradient through R (Reward Forcing, 2025).

    It does not tilt the law that is aimed at: where the term's gradient is zero it stays zero. It decides where a
    student that cannot have everything right spends its fit.
    """

    term: Term
    power: float

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            judged = reward_of(cast, "reward")(made.x0, batch.cond)
            weight = torch.exp(self.power * judged)
        loss, metrics = self.term.loss(replace(made, x0=weighed(made.x0, weight)), cast, batch, turn)
        return loss, {**metrics, "reward": float(judged.mean())}


def weighed(x: Tensor, weight: Tensor) -> Tensor:
    """x itself, bit for bit; a gradient that passes back through it is multiplied by weight [B]."""
    held = x.detach()
    return held + expand(weight, x) * (x - held)


@dataclass(frozen=True, kw_only=True)
class Agree:
    """The proxy's own loss: it learns to judge the student's samples and the data as the reward does, by latents alone.

    by: "pairs", the odds that either of two is better, `KL(sigmoid(dR / warmth) || sigmoid(dproxy / warmth))` (RG-LCD's
    LRM); or "value", the squared difference (DOLLAR). warmth: a difference of rewards that is little in doubt.
    """

    by: str = "pairs"
    warmth: float = 0.1

    roles = ()

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        return agreement(self, [made.x0.detach(), batch.x0], batch.cond, cast)


def agreement(rule: Agree, samples: list[Tensor], cond: Condition, cast: Cast) -> tuple[Tensor, Metrics]:
    """The proxy's loss on kinds of samples of one condition, each [B, C, ...], and how often it orders them right."""
    proxy = torch.stack([reward_of(cast, "proxy")(x, cond) for x in samples])
    with torch.no_grad():
        expert = torch.stack([reward_of(cast, "reward")(x, cond) for x in samples])
    pairs = [(i, j) for i in range(len(samples)) for j in range(i)]
    theirs = torch.stack([expert[i] - expert[j] for i, j in pairs])
    mine = torch.stack([proxy[i] - proxy[j] for i, j in pairs]) / rule.warmth
    if rule.by == "value":
        loss = (proxy - expert).square().mean()
    else:
        odds = torch.sigmoid(theirs / rule.warmth)
        loss = (odds * softplus(-mine) + (1.0 - odds) * softplus(mine)).mean()
        loss = loss + (odds.clamp(1e-9, 1.0).log() * odds + (1 - odds).clamp(1e-9, 1.0).log() * (1 - odds)).mean()
    return loss, {"agreement": float(((theirs > 0) == (mine > 0)).float().mean())}

"""Terms that take a reward: its gradient, its proxy's, and the share that each sample's other losses have.

Any distribution recipe takes them (`rewarded`): they ask of a rollout only the sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.models.denoiser import Condition, expand

from .distribution import DistributionMatching, Term
from .errors import RecipeError
from .objective import Batch, Cast, Metrics, Turn
from .player import PlayerSettings
from .recipe import Recipe
from .rewards import DEFAULT, check_reward, reward_of
from .rollout import Made
from .times import UniformScale


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
class Rewarded:
    """Another term, each sample's gradient times `exp(power R)`, no gradient through R (Reward Forcing, 2025).

    It does not tilt the law that is aimed at: where the inner gradient is zero it stays zero. It decides where a
    student that cannot have everything right spends its fit.
    """

    inner: Term
    power: float

    @property
    def roles(self) -> tuple[str, ...]:
        return self.inner.roles

    @property
    def guidance(self) -> UniformScale | None:
        return getattr(self.inner, "guidance", None)

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            judged = reward_of(cast, "reward")(made.x0, batch.cond)
            weight = torch.exp(self.power * judged)
        loss, metrics = self.inner.loss(replace(made, x0=weighed(made.x0, weight)), cast, batch, turn)
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


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Settings of a reward for any recipe of distribution matching. reward_scale: of its gradient, added; reward_power:
    of the share of each sample (`Rewarded`); reward_proxy_lr: where given, a proxy stands for it and learns so fast.
    """

    reward: str = DEFAULT
    reward_scale: float = 0.0
    reward_power: float = 0.0
    reward_proxy_lr: float | None = None


def pleasing(recipe: Recipe, beside: Beside) -> Recipe:
    """The recipe with these settings. Errors: those of `rewarded`, and `RecipeError` for settings without effect."""
    if not beside.reward_scale and (beside.reward_proxy_lr is not None or not beside.reward_power):
        raise RecipeError(
            f"{recipe.name}: a reward is named and reward_scale is 0; set it, or reward_power to weigh samples by it"
        )
    proxy = None if beside.reward_proxy_lr is None else PlayerSettings(lr=beside.reward_proxy_lr, warmup=50)
    return rewarded(recipe, beside.reward, scale=beside.reward_scale, power=beside.reward_power, proxy=proxy)


def rewarded(
    recipe: Recipe, reward: str, *, scale: float = 0.0, power: float = 0.0, proxy: PlayerSettings | None = None
) -> Recipe:
    """A distribution recipe whose last stage also takes a reward: `scale` of it added, and `power` in its own terms.

    proxy: how a player learns that stands for the reward in the sum; None takes the reward itself.

    Errors: `RecipeError` for a recipe that is not one of distribution matching.
    """
    check_reward(reward)
    *before, last = recipe.stages
    objective: Any = last.objective
    if not isinstance(objective, DistributionMatching):
        raise RecipeError(
            f"{recipe.name} is a {type(objective).__name__} and takes no reward beside its loss; use rg-lcd, or a "
            "recipe of distribution matching such as dmd2"
        )
    own = objective.terms["student"]
    if power:
        own = tuple(Rewarded(inner=term, power=power) for term in own)
    if scale:
        own = (*own, Favour(scale=scale, by="proxy" if proxy else "reward"))
    terms: Mapping[str, tuple[Term, ...]] = {**objective.terms, "student": own}
    settings = dict(last.player_settings)
    if proxy and scale:
        terms, settings = {**terms, "proxy": (Agree(),)}, {**settings, "proxy": proxy}
    stage = replace(last, objective=replace(objective, terms=terms), player_settings=settings)
    return replace(recipe, stages=(*before, stage), reward=reward)

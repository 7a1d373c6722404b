"""Recipes of distribution matching with a reward beside their own loss: what `--set reward_scale` and its kin do."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..distribution.distribution import DistributionMatching, Term
from ..distribution.rewarding import Agree, Favour, Rewarded
from ..errors import RecipeError
from ..loop.player import PlayerSettings
from ..networks.rewards import DEFAULT, check_reward
from .recipe import Recipe


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

"""Recipes of distribution matching with a reward beside their own loss: what `--set reward_scale` and its kin do."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..distribution.distribution import DistributionMatching, Term
from ..distribution.rewarding import Agree, Favour, Rewarded
from ..errors import RecipeError
from ..loop.player import PlayerSettings
from ..networks.rewards import DEFAULT, check_reward
from .recipe import Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Settings of a reward for any recipe of distribution matching. reward_scale: of its gradient, added; reward_power:
    of the share of each sample (`Rewarded`); reward_proxy_lr: where given, a proxy stands for it and learns so fast.
    """

    reward: str | None = None
    reward_scale: float = 0.0
    reward_power: float = 0.0
    reward_proxy_lr: float | None = None


def pleasing(recipe: Recipe, beside: Beside) -> Recipe:
    """The recipe with these settings. Errors: those of `rewarded`, and `RecipeError` for settings without effect."""
    if recipe.reward is not None:
        raise RecipeError(
            f"{recipe.name} is about a reward already; reward_scale, reward_power and reward_proxy_lr put one beside "
            "other recipes: leave them out"
        )
    if not beside.reward_scale and (beside.reward_proxy_lr is not None or not beside.reward_power):
        raise RecipeError(
            f"{recipe.name}: a reward is named and reward_scale is 0; set it, or reward_power to weigh samples by it"
        )
    proxy = None if beside.reward_proxy_lr is None else PlayerSettings(lr=beside.reward_proxy_lr, warmup=50)
    return rewarded(recipe, beside.reward or DEFAULT, scale=beside.reward_scale, power=beside.reward_power, proxy=proxy)


def rewarded(
    recipe: Recipe, reward: str, *, scale: float = 0.0, power: float = 0.0, proxy: PlayerSettings | None = None
) -> Recipe:
    """A distribution recipe whose students also take a reward: `scale` of it added, and `power` in its own terms.

    proxy: how a player learns that stands for the reward in the sum; None takes the reward itself. Of several stages
    the last has it, and each that trains a student of its own part.

    Errors: `RecipeError` for a recipe that is not one of distribution matching, or has no samples to weigh.
    """
    check_reward(reward)
    last = recipe.stages[-1]
    stages = [
        _rewarded(recipe.name, stage, scale, power, proxy) if stage.cell is not None or stage is last else stage
        for stage in recipe.stages
    ]
    return replace(recipe, stages=tuple(stages), reward=reward)


def _rewarded(name: str, stage: Stage, scale: float, power: float, proxy: PlayerSettings | None) -> Stage:
    objective: Any = stage.objective
    if not isinstance(objective, DistributionMatching):
        raise RecipeError(
            f"{name} is a {type(objective).__name__} and takes no reward beside its loss; use rg-lcd, or a recipe of "
            "distribution matching such as dmd2"
        )
    own = objective.terms["student"]
    if power:
        weighed = [getattr(term, "of_samples", True) for term in own]
        if not any(weighed):
            raise RecipeError(
                f"reward_power is {power}, and {name} has no term on the samples as they were made, so there is "
                "nothing to weigh; use reward_scale"
            )
        own = tuple(Rewarded(term=t, power=power) if of else t for t, of in zip(own, weighed, strict=True))
    if scale:
        own = (*own, Favour(scale=scale, by="proxy" if proxy else "reward"))
    terms: Mapping[str, tuple[Term, ...]] = {**objective.terms, "student": own}
    settings = dict(stage.player_settings)
    if proxy and scale:
        terms, settings = {**terms, "proxy": (Agree(),)}, {**settings, "proxy": proxy}
    return replace(stage, objective=replace(objective, terms=terms), player_settings=settings)

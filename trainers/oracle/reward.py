"""The oracle of rewards: gradients are their own, weights leave a solved student alone, a proxy learns to agree."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.denoiser import Condition
from fewstep.models.paths import VP

from ..distribution import rewarding
from ..distribution.distribution import DistributionMatching
from ..distribution.rewarding import Agree, Favour, Rewarded
from ..distribution.score_gap import ScoreGap
from ..loop.player import PlayerSettings
from ..objectives.reward_guided import RewardGuided
from ..parts.objective import Cast
from ..parts.rollout import Made
from ..recipes.recipe import Recipe
from . import consistency as oracle_consistency
from . import players as oracle_players
from .distribution import cast_of, with_terms, zero_checks
from .world import LIKED, Bent, Check, MeanReward, below, holds, liking, turn, world

COUNT = 256


class Asked:
    """A reward that counts how often it is asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: Tensor, cond: Condition) -> Tensor:
        self.count += 1
        return liking(x, cond)


def leaf(count: int = 8, seed: int = 3) -> Tensor:
    """Samples [count, 2, 3] that take a gradient."""
    drawn = torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.requires_grad_()


def favour_checks(recipe: Recipe, objective: DistributionMatching, term: Favour) -> Iterator[Check]:
    """ReFL: the gradient in each sample is the reward's own, `-scale (LIKED - x) / elements`, mean over the batch."""
    batch, x = world(VP(), "v").batch(8), leaf()
    asked, proxy = Asked(), MeanReward()
    for by, gain in (("reward", 1.0), ("proxy", float(proxy.gain.detach()))):
        asked.count = 0
        cast = Cast({}, rewards={"reward": asked, "proxy": proxy})
        (pull,) = torch.autograd.grad(replace(term, by=by).loss(Made(x, x, x[:, 0, 0]), cast, batch, turn())[0], x)
        own = gain * (LIKED - x.detach()) / x.numel()
        yield below(f"reward: gradient in the samples is its own, by {by}", pull + term.scale * own, 1e-12)
        yield holds(f"reward: asked by {by} alone", asked.count == (by == "reward"))


def rewarded_checks(recipe: Recipe, objective: DistributionMatching, term: Rewarded) -> Iterator[Check]:
    """Each sample's gradient times exp(power R); at power 0 the inner term bit for bit; zero where that is zero."""
    batch, x = world(VP(), "v").batch(8), leaf()
    weight = torch.exp(2.0 * liking(x, {})).detach()
    seen = rewarding.weighed(x, weight)
    yield holds("weighed: the samples as they are", torch.equal(seen, x))
    (given,) = torch.autograd.grad(seen.sin().sum(), x)
    yield below("weighed: gradient times the weight", given - weight[:, None, None] * x.detach().cos(), 1e-12)
    wrapped = [each for each in objective.terms["student"] if isinstance(each, Rewarded)]
    term = next((each for each in wrapped if isinstance(each.term, ScoreGap)), term)
    yield from zero_checks(with_terms(objective, "student", term))
    cast, student = cast_of(world(VP(), "v"), objective, offset=0.3)
    made = objective.rollout.make(cast["student"], batch, turn())
    plain = _gradient(term.term, made, cast, batch, student)
    same = _gradient(replace(term, power=0.0), made, cast, batch, student)
    yield holds("power 0: the term alone, bit for bit", same == plain)
    changed = _gradient(replace(term, power=2.0), made, cast, batch, student)
    yield holds("power 2: another gradient", changed != plain)


def _gradient(term: Any, made: Made, cast: Cast, batch: Any, student: Bent) -> tuple[float, ...]:
    loss = term.loss(made, cast, batch, turn(1))[0]
    return tuple(map(float, torch.autograd.grad(loss, [student.gain, student.offset], retain_graph=True)))


def agree_checks(recipe: Recipe, objective: Any, term: Agree) -> Iterator[Check]:
    """A proxy is best where it is the reward, up to a constant by pairs; it alone learns."""
    samples, batch = [leaf(64, 3), leaf(64, 4), leaf(64, 5)], world(VP(), "v").batch(64)
    for by in ("pairs", "value"):
        rule = replace(term, by=by)
        for gain, offset in ((1.0, 0.0), (1.0, 0.3), (0.5, 0.0), (2.0, 0.0)):
            expert, proxy = _Opinion(), MeanReward(gain, offset)
            cast = Cast({}, rewards={"reward": expert, "proxy": proxy})
            loss = rewarding.agreement(rule, [x.detach() for x in samples], batch.cond, cast)[0]
            loss.backward()
            slope = float(proxy.gain.grad or 0.0)
            label = f"proxy by {by}, gain {gain} offset {offset}: "
            if gain == 1.0 and (by == "pairs" or offset == 0.0):
                yield below(f"{label}no loss", loss, 1e-9)
                yield below(f"{label}no slope", slope, 1e-9)
            elif gain != 1.0:
                yield holds(f"{label}its loss pulls it back", slope * (gain - 1.0) > 1e-3)
            yield holds(f"{label}the reward learns nothing", expert.weight.grad is None)
    made = Made(samples[0], samples[0], samples[0][:, 0, 0])
    cast = Cast({}, rewards={"reward": liking, "proxy": MeanReward()})
    if isinstance(objective, DistributionMatching):
        term.loss(made, cast, replace(batch, x0=samples[1].detach()), turn())[0].backward()
        yield holds("proxy: its loss teaches the student nothing", samples[0].grad is None)


class _Opinion(nn.Module):
    """The suite's reward with a weight that could learn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, cond: Condition) -> Tensor:
        return self.weight * liking(x, cond)


def guided_checks(recipe: Recipe, objective: RewardGuided) -> Iterator[Check]:
    """The base's checks; the base alone at scale 0, and beside it the reward's gradient; the proxy's part in it."""
    yield from oracle_consistency.checks(recipe, objective.base)
    plain = replace(objective, scale=0.0)
    yield holds("scale 0: the base bit for bit", _turned(plain)[:3] == _turned(objective.base)[:3])
    for by in ("reward", "proxy"):
        guided = replace(objective, proxied=by == "proxy")
        *found, asked = _turned(guided)
        base, own = _turned(objective.base), _own(guided)
        for k, name in enumerate(("value", "slope of gain", "slope of offset")):
            yield below(f"{by}: {name} beside the base's", found[k] - base[k] - own[k], 1e-9)
        yield holds(f"{by}: in the student's turn the reward is asked by {by} alone", asked == (by == "reward"))
    yield from agree_checks(recipe, objective, objective.rule)
    yield from _proxy_turn(replace(objective, proxied=True))
    stage = recipe.stages[-1]
    settings = {**stage.player_settings, "proxy": PlayerSettings(lr=1e-3)}
    both = replace(stage, objective=replace(objective, proxied=True), player_settings=settings)
    yield from oracle_players.checks(replace(recipe, stages=(*recipe.stages[:-1], both)))


def _members(objective: Any) -> tuple[Cast, Bent, Asked, MeanReward]:
    """A bent student with a target of its own, the teacher, a reward and its proxy."""
    stage, asked, proxy = world(VP(), "v"), Asked(), MeanReward()
    student = Bent(stage.teacher(), offset=0.2)
    roles = {"student": student.denoiser(), "teacher": stage.teacher(), "target": Bent(stage.teacher()).denoiser()}
    return Cast(roles, rewards={"reward": asked, "proxy": proxy}), student, asked, proxy


def _turned(objective: Any) -> tuple[float, float, float, int]:
    """(loss, slopes of the student's gain and offset, how often the reward was asked) of one student's turn."""
    cast, student, asked, _ = _members(objective)
    loss = objective.loss("student", cast, world(VP(), "v").batch(COUNT), turn())[0]
    gain, offset = torch.autograd.grad(loss, [student.gain, student.offset])
    return float(loss.detach()), float(gain), float(offset), asked.count


def _own(objective: RewardGuided) -> tuple[float, float, float]:
    """What the reward alone adds: the mean over the student's landings, which the base gives."""
    cast, student, _, proxy = _members(objective)
    landed = objective.base.landed(cast, world(VP(), "v").batch(COUNT), turn()).guess
    factor = float(proxy.gain.detach()) if objective.proxied else 1.0
    added = objective.scale * factor * 0.5 * (landed - LIKED).square().mean()
    gain, offset = torch.autograd.grad(added, [student.gain, student.offset])
    return float(added.detach()), float(gain), float(offset)


def _proxy_turn(objective: RewardGuided) -> Iterator[Check]:
    cast, student, asked, proxy = _members(objective)
    objective.loss("proxy", cast, world(VP(), "v").batch(COUNT), turn(player="proxy"))[0].backward()
    yield holds("proxy's turn: the student learns nothing", student.offset.grad is None)
    yield holds("proxy's turn: it learns to be surer", float(proxy.gain.grad or 0.0) < 0.0)
    yield holds("proxy's turn: three kinds of samples are judged", asked.count == 3)

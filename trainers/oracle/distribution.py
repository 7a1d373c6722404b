"""The oracle of the score gap: golden values of the KL gradient, descent, the best fake, and who learns in whose turn.

Expectations over two Gaussians are Gauss-Hermite sums, so the golden numbers (computed apart from this code, by
quadrature over the closed forms) are met to their last printed digit.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.models.analytic import Mixture, exact, gaussian, log_density, mixture
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.paths import EDM, VP

from ..distribution import score_gap
from ..distribution.control_terms import CONTROL
from ..distribution.distribution import DistributionMatching, Term
from ..distribution.score_gap import Denoise, ScoreGap
from ..parts.jumps import ToClean
from ..parts.objective import Cast, Critic, Reward
from ..parts.rollout import Made
from ..parts.times import UniformScale
from ..recipes.recipe import Recipe
from .parts import guidance_checks, perfect_student
from .world import (
    SHIFT,
    Bent,
    Check,
    MeanCritic,
    MeanReward,
    World,
    absorbed,
    below,
    between,
    grad_of,
    holds,
    liking,
    turn,
    world,
)

COUNT = 512
NODES = 120
GOLDEN = (-0.18963, -0.00390)
"""E[mu_fake - mu_real] and E[(mu_fake - mu_real) z] at noise 1 for a student N(2.5, 1) and a teacher of two equal bumps
N(-3, .25) and N(3, .25)."""


def gap_checks(recipe: Recipe, objective: DistributionMatching, term: ScoreGap) -> Iterator[Check]:
    yield from _gaussian_kl()
    yield from _golden_mixture()
    yield carry_check()
    alone = with_terms(objective, "student", replace(term, augment=None, trail=None))
    yield from zero_checks(alone)
    yield from descent_checks(alone)
    yield from guidance_checks(world(VP(), "v"))
    from .score import option_checks

    yield from option_checks(recipe, objective, term)


def with_terms(objective: DistributionMatching, player: str, *terms: Term) -> DistributionMatching:
    """The objective with these terms alone for one player."""
    return replace(objective, terms={**objective.terms, player: terms})


def nodes() -> tuple[Tensor, Tensor, Tensor]:
    """Two standard normal variables on a grid, each [NODES^2, 1], and the weights of the expectation [NODES^2]."""
    points, weights = np.polynomial.hermite_e.hermegauss(NODES)
    z, noise = (torch.tensor(v.reshape(-1, 1)) for v in np.meshgrid(points, points, indexing="ij"))
    both = torch.tensor(np.outer(weights, weights).reshape(-1)) / (2 * math.pi)
    return z, noise, both


def _matched(teacher: Mixture, student: tuple[float, float], sigma: float) -> tuple[float, float]:
    """E[g] and E[g z] of `dmd_gradient`'s g without its normaliser, at one noise level; student (mean, std)."""
    path, (mean, std) = EDM(), student
    z, noise, weights = nodes()
    x, t = mean + std * z, torch.full((len(z),), sigma, dtype=torch.float64)
    real = exact(teacher, path, "x0")
    fake = exact(gaussian(torch.tensor([mean], dtype=torch.float64), std), path, "x0")
    scaled = score_gap.dmd_gradient(real, fake, Made(x, x, t), t, noise, {})
    normaliser = (x - real.x0(x + sigma * noise, t, {})).abs().clamp(min=1e-6)
    g = (scaled * normaliser)[:, 0]
    return float((weights * g).sum()), float((weights * g * z[:, 0]).sum())


def _gaussian_kl() -> Iterator[Check]:
    """T1: for Gaussians both moments of the gradient are closed form, `sigma^2 dKL(q || p)`."""
    m, s, b, a = 0.3, 0.7, 1.1, 1.2
    teacher = gaussian(torch.tensor([m], dtype=torch.float64), s)
    for sigma in (0.2, 1.0, 4.0):
        mean, spread = _matched(teacher, (b, a), sigma)
        square = sigma**2
        wanted_mean = square * (b - m) / (s**2 + square)
        wanted_spread = a * square * (a**2 - s**2) / ((a**2 + square) * (s**2 + square))
        yield below(f"T1: gradient in the mean at noise {sigma}", mean - wanted_mean, 1e-9)
        yield below(f"T1: gradient in the spread at noise {sigma}", spread - wanted_spread, 1e-9)


def _golden_mixture() -> Iterator[Check]:
    """T13: the two-bump teacher."""
    bumps = mixture(torch.tensor([[-3.0], [3.0]]), torch.tensor([0.5, 0.5]), torch.ones(2))
    for name, found, wanted in zip(("mean", "spread"), _matched(bumps, (2.5, 1.0), 1.0), GOLDEN, strict=True):
        yield below(f"T13: gradient in the {name}, two bumps", found - wanted, 1e-5)


def carry_check() -> Check:
    """The surrogate's gradient in x is the carried one over the number of elements, and downhill in it."""
    x = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(2, 6).requires_grad_()
    wanted = torch.linspace(3.0, -2.0, 12, dtype=torch.float64).reshape(2, 6)
    score_gap.carry(x, wanted).backward()
    assert x.grad is not None
    return below("carry: gradient in x", x.grad * x.numel() - wanted, 1e-5)


def cast_of(stage: World, objective: DistributionMatching, offset: float = 0.0, gain: float = 1.0) -> tuple[Cast, Bent]:
    """A student whose samples are N(mean + offset, (gain std)^2), with its exact fake score, and the exact teacher."""
    scale = objective.guidance or UniformScale(1.0, 1.0)
    moved = Mixture(stage.data.means + offset, stage.data.stds * gain, stage.data.weights)
    theirs = World(stage.path, stage.prediction, moved)
    aim = SimpleNamespace(jump=getattr(objective.rollout, "jump", ToClean()), guidance=scale)
    student = Bent(perfect_student(theirs, aim))
    teacher = Bent(stage.teacher())
    fake = absorbed(theirs.teacher(), scale.low)
    roles = {"student": student.denoiser(), "teacher": teacher.denoiser(), "fake": fake}
    roles |= {role: fake for role in objective.roles if role.startswith("fake.")}
    critic = exact_ratio(stage.data.moved(SHIFT * scale.low), moved.moved(SHIFT * scale.low))
    return Cast(roles, critic, rewards={"reward": liking, CONTROL: liking, "proxy": MeanReward()}), student


def exact_ratio(p: Mixture, q: Mixture) -> Critic:
    """The best critic: `log(p / q)` at x_t on VP."""

    def critic(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        alpha, sigma = VP().alpha(t), VP().sigma(t)
        return log_density(p, x, alpha, sigma) - log_density(q, x, alpha, sigma)

    return critic


def zero_checks(objective: DistributionMatching) -> Iterator[Check]:
    """Where the student's law is the guided teacher's the gradient is zero in every sample, at every time."""
    for prediction in ("v", "eps"):
        stage = world(VP(), prediction)
        cast, _ = cast_of(stage, objective)
        metrics = objective.loss("student", cast, stage.batch(COUNT), turn())[1]
        yield below(f"{prediction}: gradient at the guided data", metrics["dmd_gradient"], 1e-8)


def descent_checks(objective: DistributionMatching) -> Iterator[Check]:
    """The student's own loss pulls its mean and its spread towards the teacher's."""
    stage = world(VP(), "x0", mean=0.0)
    for offset in (0.4, -0.4):
        found = slope_at(stage, objective, "offset", offset=offset)
        yield between(f"descent: mean off by {offset}", found / offset, 0.01, float("inf"))
    ones = [replace(term, guidance=UniformScale(1.0, 1.0)) for term in objective.terms["student"]]  # type: ignore[type-var]
    for gain in (1.5, 0.6):
        found = slope_at(stage, with_terms(objective, "student", *ones), "gain", gain=gain)
        yield between(f"descent: spread off by {gain}", found / (gain - 1.0), 0.01, float("inf"))


def slope_at(stage: World, objective: DistributionMatching, weight: str, **changes: float) -> float:
    """Gradient of the student's loss in one weight of its bend, averaged over turns."""
    cast, student = cast_of(stage, objective, **changes)
    for step in range(8):
        (objective.loss("student", cast, stage.batch(COUNT, step), turn(step))[0] / 8).backward()
    return float(getattr(student, weight).grad)


def denoise_checks(recipe: Recipe, objective: DistributionMatching, term: Denoise) -> Iterator[Check]:
    """T5: denoising is least at the exact fake score. Four points carry the moments that decide it."""
    stage = world(VP(), "v")
    data = gaussian(torch.tensor([0.5], dtype=torch.float64), 0.8)
    corners = torch.tensor(list(product((-1.0, 1.0), repeat=2)), dtype=torch.float64)
    x, noise = 0.5 + 0.8 * corners[:, :1], corners[:, 1:]
    for time in (50.0, 500.0, 950.0):
        t = torch.full((4,), time, dtype=torch.float64)
        for bend, sign in ((0.0, 0.0), (0.1, 1.0), (-0.1, -1.0)):
            fake = Bent(exact(data, stage.path, "v"), offset=bend)
            score_gap.denoising_loss(fake.denoiser(), Made(x, x, t), t, noise, {}, term.weight).backward()
            slopes = [float(weight.grad) for weight in (fake.gain, fake.offset) if weight.grad is not None]
            if sign == 0.0:
                yield below(f"T5: slope at the exact fake, time {time}", max(map(abs, slopes)), 1e-5)
            else:
                yield holds(f"T5: slope beside it, time {time}, bend {bend}", sign * slopes[1] > 1e-4)
    plain = with_terms(objective, "fake", replace(term, guidance=1.0, nulled=0.0))
    cast, _ = cast_of(stage, plain)
    batch = stage.batch(4096)
    yield from _own_scale(objective, term, cast, stage)
    for sign in (1.0, -1.0):
        learner = Bent(cast["fake"], offset=0.3 * sign)
        roles = {**cast.roles, "fake": learner.denoiser()}
        plain.loss("fake", Cast(roles), batch, turn(player="fake"))[0].backward()
        yield holds(f"fake: its loss pulls it back, bend {0.3 * sign}", sign * float(grad_of(learner.offset)) > 0.0)


def _own_scale(objective: DistributionMatching, term: Denoise, cast: Cast, stage: World) -> Iterator[Check]:
    """At its own guidance scale the fake's guided estimate learns; rows that are told nothing are those at scale 0."""
    batch = stage.batch(COUNT)

    def value(own: Denoise, fake: Denoiser) -> float:
        them = Cast({**cast.roles, "fake": fake})
        return float(with_terms(objective, "fake", own).loss("fake", them, batch, turn(player="fake"))[0].detach())

    plain = replace(term, guidance=1.0, nulled=0.0)
    for k in (0.0, 2.5, term.guidance):
        gap = value(replace(plain, guidance=k), cast["fake"]) - value(plain, absorbed(cast["fake"], k))
        yield below(f"fake: learns at its own guidance scale {k:g}", gap, 1e-6)
    gap = value(replace(plain, nulled=1.0), cast["fake"]) - value(replace(plain, guidance=0.0), cast["fake"])
    yield below("fake: rows that are told nothing", gap, 1e-6)


def routing_checks(objective: DistributionMatching) -> Iterator[Check]:
    """The student's turn teaches neither teacher nor fake; the fake's turn teaches neither student nor teacher."""
    stage = world(VP(), "v")
    cast, student = cast_of(stage, objective, offset=0.3)
    networks = {"student": student, "teacher": Bent(stage.teacher()), "fake": Bent(cast["fake"])}
    others = set(objective.players) - {*networks, "critic", "proxy"}
    networks |= {name: Bent(cast["fake"]) for name in sorted(others)}
    frozen = set(objective.roles) - {*networks, *objective.players}
    networks |= {name: Bent(stage.teacher()) for name in sorted(frozen)}
    roles: dict[str, Denoiser] = {name: module.denoiser() for name, module in networks.items()}
    roles |= {role: cast[role] for role in objective.roles if role.startswith("fake.")}
    critic, judge = MeanCritic(), "critic" if "critic" in objective.players else "fake"
    proxy = MeanReward()
    modules: dict[str, nn.Module] = {**networks, "critic": critic, "proxy": proxy}
    rewards: dict[str, Reward] = {"reward": liking, CONTROL: liking, "proxy": proxy}
    for player in objective.players:
        through = any(getattr(term, "through_networks", False) for term in objective.terms[player])
        for name, module in modules.items():
            module.zero_grad()
            mine = (judge if name == "critic" else name) == player
            module.requires_grad_(mine or not (through or name == "critic"))  # as in the loop, and frozen ones
        them = Cast(roles, critic, rewards=rewards)
        batch = stage.batch(COUNT)
        batch = replace(batch, noise=batch.x0.flip(0))  # any, for terms that learn from pairs
        objective.loss(player, them, batch, turn(player=player))[0].backward()
        taught = {name for name, module in modules.items() if any(w.grad is not None for w in module.parameters())}
        learned = {judge if name == "critic" else name for name in taught}
        yield holds(f"the {player}'s turn teaches the {player} alone", learned == {player})

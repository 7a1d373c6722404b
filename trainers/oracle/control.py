"""The oracle of joint distribution matching: for a Gaussian joint of sample and control the answer is the posterior.

x ~ N(m, s^2) and c = x + tau n. With a score gap at next to no noise, its fake alone told c, and -log q(c | x),
the gradient is that of `KL(q(x | c) || p(x | c))`, which is closed form for every Gaussian q.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fewstep.models.analytic import exact, gaussian
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.paths import EDM, VP

from ..distribution import score_gap
from ..distribution.control_terms import CONTROL, Follow
from ..distribution.distribution import DistributionMatching
from ..parts.objective import Batch, Cast
from ..parts.rollout import Made
from ..plane.control import Likelihood
from ..recipes.recipe import Recipe
from .distribution import nodes
from .world import LIKED, Check, below, between, liking, turn, world

MEAN, SPREAD, NOISE = 0.3, 0.8, 0.5
"""m, s and tau."""
LEVEL = 1e-3
"""The noise of the gap: its limit is clean data, where the identity is exact."""


def follow_checks(recipe: Recipe, objective: DistributionMatching, term: Follow) -> Iterator[Check]:
    batch = world(VP(), "v").batch(8)
    x = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    made = Made(x, x, x[:, 0, 0])
    term.loss(made, Cast({}, rewards={CONTROL: liking}), batch, turn())[0].backward()
    assert x.grad is not None
    own = (LIKED - x.detach()) / x[0].numel()
    yield below("control: gradient in the samples", x.grad + term.weight * own / x.numel(), 1e-12)
    variance = 1.0 / (1.0 / SPREAD**2 + 1.0 / NOISE**2)
    for c in (-1.0, 0.2, 1.5):
        mean, spread, sample = joint_gradient(c, 0.0, 1.0)
        yield below(f"posterior, control {c}: gradient in the mean", mean, 1e-4)
        yield below(f"posterior, control {c}: gradient in the spread", spread, 1e-4)
        yield below(f"posterior, control {c}: mean gradient of every sample", sample, 1e-4)
        for offset in (0.4, -0.4):
            mean, _, _ = joint_gradient(c, offset, 1.0)
            yield below(f"mean off by {offset}, control {c}: offset / variance", mean * variance / offset - 1.0, 1e-3)
        for gain in (1.5, 0.6):
            _, spread, _ = joint_gradient(c, 0.0, gain)
            wanted = (gain**2 - 1.0) / (gain * variance**0.5)
            yield below(f"spread off by {gain}, control {c}: against closed form", spread / wanted - 1.0, 1e-3)
    blind, _, _ = joint_gradient(1.5, 0.0, 1.0, weight=0.0)
    yield between("without the condition's side the answer is not the posterior", abs(blind), 0.5, float("inf"))


def joint_gradient(c: float, offset: float, gain: float, weight: float = 1.0) -> tuple[float, float, float]:
    """(E[g], E[g z], max over z of |E[g | z]|) for the student `mu(c) + offset + gain v z`, mu and v^2 the posterior's.

    g is the gap of scores at `LEVEL` plus the gradient of Follow, per sample.
    """
    path, (z, noise, weights) = EDM(), nodes()
    variance = 1.0 / (1.0 / SPREAD**2 + 1.0 / NOISE**2)
    mean = variance * (MEAN / SPREAD**2 + c / NOISE**2) + offset
    x = (mean + gain * variance**0.5 * z).requires_grad_()
    t = torch.full((len(z),), LEVEL, dtype=torch.float64)
    cond = {CONTROL: torch.full_like(z, c)}
    real = exact(_gaussian(MEAN, SPREAD), path, "x0")
    fake = told(_gaussian(mean, gain * variance**0.5), path)
    made = Made(x.detach(), x.detach(), t)
    gap = score_gap.dmd_gradient(real, fake, made, t, noise, cond, None) / LEVEL**2
    cast = Cast({}, rewards={CONTROL: Likelihood(NOISE)})
    Follow(weight=weight).loss(Made(x, x, t), cast, Batch(x.detach(), cond, {}), turn())[0].backward()
    assert x.grad is not None
    g = (gap + x.grad * x.numel())[:, 0]
    each = (weights * g).reshape(-1, round(len(z) ** 0.5)).sum(1)
    shares = weights.reshape(each.shape[0], -1).sum(1)
    near = shares > 1e-4
    sample = float((each[near] / shares[near]).abs().max())
    return float((weights * g).sum()), float((weights * g * z[:, 0]).sum()), sample


def _gaussian(mean: float, std: float) -> Any:
    return gaussian(torch.tensor([mean], dtype=torch.float64), std)


def told(data: Any, path: EDM) -> Denoiser:
    """The exact fake score of a law given the control, which fails where it is not told it."""
    plain = exact(data, path, "x0")

    def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if CONTROL not in cond:
            return torch.full_like(x, float("nan"))
        return plain.raw(x, t, cond)

    return Denoiser(net, path, "x0")

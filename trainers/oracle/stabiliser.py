"""The oracle of guidance without matching, and of the prior on means and variances that then holds samples together."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fewstep.models.denoiser import expand
from fewstep.models.paths import VP

from ..distribution.distribution import DistributionMatching
from ..distribution.score_gap import ScoreGap
from ..distribution.stabiliser import GuidanceAlone, MeanVariance
from ..parts.objective import Batch, Cast
from ..parts.rollout import Made
from ..parts.score_times import draw_times
from ..parts.times import UniformScale
from ..recipes.recipe import Recipe
from .distribution import cast_of, slope_at, with_terms
from .world import SHIFT, Check, below, between, grad_of, turn, world

COUNT = 64


def mean_variance_checks(recipe: Recipe, objective: DistributionMatching, term: MeanVariance) -> Iterator[Check]:
    """S10: the KL of two normals, sample by sample; least, and at rest, where each has the law that is asked for."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(COUNT, 2, 3, generator=rng, dtype=torch.float64)
    x = (0.5 + 1.7 * rows).requires_grad_()
    loss = _loss(term, x)
    loss.backward()
    flat = x.detach().flatten(1)
    m, v = flat.mean(1), flat.var(1, correction=0)
    wanted = kl_divergence(Normal(m, v.sqrt()), Normal(term.mean, term.variance**0.5))
    yield below("mean and variance: the KL of two normals", loss.detach() / term.weight - wanted.mean(), 1e-5)
    slope = (flat - term.mean) / term.variance - (flat - m[:, None]) / v[:, None]
    found = grad_of(x).flatten(1) * x.numel() / term.weight
    yield below("mean and variance: gradient, element by element", found - slope, 1e-4)
    own = (flat - m[:, None]) / v.sqrt()[:, None]
    right = (term.mean + term.variance**0.5 * own).requires_grad_()
    least = _loss(term, right)
    least.backward()
    yield below("mean and variance: least is 0", least, 1e-5)
    yield below("mean and variance: at rest there", grad_of(right) * right.numel(), 1e-4)
    apart = torch.where(torch.arange(COUNT)[:, None] % 2 == 0, 1.0, -1.0) * term.variance**0.5
    spread = 0.5 * term.weight  # of a sample whose mean is one deviation off
    yield below("mean and variance: of each sample, not of the batch", _loss(term, right + apart) / spread - 1.0, 1e-4)


def _loss(term: MeanVariance, x: Tensor) -> Tensor:
    return term.loss(Made(x, x, torch.zeros(len(x))), Cast({}), Batch(x, {}, {}), turn())[0]


def guidance_alone_checks(recipe: Recipe, objective: DistributionMatching, term: GuidanceAlone) -> Iterator[Check]:
    """T4 without matching: the drive is guidance's own, nothing of it is left at scale 1, and no law is its rest."""
    stage, gap = world(VP(), "v"), term.term
    cast, _ = cast_of(stage, objective, offset=0.3)
    batch = stage.batch(COUNT)
    made = objective.rollout.make(cast["student"], batch, turn())
    for w in (1.0, 2.5):
        guided = replace(term, term=replace(gap, guidance=UniformScale(w, w)))
        x = made.x0.detach().requires_grad_()
        guided.loss(replace(made, x0=x), Cast({"teacher": cast["teacher"]}), batch, turn(1))[0].backward()
        wanted = _drive(guided.term, replace(made, x0=x.detach()), cast, batch, w)
        yield below(f"guidance alone: its drive at scale {w:g}", grad_of(x) * x.numel() - wanted, 1e-5)
    high = replace(term, term=replace(gap, guidance=UniformScale(3.0, 3.0)))
    alone = with_terms(objective, "student", high)
    held = with_terms(objective, "student", high, MeanVariance(weight=1.0, mean=0.0, variance=1.0))
    bench = world(VP(), "x0", mean=0.0)
    for offset in (2.0, -2.0):
        away = slope_at(bench, alone, "offset", offset=offset)
        yield between(f"guidance alone: one way at every mean, here {offset:g}", -away / SHIFT, 1e-4, float("inf"))
        back = slope_at(bench, held, "offset", offset=offset)
        yield between(f"guidance held: brought back from {offset:g}", back / offset, 1e-4, float("inf"))


def _drive(gap: ScoreGap, made: Made, cast: Cast, batch: Batch, w: float) -> Tensor:
    """`(1 - w) (mu_cond - mu_uncond) / mean|x - mu_real|`, by hand at the draws of the gap."""
    teacher, again = cast["teacher"], turn(1)
    path, count = teacher.path, len(made.x0)
    gap.guidance.draw(count, again)
    t, noise = draw_times(gap.times, path, made, again), again.noise(made.x0)
    x_t = made.at(path, t, noise)
    there, at = (x_t, t)
    if gap.augment is not None:
        at, other = draw_times(gap.augment, path, made, again), again.noise(made.x0)
        there = made.at(path, at, other)
    cond = {**batch.cond, **batch.uncond}
    part = (w - 1.0) * (teacher.x0(there, at, batch.cond) - teacher.x0(there, at, cond))
    real = teacher.x0(x_t, t, batch.cond) + part
    size = (made.x0 - real).flatten(1).abs().mean(1).clamp(min=gap.floor or 0.0)
    size = torch.ones_like(size) if gap.floor is None else size
    return -part / expand(size, part) * expand(gap.weight(path, t), part)

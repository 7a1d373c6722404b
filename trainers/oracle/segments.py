"""The oracle of laws within an interval: where a rollout lands, the noise there, and what a fake learns of it."""

from collections.abc import Callable, Iterator
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from fewstep.models.analytic import exact, gaussian, mixture
from fewstep.models.denoiser import Denoiser, times
from fewstep.models.paths import VP, RectifiedFlow
from fewstep.runtime.sampling.samplers import path_start, updates

from ..distribution import subinterval
from ..distribution.anchor import Regress
from ..distribution.distribution import DistributionMatching
from ..distribution.only import Only
from ..distribution.subinterval import DenoiseLanding, DenoiseTrajectory
from ..parts.objective import Cast
from ..parts.rollout import Made
from ..parts.segments import RandomWalk, Segments, step_apart
from ..parts.times import clean
from ..recipes.recipe import Recipe
from .distribution import nodes, with_terms
from .score import only_checks, regress_checks
from .world import Bent, Check, World, below, between, holds, recipe_spec, turn, world


def segments_checks(recipe: Recipe, rollout: Segments) -> Iterator[Check]:
    """Steps begin at the states of the recipe's own sampler and land at the ends of their parts of the walk."""
    stage = world(VP(), "v")
    path, student, batch = stage.path, stage.teacher(), stage.batch(64)
    spec = recipe_spec(recipe, path, stage.prediction)
    (count,) = rollout.grids.counts
    grid, each = spec.grids[count], count // (rollout.phases or count)
    edges, ends, gaps, seen = [*grid, clean(path)], rollout.ends(path), [], set()
    right = all(s == edges[(k // each + 1) * each] for k, (_, s) in enumerate(ends))
    yield holds("segments: a step lands where its part ends", right and [t for t, _ in ends] == list(grid))
    for step in range(40):
        made = rollout.make(student, batch, turn(step))
        assert made.s is not None and made.x_s is not None
        states = _chain(student, spec, count, turn(step).noise(batch.x0) * path_start(path), batch.cond)
        places = [grid.index(t) for t in made.t.tolist()]
        seen |= set(zip(made.t.tolist(), made.s.tolist(), strict=True))
        began = torch.stack([states[k][row] for row, k in enumerate(places)])
        gaps.append(float((made.x - began).abs().max()))
        gaps.append(float((made.x_s - student.jump(made.x, made.t, made.s, batch.cond)).abs().max()))
        gaps.append(float((made.x0 - student.x0(made.x, made.t, batch.cond)).abs().max()))
        if not rollout.alone:
            gaps.append(float(len(set(places)) > 1))
    yield below("segments: against the sampler of the recipe, same draws", max(gaps), 1e-9)
    yield holds("segments: every step is reached, and no other", seen == set(ends))
    yield from _last_alone(rollout, stage, student)
    yield from _variance(rollout)


def _chain(student: Denoiser, spec: Any, count: int, x: Tensor, cond: Any) -> list[Tensor]:
    """The states at which the runtime's sampler asks its network."""
    states = [x]
    for t, update in updates(spec, count)[:-1]:
        x = update.a * x + update.b * student.raw(x, times(t, x), cond)
        states.append(x)
    return states


def _last_alone(rollout: Any, stage: World, student: Denoiser) -> Iterator[Check]:
    learner = Bent(student).denoiser()
    made = rollout.make(learner, stage.batch(8), turn())
    yield holds("rollout: gradient through the last step alone", made.x0.requires_grad and not made.x.requires_grad)


def _variance(rollout: Segments) -> Iterator[Check]:
    """On data N(0, 1) all of a VP path has variance 1; a landing noised as if it were clean data has more."""
    path = VP()
    student = exact(gaussian(torch.zeros(2, dtype=torch.float64), 1.0), path, "v")
    rng = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, 20000, 2, generator=rng, dtype=torch.float64)
    for t, s in rollout.ends(path):
        at, to = torch.full((len(x),), t, dtype=torch.float64), torch.full((len(x),), s, dtype=torch.float64)
        x0, _ = student.both(x, at, {})
        made = Made(x0, x, at, to, x)  # a landing of variance 1 too
        later = 0.5 * (max(s, 0.0) + path.start)
        found = made.at(path, torch.full_like(at, later), noise).var()
        yield between(f"segments: variance of a landing at {s:g} noised on", found, 0.97, 1.03)


def walk_checks(recipe: Recipe, rollout: RandomWalk) -> Iterator[Check]:
    """Times fall from the noisiest, the state is the deterministic chain's, also off the walk."""
    stage = world(VP(), "v")
    path, student, batch = stage.path, stage.teacher(), stage.batch(16)
    gaps, lengths, off, inside = [], set(), 0, True
    for step in range(60):
        made, again = rollout.make(student, batch, turn(step)), turn(step)
        walked, other = rollout.exit(path, again)
        lengths.add(len(walked))
        off += other is not None
        bounds = [(t - path.end) / (path.start - path.end) for t in walked[1:]]
        inside &= walked[0] == path.start and all(a >= b for a, b in pairwise(walked))
        inside &= all(rollout.low - 1e-2 <= share <= rollout.high + 1e-2 for share in bounds)
        x = again.noise(batch.x0) * path_start(path)
        for t, after in pairwise([*walked, *([] if other is None else [other])]):
            x0, eps = student.both(x, times(t, x), batch.cond)
            x = path.alpha(after) * x0 + path.sigma(after) * eps
        gaps.append(float((made.x - x).abs().max()))
        gaps.append(float((made.x0 - student.x0(x, made.t, batch.cond)).abs().max()))
    yield below("walk: against the deterministic chain, same draws", max(gaps), 1e-9)
    yield holds("walk: times fall from the noisiest within their bounds", inside)
    yield holds("walk: every length is reached", lengths == set(range(1, rollout.most + 1)))
    yield between("walk: share asked off it", off / 60, rollout.off - 0.25, rollout.off + 0.25)
    yield from _last_alone(rollout, stage, student)


def landing_checks(recipe: Recipe, objective: DistributionMatching, term: DenoiseLanding) -> Iterator[Check]:
    """The aim's error against the exact clean estimate has no correlation with anything that x_t says."""
    path, s, t = RectifiedFlow(), 0.5, 0.75
    data = mixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.2, 0.2]), torch.ones(2))
    z, noise, weights = nodes()
    errors = torch.zeros(3, dtype=torch.float64)
    for sign in (-1.0, 1.0):
        x_s = sign * path.alpha(s) + ((0.2 * path.alpha(s)) ** 2 + path.sigma(s) ** 2) ** 0.5 * z
        at, to = torch.full((len(z),), t, dtype=torch.float64), torch.full((len(z),), s, dtype=torch.float64)
        made = Made(x_s, x_s, at, to, x_s)
        x_t, aim = made.at(path, at, noise), subinterval.landing_aim(path, made, at, noise)
        error = 0.5 * weights * (aim - exact(data, path, "x0").x0(x_t, at, {}))[:, 0]
        says = torch.stack([torch.ones_like(x_t), x_t, torch.tanh(3.0 * x_t)])[..., 0]
        errors += (says * error).sum(1)
    yield below("landing: the aim's mean is the clean estimate of the marginal", errors, 1e-6)
    yield from _learns(objective, term)


def trajectory_checks(recipe: Recipe, objective: DistributionMatching, term: DenoiseTrajectory) -> Iterator[Check]:
    """The mixed noise is what takes the estimate to x_t; where it is as long as the fresh noise the weight is 1."""
    path = VP()
    rng = torch.Generator().manual_seed(2)
    x0, eps, noise = torch.randn(3, 64, 6, generator=rng, dtype=torch.float64)
    s, t = torch.full((64,), 250.0, dtype=torch.float64), torch.full((64,), 600.0, dtype=torch.float64)
    a, b = step_apart(path, s, t)
    x_s = path.alpha(250.0) * x0 + path.sigma(250.0) * eps
    x_t = Made(x0, x_s, t, s, x_s).at(path, t, noise)
    mixed = (a[:, None] * path.sigma(250.0) * eps + b[:, None] * noise) / path.sigma(600.0)
    wanted = (0.5 * (noise.square().mean(1) - mixed.square().mean(1))).exp()
    yield below("trajectory: weight by the mixed noise", subinterval.importance(path, x0, x_t, t, noise) - wanted, 1e-9)
    plain = path.alpha(600.0) * x0 + path.sigma(600.0) * noise
    yield below("trajectory: no weight from clean data", subinterval.importance(path, x0, plain, t, noise) - 1.0, 1e-9)
    for time, wanted_at in ((100.0, 5.0), (900.0, float(path.level(900.0)) ** -2)):
        found = float(subinterval.min_snr_5(path, torch.tensor([time], dtype=torch.float64)))
        yield below(f"trajectory: min(SNR, 5) at {time:g}", found - wanted_at, 1e-9)
    yield from _learns(objective, term)


def _learns(objective: DistributionMatching, term: Any) -> Iterator[Check]:
    """A fake whose estimates are off is pulled back, on the walk of an exact student."""
    stage = world(VP(), "v")
    alone = with_terms(objective, "fake", term)
    for sign, step in product((1.0, -1.0), range(2)):
        learner = Bent(stage.teacher(), offset=0.6 * sign)
        roles = {"student": stage.teacher(), "teacher": stage.teacher(), "fake": learner.denoiser()}
        alone.loss("fake", Cast(roles), stage.batch(2048, step), turn(step, "fake"))[0].backward()
        pull = sign * float(learner.offset.grad or 0.0)
        yield holds(f"fake: its loss pulls it back, bend {0.6 * sign}, {step}", pull > 0.0)


SCORE_TERMS: dict[type, Callable[[Recipe, DistributionMatching, Any], Iterator[Check]]] = {
    DenoiseLanding: landing_checks, DenoiseTrajectory: trajectory_checks, Only: only_checks, Regress: regress_checks,
}  # fmt: skip
SCORE_ROLLOUTS: dict[type, Callable[[Recipe, Any], Iterator[Check]]] = {
    RandomWalk: walk_checks,
    Segments: segments_checks,
}

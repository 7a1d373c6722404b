"""The oracle of what a score gap may have besides: divergences, a guided fake, split draws; and of terms around it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.models.analytic import Mixture, exact, gaussian, log_density, mixture
from fewstep.models.denoiser import Denoiser, times
from fewstep.models.paths import EDM, VP

from ..distribution import score_gap
from ..distribution.anchor import Regress
from ..distribution.backtrack import Trail
from ..distribution.discriminator import Deceive
from ..distribution.distribution import DistributionMatching
from ..distribution.only import Only
from ..distribution.score_gap import ScoreGap
from ..parts.divergences import WEIGHTS, Divergence
from ..parts.objective import Batch, Cast
from ..parts.rollout import Made
from ..parts.score_times import draw_times
from ..parts.times import UniformScale
from ..parts.transitions import guided, pure_noise
from ..recipes.recipe import Recipe
from .adversary import deceive_checks
from .distribution import cast_of, gap_checks, with_terms
from .parts import perfect_student
from .world import Bent, Check, below, between, holds, turn, world

BUMPS = mixture(torch.tensor([[-3.0], [3.0]]), torch.tensor([0.5, 0.5]), torch.ones(2))
"""The teacher of two equal bumps N(-3, .25) and N(3, .25) of the golden numbers."""
RATIOS = {"rkl": (-1.7715, 2.4343), "kl": (2.4752, -14.2143), "js": (-0.1709, 0.1689)}
"""E[h (s_fake - s_real)] and E[h (s_fake - s_real) z] at noise 0.1 for a student N(2.5, 1), s the scores."""
NODES = 721


def unbound(kind: str) -> Divergence:
    """A divergence whose ratio nothing calms: the true one is known here."""
    return Divergence(kind, bins=0, clamp=math.inf)


def option_checks(recipe: Recipe, objective: DistributionMatching, term: ScoreGap) -> Iterator[Check]:
    """Of a score gap with any of its options."""
    yield from formula_checks(objective, term)
    if term.divergence is not None:
        yield from divergence_checks(term.divergence)
    if term.augment is not None:
        yield from split_checks(objective, term)
    if term.trail is not None:
        yield from trail_checks(objective, term, term.trail)
    if recipe.name in ("dmd2", "f-distill"):
        yield from mode_checks()


def formula_checks(objective: DistributionMatching, term: ScoreGap) -> Iterator[Check]:
    """The gradient that reaches the samples, against its formula on the term's own draws, at one scale and no split."""
    stage = world(VP(), "v")
    plain = replace(term, augment=None, divergence=None, trail=None)
    cast, _ = cast_of(stage, objective, offset=0.4)
    batch, path = stage.batch(64), stage.path
    x = (batch.x0 * 1.5 + 1.0).requires_grad_()
    made = Made(x, x.detach(), torch.full((64,), 700.0, dtype=torch.float64))
    plain.loss(made, cast, batch, turn())[0].backward()
    again = turn()
    w = plain.guidance.draw(64, again)
    t, noise = draw_times(plain.times, path, made, again), again.noise(x)
    x_t = _column(path.alpha(t)) * x.detach() + _column(path.sigma(t)) * noise
    real, fake = (_guided_mean(cast, role, batch, x_t, t, w, on) for role, on in
                  (("teacher", plain.cfg), ("fake", plain.fake_cfg)))  # fmt: skip
    gap = (fake - real) * _column(plain.weight(path, t))
    if plain.floor is not None:
        gap = gap / _column((x.detach() - real).abs().flatten(1).mean(1).clamp(min=plain.floor))
    assert x.grad is not None
    yield below(
        "gap: its gradient against the formula",
        x.grad * x.numel() - gap.detach(),
        1e-5 * float(gap.detach().abs().max()),
    )


def _column(value: Tensor) -> Tensor:
    return value.reshape(-1, 1, 1)


def _guided_mean(cast: Cast, role: str, batch: Any, x: Tensor, t: Tensor, w: Tensor, on: bool) -> Tensor:
    """u + w (c - u) of clean estimates, which are linear in what is guided."""
    cond = cast[role].x0(x, t, batch.cond)
    if not on:
        return cond
    uncond = cast[role].x0(x, t, {**batch.cond, **batch.uncond})
    return uncond + _column(w) * (cond - uncond)


def divergence_checks(divergence: Divergence) -> Iterator[Check]:
    """T13: the weighted gaps of two bumps; and a learned ratio of any size is calmed to mean 1 in each part."""
    for kind, wanted in RATIOS.items():
        found = weighted_gap(replace(divergence, kind=kind, bins=0, clamp=math.inf), 2.5, 1.0, 0.1)
        for name, value, golden in zip(("mean", "spread"), found, wanted, strict=True):
            yield below(f"T13: {kind} gap in the {name}, two bumps", value / 0.01 / golden - 1.0, 1e-3)
    path, rng = VP(), torch.Generator().manual_seed(0)
    t = torch.rand(4000, generator=rng, dtype=torch.float64) * path.start
    logits = 0.3 * torch.randn(4000, 3, generator=rng, dtype=torch.float64) + _drift(t)[:, None]
    r = divergence.ratio(logits, path, t)
    if divergence.bins:
        part = (t / path.start * divergence.bins).long().clamp(max=divergence.bins - 1)
        means = torch.stack([r[part == k].mean() for k in range(divergence.bins)])
        yield below("f: mean ratio in each part of the path", means - 1.0, 1e-6)
    yield below("f: mean weight of a batch", float(divergence.weights(logits, path, t).mean()) - 1.0, 1e-9)
    wild = divergence.ratio(torch.tensor([[900.0], [-900.0]], dtype=torch.float64), path, t[:2])
    yield holds("f: a wild logit stays finite", bool(torch.isfinite(wild).all()))


def _drift(t: Tensor) -> Tensor:
    return 2.0 * torch.floor(10.0 * t / VP().start) / 10.0


def weighted_gap(divergence: Divergence, b: float, a: float, sigma: float) -> tuple[float, float]:
    """E[h (mu_fake - mu_real)] and E[h (mu_fake - mu_real) z], by quadrature: even in z, Gauss-Hermite in the noise."""
    path = EDM()
    z = torch.linspace(-9.0, 9.0, NODES, dtype=torch.float64)
    points, weights = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(12))
    both = torch.outer((-0.5 * z**2).exp(), weights).flatten()
    both = both / both.sum()
    at, noise = z.repeat_interleave(12)[:, None], points.repeat(NODES)[:, None]
    x, t = b + a * at, torch.full((len(at),), sigma, dtype=torch.float64)
    student = gaussian(torch.tensor([b], dtype=torch.float64), a)
    g = score_gap.dmd_gradient(
        exact(BUMPS, path, "x0"), exact(student, path, "x0"), Made(x, x, t), t, noise, {}, floor=None
    )[:, 0]
    x_t = x + sigma * noise
    logits = _log_ratio(BUMPS, student, x_t, t)
    h = WEIGHTS[divergence.kind](divergence.ratio(logits, path, t))
    return float((both * h * g).sum()), float((both * h * g * at[:, 0]).sum())


def _log_ratio(p: Mixture, q: Mixture, x: Tensor, t: Tensor) -> Tensor:
    one = torch.ones_like(t)
    return log_density(p, x, one, t) - log_density(q, x, one, t)


def mode_checks() -> Iterator[Check]:
    """T2: from a student on one bump, at low noise, reverse KL narrows to that bump; forward KL covers both."""
    for kind, wanted, bound in (("rkl", (3.0, 0.5), 2e-3), ("kl", (0.0, math.sqrt(9.25)), 0.05)):
        b, a = descend(unbound(kind), (2.5, 1.0), 0.5)
        yield below(f"T2: {kind} at noise 0.5 comes to mean {wanted[0]:.3f}", b - wanted[0], bound)
        yield below(f"T2: {kind} at noise 0.5 comes to spread {wanted[1]:.3f}", a - wanted[1], bound)


def descend(
    divergence: Divergence, start: tuple[float, float], sigma: float, steps: int = 80,
    beside: Callable[[float, float], tuple[float, float]] = lambda b, a: (0.0, 0.0),
) -> tuple[float, float]:  # fmt: skip
    """(mean, spread) where a student N(b, a^2) comes to along the weighted gap, by steps that grow and shrink."""
    place = np.array(start)
    rate = np.full(2, 0.05)
    before = np.zeros(2)
    for _ in range(steps):
        b, a = map(float, place)
        found = np.asarray(weighted_gap(divergence, b, a, sigma)) + np.asarray(beside(b, a))
        slope = np.sign(found)
        rate = np.where(slope * before < 0, 0.5, 1.2) * rate
        rate = np.minimum(rate, 0.3)
        place = place - rate * slope
        place[1] = max(place[1], 0.05)
        before = slope
    return float(place[0]), float(place[1])


def split_checks(objective: DistributionMatching, term: ScoreGap) -> Iterator[Check]:
    """Where both draws are one, the split gap's teacher is the guided teacher, bit for bit; else guidance's part is
    that of the other draw."""
    stage = world(VP(), "v")
    batch, path = stage.batch(32), stage.path
    teacher = stage.teacher()
    w = torch.full((32,), 3.0, dtype=torch.float64)
    whole = guided(teacher, batch.uncond, w)
    rng = torch.Generator().manual_seed(3)
    noise, other = (torch.randn(batch.x0.shape, generator=rng, dtype=torch.float64) for _ in range(2))
    t, there = torch.full((32,), 300.0, dtype=torch.float64), torch.full((32,), 800.0, dtype=torch.float64)
    made = Made(batch.x0, batch.x0, t)
    x_t, x_there = made.at(path, t, noise), made.at(path, there, other)
    same = score_gap.augmented(whole, teacher, made, t, noise).x0(x_t, t, batch.cond)
    equal = torch.equal(same, whole.x0(x_t, t, batch.cond))
    yield holds("split: with one draw it is the guided teacher, bit for bit", equal)
    apart = score_gap.augmented(whole, teacher, made, there, other).x0(x_t, t, batch.cond)
    cond, uncond = (teacher.x0(x_there, there, side) for side in (batch.cond, batch.uncond))
    wanted = teacher.x0(x_t, t, batch.cond) + 2.0 * (cond - uncond)
    yield below("split: guidance's part is that of the other draw", apart - wanted, 1e-9)
    aim = replace(term, guidance=replace(term.guidance, low=1.0, high=1.0))
    found = [
        with_terms(objective, "student", kind).loss("student", cast_of(stage, objective)[0], batch, turn())[1]
        for kind in (aim, replace(aim, augment=None))
    ]
    gap = found[0]["dmd_gradient"] - found[1]["dmd_gradient"]
    yield below("split: nothing is added at scale 1", gap, 1e-9)


def trail_checks(objective: DistributionMatching, term: ScoreGap, trail: Trail) -> Iterator[Check]:
    """Snapshots follow the fake out, each up to its own time; then they stand for the teacher, the last first."""
    for k, (name, decay) in enumerate(trail.averages.items()):
        at = trail.out * (k + 1) / trail.points
        kept = [decay(1, at + shift) for shift in (-1e-6, 1e-6)]
        yield holds(f"trail: {name} follows up to {at:.3g} of the run and stays", kept == [0.0, 1.0])
    along = [trail.role(p / 1000.0) for p in range(1001)]
    order = [role for k, role in enumerate(along) if k == 0 or along[k - 1] != role]
    yield holds("trail: back by every snapshot, the last first", order == [*reversed(trail.roles), "teacher"])
    left = sum(role != "teacher" for role in along) / 1000.0
    yield below("trail: the teacher itself from its share of the run on", left - trail.back, 2e-3)
    alone, stage = with_terms(objective, "student", term), world(VP(), "v")
    for progress in (0.0, 0.5 * (trail.out + trail.back), trail.back):
        cast, _ = cast_of(stage, objective, offset=0.5)
        roles = dict.fromkeys(trail.roles, cast["fake"]) | {"fake": cast["fake"], "student": cast["student"]}
        one = {**roles, trail.role(progress): stage.teacher()}
        plain = replace(turn(), done=progress)
        found = alone.loss("student", replace(cast, roles={"teacher": cast["fake"], **one}), stage.batch(64), plain)[1]
        yield holds(f"trail: who is followed at {progress:.3g}", found["dmd_gradient"] > 1e-3)


def regress_checks(recipe: Recipe, objective: DistributionMatching, term: Regress) -> Iterator[Check]:
    """Nothing at the exact map of the pairs, and beside it a pull back."""
    stage = world(VP(), "v")
    batch = stage.batch(256)
    perfect = perfect_student(stage, SimpleNamespace(jump=term.jump, guidance=UniformScale(1.0, 1.0)))
    noise = torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    start = pure_noise(stage.path, noise)
    made = perfect.x0(start, times(stage.path.start, start), batch.cond)
    pairs = replace(batch, x0=made, noise=noise)
    for offset in (0.0, 0.3, -0.3):
        student = Bent(perfect, offset=offset)
        cast = Cast({"student": student.denoiser()})
        loss = term.loss(Made(made, start, torch.zeros(256)), cast, pairs, turn())[0]
        loss.backward()
        if offset == 0.0:
            yield below("pairs: loss at the exact map", loss, 1e-6)
        else:
            yield holds(f"pairs: pulled back, off by {offset}", float(student.offset.grad or 0.0) * offset > 0.0)
    b, a = descend(unbound("rkl"), (2.5, 1.0), 0.5, beside=lambda b, a: _anchor_slope(term, b, a))
    yield below("T2: from one bump, anchored by pairs, to the mean of both", b, 0.05)
    yield between("T2: and to a spread that covers both", a, 2.2, 3.1)


def _anchor_slope(term: Regress, b: float, a: float) -> tuple[float, float]:
    """Slope of the anchor in the mean and the spread of a student `b + a z`, on the two bumps' exact pairs."""
    levels = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    z, grid = torch.special.ndtri(levels), torch.linspace(-8.0, 8.0, 20001, dtype=torch.float64)
    below_at = 0.5 * (torch.special.ndtr((grid + 3.0) / 0.5) + torch.special.ndtr((grid - 3.0) / 0.5))
    made = grid[torch.searchsorted(below_at, levels).clamp(max=20000)][:, None]
    place = torch.tensor([b, a], dtype=torch.float64, requires_grad=True)
    student = Denoiser(lambda x, t, cond: place[0] + place[1] * x, VP(), "x0")
    pairs = Batch(made, {}, {}, z[:, None])
    term.loss(Made(made, made, torch.zeros(400)), Cast({"student": student}), pairs, turn())[0].backward()
    assert place.grad is not None
    return float(place.grad[0]), float(place.grad[1])


def only_checks(recipe: Recipe, objective: DistributionMatching, term: Only) -> Iterator[Check]:
    """The inner term's own value inside its part of the path and of the run, nothing outside."""
    stage = world(VP(), "v")
    cast, _ = cast_of(stage, objective, offset=0.4)
    cast = replace(cast, critic=lambda x, t, cond: x.flatten(1).mean(1))
    batch = stage.batch(32)
    for share, progress in product((0.05, 0.3, 0.6, 0.95, 1.0), sorted({0.0, 0.99 * term.after, term.after, 1.0})):
        x = (batch.x0 + 0.2).requires_grad_()
        made = Made(x, x.detach(), torch.full((32,), share * stage.path.start, dtype=torch.float64))
        term.loss(made, cast, batch, replace(turn(), done=progress))[0].backward()
        assert x.grad is not None
        wanted = term.low < share <= term.high and progress >= term.after
        moved = float(x.grad.abs().max()) > 0.0
        name = f"a step from {share} at {progress:.3g} of the run is {'moved' if wanted else 'left'}"
        yield holds(f"part: {name}", moved == wanted)
    yield from _inner(recipe, objective, term.term)


def _inner(recipe: Recipe, objective: DistributionMatching, term: Any) -> Iterator[Check]:
    """The checks of a term that another one is around, without that."""
    bare = with_terms(objective, "student", *(getattr(part, "term", part) for part in objective.terms["student"]))
    if isinstance(term, ScoreGap):
        yield from gap_checks(recipe, bare, term)
    elif isinstance(term, Deceive):
        yield from deceive_checks(recipe, bare, term)

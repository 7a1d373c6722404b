"""The oracle of consistency's parts: where pairs and ends lie, solvers that draw noise, steps without a teacher."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.models.paths import VP

from ..objectives.consistency import Consistency
from ..parts.ends import AnyBelow, AtClean, Ends, MergedTargets, PhaseEdges
from ..parts.objective import Batch
from ..parts.steps import AdjustedStep, At, ReferenceBatch, SameNoise, SdeStep, same_condition
from ..parts.times import GridPairs, grid
from ..parts.transitions import NoisedData, ddim_chain
from ..recipes.recipe import Recipe
from .world import SHIFT, Bent, Check, below, between, holds, recipe_spec, turn, world

LATE = 99
"""A step near the end of a run of 100, where curricula have grown."""


def pair_checks(recipe: Recipe, objective: Consistency) -> Iterator[Check]:
    """Pairs go down in noise, and every time at which the student will be sampled is trained, or its neighbourhood."""
    path = VP()
    for step in (0, LATE):
        t, s = objective.pairs.draw(path, 8192, turn(step))
        inside = (s >= path.end) | (s == float("-inf"))
        yield holds(f"pairs: s lies below t, inside the path, step {step}", bool(((s < t) & inside).all()))
        yield holds(f"pairs: t inside the path, step {step}", bool(((t <= path.start) & (t >= path.end)).all()))
        yield holds(f"pairs: the noisiest time is trained, step {step}", bool((t == path.start).any()))
    spec = recipe_spec(recipe, path, "v")
    sampled = torch.tensor(sorted({t for walked in spec.grids.values() for t in walked}), dtype=torch.float64)
    gaps = (sampled[:, None] - t.unique()[None]).abs().min(dim=1).values
    exact = isinstance(objective.pairs, GridPairs) and spec.sampler == "lcm"
    yield below("pairs: how far a sampler's time is from one that is trained", gaps, 1e-9 if exact else 30.0)
    if objective.per_gap:
        level = path.level(t) - path.level(s)
        weighed = objective.gap_weight(path, t, s) * level**objective.per_gap
        yield below("pairs: weight times the gap in levels", weighed - 1.0, 1e-9)
    if objective.coupling is not None:
        yield from _coupled(objective)


def _coupled(objective: Consistency) -> Iterator[Check]:
    """The coupling brings noise nearer to its sample, and each condition keeps the noise it drew."""
    rng = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(256, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    cond = {"label": (torch.arange(256) % 2)[:, None].float()}
    moved = objective.coupled(Batch(x0, cond, cond), noise, turn())
    before, after = (x0 - noise).square().sum(1).mean(), (x0 - moved).square().sum(1).mean()
    yield between("coupling: cost after over before", after / before, 0.0, 0.7)
    kept = all(torch.equal(noise[k::2].sort(0).values, moved[k::2].sort(0).values) for k in (0, 1))
    yield holds("coupling: each condition keeps its noise", kept)


def end_checks(recipe: Recipe, ends: Ends) -> Iterator[Check]:
    path, count = VP(), 8192
    gen = torch.Generator().manual_seed(0)
    t = torch.rand(count, generator=gen, dtype=torch.float64) * 998.0 + 1.0
    s = t * torch.rand(count, generator=gen, dtype=torch.float64)
    t[0], s[0] = path.start, path.start - 20.0
    end = ends(path, t, s, turn(LATE))
    inside = (end >= path.end) | (end == float("-inf"))
    yield holds("ends: none above s, all on the path", bool(((end <= s) & inside).all()))
    if isinstance(ends, AtClean):
        yield holds("ends: clean data", bool((end == float("-inf")).all()))
    if isinstance(ends, PhaseEdges):
        edges = [float("-inf"), *grid(path, ends.phases(turn(LATE))).tolist()]
        low = torch.tensor([max(edge for edge in edges if edge < value) for value in t.tolist()], dtype=torch.float64)
        if ends.drawn:
            floor = torch.minimum(low.clamp(min=path.end), s)
            yield holds("ends: above the edge of the phase", bool((end >= floor).all()))
            yield between("ends: mean place between edge and s", _place(end, floor, s), 0.47, 0.53)
        else:
            yield holds("ends: the edge below t, counted by hand", torch.equal(end, torch.minimum(low, s)))
    if isinstance(ends, AnyBelow):
        drawn = end[end > float("-inf")]
        yield between(
            "ends: share at clean data", 1.0 - len(drawn) / count, ends.clean_share - 0.02, ends.clean_share + 0.02
        )
        some = end > float("-inf")
        yield between("ends: mean place up to s", _place(drawn, torch.zeros_like(drawn), s[some]), 0.47, 0.53)
    if isinstance(ends, MergedTargets):
        yield from _merged(ends, t, s)


def _place(end: Tensor, low: Tensor, high: Tensor) -> Tensor:
    wide = high - low > 1.0
    return ((end - low) / (high - low))[wide].mean()


def _merged(ends: MergedTargets, t: Tensor, s: Tensor) -> Iterator[Check]:
    """TDD's draw against its description, row by row, without the move down by eta."""
    path = VP()
    table = ends.targets(path).tolist()
    still = replace(ends, eta=0.0)(path, t, s, turn())
    right = True
    for bound, found in zip(s.tolist(), still.tolist(), strict=True):
        top = max(value for value in table if value <= bound)
        right &= found in [value for value in table if top - ends.reach * path.start <= value <= top]
    yield holds("ends: a target of the union, within reach below s", right)
    moved = ends(path, t, s, turn()) / still.clamp(min=1e-9)
    far = still > 1.0
    yield between("ends: mean move down by eta", moved[far].mean(), 1.0 - 0.55 * ends.eta, 1.0 - 0.45 * ends.eta)
    walked = {value for one in ends.grids.of(path).values() for value in one[1:]}
    yield holds("ends: every time that a grid lands on is a target", walked <= set(table))


def step_checks(objective: Consistency) -> Iterator[Check]:
    if isinstance(objective.step, SdeStep):
        yield from _noisy(objective.step)
    if isinstance(objective.step, AdjustedStep):
        yield from _adjusted(objective.step)
    if isinstance(objective.step, ReferenceBatch):
        yield from reference_checks(objective.step)


def _at(count: int, time: float, mixing: NoisedData | None = None) -> tuple[Any, At]:
    stage, mixing = world(VP(), "v"), mixing or NoisedData()
    batch = stage.batch(count)
    t = torch.full((count,), time, dtype=torch.float64)
    noise = turn().noise(batch.x0)
    x = mixing.mix(stage.path, batch.x0, t, noise)
    return stage, At(x, t, batch.x0, noise, batch.cond, mixing)


def _noisy(step: SdeStep) -> Iterator[Check]:
    """eta = 0 is DDIM; eta = 1 in many parts keeps the exact marginal (moments of the data at s)."""
    stage, at = _at(8192, 700.0)
    s = torch.full_like(at.t, 500.0)
    still = replace(step, eta=0.0, parts=2)(stage.teacher(), at, s, turn())
    chain = ddim_chain(stage.teacher(), at.x, (at.t, 0.5 * (at.t + s), s), at.cond)
    yield below("solver: eta = 0 is DDIM in as many parts", still - chain, 1e-9)
    for eta in (step.eta, 1.0):
        x = replace(step, eta=eta, parts=50)(stage.teacher(), at, s, turn(1))
        path = stage.path
        mean = path.alpha(500.0) * (stage.data.means[0] + SHIFT)
        std = (path.alpha(500.0) ** 2 * stage.data.stds[0] ** 2 + path.sigma(500.0) ** 2).sqrt()
        yield below(f"solver: mean of x_s, eta {eta}", x.mean(0) - mean, 0.05)
        yield below(f"solver: deviation of x_s, eta {eta}", x.std(0) / std - 1.0, 0.03)
    apart = step(stage.teacher(), at, s, turn(1)) - step(stage.teacher(), at, s, turn(2))
    yield between("solver: draws noise of its own", apart.std(), 1e-3, 10.0)


def _adjusted(step: AdjustedStep) -> Iterator[Check]:
    """aDDIM with nothing missing is DDIM; its noise part has the length that eq. 8 states."""
    stage, at = _at(64, 700.0)
    s = torch.full_like(at.t, 600.0)
    teacher = Bent(stage.teacher(), 0.1, 0.05).denoiser()
    x0, eps = (value.detach() for value in teacher.both(at.x, at.t, at.cond))
    plain = ddim_chain(teacher, at.x, (at.t, s), at.cond)
    yield below(
        "aDDIM: DDIM where the estimate is the sample", step(teacher, replace(at, x0=x0), s, turn()) - plain, 1e-9
    )
    path = stage.path
    rest = step(teacher, at, s, turn()) - path.alpha(600.0) * x0
    lever = path.alpha(600.0) - path.alpha(700.0) * path.sigma(600.0) / path.sigma(700.0)
    wanted = path.sigma(600.0) ** 2 * _square(eps) + lever**2 * step.eta * _square(x0 - at.x0)
    yield below("aDDIM: squared length of the noise part", _square(rest) / wanted - 1.0, 1e-9)


def _square(value: Tensor) -> Tensor:
    return value.detach().flatten(1).square().sum(1)


def reference_checks(step: ReferenceBatch) -> Iterator[Check]:
    """A batch of one is the data's own pair; a large one nears the teacher's step, with far less spread."""
    stage, one = _at(1, 700.0)
    s = torch.full_like(one.t, 600.0)
    yield below(
        "reference: a batch of one is the same noise",
        step(stage.teacher(), one, s, turn()) - SameNoise()(stage.teacher(), one, s, turn()), 1e-9,
    )  # fmt: skip
    spreads = []
    for count in (32, 512):
        _, at = _at(count, 700.0)
        s = torch.full_like(at.t, 600.0)
        truth = ddim_chain(stage.teacher(), at.x, (at.t, s), at.cond)
        own = SameNoise()(stage.teacher(), at, s, turn()) - truth
        spreads.append(float((step(stage.teacher(), at, s, turn()) - truth).std() / own.std()))
    yield between("reference: spread of 512 over that of 32", spreads[1] / spreads[0], 0.0, 0.6)
    yield below("reference: spread of 512 over that of one", spreads[1], 0.5)
    _, at = _at(8, 700.0)
    apart = replace(at, cond={"ctx": torch.arange(8.0)[:, None, None]})
    s = torch.full_like(at.t, 600.0)
    gap = step(stage.teacher(), apart, s, turn()) - SameNoise()(stage.teacher(), apart, s, turn())
    yield below("reference: rows of other conditions play no part", gap, 1e-9)
    yield holds("reference: equal conditions are found", bool(same_condition(at.cond).all()))

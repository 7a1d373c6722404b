"""The oracle of progressive distillation: two exact steps are one exact step, and the student's chain the teacher's."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.models.analytic import Landing
from fewstep.models.denoiser import Condition, Denoiser, times
from fewstep.models.paths import VP, Path
from fewstep.runtime.sampling.samplers import time_pairs, updates

from ..objectives.progressive import ProgressiveHalving, halving_target
from ..parts.objective import Cast, Turn
from ..parts.times import clean
from ..parts.transitions import guided, inverse_ddim
from ..recipes.recipe import Recipe, Stage
from .parts import guidance_checks, source_checks
from .world import Bent, Check, World, absorbed, below, between, gradient_checks, holds, recipe_spec, turn, world

COUNT = 256
Rows = list[tuple[float, float, float]]


@dataclass(frozen=True)
class Apart:
    """Triples of fixed length, t spread over the path."""

    distance: float

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        width = path.start - path.end
        t = path.end + width * torch.linspace(0.3, 0.9, count, dtype=torch.float64)
        return t, t - 0.5 * self.distance * width, t - self.distance * width


def checks(recipe: Recipe, objective: ProgressiveHalving) -> Iterator[Check]:
    stage = world(VP(), "v")
    for k, each in enumerate(recipe.stages):
        yield from _stage_checks(recipe, each, recipe.stages[k - 1] if k else None)
    first = recipe.stages[0].objective
    for kind in (first, objective):
        assert isinstance(kind, ProgressiveHalving)
        yield from _order("guided: " if kind.cfg else "", stage, kind)
        yield from _gradients("guided: " if kind.cfg else "", stage, kind)
    yield _inverse(stage)
    yield from _sold(recipe, objective)
    yield from source_checks(objective.source)
    yield from guidance_checks(stage)


def _rows(objective: ProgressiveHalving, path: Path) -> Rows:
    return [(t, mid, s) for t, mid, s in objective.pairs.table(path)[0].tolist()]


def _landing(table: dict[float, float]) -> Landing:
    """A step that ends where the table says; times that are not in it are an error."""
    keys = torch.tensor(list(table), dtype=torch.float64)
    ends = torch.tensor(list(table.values()), dtype=torch.float64)

    def to(t: Tensor, cond: Condition) -> Tensor:
        gap, index = (t.double()[:, None] - keys[None]).abs().min(dim=1)
        if bool((gap > 1e-9).any()):
            raise ValueError(f"a network was asked at a time {t[gap.argmax()].item()} that is on no grid")
        return ends[index]

    return to


def _stage_checks(recipe: Recipe, each: Stage, before: Stage | None) -> Iterator[Check]:
    """A teacher whose steps follow the flow map has a student that follows it in twice the stride: residual zero."""
    objective = each.objective
    assert isinstance(objective, ProgressiveHalving)
    stage, path = world(VP(), "v"), VP()
    rows = _rows(objective, path)
    label = f"round {each.name}: "
    yield holds(f"{label}times fall, t > mid >= s", all(t > mid >= s for t, mid, s in rows))
    teacher = stage.jumper(_landing({t: mid for t, mid, _ in rows} | {mid: s for _, mid, s in rows if mid > s}))
    student = stage.jumper(_landing({t: s for t, _, s in rows}))
    w = objective.guidance.low
    cast = Cast({"student": absorbed(student, w), "teacher": teacher if objective.cfg else absorbed(teacher, w)})
    residual = objective.loss("student", cast, stage.batch(COUNT), turn())[1]["residual"]
    yield below(f"{label}residual at the exact chain", residual, 1e-8)
    yield below(f"{label}N steps of the student against 2N of the teacher", _chain_gap(recipe, each, stage), 1e-9)
    if before is not None:
        assert isinstance(before.objective, ProgressiveHalving)
        known = {(t, s) for t, _, s in _rows(before.objective, path)}
        asked = {(t, mid) for t, mid, _ in rows} | {(mid, s) for _, mid, s in rows if mid > s}
        yield holds(f"{label}the teacher is asked for steps it was taught", asked <= known)


def _chain_gap(recipe: Recipe, each: Stage, stage: World) -> float:
    """Largest distance between the runtime's DDIM with the fitted student at N and with its teacher at 2N steps."""
    objective = each.objective
    assert isinstance(objective, ProgressiveHalving)
    n = objective.pairs.steps
    spec = recipe_spec(recipe, stage.path, stage.prediction)
    assert recipe.sampling is not None
    grids = replace(recipe.sampling.grids, counts=(n, 2 * n))  # type: ignore[type-var]
    spec = replace(spec, grids=grids.of(stage.path))
    batch = stage.batch(8)
    w = torch.full((8,), objective.guidance.low, dtype=torch.float64)
    teacher = guided(stage.teacher(), batch.uncond, w) if objective.cfg else stage.teacher()
    mids = {t: mid for t, mid, s in _rows(objective, stage.path) if mid > s}
    start = stage.marginal(times(spec.grids[n][0], batch.x0))
    x = start
    for (t, to), (_, update) in zip(time_pairs(spec, n), updates(spec, n), strict=True):
        end = clean(stage.path) if to is None else to
        aim = halving_target(teacher, x, times(t, x), times(mids[t], x), times(end, x), batch.cond)
        x = update.a * x + update.b * _output(stage, x, t, aim)
    y = start
    for t, update in updates(spec, 2 * n):
        y = update.a * y + update.b * teacher.raw(y, times(t, y), batch.cond)
    return float((x - y).abs().max())


def _output(stage: World, x: Tensor, t: float, x0: Tensor) -> Tensor:
    """The v output whose clean estimate is x0."""
    alpha, sigma = stage.path.alpha(t), stage.path.sigma(t)
    return (alpha * x - x0) / sigma


def _cast(stage: World, objective: ProgressiveHalving, student: Denoiser) -> tuple[Cast, Bent, Bent]:
    w = objective.guidance.low
    learner = Bent(absorbed(student, w))
    teacher = Bent(stage.teacher() if objective.cfg else absorbed(stage.teacher(), w))
    return Cast({"student": learner.denoiser(), "teacher": teacher.denoiser()}), learner, teacher


def _back(width: float) -> Landing:
    """Every jump lands this much below where it begins."""
    return lambda t, cond: t - width


def _order(label: str, stage: World, objective: ProgressiveHalving) -> Iterator[Check]:
    """With the exact denoiser as teacher, the flow map's clean estimate is missed by O(step)."""
    residuals = []
    for distance in (0.04, 0.02, 0.01):
        width = distance * (stage.path.start - stage.path.end)
        cast, _, _ = _cast(stage, objective, stage.jumper(_back(width)))
        near = replace(objective, pairs=Apart(distance))  # type: ignore[arg-type]
        residuals.append(near.loss("student", cast, stage.batch(COUNT), turn())[1]["residual"])
    yield below(f"{label}residual at the flow map, one step of 0.01", residuals[-1], 5e-3)
    for coarse, finer in pairwise(residuals):
        yield between(f"{label}residual ratio when the step halves", coarse / finer, 1.8, 2.2)


def _gradients(label: str, stage: World, objective: ProgressiveHalving) -> Iterator[Check]:
    near = replace(objective, pairs=Apart(0.02))  # type: ignore[arg-type]
    width = 0.02 * (stage.path.start - stage.path.end)
    cast, student, teacher = _cast(stage, objective, stage.jumper(_back(width)))
    batch = stage.batch(COUNT)

    def loss() -> Tensor:
        return near.loss("student", cast, batch, turn())[0]

    least = float(loss().detach())
    with torch.no_grad():
        student.gain.fill_(0.2)
        student.offset.fill_(0.1)
    bent = loss()
    bent.backward()
    yield holds(f"{label}no gradient reaches the teacher", all(w.grad is None for w in teacher.parameters()))
    yield between(f"{label}a bent student's loss over the perfect one's", bent.detach() / least, 5.0, float("inf"))
    yield from gradient_checks(label, loss, student)


def _inverse(stage: World) -> Check:
    t = torch.linspace(100.0, 900.0, 16, dtype=torch.float64)
    s = 0.7 * t
    x, teacher = stage.marginal(t), stage.teacher()
    x0 = teacher.x0(x, t, {})
    return below("inverse_ddim undoes a step", inverse_ddim(stage.path, teacher.jump(x, t, s, {}), x, t, s) - x0, 1e-8)


def _sold(recipe: Recipe, objective: ProgressiveHalving) -> Iterator[Check]:
    """The last student was taught at each time its samplers ask, and each whole step of its own step count."""
    path = VP()
    spec = recipe_spec(recipe, path, "v")
    taught = {(t, s) for t, _, s in _rows(objective, path)}
    steps = {n: [(t, clean(path) if to is None else to) for t, to in time_pairs(spec, n)] for n in spec.steps}
    asked = {t for pairs in steps.values() for t, _ in pairs}
    yield holds("every time of the samplers was taught", asked <= {t for t, _ in taught})
    yield holds("every step of the last round's sampler was taught", set(steps[objective.pairs.steps]) <= taught)
    t, mid, s = objective.pairs.draw(path, 4096, turn())
    drawn = set(zip(t.tolist(), mid.tolist(), s.tolist(), strict=True))
    yield holds("pairs: every row is drawn, and no other", drawn == set(_rows(objective, path)))

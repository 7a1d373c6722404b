"""The oracle of what stands beside an adversary: other objectives as terms, rollouts, a teacher's aim, ASD, parts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.analytic import exact, gaussian
from fewstep.models.denoiser import Condition
from fewstep.models.paths import VP
from fewstep.runtime.sampling.groups import Group, Student

from ..distribution.adaptation import TaughtBy
from ..distribution.adversarial import TeacherAim
from ..distribution.also import Also
from ..distribution.discriminator import Judge
from ..distribution.distribution import DistributionMatching
from ..distribution.embedding import EmbeddingLoss
from ..distribution.score_gap import ScoreGap
from ..distribution.self_paced import BesideNext, DrawnWalk, NextCount
from ..parts.noised_rollout import NoisedRollout, SampledTimes, StartMoreOften
from ..parts.objective import Batch, Cast
from ..parts.rollout import Made
from ..parts.times import UniformScale, UniformTimes, weighed
from ..pictures import parting
from ..plane import sources
from ..plane.plane import CLASSES
from ..recipes.recipe import Recipe
from .distribution import cast_of, slope_at, with_terms
from .parts import perfect_student, sampled, source_checks
from .world import Bent, Check, MeanCritic, World, below, between, holds, recipe_spec, turn, world

COUNT = 4096


def aim_checks(recipe: Recipe, objective: DistributionMatching, term: TeacherAim) -> Iterator[Check]:
    """A teacher's estimate alone pulls the mean, is at rest there, and shrinks the spread: `scale c(t) s (1 - k)`."""
    stage, plain = world(VP(), "x0", mean=0.0), replace(term, cfg=False, guidance=UniformScale(1.0, 1.0))
    alone = with_terms(objective, "student", plain)
    for offset in (0.4, -0.4):
        found = slope_at(stage, alone, "offset", offset=offset)
        yield between(f"teacher's aim: mean off by {offset}", found / offset, 0.01, float("inf"))
    for share in (0.3, 0.6):
        s, path = 0.7, VP()
        data = gaussian(torch.tensor([0.2], dtype=torch.float64), s)
        t = torch.full((50_000,), math.floor(share * 1000), dtype=torch.float64)
        z = torch.randn(len(t), 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        x = (0.2 + s * z).requires_grad_()

        at = replace(plain, times=UniformTimes(share, share + 5e-4))
        cast = Cast({"teacher": exact(data, path, "v")})
        at.loss(Made(x, x, t), cast, Batch(x, {}, {}), turn())[0].backward()
        assert x.grad is not None
        alpha, sigma = path.alpha(t[0]), path.sigma(t[0])
        k = alpha**2 * s**2 / (alpha**2 * s**2 + sigma**2)
        wanted = float(2.0 * term.scale * term.weight(path, t[:1])[0] * s * (1.0 - k))
        spread = float((x.grad * z).sum())
        yield below(f"teacher's aim: it shrinks the spread, at {share}", spread / wanted - 1.0, 0.03)
        yield below(f"teacher's aim: no pull on the mean of the data, at {share}", float(x.grad.sum()) / wanted, 0.03)


def also_checks(recipe: Recipe, objective: DistributionMatching, term: Also) -> Iterator[Check]:
    """The other objective's own suite, and that it is untouched by what stands beside it."""
    from .suite import SUITES

    stage = replace(recipe.stages[-1], objective=term.objective)
    yield from SUITES[type(term.objective)](replace(recipe, stages=(stage,)), term.objective)
    bench = world(VP(), "v")
    silent = {player: tuple(_silent(t) for t in terms) for player, terms in objective.terms.items()}
    grads = []
    for whole in (term.objective, replace(objective, terms=silent)):
        cast, student = cast_of(bench, objective, offset=0.2)
        roles = {**dict.fromkeys(term.roles, cast["student"]), **cast.roles}  # an average is the student
        loss = whole.loss("student", Cast(roles, MeanCritic()), bench.batch(64), turn(3))[0]
        loss.backward()
        grads.append(torch.stack([student.gain.grad, student.offset.grad]))  # type: ignore[list-item]
    factor = term.weight
    yield holds("beside weights of 0 it is the other objective, bit for bit", torch.equal(factor * grads[0], grads[1]))


def taught_checks(recipe: Recipe, objective: DistributionMatching, term: TaughtBy) -> Iterator[Check]:
    """The other teacher alone is heard, and with the teacher in its place the term is the plain one, bit for bit."""
    stage = world(VP(), "x0", mean=0.0)
    cast, _ = cast_of(stage, objective, offset=0.3)
    far = World(stage.path, stage.prediction, stage.data.moved(5.0)).teacher()
    batch, found = stage.batch(64), {}
    made = objective.rollout.make(cast["student"], batch, turn())
    for name, part, roles in (
        ("plain", term.term, cast.roles),
        ("same", term, {**cast.roles, term.role: cast["teacher"], "teacher": far}),
        ("other", term, {**cast.roles, term.role: far}),
    ):
        x0 = made.x0.detach().requires_grad_()
        part.loss(replace(made, x0=x0), Cast(roles), batch, turn(1))[0].backward()
        assert x0.grad is not None
        found[name] = x0.grad
    yield holds(
        "taught by another: the plain term where both are one", torch.equal(term.weight * found["plain"], found["same"])
    )
    pull = float(-(found["other"] - found["same"]).mean())
    yield between("taught by another: it pulls to where that teacher's data lie", pull, 1e-6, float("inf"))


def _silent(term: Any) -> Any:
    """The term with its adversary's weight 0, a score gap or an embedding loss with its own."""
    if isinstance(term, ScoreGap):
        return replace(term, weight=_weightless)
    if isinstance(term, EmbeddingLoss):
        return replace(term, weight=0.0)
    own = getattr(term, "adversary", None)
    return term if own is None else replace(term, adversary=replace(own, student_weight=0.0))


def _weightless(path: Any, t: Tensor) -> Tensor:
    return torch.zeros_like(t)


def noised_checks(recipe: Recipe, rollout: NoisedRollout) -> Iterator[Check]:
    """Inputs are noised data of the times that are said, and the sample is the jump from there."""
    yield from source_checks(rollout.source)
    stage = world(VP(), "v")
    path, batch, student = stage.path, stage.batch(COUNT), Bent(stage.teacher(), gain=0.1).denoiser()
    made = rollout.make(student, batch, turn())
    cond = {**batch.cond, "w": torch.ones(COUNT, dtype=torch.float64)}
    again = rollout.jump(student, made.x, made.t, torch.zeros_like(made.t), cond)
    yield below("noised rollout: one evaluation at its state", made.x0 - again, 1e-12)
    yield holds("noised rollout: with a gradient", made.x0.requires_grad and not made.x.requires_grad)
    apart = made.x - rollout.source.mix(path, batch.x0, made.t, torch.zeros_like(batch.x0))
    scale = rollout.source.coefficients(path, made.t)[1].clamp(min=1e-3)
    yield between("noised rollout: the noise's size at its times", (apart.flatten(1).std(1) / scale).mean(), 0.85, 1.0)
    law = rollout.times
    if isinstance(law, SampledTimes):
        grid = law.grids.of(path)[max(law.grids.counts)]
        weights = weighed(law.weights, len(grid))
        got = torch.tensor([float((made.t == time).double().mean()) for time in grid])
        yield below("noised rollout: each time with its weight", got - weights / weights.sum(), 0.03)
    if isinstance(law, StartMoreOften):
        plain = float((law.law.draw(path, COUNT, turn(1)) >= path.start).double().mean())
        wanted = law.share + (1.0 - law.share) * plain
        yield below(
            "noised rollout: the share of the noisiest", float((made.t >= path.start).double().mean()) - wanted, 0.03
        )


def walk_checks(recipe: Recipe, rollout: DrawnWalk) -> Iterator[Check]:
    """Samples of n steps are those of the student's own sampler, draw by draw, for every n; some stop early."""
    stage = world(VP(), "v")
    grids = rollout.grids.of(stage.path)
    spec, student, batch = recipe_spec(recipe, stage.path, stage.prediction), stage.teacher(), stage.batch(16)
    for n in rollout.grids.counts:
        ours = rollout.walk(student, grids[n], batch.x0, batch.cond, turn(n))
        theirs = sampled(student, spec, spec.grids[n], batch.x0, batch.cond, turn(n))
        yield below(f"walk of {n}: against the sampler of the recipe", ours.x0 - theirs, 1e-9)
        yield holds(f"walk of {n}: it is known for one of {n}", rollout.count(ours, stage.path) == n)
    drawn = [rollout.make(student, batch, turn(step)) for step in range(120)]
    counts = {rollout.count(each, stage.path) for each in drawn}
    yield holds("walk: every step count is drawn, and some stop on their way", counts == {None, *rollout.grids.counts})
    times = {time for grid in grids.values() for time in grid}
    yield holds("walk: a student learns at every time of its samplers", {float(each.t[0]) for each in drawn} == times)
    learner = Bent(student).denoiser()
    made = rollout.walk(learner, grids[max(grids)], batch.x0, batch.cond, turn())
    first = made.before[0].x0.requires_grad
    yield holds(
        "walk: gradient through the last step alone", made.x0.requires_grad and not (first or made.x.requires_grad)
    )


class _Spread(nn.Module):
    """`gain mean(x^2)`, which tells laws of other spread apart; it knows nothing at first."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.gain * x.flatten(1).square().mean(1)


def next_checks(recipe: Recipe, objective: DistributionMatching, term: BesideNext) -> Iterator[Check]:
    """ASD: at equal laws of n and n + 1 the critic's loss is log 2 and no slope is left; else it learns."""
    walk = term.next.walk
    counts = walk.grids.counts
    if isinstance(term.side, Judge):
        stage = world(VP(), "x0")
        perfect = perfect_student(stage, _aims(walk))
        for name, student in (("a perfect student", perfect), ("a mean of the data", stage.teacher())):
            critic = _Spread()
            made = walk.walk(
                student, walk.grids.of(stage.path)[counts[0]], stage.batch(COUNT).x0, stage.batch(COUNT).cond, turn()
            )
            plain = replace(
                term, side=Judge(replace(term.adversary, times=None, share=1.0, critic_weight=1.0, regularisers=()))
            )
            loss = plain.loss(made, Cast({"student": student}, critic), stage.batch(COUNT), turn(1, "fake"))[0]
            loss.backward()
            slope = abs(float(critic.gain.grad or 0.0))
            yield below(f"next count, {name}: an ignorant critic's loss is log 2", loss - math.log(2.0), 1e-6)
            if student is perfect:
                yield below(f"next count, {name}: nothing to learn", slope, 0.02)
            else:
                yield between(f"next count, {name}: the critic learns", slope, 0.02, float("inf"))
    grids = walk.grids.of(VP())
    follows = {n: NextCount(walk).after(_at(grids[n]), VP()) for n in counts}
    wanted = dict(zip(counts, [*counts[1:], None], strict=True))
    yield holds("next count: each is held against the next, the last against none", follows == wanted)
    on_its_way = NextCount(walk).after(_at(grids[max(counts)][:-1]), VP())
    yield holds("next count: a walk that stopped on its way is held against none", on_its_way is None)
    stage = world(VP(), "v")
    told: list[int] = []

    def listening(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        told.append(int(cond["steps"][0]))
        return x.flatten(1).mean(1)

    for n in counts:
        made = walk.walk(Bent(stage.teacher()).denoiser(), grids[n], stage.batch(4).x0, stage.batch(4).cond, turn())
        term.loss(made, Cast({"student": stage.teacher()}, listening), stage.batch(4), turn())
    yield holds("next count: the critic is told n, and the last count is not judged", set(told) == set(counts[:-1]))


def _at(grid: Sequence[float]) -> Made:
    """A walk at these times."""
    *before, last = (Made(torch.zeros(1), torch.zeros(1), torch.tensor([t], dtype=torch.float64)) for t in grid)
    return replace(last, before=tuple(before))


def _aims(walk: DrawnWalk) -> Any:
    return SimpleNamespace(jump=walk.jump, guidance=UniformScale(1.0, 1.0))


def cell_checks(recipe: Recipe) -> Iterator[Check]:
    """Parts of the conditions: none is empty, each prompt is in one, and it is the one that the server routes to."""
    cells = [stage.cell for stage in recipe.stages if stage.cell is not None]
    if not cells:
        return
    count = len(cells)
    points = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    chosen = parting.centroids(points, count, seed=0)
    owner = parting.nearest(points, chosen)
    students = tuple(Student(model=str(k), centroid=tuple(c.tolist())) for k, c in enumerate(chosen))
    group = Group(name="g", students=students)
    served = torch.tensor([int(group.nearest(point.tolist())) for point in points])
    yield holds("parts: training's router is the server's", torch.equal(owner, served))
    yield holds("parts: every part has prompts", len(owner.unique()) == count)
    yield holds("parts: one student for each", [cell.index for cell in cells] == list(range(count)))
    inertia = torch.cdist(points, chosen).min(1).values.square().sum()
    yield holds("parts: centroids lie among their prompts", float(inertia) < float(points.var(0).sum() * len(points)))
    labels = [sources.part_of(label, count) for label in range(CLASSES)]
    even = all(labels.count(k) == CLASSES // count for k in range(count)) if CLASSES % count == 0 else True
    yield holds("parts: classes of the plane are dealt out evenly", even and set(labels) <= set(range(count)))

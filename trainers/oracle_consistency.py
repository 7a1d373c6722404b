"""The oracle of consistency distillation: the exact consistency function is its zero, at the solver's order."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import dropout

from fewstep.models.analytic import flow_map
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.paths import VP, Path

from .consistency import ConsistencyDistillation
from .objective import Cast, Turn
from .oracle_parts import guidance_checks, perfect_student, source_checks
from .oracle_world import Bent, Check, World, below, between, holds, recipe_spec, slope_of, turn, world
from .recipe import Recipe

COUNT = 256


@dataclass(frozen=True)
class Apart:
    """Pairs a fixed distance apart, t spread over the path."""

    distance: float

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        width = path.start - path.end
        t = path.end + width * torch.linspace(0.3, 0.9, count, dtype=torch.float64)
        return t, t - self.distance * width


def checks(recipe: Recipe, objective: ConsistencyDistillation) -> Iterator[Check]:
    for prediction in ("v", "eps"):
        stage = world(VP(), prediction)
        label = f"{prediction}: "
        yield from _zero(label, stage, objective)
        yield from _routing(label, stage, objective)
        yield from _slopes(label, stage, objective)
    yield from _pairs(recipe, objective)
    yield from source_checks(objective.source)
    yield from _conventions(world(VP(), "v"), objective)
    yield _dropout(objective)


def cast_of(stage: World, objective: ConsistencyDistillation, gain: float = 0.0) -> tuple[Cast, dict[str, Bent]]:
    """Perfect players; `gain` bends the student and its copies."""
    student = Bent(perfect_student(stage, objective), gain, 0.5 * gain)
    teacher = Bent(stage.teacher() if objective.cfg else stage.teacher(takes_w=True))
    modules = {"student": student, "teacher": teacher}
    if objective.target != "student":
        modules[objective.target] = deepcopy(student)
    return Cast({name: module.denoiser() for name, module in modules.items()}), modules


def _residual(stage: World, objective: ConsistencyDistillation) -> float:
    cast, _ = cast_of(stage, objective)
    return objective.loss("student", cast, stage.batch(COUNT), turn())[1]["residual"]


def _zero(label: str, stage: World, objective: ConsistencyDistillation) -> Iterator[Check]:
    yield below(f"{label}residual at the exact solution, own pairs", _residual(stage, objective), 5e-3)
    near = [_residual(stage, replace(objective, pairs=Apart(h))) for h in (0.02, 0.01, 0.005)]
    yield below(f"{label}residual at the exact solution, one step of 0.005", near[-1], 1e-3)
    for coarse, finer in pairwise(near):
        yield between(f"{label}residual ratio when the step halves", coarse / finer, 3.6, 4.4)


def _routing(label: str, stage: World, objective: ConsistencyDistillation) -> Iterator[Check]:
    """Only the student learns, and by the gradient it gets when a copy of the target stands still."""
    batch = stage.batch(COUNT)
    cast, modules = cast_of(stage, objective, gain=0.2)
    student = modules["student"]
    copy = deepcopy(student)
    found = []
    for kind in (objective, replace(objective, target="held")):
        student.zero_grad()
        kind.loss("student", Cast({**cast.roles, "held": copy.denoiser()}), batch, turn())[0].backward()
        found.append([0.0 if w.grad is None else float(w.grad) for w in student.parameters()])
    others = [w for module in (*modules.values(), copy) if module is not student for w in module.parameters()]
    yield holds(f"{label}no gradient reaches teacher or target", all(w.grad is None for w in others))
    gap = max(abs(a - b) for a, b in zip(*found, strict=True))
    yield below(f"{label}gradient equals that with the target held still", gap, 1e-6)


def _slopes(label: str, stage: World, objective: ConsistencyDistillation) -> Iterator[Check]:
    """With a perfect target that stands still: autograd against differences, and the perfect student is the minimum."""
    batch, held = stage.batch(COUNT), replace(objective, target="held")
    cast, modules = cast_of(stage, objective)
    student = modules["student"]
    roles = {**cast.roles, "held": deepcopy(student).denoiser()}

    def loss() -> Tensor:
        return held.loss("student", Cast(roles), batch, turn())[0]

    least = float(loss().detach())
    with torch.no_grad():
        student.gain.fill_(0.2)
        student.offset.fill_(0.1)
    bent = loss()
    bent.backward()
    yield between(f"{label}a bent student's loss over the perfect one's", bent.detach() / least, 5.0, float("inf"))
    for name, weight in student.named_parameters():
        slope = slope_of(loss, weight)
        yield below(f"{label}gradient of {name} against differences", abs(float(weight.grad) / slope - 1.0), 0.01)


def _pairs(recipe: Recipe, objective: ConsistencyDistillation) -> Iterator[Check]:
    """Pairs go down in noise, and every time at which the student will be sampled is trained."""
    path = VP()
    t, s = objective.pairs.draw(path, 4096, turn())
    yield holds("pairs: s lies below t, inside the path", bool((s < t).all() and (s >= path.end).all()))
    yield holds("pairs: t inside the path", bool((t <= path.start).all() and (t > path.end).all()))
    trained = t.unique()
    spec = recipe_spec(recipe, path, "v")
    sampled = torch.tensor(sorted({t for grid in spec.grids.values() for t in grid}), dtype=torch.float64)
    gaps = (sampled[:, None] - trained[None]).abs().min(dim=1).values
    yield below("pairs: times of the sampler that are never trained", gaps, 1e-9)


def _conventions(stage: World, objective: ConsistencyDistillation) -> Iterator[Check]:
    yield from guidance_checks(stage)
    cast, _ = cast_of(stage, objective)
    batch = stage.batch(4)
    w = torch.tensor([objective.guidance.low, objective.guidance.high] * 2, dtype=torch.float64)
    t = torch.full((4,), 700.0, dtype=torch.float64)
    x = stage.marginal(t)
    end = torch.full_like(t, stage.path.end)
    ours = objective.jump(cast["student"], x, t, end, {**batch.cond, "w": w})
    shift = w.reshape(-1, 1, 1) * batch.cond["ctx"].reshape(-1, 1, 1)
    truth = flow_map(stage.data.moved(shift[0]), stage.path, x[:1], t[:1], end[:1])
    yield below("the student at w lands on the data of mean u + w (c - u)", ours[:1] - truth, 1e-6)


def _dropout(objective: ConsistencyDistillation) -> Check:
    """Student and target see the same dropout masks in one turn, and others in the next."""
    stage = world(VP(), "v")
    masks: list[Tensor] = []
    perfect = perfect_student(stage, objective)

    def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        masks.append(dropout(torch.ones_like(x), 0.5, training=True))
        return perfect.raw(x, t, cond) * masks[-1]

    leaky = Denoiser(net, stage.path, stage.prediction)
    cast = Cast({"student": leaky, objective.target: leaky, "teacher": stage.teacher(takes_w=not objective.cfg)})
    for step in (0, 1):
        objective.loss("student", cast, stage.batch(8), turn(step))
    same = len(masks) == 4 and torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    return holds("student and target share dropout masks", same and not torch.equal(masks[0], masks[2]))

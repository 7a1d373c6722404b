"""The oracle of backward distillation: the exact student is its zero where nothing is shifted, else the aim by hand."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.models.analytic import flow_map
from fewstep.models.denoiser import Condition, Denoiser, expand
from fewstep.models.paths import VP, RectifiedFlow

from ..objectives.backward import BackwardDistillation, Shift
from ..parts.distances import Squared
from ..parts.objective import Cast, Turn
from ..parts.steps import OdeStep
from ..parts.tangent import FLOW
from ..recipes.recipe import Recipe
from .parts import guidance_checks, rollout_checks
from .world import SHIFT, Bent, Check, World, absorbed, below, between, holds, slope_of, turn, world

COUNT = 32
WORLDS = ((VP(), "v"), (VP(), "eps"), (RectifiedFlow(), "flow"))


def checks(recipe: Recipe, objective: BackwardDistillation) -> Iterator[Check]:
    for path, prediction in WORLDS:
        stage, label = world(path, prediction), f"{path.kind} {prediction}: "
        yield from _zero(label, stage, objective)
        yield from _aim(label, stage, objective)
    for prediction in ("v", "eps"):
        yield from _routing(f"{prediction}: ", world(VP(), prediction), objective)
    yield from _shift(objective.shift)
    yield from rollout_checks(recipe, objective.rollout)
    yield from _walked(objective)
    yield from guidance_checks(world(VP(), "v"))


@dataclass(frozen=True)
class _Held:
    """A walk that has ended: states that do not depend on the student."""

    x: Tensor
    t: Tensor

    def reach(self, student: Denoiser, like: Tensor, cond: Condition, turn: Turn) -> tuple[Tensor, Tensor]:
        return self.x, self.t


def _cast(stage: World, objective: BackwardDistillation, gain: float = 0.0) -> tuple[Cast, Bent, Bent]:
    exact = stage.consistency(takes_w=True)
    student = Bent(absorbed(exact, objective.guidance.low), gain, 0.5 * gain)
    teacher = Bent(stage.teacher() if objective.cfg else stage.teacher(takes_w=True))
    return Cast({"student": student.denoiser(), "teacher": teacher.denoiser()}), student, teacher


def _zero(label: str, stage: World, objective: BackwardDistillation) -> Iterator[Check]:
    """With gamma(t) = t the exact student's point is x_t itself: what is left is the teacher's solver error."""
    plain = replace(objective, shift=Shift(1.0))
    cast, _, _ = _cast(stage, plain)
    batch, found = stage.batch(COUNT), []
    for parts in (16, 32, 64):
        kind = replace(plain, step=OdeStep(parts=parts))
        residuals = [kind.loss("student", cast, batch, turn(step))[1]["residual"] for step in range(4)]
        found.append(sum(residuals) / len(residuals))
    for coarse, finer in pairwise(found):
        yield between(f"{label}residual ratio when the teacher's steps double", coarse / finer, 1.6, 2.4)
    yield below(f"{label}residual at the exact student, 64 steps", found[-1], 0.1)
    bent, _, _ = _cast(stage, plain, 0.5)
    beside = replace(plain, step=OdeStep(parts=16)).loss("student", bent, batch, turn())[1]["residual"]
    yield between(f"{label}residual beside it", beside, 3.0 * found[0], float("inf"))


def _aim(label: str, stage: World, objective: BackwardDistillation) -> Iterator[Check]:
    """The aim is where the exact flow carries `alpha_g x^ + sigma_g e^` from g = gamma(t), shifted as declared."""
    path, many = stage.path, replace(objective, step=OdeStep(parts=256))
    t = path.end + (path.start - path.end) * torch.linspace(0.3, 0.9, COUNT, dtype=torch.float64)
    x, cond = stage.marginal(t), stage.batch(COUNT).cond
    rough = Bent(stage.teacher(), 0.3, 0.1).denoiser()
    x0, eps = (value.detach() for value in rough.both(x, t, cond))
    low = objective.shift(path, t)
    point = expand(path.alpha(low), x0) * x0 + expand(path.sigma(low), eps) * eps
    truth = flow_map(stage.data.moved(SHIFT), path, point, low, None)
    found = many.aim(stage.teacher(), x0, eps, t, cond, turn())
    yield below(f"{label}aim: the teacher's sample of the carried point", found - truth, 0.05)


def _routing(label: str, stage: World, objective: BackwardDistillation) -> Iterator[Check]:
    """Only the student learns, and only by its evaluation at t: as if the walk and the aim stood still."""
    cast, student, teacher = _cast(stage, objective, 0.2)
    batch = stage.batch(COUNT)
    smooth = replace(objective, distance=Squared())
    smooth.loss("student", cast, batch, turn())[0].backward()
    yield holds(f"{label}no gradient reaches the teacher", all(w.grad is None for w in teacher.parameters()))
    w = torch.full((COUNT,), objective.guidance.low, dtype=torch.float64)
    again = turn()
    objective.guidance.draw(COUNT, again)
    x, t = objective.rollout.reach(cast["student"], batch.x0, {**batch.cond, "w": w}, again)
    kept: list[Tensor] = []

    def still(a: Tensor, b: Tensor) -> Tensor:
        kept.append(b.detach())
        return Squared()(a, kept[0])

    held: Any = replace(objective, rollout=_Held(x, t), distance=still)  # type: ignore[arg-type]
    held.loss("student", cast, batch, turn())

    def loss() -> Tensor:
        out: Tensor = held.loss("student", cast, batch, turn())[0]
        return out

    for name, weight in student.named_parameters():
        assert weight.grad is not None
        slope = slope_of(loss, weight)
        yield below(f"{label}gradient of {name} with walk and aim held still", float(weight.grad) / slope - 1.0, 0.01)


def _shift(shift: Shift) -> Iterator[Check]:
    """gamma keeps the noisiest time, rises with t, and lies at tau_T (tau / tau_T)^power in flow time."""
    for path in (VP(), RectifiedFlow()):
        t = torch.linspace(path.end, path.start, 64, dtype=torch.float64)[1:]
        low = shift(path, t)
        yield holds(f"{path.kind}: shift: the noisiest time stays", float(low[-1]) == path.start)
        rises = bool((low.diff() >= 0).all() and (low <= t).all())
        yield holds(f"{path.kind}: shift: rises with t, never above it", rises)
        noisiest, inside = FLOW.time(path, t[-1:]), low > path.end
        wanted = noisiest * (FLOW.time(path, t) / noisiest) ** shift.power
        yield below(f"{path.kind}: shift: in flow time", (FLOW.time(path, low) - wanted)[inside], 1e-6)


def _walked(objective: BackwardDistillation) -> Iterator[Check]:
    """The batch's samples are not looked at."""
    stage = world(VP(), "v")
    cast, _, _ = _cast(stage, objective, 0.1)
    batch = stage.batch(COUNT)
    moved = replace(batch, x0=batch.x0 + 5.0)
    found = [float(objective.loss("student", cast, data, turn())[0].detach()) for data in (batch, moved)]
    yield below("data are not looked at", found[0] - found[1], 1e-12)

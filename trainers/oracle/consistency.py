"""The oracle of consistency: the exact flow map is its zero, at the solver's order, or in the mean over drawn noise."""

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

from ..objectives.consistency import AsEstimates, CarriedToClean, Consistency
from ..parts.distances import Squared, unweighted
from ..parts.ends import AtClean
from ..parts.jumps import DdimJump, LcmJump, TwoTimeJump
from ..parts.objective import Cast, Turn
from ..parts.steps import AdjustedStep, OdeStep, SdeStep
from ..recipes.recipe import Recipe
from .parts import guidance_checks, perfect_student, source_checks
from .steps import end_checks, pair_checks, step_checks
from .straight import slope_checks
from .world import Bent, Check, World, below, between, gradient_checks, holds, turn, world

COUNT = 256


@dataclass(frozen=True)
class Apart:
    """Pairs a fixed distance apart, t spread over the path."""

    distance: float

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        width = path.start - path.end
        t = path.end + width * torch.linspace(0.3, 0.9, count, dtype=torch.float64)
        return t, t - self.distance * width


@dataclass(frozen=True)
class FarBelow:
    """An end that no pair of `Apart` reaches."""

    def __call__(self, path: Path, t: Tensor, s: Tensor, turn: Turn) -> Tensor:
        return path.end + 0.2 * (t - path.end)


def checks(recipe: Recipe, objective: Consistency) -> Iterator[Check]:
    told = knowing(objective)
    for prediction in ("v", "eps"):
        stage = world(VP(), prediction)
        label = f"{prediction}: "
        if deterministic(told) is not None:
            yield from _zero(label, stage, told)
        else:
            yield from _mean(label, stage, told)
        yield from _routing(label, stage, told)
        yield from _slopes(label, stage, told)
    yield from pair_checks(recipe, objective)
    yield from end_checks(recipe, objective.ends)
    yield from step_checks(objective)
    yield from source_checks(objective.source.mixing)
    yield from _conventions(world(VP(), "v"), told)
    yield from _landing(objective)
    yield from _compared(told)
    yield _dropout(told)
    if objective.aside is not None:
        yield from _aside(told)
    if objective.slopes is not None:
        yield from slope_checks(objective)


def knowing(objective: Consistency) -> Consistency:
    """The objective of a student that is told where it lands: no estimate that is not can be right for all ends."""
    return replace(objective, jump=TwoTimeJump()) if isinstance(objective.jump, DdimJump) else objective


def deterministic(objective: Consistency) -> Consistency | None:
    """The objective with the noise of its solver taken away; None where it has no solver."""
    if isinstance(objective.step, (SdeStep, AdjustedStep)):
        return replace(objective, step=replace(objective.step, eta=0.0), aside=None)
    return replace(objective, aside=None) if isinstance(objective.step, OdeStep) else None


def cast_of(stage: World, objective: Consistency, gain: float = 0.0) -> tuple[Cast, dict[str, Bent]]:
    """Perfect players; `gain` bends the student and its copies."""
    student = Bent(perfect_student(stage, objective), gain, 0.5 * gain)
    teacher = Bent(stage.teacher() if objective.cfg else stage.teacher(takes_w=True))
    modules = {"student": student, "teacher": teacher}
    if objective.target != "student":
        modules[objective.target] = deepcopy(student)
    return Cast({name: module.denoiser() for name, module in modules.items()}), modules


def _residual(stage: World, objective: Consistency) -> float:
    cast, _ = cast_of(stage, objective)
    return objective.loss("student", cast, stage.batch(COUNT), turn(99))[1]["residual"]


def _zero(label: str, stage: World, objective: Consistency) -> Iterator[Check]:
    plain = deterministic(objective)
    assert plain is not None
    yield below(f"{label}residual at the exact solution, own pairs", _residual(stage, plain), 0.1)
    far = plain if isinstance(plain.ends, AtClean) else replace(plain, ends=FarBelow())
    # a step of several parts is as near in one part as a step of one is from as far
    parts = getattr(plain.step, "parts", 1)
    near = [_residual(stage, replace(far, pairs=Apart(h * min(parts, 4)))) for h in (0.02, 0.01, 0.005)]
    yield below(f"{label}residual at the exact solution, one step of 0.005", near[-1], 4e-3)
    low, high = (7.0, 9.0) if getattr(plain.step, "order", 1) == 2 else (3.6, 4.4)
    for coarse, finer in pairwise(near):
        yield between(f"{label}residual ratio when the step halves", coarse / finer, low, high)


def _mean(label: str, stage: World, objective: Consistency) -> Iterator[Check]:
    """Without a teacher the aim is right in the mean: the gradient is that of the teacher's own step."""
    same = replace(
        objective, pairs=Apart(0.05), distance=Squared(), weight=unweighted, per_gap=0.0, aside=None, coupling=None,
        target="held",
    )  # fmt: skip
    batch = stage.batch(1024)
    found = []
    for kind in (same, replace(same, step=OdeStep())):
        cast, modules = cast_of(stage, objective, gain=0.2)
        held = Bent(perfect_student(stage, objective), 0.1, -0.1).denoiser()
        kind.loss("student", Cast({**cast.roles, "held": held}), batch, turn())[0].backward()
        found.append([float(w.grad) for w in modules["student"].parameters() if w.grad is not None])
    for name, mine, theirs in zip(("gain", "offset"), *found, strict=True):
        yield between(f"{label}gradient of {name} over that of a teacher's step", mine / theirs, 0.93, 1.07)


def _routing(label: str, stage: World, objective: Consistency) -> Iterator[Check]:
    """Only the student learns, and by the gradient it gets when a copy of the target stands still."""
    batch = stage.batch(COUNT)
    cast, modules = cast_of(stage, objective, gain=0.2)
    student = modules["student"]
    copy = deepcopy(student)
    if isinstance(
        objective.compare, CarriedToClean
    ):  # its gradient passes through the target, whose weights are closed
        for module in (copy, *modules.values()):
            module.requires_grad_(module is student)
    found = []
    for kind in (objective, replace(objective, target="held")):
        student.zero_grad()
        kind.loss("student", Cast({**cast.roles, "held": copy.denoiser()}), batch, turn())[0].backward()
        found.append([0.0 if w.grad is None else float(w.grad) for w in student.parameters()])
    others = [w for module in (*modules.values(), copy) if module is not student for w in module.parameters()]
    yield holds(f"{label}no gradient reaches teacher or target", all(w.grad is None for w in others))
    gap = max(abs(a - b) for a, b in zip(*found, strict=True)) / max(1.0, *map(abs, found[1]))
    yield below(f"{label}gradient equals that with the target held still", gap, 1e-6)


def _slopes(label: str, stage: World, objective: Consistency) -> Iterator[Check]:
    """With a perfect target that stands still: autograd against differences, and the perfect student is the minimum."""
    batch, held = stage.batch(COUNT), replace(objective, target="held")
    cast, modules = cast_of(stage, objective)
    student = modules["student"]
    roles = {**cast.roles, "held": deepcopy(student).requires_grad_(False).denoiser()}

    def loss() -> Tensor:
        return held.loss("student", Cast(roles), batch, turn(99))[0]

    least = float(loss().detach())
    with torch.no_grad():
        student.gain.fill_(0.2)
        student.offset.fill_(0.1)
    bent = loss()
    bent.backward()
    if deterministic(objective) is not None and objective.aside is None:
        low = 5.0 if isinstance(objective.step, OdeStep) else 2.0
        yield between(f"{label}a bent student's loss over the perfect one's", bent.detach() / least, low, float("inf"))
    yield from gradient_checks(label, loss, student, 0.02)


def _conventions(stage: World, objective: Consistency) -> Iterator[Check]:
    yield from guidance_checks(stage)
    cast, _ = cast_of(stage, objective)
    batch = stage.batch(4)
    w = torch.tensor([objective.guidance.low, objective.guidance.high] * 2, dtype=torch.float64)
    t = torch.full((4,), 700.0, dtype=torch.float64)
    x = stage.marginal(t)
    at_end = isinstance(objective.jump, LcmJump)
    end = torch.full_like(t, stage.path.end if at_end else float("-inf"))
    ours = objective.jump(cast["student"], x, t, end, {**batch.cond, "w": w})
    shift = w.reshape(-1, 1, 1) * batch.cond["ctx"].reshape(-1, 1, 1)
    truth = flow_map(stage.data.moved(shift[0]), stage.path, x[:1], t[:1], end[:1])
    yield below("the student at w lands on the data of mean u + w (c - u)", ours[:1] - truth, 1e-6)


def _landing(objective: Consistency) -> Iterator[Check]:
    """A jump of no length stays, and one to clean data is the clean estimate, of any network."""
    stage = world(VP(), "v")
    rough = Bent(stage.teacher(), 0.3, 0.1).denoiser()
    t = torch.tensor([200.0, 600.0, 999.0], dtype=torch.float64)
    x, cond = stage.marginal(t), stage.batch(3).cond
    clean = objective.jump(rough, x, t, torch.full_like(t, float("-inf")), cond)
    yield below("jump: to clean data is the clean estimate", (clean - rough.x0(x, t, cond)).detach(), 1e-3)
    if isinstance(objective.jump, (DdimJump, TwoTimeJump)):
        yield below("jump: of no length stays", (objective.jump(rough, x, t, t, cond) - x).detach(), 1e-9)


def _compared(objective: Consistency) -> Iterator[Check]:
    """What landings are turned into: the student's own clean estimate, or where they are carried by the exact map."""
    stage = world(VP(), "v")
    t = torch.tensor([300.0, 600.0, 999.0], dtype=torch.float64)
    x, cond, end = stage.marginal(t), stage.batch(3).cond, torch.full_like(t, 100.0)
    if isinstance(objective.compare, AsEstimates):
        rough = Bent(stage.teacher(), 0.3, 0.1).denoiser()
        found = objective.compare(rough, rough.jump(x, t, end, cond), x, t, end, cond)
        yield below("compare: a landing as its estimate", (found - rough.x0(x, t, cond)).detach(), 1e-9)
    if isinstance(objective.compare, CarriedToClean):
        told = stage.jumper(lambda t, cond: cond["s"])
        data = stage.data.moved(cond["ctx"][0])
        found = objective.compare(told, flow_map(data, stage.path, x, t, end), x, t, end, cond)
        yield below("compare: a landing carried to clean data", found - flow_map(data, stage.path, x, t, None), 1e-9)


def _aside(objective: Consistency) -> Iterator[Check]:
    """The denoising term is least at the exact denoiser, and silent at levels above its bound."""
    stage = world(VP(), "v")
    only = objective.aside
    assert only is not None
    path, count = stage.path, 8192
    t = torch.linspace(20.0, 300.0, count, dtype=torch.float64)
    batch = stage.batch(count)
    noise = turn().noise(batch.x0)
    from ..parts.steps import At

    x = objective.source.mixing.mix(path, batch.x0, t, noise)
    here = At(x, t, batch.x0, noise, batch.cond, objective.source.mixing)
    slopes = []
    for offset in (-0.1, 0.0, 0.1):
        student = Bent(stage.teacher(), 0.0, offset)
        only(student.denoiser(), here).backward()
        slopes.append(float(student.offset.grad or 0.0))
    yield holds("aside: pulls to the exact denoiser from both sides", slopes[0] < 0.0 < slopes[2])
    yield below("aside: slope at the exact denoiser over that beside it", slopes[1] / slopes[2], 0.2)
    if only.below is not None:
        late = replace(here, t=torch.full_like(t, 900.0))
        yield below("aside: silent at large noise", only(Bent(stage.teacher(), 0.3).denoiser(), late), 1e-12)


def _dropout(objective: Consistency) -> Check:
    """Student and target see the same dropout masks in one turn, and others in the next."""
    stage = world(VP(), "v")
    masks: list[Tensor] = []
    perfect = perfect_student(stage, objective)

    def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        masks.append(dropout(torch.ones_like(x), 0.5, training=True))
        return perfect.raw(x, t, cond) * masks[-1]

    leaky = Denoiser(net, stage.path, stage.prediction)
    cast = Cast({"student": leaky, objective.target: leaky, "teacher": stage.teacher(takes_w=not objective.cfg)})
    plain, counts = replace(objective, aside=None), []
    for step in (0, 1):
        plain.loss("student", cast, stage.batch(8), turn(step))
        counts.append(len(masks))
    first, second = masks[: counts[0]], masks[counts[0] :]
    same = len(first) >= 2 and torch.equal(first[0], first[1]) and torch.equal(second[0], second[1])
    return holds("student and target share dropout masks", same and not torch.equal(first[0], second[0]))

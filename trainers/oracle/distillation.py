"""The oracle of knowledge distillation: the teacher is its zero, the exact denoiser its least, stages compare right."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from fewstep.models.analytic import exact, gaussian
from fewstep.models.denoiser import Condition
from fewstep.models.paths import VP, Path

from ..networks.surgery import Run
from ..networks.watch import Twin, lead, stage_pairs, watch_both
from ..objectives.distillation import KnowledgeDistillation, Times, feature_loss
from ..parts.objective import Batch, Cast, Turn
from ..recipes.recipe import Recipe
from .parts import source_checks
from .world import Bent, Check, World, below, between, gradient_checks, holds, recipe_spec, turn, world

COUNT = 256


def checks(recipe: Recipe, objective: KnowledgeDistillation) -> Iterator[Check]:
    for prediction in ("v", "eps"):
        stage = world(VP(), prediction)
        if objective.output:
            yield from _output(f"{prediction}: ", stage, objective)
    if objective.task:
        yield from _task(objective)
    if objective.feature:
        yield from _features()
        yield from _wired(objective)
        if recipe.student.probe is not None:
            yield from _replaced(objective)
    yield from time_checks(recipe, objective.times)
    yield from source_checks(objective.source)


def _cast(stage: World, gain: float = 0.0) -> tuple[Cast, Bent, Bent]:
    student, teacher = Bent(stage.teacher(), gain, 0.5 * gain), Bent(stage.teacher())
    return Cast({"student": student.denoiser(), "teacher": teacher.denoiser()}), student, teacher


def _output(label: str, stage: World, objective: KnowledgeDistillation) -> Iterator[Check]:
    """Without the data's term the loss is zero at the teacher, and its gradient is the student's alone."""
    plain = replace(objective, task=0.0)
    cast, student, teacher = _cast(stage)
    batch = stage.batch(COUNT)
    loss, metrics = plain.loss("student", cast, batch, turn())
    yield below(f"{label}loss where the student is the teacher", loss, 1e-12)
    yield below(f"{label}residual where the student is the teacher", metrics["residual"], 1e-6)
    with torch.no_grad():
        student.gain.fill_(0.2)
        student.offset.fill_(0.1)

    def again() -> Tensor:
        return plain.loss("student", cast, batch, turn())[0]

    again().backward()
    yield holds(f"{label}no gradient reaches the teacher", all(w.grad is None for w in teacher.parameters()))
    yield from gradient_checks(label, again, student)
    yield between(f"{label}the loss pulls a bent student back", student.gain.grad or 0.0, 1e-3, float("inf"))


@dataclass(frozen=True)
class _Fixed:
    """One time, and noise that is given: x_t = alpha x0 + sigma noise."""

    time: float
    noise: Tensor

    def draw(self, path: Path, first: object, *rest: object) -> Tensor:
        t = torch.full((len(self.noise),), self.time, dtype=torch.float64)
        if not isinstance(first, Batch):
            return t
        return path.alpha(t)[:, None] * first.x0 + path.sigma(t)[:, None] * self.noise


def _task(objective: KnowledgeDistillation) -> Iterator[Check]:
    """The data's term is least at the exact denoiser. Four points carry the moments that decide it."""
    data = gaussian(torch.tensor([0.5], dtype=torch.float64), 0.8)
    corners = torch.tensor(list(product((-1.0, 1.0), repeat=2)), dtype=torch.float64)
    batch = Batch(0.5 + 0.8 * corners[:, :1], {}, {})
    for time in (50.0, 500.0, 950.0):
        fixed = _Fixed(time, corners[:, 1:])
        plain = replace(objective, output=0.0, feature=0.0, times=fixed, source=fixed)  # type: ignore[arg-type]
        for bend, sign in ((0.0, 0.0), (0.1, 1.0), (-0.1, -1.0)):
            student = Bent(exact(data, VP(), "v"), offset=bend)
            cast = Cast({"student": student.denoiser(), "teacher": exact(data, VP(), "v")})
            plain.loss("student", cast, batch, turn())[0].backward()
            slopes = [float(w.grad) for w in (student.gain, student.offset) if w.grad is not None]
            if sign == 0.0:
                yield below(f"task: slope at the exact denoiser, time {time}", max(map(abs, slopes)), 1e-5)
            else:
                yield holds(f"task: slope beside it, time {time}, bend {bend}", sign * slopes[1] > 1e-4)


def _features() -> Iterator[Check]:
    """Golden: every stage counts alike whatever its scale, and one that cannot be compared counts nothing."""
    ones = torch.ones(2, 3)
    theirs = {"a": 2.0 * ones, "b": 100.0 * ones, "c": torch.ones(2, 4)}
    mine = {"a": 3.0 * ones, "b": 150.0 * ones, "c": torch.ones(2, 5)}
    yield below("features: both stages off by half, in squares 1/4", feature_loss(mine, theirs) - 0.25, 1e-6)
    yield below("features: zero where they agree", feature_loss(theirs, theirs), 1e-12)
    learned = {"a": (3.0 * ones).requires_grad_()}
    aim = {"a": (2.0 * ones).requires_grad_()}
    feature_loss(learned, aim).backward()
    yield holds("features: only the student's teach", learned["a"].grad is not None and aim["a"].grad is None)


class _Chain(nn.Module):
    """Stages in a row, as a U-Net's blocks or a transformer's layers are called: each scales what it is given."""

    def __init__(self, scales: tuple[float, ...], stack: str = "down_blocks") -> None:
        super().__init__()
        self.row = tuple(_Scale(scale) for scale in scales)
        setattr(self, stack, nn.ModuleList(self.row))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.row:
            x = block(hidden_states=x)
        return x


class _Scale(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.scale * hidden_states


def _wired(objective: KnowledgeDistillation) -> Iterator[Check]:
    """Two stages of 2 and 3 against a student's of 4 and 3: alone, the second is right already and learns nothing."""
    student, teacher = _Chain((4.0, 3.0)), _Chain((2.0, 3.0))
    pairs = stage_pairs(student, teacher)
    yield holds(
        "stages: each finds its twin", pairs == {name: Twin(name, name) for name in ("down_blocks.0", "down_blocks.1")}
    )
    led = lead(student, teacher, pairs) if objective.alone else None
    seen = watch_both(student, teacher, pairs)
    nets = {"student": student, "teacher": teacher}
    stage = world(VP(), "v")
    roles = {name: replace(stage.teacher(), net=_untold(net)) for name, net in nets.items()}
    plain = replace(objective, task=0.0, output=0.0, feature=1.0)
    # (4 - 2)^2 / 2^2 and (12 - 6)^2 / 6^2 own their derivatives 2 (4 - 2) / 4; a stage that is fed rightly has none
    aims = {True: (0.5, 0.0), False: (0.5 * (1.0 + 1.0), 0.5 * 2.0 * 4.0 / 6.0)}
    led_in = []
    for step in range(10):
        student.zero_grad()
        plain.loss("student", Cast(roles, None, seen, led), stage.batch(8), turn(step))[0].backward()
        grads = [0.0 if block.scale.grad is None else float(block.scale.grad) for block in student.row]
        led_in.append(grads[1] == 0.0)
        for name, grad, aim in zip(pairs, grads, aims[led_in[-1]], strict=True):
            if step < 2:
                yield below(f"stages: gradient of {name}, step {step}", grad - aim, 1e-6)
    yield below("stages: share of steps in which they are fed", sum(led_in) / 10 - objective.alone, 1e-9)
    yield holds("stages: no gradient reaches the teacher's", all(w.grad is None for w in teacher.parameters()))


def _untold(net: _Chain) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    """A chain as a denoiser's network: it asks neither for the time nor for the condition."""

    def answer(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        out: Tensor = net(x)
        return out

    return answer


def _replaced(objective: KnowledgeDistillation) -> Iterator[Check]:
    """Layers 2, (3, 4, 5), 6 against a student's 4, s, 6: s learns 60 of the teacher's input, and 30 of its own."""
    run, scale = Run("transformer_blocks", 1, 3), 10.0
    student, teacher = (_Chain(scales, run.stack) for scales in ((4.0, scale, 6.0), (2.0, 3.0, 4.0, 5.0, 6.0)))
    pairs = stage_pairs(student, teacher, (run,))
    place, twin = "transformer_blocks.1", Twin("transformer_blocks.1", "transformer_blocks.3")
    yield holds("runs: the new layer is held against the end of its run", pairs == {place: twin})
    led, seen = lead(student, teacher, pairs), watch_both(student, teacher, pairs)
    stage = world(VP(), "v")
    nets = {"student": student, "teacher": teacher}
    roles = {name: replace(stage.teacher(), net=_untold(net)) for name, net in nets.items()}
    plain = replace(objective, task=0.0, output=0.0, feature=1.0)
    for step, share in ((0, 0.0), (0, 1.0), (1, 0.5), (2, 0.5)):
        student.zero_grad()
        batch = stage.batch(8)
        replace(plain, alone=share).loss("student", Cast(roles, None, seen, led), batch, turn(step))[0].backward()
        gain = 1.0 if share == 1.0 or (share == 0.5 and step % 2) else 2.0  # how its input compares with the teacher's
        found = student.get_parameter(f"{place}.scale").grad
        wanted = 2.0 * gain * (gain * scale - 60.0) / 60.0**2
        yield below(f"runs: gradient of the new layer, fed in {share}, step {step}", float(found or 0.0) - wanted, 1e-6)


def time_checks(recipe: Recipe, drawn: Times) -> Iterator[Check]:
    """Every time lies on the path, every time of the student's samplers is drawn, and the noisiest as often as said."""
    path = VP()
    t = drawn.draw(path, 8192, Turn.of(0, 0, 1, "student"))
    yield holds("times: inside the path", bool(((t >= path.end) & (t <= path.start)).all()))
    sampled = torch.tensor(sorted({t for grid in recipe_spec(recipe, path, "v").grids.values() for t in grid}))
    trained = t.unique()
    gaps = (sampled[:, None].double() - trained[None]).abs().min(dim=1).values
    yield below("times: how far a sampler's time is from one that is drawn", gaps, 20.0)
    said = getattr(drawn, "start_share", None)
    if said is not None:
        share = said + (1.0 - said) / drawn.points  # type: ignore[attr-defined]
        yield between("times: share of the noisiest", (t == path.start).double().mean() - share, -0.02, 0.02)

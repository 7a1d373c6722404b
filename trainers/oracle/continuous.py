"""The oracle of continuous-time consistency: at the exact consistency function the tangent is zero, on every path."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.paths import EDM, VP, Path, RectifiedFlow, TrigFlow

from ..objectives.continuous import ContinuousConsistency
from ..parts.objective import Cast, Turn
from ..parts.tangent import ANGLE, DataField, Difference, Discrete, Hub, Jvp
from ..parts.times import UniformScale
from ..recipes.recipe import Recipe
from .parts import guidance_checks, source_checks
from .world import Bent, Check, World, absorbed, below, between, grad_of, holds, slope_of, turn, world

WORLDS = ((VP(), "v"), (VP(), "eps"), (RectifiedFlow(), "flow"), (TrigFlow(), "trig"), (EDM(sigma_max=5.0), "x0"))
COUNT = 256


@dataclass(frozen=True)
class Spread:
    """Times spread over the path."""

    low: float = 0.2
    high: float = 0.9

    def draw(self, path: Path, count: int, turn: Turn) -> Tensor:
        share = torch.linspace(self.low, self.high, count, dtype=torch.float64)
        return path.end + (path.start - path.end) * share + 1e-3


def checks(recipe: Recipe, objective: ContinuousConsistency) -> Iterator[Check]:
    plain = replace(objective, times=Spread(), floor=None)
    for path, prediction in WORLDS:
        stage = world(path, prediction)
        yield from _zero(f"{path.kind} {prediction}: ", stage, plain)
        yield from hub_checks(f"{path.kind} {prediction}: ", stage)
    for prediction in ("v", "eps"):
        stage = world(VP(), prediction)
        yield from _start_of_warmup(f"{prediction}: ", stage, plain)
        yield from _pull(f"{prediction}: ", stage, plain)
        yield from _routing(f"{prediction}: ", stage, replace(objective, times=Spread()))
    yield from _mean(plain)
    yield from _size(objective)
    yield from _rise(objective)
    yield from tangent_checks()
    yield from source_checks(objective.source.mixing)
    yield from guidance_checks(world(VP(), "v"))
    yield from _times(objective)
    yield _dropout(objective)


def cast_of(stage: World, scale: UniformScale, cfg: bool, gain: float = 0.0) -> tuple[Cast, Bent, Bent]:
    """The perfect consistency function, guided as the objective is, bent by `gain`; the teacher."""
    perfect = stage.jumper(None, takes_w=True)
    student = Bent(perfect if scale.low != scale.high else absorbed(perfect, scale.low), gain, 0.5 * gain)
    teacher = Bent(stage.teacher() if cfg else stage.teacher(takes_w=True)).requires_grad_(False)
    return Cast({"student": student.denoiser(), "teacher": teacher.denoiser()}), student, teacher


def _cast(stage: World, objective: ContinuousConsistency, gain: float = 0.0) -> tuple[Cast, Bent]:
    cast, student, _ = cast_of(stage, objective.guidance, objective.cfg, gain)
    return cast, student


def _zero(label: str, stage: World, objective: ContinuousConsistency) -> Iterator[Check]:
    """TB2: the tangent that is not normalised vanishes at f*, and does not beside it."""
    for tangent, bound in ((Jvp(), 1e-6), (Difference(1e-4), 1e-4)):
        exact = replace(objective, tangent=tangent)
        residual = exact.loss("student", _cast(stage, exact)[0], stage.batch(COUNT), turn(99))[1]["residual"]
        yield below(f"{label}tangent at the exact solution, {type(tangent).__name__}", residual, bound)
    bent = objective.loss("student", _cast(stage, objective, 0.1)[0], stage.batch(COUNT), turn(99))[1]["residual"]
    yield between(f"{label}tangent beside it", bent, 1e-3, float("inf"))


def hub_checks(label: str, stage: World) -> Iterator[Check]:
    """A hub's time and state pass as their derivatives say, and its velocity is that of the trajectory."""
    for hub in (ANGLE, Hub("flow")):
        t = Spread().draw(stage.path, 64, turn(99))
        x, h, cond = stage.marginal(t), 1e-5 * (stage.path.start - stage.path.end), stage.batch(64).cond
        x0, eps = stage.teacher().both(x, t, cond)
        grown = (hub.time(stage.path, t + h) - hub.time(stage.path, t - h)) / (2.0 * h * hub.pace(stage.path, t))
        yield below(f"{label}{hub.kind}: pace of its time", (grown - 1.0)[1:-1].median(), 1e-4)
        dx, dt = hub.along(stage.path, x0, eps, t)
        ahead, behind = (hub.scale(stage.path, t + k * dt).reshape(-1, 1, 1) * (x + k * dx) for k in (1e-6, -1e-6))
        moved = (ahead - behind) / 2e-6 - hub.velocity(stage.path, t, x0, eps)
        yield below(f"{label}{hub.kind}: velocity of the state", moved.abs().flatten(1).mean(1).median(), 1e-4)


def _start_of_warmup(label: str, stage: World, objective: ContinuousConsistency) -> Iterator[Check]:
    """At r = 0 the aim is a step of cos^2 from F towards the teacher's velocity: plain distillation."""
    cast, student = _cast(stage, objective, 0.1)
    batch, first = stage.batch(COUNT), turn(0)
    found = replace(objective, warmup=0.5).loss("student", cast, batch, first)[1]["residual"]
    again = turn(0)
    t, w = objective.times.draw(stage.path, COUNT, again), objective.guidance.draw(COUNT, again)
    cond, noise = {**batch.cond, "w": w}, again.noise(batch.x0)
    truth = stage.teacher(takes_w=True)
    x = objective.source.at(truth, batch, t, noise, cond)
    gap = ANGLE.ask(student.denoiser(), x, t, cond) - ANGLE.ask(truth, x, t, cond)
    cos, _ = ANGLE.mix(stage.path, t)
    wanted = (gap * cos.reshape(-1, 1, 1) ** 2).square().mean().sqrt()
    yield below(f"{label}tangent at the first step, against distillation", found / float(wanted.detach()) - 1.0, 1e-6)


def _pull(label: str, stage: World, objective: ContinuousConsistency) -> Iterator[Check]:
    """The gradient is that of a discrete step of the exact trajectory, in the limit: it pulls a bent student back."""
    fixed = replace(objective, times=Spread(0.5, 0.9))
    for weight, gain in (("gain", 0.1), ("offset", 0.2)):
        cast, student = _cast(stage, fixed)
        with torch.no_grad():
            student.get_parameter(weight).fill_(gain)
        fixed.loss("student", cast, stage.batch(COUNT), turn(99))[0].backward()
        pull = grad_of(student.get_parameter(weight))
        yield between(f"{label}gradient of {weight} against its error", pull, 1e-6, 1e6)


def _routing(label: str, stage: World, objective: ContinuousConsistency) -> Iterator[Check]:
    """Only the student learns, and by the gradient against an aim that stands still."""
    cast, student, teacher = cast_of(stage, objective.guidance, objective.cfg, 0.2)
    teacher.requires_grad_(True)
    batch = stage.batch(COUNT)
    objective.loss("student", cast, batch, turn(99))[0].backward()
    yield holds(f"{label}no gradient reaches the teacher", all(w.grad is None for w in teacher.parameters()))
    kept: list[Tensor] = []

    @dataclass(frozen=True)
    class Keep:
        def __call__(self, a: Tensor, b: Tensor) -> Tensor:
            kept.append(b.detach())
            return objective.distance(a, b)

    @dataclass(frozen=True)
    class Against:
        def __call__(self, a: Tensor, b: Tensor) -> Tensor:
            return objective.distance(a, kept[0])

    replace(objective, distance=Keep()).loss("student", cast, batch, turn(99))
    still = replace(objective, distance=Against())

    def loss() -> Tensor:
        return still.loss("student", cast, batch, turn(99))[0]

    for name, weight in student.named_parameters():
        slope = slope_of(loss, weight, 1e-4)
        assert weight.grad is not None
        yield below(f"{label}gradient of {name} against an aim held still", float(weight.grad) / slope - 1.0, 0.01)


def _mean(objective: ContinuousConsistency) -> Iterator[Check]:
    """Trained on data in place of a teacher the tangent is zero in the mean alone."""
    stage, count = world(TrigFlow(), "trig"), 16384
    one = replace(objective, guidance=UniformScale(1.0, 1.0), field=DataField(), times=Spread(0.4, 0.6))
    one = replace(one, source=one.source.mixing)
    cast, student = _cast(stage, one)
    one.loss("student", cast, stage.batch(count), turn(99))[0].backward()
    at_zero = float(student.offset.grad or 0.0)
    cast, student = _cast(stage, one, 0.1)
    one.loss("student", cast, stage.batch(count), turn(99))[0].backward()
    beside = float(grad_of(student.offset))
    yield below("data: mean tangent at the exact solution, over that beside it", at_zero / beside, 0.2)


def _size(objective: ContinuousConsistency) -> Iterator[Check]:
    """Normalised, the tangent is g / (rms g + c) of each sample, in any size."""
    if objective.floor is None:
        return
    for size in (2, 200):
        for rms in (0.01, 1.0, 100.0):
            g = rms * torch.ones(3, size, dtype=torch.float64)
            wanted = rms / (rms + objective.floor)
            yield below(f"normalised: rms {rms} of {size} elements", objective.normalised(g) - wanted, 1e-9)
    mixed = torch.tensor([[1.0, 1.0], [100.0, 100.0]], dtype=torch.float64)
    apart = objective.normalised(mixed)[0] - objective.normalised(mixed[:1])[0]
    yield below("normalised: each sample by itself", apart, 1e-12)


def _rise(objective: ContinuousConsistency) -> Iterator[Check]:
    r = [objective.rise(Turn.of(0, step, 1000, "student")) for step in range(1001)]
    yield holds("warm-up: r never falls", all(b >= a for a, b in pairwise(r)))
    yield below("warm-up: r at the first step", r[0] - (0.0 if objective.warmup else 1.0), 1e-12)
    yield below("warm-up: r where the share is up", r[round(objective.warmup * 1000)] - 1.0, 1e-9)
    if objective.warmup:
        yield between("warm-up: r half way there", r[round(objective.warmup * 500)], 0.45, 0.55)


def tangent_checks() -> Iterator[Check]:
    """Three ways to one derivative: exact, of second order, of first order."""
    x = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(4, 3)
    t = torch.linspace(0.2, 0.8, 4, dtype=torch.float64)
    dx, dt = x.cos(), 0.5 + t

    def f(x: Tensor, t: Tensor) -> Tensor:
        return (x * t[:, None]).sin()

    truth = (x * t[:, None]).cos() * (dx * t[:, None] + x * dt[:, None])
    yield below("tangent: exact", Jvp()(f, x, t, dx, dt) - truth, 1e-12)
    for kind, low, high in ((Difference, 3.8, 4.2), (Discrete, 1.9, 2.1)):
        errors = [float((kind(h)(f, x, t, dx, dt) - truth).abs().max()) for h in (0.02, 0.01)]
        yield between(f"tangent: error ratio of {kind.__name__} when h halves", errors[0] / errors[1], low, high)


def _times(objective: ContinuousConsistency) -> Iterator[Check]:
    path = VP()
    t = objective.times.draw(path, 8192, turn())
    yield holds("times: inside the path", bool(((t >= path.end) & (t <= path.start)).all()))
    yield between("times: share at the noisiest, where one step begins", (t == path.start).double().mean(), 0.01, 0.3)


class _Dropping(nn.Module):
    """A network whose answer is scaled by its dropout mask."""

    def __init__(self, net: Denoiser, seen: list[float]) -> None:
        super().__init__()
        self.net, self.seen = net, seen

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        mask = dropout(torch.ones(64, dtype=torch.float64), 0.5)
        self.seen.append(float((mask * torch.arange(64)).sum()))
        return self.net.raw(x, t, cond)


def _dropout(objective: ContinuousConsistency) -> Check:
    """The derivative and the gradient are of one network: same masks."""
    stage, seen = world(VP(), "v"), list[float]()
    cast, _ = _cast(stage, objective, 0.1)
    student = cast["student"]
    dropping = Denoiser(_Dropping(student, seen), student.path, student.prediction)
    objective.loss("student", Cast({**cast.roles, "student": dropping}), stage.batch(4), turn())
    return holds("dropout: one mask for all evaluations of a step", len(seen) > 1 and len(set(seen)) == 1)

"""The oracle of flow maps: the exact map is the zero of every identity on every path; of data, in the mean."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.models.paths import VP, Path, RectifiedFlow

from ..objectives.flow_map import Derivative, FlowMap, FlowPairs
from ..objectives.from_noise import Bootstrapped, Displaced, FromNoise
from ..parts.objective import Cast, Turn
from ..parts.tangent import FLOW, DataField, Difference, Jvp, TeacherField
from ..parts.times import UniformScale, clean
from ..recipes.recipe import Recipe
from .continuous import COUNT, WORLDS, Spread, hub_checks, tangent_checks
from .parts import guidance_checks, source_checks
from .world import Bent, Check, World, absorbed, below, between, holds, slope_of, turn, world


@dataclass(frozen=True)
class Halfway:
    """t spread over the path, s the share `down` of the way to its end; the first is equal, the second lands on clean
    data, but where all are equal."""

    low: float = 0.2
    high: float = 0.9
    down: float = 0.5

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        t = Spread(self.low, self.high).draw(path, count, turn)
        if not self.down:
            return t, t.clone()
        s = path.end + (1.0 - self.down) * (t - path.end)
        s[0], s[1] = t[0], clean(path)
        return t, s


def checks(recipe: Recipe, objective: FlowMap) -> Iterator[Check]:
    plain = replace(objective, pairs=Halfway(), field=TeacherField())
    for path, prediction in WORLDS:
        stage, label = world(path, prediction), f"{path.kind} {prediction}: "
        yield from _zero(label, stage, plain)
        yield from hub_checks(label, stage)
    for prediction in ("v", "eps"):
        yield from routing(f"{prediction}: ", world(VP(), prediction), replace(objective, pairs=Halfway()))
    if isinstance(objective.field, DataField):
        yield from _mean(plain)
    yield from pair_checks(objective.pairs)
    yield from tangent_checks()
    yield from source_checks(objective.source)
    yield from guidance_checks(world(VP(), "v"))


def noise_checks(recipe: Recipe, objective: FromNoise) -> Iterator[Check]:
    for path, prediction in WORLDS:
        stage, label = world(path, prediction), f"{path.kind} {prediction}: "
        yield from _noise_zero(label, stage, objective)
        yield from hub_checks(label, stage)
    for prediction in ("v", "eps"):
        yield from routing(f"{prediction}: ", world(VP(), prediction), objective)
    stage = world(VP(), "v")
    batch = stage.batch(COUNT)
    moved = replace(batch, x0=batch.x0 + 5.0)
    cast, _ = _cast(stage, objective, 0.1)
    found = [float(objective.loss("student", cast, data, turn())[0].detach()) for data in (batch, moved)]
    yield below("data are not looked at", found[0] - found[1], 1e-12)
    yield from tangent_checks()
    yield from guidance_checks(stage)


def _cast(stage: World, objective: Any, gain: float = 0.0) -> tuple[Cast, dict[str, Bent]]:
    """The perfect flow map, bent by `gain`; the teacher; a target of its own where the objective has one."""
    scale: UniformScale = objective.guidance
    perfect = stage.jumper(lambda t, cond: cond["s"], takes_w=True)
    perfect = perfect if scale.low != scale.high else absorbed(perfect, scale.low)
    modules = {
        "student": Bent(perfect, gain, 0.5 * gain),
        "teacher": Bent(stage.teacher() if objective.cfg else stage.teacher(takes_w=True)),
    }
    if getattr(objective, "target", "student") != "student":
        modules[objective.target] = Bent(perfect, gain, 0.5 * gain)
    return Cast({name: module.denoiser() for name, module in modules.items()}), modules


def _residual(stage: World, objective: Any, gain: float = 0.0) -> float:
    cast, _ = _cast(stage, objective, gain)
    return float(objective.loss("student", cast, stage.batch(COUNT), turn(99))[1]["residual"])


def _zero(label: str, stage: World, objective: FlowMap) -> Iterator[Check]:
    kinds = {"exact": objective}
    if isinstance(objective.aim, Derivative):
        kinds = {
            "exact derivative": replace(objective, aim=Derivative(Jvp())),
            "differences": replace(objective, aim=Derivative(Difference(1e-4))),
        }
    for name, kind in kinds.items():
        yield below(f"{label}residual at the exact map, {name}", _residual(stage, kind), 1e-4)
    yield between(f"{label}residual beside it", _residual(stage, objective, 0.1), 1e-3, float("inf"))


def _noise_zero(label: str, stage: World, objective: FromNoise) -> Iterator[Check]:
    inside = replace(objective, last_share=0.0)
    if isinstance(objective.aim, Displaced):
        yield below(f"{label}residual at the exact map", _residual(stage, replace(inside, aim=Displaced(Jvp()))), 1e-4)
    else:
        found = [_residual(stage, replace(inside, aim=Bootstrapped(gap))) for gap in (0.02, 0.01, 0.005)]
        yield below(f"{label}residual at the exact map, gap 0.005", found[-1], 2e-2)
        for coarse, finer in pairwise(found):
            yield between(f"{label}residual ratio when the gap halves", coarse / finer, 1.5, 4.6)
    yield below(f"{label}residual of the last step", _residual(stage, replace(objective, last_share=1.0)), 5e-3)
    yield between(f"{label}residual beside it", _residual(stage, objective, 0.1), 1e-2, float("inf"))


def routing(label: str, stage: World, objective: Any) -> Iterator[Check]:
    """Only the student learns, and by the gradient against an aim that stands still."""
    cast, modules = _cast(stage, objective, 0.2)
    batch, student = stage.batch(COUNT), modules["student"]
    objective.loss("student", cast, batch, turn())[0].backward()
    others = [w for name, module in modules.items() if name != "student" for w in module.parameters()]
    yield holds(f"{label}no gradient reaches teacher or target", all(w.grad is None for w in others))
    kept: list[Tensor] = []

    def keep(a: Tensor, b: Tensor) -> Tensor:
        kept.append(b.detach())
        apart: Tensor = objective.distance(a, b)
        return apart

    replace(objective, distance=keep).loss("student", cast, batch, turn())
    size = (kept[0] - kept[0]).flatten(1).sum(1)

    def still(a: Tensor, b: Tensor) -> Tensor:  # squared: an adaptive weight is no function of the difference alone
        return (a - kept[0]).square().flatten(1).mean(1) + size

    fixed = replace(objective, distance=still)
    student.zero_grad()
    plain = replace(objective, distance=_squared)
    plain.loss("student", cast, batch, turn())[0].backward()

    def loss() -> Tensor:
        value: Tensor = fixed.loss("student", cast, batch, turn())[0]
        return value

    for name, weight in student.named_parameters():
        slope = slope_of(loss, weight, 1e-4)
        assert weight.grad is not None
        yield below(f"{label}gradient of {name} against an aim held still", float(weight.grad) / slope - 1.0, 0.01)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)


def _mean(objective: FlowMap) -> Iterator[Check]:
    """Told by data, the aim is right in the mean: the gradient at the exact map is small beside that of a bent one."""
    stage, count = world(RectifiedFlow(), "flow"), 16384
    down = 0.5 if isinstance(objective.aim, Derivative) else 0.0  # halves are told by data where s = t alone
    told = replace(objective, field=DataField(), pairs=Halfway(0.4, 0.6, down), distance=_squared)
    found = []
    for offset in (0.0, 0.2):
        cast, modules = _cast(stage, told)
        student = modules["student"]
        with torch.no_grad():
            student.offset.fill_(offset)
        told.loss("student", cast, stage.batch(count), turn())[0].backward()
        found.append(float(student.offset.grad or 0.0))
    yield below("data: mean gradient at the exact map, over that beside it", found[0] / found[1], 0.2)


def pair_checks(drawn: Any) -> Iterator[Check]:
    if not isinstance(drawn, FlowPairs):
        yield holds("the suite knows these pairs", False)
        return
    for path in (VP(), RectifiedFlow()):
        label = f"pairs, {path.kind}: "
        t, s = drawn.draw(path, 16384, turn())
        rules = {"inside the path": (t <= path.start) & (t >= path.end), "s is not above t": s <= t}
        for name, kept in rules.items():
            yield holds(f"{label}{name}", bool(kept.all()))
        # below the path's end, 0.03 of flow time on VP, both are that end
        yield between(f"{label}share with s = t", (s == t).double().mean() - drawn.equal, -0.02, 0.04)
        yield between(f"{label}share to clean data", (s == clean(path)).double().mean() - drawn.to_clean, -0.02, 0.02)
        begun = (t == path.start).double().mean() - drawn.start_share
        yield between(f"{label}share that begins at the noisiest", begun, -0.02, 0.02)
        middle = FLOW.time(path, t).median() / FLOW.time(path, torch.full_like(t, path.start)).max()
        yield between(f"{label}middle of t in flow time", middle - 0.5 * (1.0 + drawn.start_share / 0.9), -0.06, 0.06)

"""The oracle of straight trajectories: on lines that are straight and compose, and on the teacher's curved ones."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand
from fewstep.models.paths import VP, RectifiedFlow
from fewstep.models.predictions import target

from ..objectives.consistency import Consistency
from ..objectives.self_corrected import BothWays, SelfCorrected
from ..objectives.straight import SameSlope, StraightTrajectory, slope
from ..parts.distances import Squared
from ..parts.objective import Batch, Cast
from ..parts.steps import SameNoise
from ..parts.tangent import FLOW
from ..parts.times import UniformScale, clean
from ..parts.transitions import noised, pure_noise
from ..recipes.recipe import Recipe
from .adversary import adversary_checks, critic_checks
from .continuous import COUNT, WORLDS, hub_checks
from .flow import Halfway, pair_checks
from .parts import guidance_checks, source_checks
from .world import SHIFT, Bent, Check, World, absorbed, below, between, holds, slope_of, turn, world


class Gated(Bent):
    """A bent network whose further bend counts only where a gradient is asked for, so that aims stand still."""

    def __init__(self, perfect: Denoiser, gain: float = 0.0, offset: float = 0.0) -> None:
        super().__init__(perfect, gain, offset)
        self.still = (gain, offset)

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        gain, offset = (self.gain, self.offset) if torch.is_grad_enabled() else self.still
        return self.perfect.raw(x, t, cond) + gain * x + offset


def held_still(label: str, objective: Any, roles: dict[str, Denoiser], learner: Gated, batch: Batch) -> Iterator[Check]:
    """The gradient is that of the distances to aims which do not move with the weights."""
    aims: list[Tensor] = []

    def keep(a: Tensor, b: Tensor) -> Tensor:
        aims.append(b.detach())
        return Squared()(a.double(), b)

    learner.zero_grad()
    cast = Cast({**roles, "student": learner.denoiser()})
    replace(objective, distance=keep).loss("student", cast, batch, turn())[0].backward()
    yield holds(f"{label}no gradient reaches an aim", not any(aim.requires_grad for aim in aims))

    def loss() -> Tensor:
        left = iter(aims)
        still = replace(objective, distance=lambda a, b: (a.double() - next(left)).flatten(1).square().mean(1))
        with torch.enable_grad():
            value: Tensor = still.loss("student", cast, batch, turn())[0]
        return value

    for name, weight in learner.named_parameters():
        found = slope_of(loss, weight, 1e-4)
        assert weight.grad is not None
        yield below(f"{label}gradient of {name} against aims held still", float(weight.grad) / found - 1.0, 0.01)


def straight_pairs(stage: World, count: int) -> Batch:
    """Noise and the sample that lies as far from the mean: the lines between them never cross."""
    batch, noise = stage.batch(count), turn().noise(stage.batch(count).x0)
    return replace(batch, x0=stage.data.means[0] + SHIFT + stage.data.stds[0] * noise, noise=noise)


def straight_student(stage: World) -> Denoiser:
    """The flow map of those lines, from any time to any other; at the noisiest time it reads pure noise."""

    def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        path = stage.path
        mean, std = stage.data.means[0] + cond["ctx"].double(), stage.data.stds[0]
        alpha, sigma = expand(path.alpha(t), x.double()), expand(path.sigma(t), x.double())
        scale = float(pure_noise(path, torch.ones(1)))
        inside = (x.double() - alpha * mean) / (alpha * std + sigma)
        z = torch.where(expand((t >= path.start).double(), x.double()) > 0, x.double() / scale, inside)
        x0 = mean + std * z
        f: Tensor = target(stage.prediction, path, t.double()[:, None, None], x0, (x.double() - alpha * x0) / sigma)
        return f.to(x.dtype)

    return Denoiser(net, stage.path, stage.prediction)


def checks(recipe: Recipe, objective: StraightTrajectory) -> Iterator[Check]:
    plain = replace(objective, pairs=Halfway(), distance=Squared(), output=1.0, velocity=1.0, consistency=1.0)
    for path, prediction in WORLDS:
        stage, label = world(path, prediction), f"{path.kind} {prediction}: "
        batch = straight_pairs(stage, COUNT)
        found = _terms(stage, plain, straight_student(stage), batch)
        for name in ("residual", "output", "velocity", "consistency"):
            yield below(f"{label}{name} of straight lines that compose", found[name], 1e-7)
        beside = _terms(stage, plain, Bent(straight_student(stage), 0.1, 0.05).denoiser(), batch)
        for name in ("output", "velocity", "consistency"):
            yield between(f"{label}{name} beside them", beside[name], 1e-5, float("inf"))
        yield from hub_checks(label, stage)
    stage = world(VP(), "v")
    batch = straight_pairs(stage, COUNT)
    curved = _terms(stage, plain, stage.jumper(lambda t, cond: cond["s"]), batch)
    yield between("the teacher's own flow map is not straight", curved["velocity"], 1e-4, float("inf"))
    # but for the one row where s is t, where the aim is the straight line's velocity
    yield below("but it composes", curved["consistency"] / curved["velocity"], 0.02)
    yield from _weights(stage, replace(objective, pairs=Halfway(), distance=Squared()), batch)
    for prediction in ("v", "eps"):
        stage = world(VP(), prediction)
        learner = Gated(straight_student(stage), 0.2, 0.1)
        told = replace(objective, pairs=Halfway())
        yield from held_still(f"{prediction}: ", told, {}, learner, straight_pairs(stage, COUNT))
    yield from pair_checks(objective.pairs)
    yield from source_checks(objective.source)


def _terms(stage: World, objective: StraightTrajectory, student: Denoiser, batch: Batch) -> dict[str, float]:
    loss, metrics = objective.loss("student", Cast({"student": student}), batch, turn())
    return {**metrics, "loss": float(loss.detach())}


def _weights(stage: World, objective: StraightTrajectory, batch: Batch) -> Iterator[Check]:
    """The loss is its three terms, each at its weight, and each term is what its name says."""
    student = Bent(straight_student(stage), 0.1, 0.05).denoiser()
    found = _terms(stage, objective, student, batch)
    names = ("output", "velocity", "consistency")
    total = sum(getattr(objective, name) * found[name] for name in names)
    yield below("the loss is the sum of its terms at their weights", found["loss"] / total - 1.0, 1e-5)
    assert batch.noise is not None
    start = torch.full((COUNT,), stage.path.start, dtype=torch.float64)
    made = student.x0(pure_noise(stage.path, batch.noise), start, {**batch.cond, "s": start})
    wanted = Squared()(made, batch.x0).mean()
    yield below("output: one step from the pair's noise against its sample", found["output"] / wanted - 1.0, 1e-5)


def slope_checks(objective: Consistency) -> Iterator[Check]:
    """Consistency-FM's further term: velocities of the network's own lines, and nothing of straight ones."""
    only = objective.slopes
    assert isinstance(only, SameSlope)
    one = replace(only, weight=1.0)
    for path, prediction in WORLDS[:3]:
        stage, label = world(path, prediction), f"slopes, {path.kind} {prediction}: "
        batch = straight_pairs(stage, 64)
        width = path.start - path.end
        t = path.end + width * torch.linspace(0.3, 0.9, 64, dtype=torch.float64)
        s, end = t - 0.1 * width, path.end + 0.1 * (t - path.end)
        assert batch.noise is not None
        x_t, x_s = (noised(path, batch.x0, at, batch.noise) for at in (t, s))
        for name, net in (("straight", straight_student(stage)), ("bent", Bent(stage.teacher(), 0.2, 0.1).denoiser())):
            y, y_s = (net.jump(x, at, end, batch.cond).detach() for x, at in ((x_t, t), (x_s, s)))
            found = one(path, y, y_s, x_t, t, x_s, s, end)
            v, v_s = (FLOW.ask(net, x, at, batch.cond).detach() for x, at in ((x_t, t), (x_s, s)))
            yield below(f"{label}difference of velocities, {name}", found - Squared()(v.double(), v_s.double()), 1e-6)
            if name == "straight":
                yield below(f"{label}none along straight lines", found, 1e-9)
                gap = slope(path, x_t, t, y, end) - (batch.noise - batch.x0)
                yield below(f"{label}a line's slope is noise less sample", gap, 1e-6)
        yield below(f"{label}no second line where s is the end", one(path, y, y, x_t, t, x_s, end, end), 0.0)
        yield below(f"{label}its weight", only(path, y, y_s, x_t, t, x_s, s, end) / found - only.weight, 1e-9)
    yield from _anchored(objective)


def _anchored(objective: Consistency) -> Iterator[Check]:
    """Below the anchor the aim is the sample itself, elsewhere it is an answer."""
    path = VP()
    t, s = objective.pairs.draw(path, 8192, turn())
    plain_t, plain_s = objective.pairs.pairs.draw(path, 8192, turn())  # type: ignore[attr-defined]
    low = FLOW.time(path, plain_s) < objective.pairs.below  # type: ignore[attr-defined]
    yield holds("anchor: t is as drawn", torch.equal(t, plain_t))
    yield holds("anchor: s is clean data below it and as drawn above", torch.equal(s[~low], plain_s[~low]))
    yield holds("anchor: and nowhere else", bool((s[low] == clean(path)).all()) and 0 < int(low.sum()) < len(s))
    stage = world(path, "v")
    batch = stage.batch(256)
    kept: list[Tensor] = []

    def keep(a: Tensor, b: Tensor) -> Tensor:
        kept.append(b.detach())
        return Squared()(a, b)

    told = replace(objective, distance=keep, step=SameNoise(), target="student")
    student = Bent(stage.teacher(takes_w=True), 0.3).denoiser()
    told.loss("student", Cast({"student": student, "teacher": student}), batch, turn())
    near = objective.pairs.draw(path, 256, turn())[1] == clean(path)
    off = (kept[0] - batch.x0).flatten(1).abs().amax(1)
    yield below("anchor: the aim there is the sample", off[near], 1e-9)
    yield between("anchor: elsewhere it is not", off[~near].min(), 1e-4, float("inf"))


def corrected_checks(recipe: Recipe, objective: SelfCorrected) -> Iterator[Check]:
    silent = replace(objective, adversary=None, distance=Squared())
    for path, prediction in WORLDS:
        stage, label = world(path, prediction), f"{path.kind} {prediction}: "
        yield from _both_ways(label, stage, silent)
        yield from _own_lines(label, stage, silent)
    for prediction in ("v", "eps"):
        stage = world(VP(), prediction)
        roles, learner = _roles(stage, objective, 0.2)
        told = replace(objective, adversary=None, straight=0.0)
        yield from held_still(f"{prediction}: ", told, roles, learner, stage.batch(COUNT))
    yield from _sum(world(VP(), "v"), objective)
    yield from _times(objective.times)
    yield from source_checks(objective.source)
    yield from guidance_checks(world(VP(), "v"))
    if objective.adversary is not None:
        yield from critic_checks()
        yield from adversary_checks(objective, _player)


def _roles(stage: World, objective: SelfCorrected, gain: float = 0.0) -> tuple[dict[str, Denoiser], Gated]:
    """The perfect consistency function, guided as the objective is; `gain` bends the student and its average."""
    perfect = absorbed(stage.jumper(None, takes_w=True), objective.guidance.low)
    learner = Gated(perfect, gain, 0.5 * gain)
    teacher = stage.teacher() if objective.cfg else stage.teacher(takes_w=True)
    return {"teacher": teacher, objective.target: Bent(perfect, gain, 0.5 * gain).denoiser()}, learner


def _player(stage: World, objective: SelfCorrected, offset: float) -> tuple[Cast, Bent]:
    roles, _ = _roles(stage, objective)
    student = Bent(absorbed(stage.jumper(None, takes_w=True), objective.guidance.low), 0.0, offset)
    return Cast({**roles, "student": student.denoiser()}), student


def _both_ways(label: str, stage: World, objective: SelfCorrected) -> Iterator[Check]:
    """TB1: at the exact solution both directions miss by the square of the teacher's step."""
    roles, learner = _roles(stage, objective)
    cast = Cast({**roles, "student": learner.denoiser()})
    found: dict[str, list[float]] = {"consistency": [], "backward": []}
    for reach in (0.08, 0.04, 0.02):
        kind = replace(objective, times=BothWays(reach, start_share=0.0, anchor=0.0))
        metrics = kind.loss("student", cast, stage.batch(COUNT), turn(99))[1]
        for name, errors in found.items():
            errors.append(metrics[name] ** 0.5)
    for name, errors in found.items():
        yield below(f"{label}{name} at the exact solution, steps to 0.02", errors[-1], 2e-2)
        for coarse, finer in pairwise(errors):
            yield between(f"{label}{name}: error ratio when steps halve", coarse / finer, 2.6, 5.5)
    bent = Bent(learner.perfect, 0.1, 0.1).denoiser()
    beside = objective.loss("student", Cast({**cast.roles, "student": bent}), stage.batch(COUNT), turn(99))[1]
    ratio = beside["consistency"] ** 0.5 / found["consistency"][-1]
    yield between(f"{label}a bent student's loss over it", ratio, 3.0, float("inf"))


def _own_lines(label: str, stage: World, objective: SelfCorrected) -> Iterator[Check]:
    """A student that stays on the lines to its own samples has none of the third term, a curved one has some."""
    plain = replace(objective, guidance=UniformScale(1.0, 1.0))
    told = Cast({"teacher": stage.teacher(), objective.target: stage.teacher(), "student": straight_student(stage)})
    found = plain.loss("student", told, stage.batch(COUNT), turn())[1]["straight"]
    yield below(f"{label}own lines of a straight student", found, 1e-9)
    curved = Cast({**told.roles, "student": stage.jumper(None)})
    found = plain.loss("student", curved, stage.batch(COUNT), turn())[1]["straight"]
    yield between(f"{label}own lines of a curved one", found, 1e-5, float("inf"))


def _sum(stage: World, objective: SelfCorrected) -> Iterator[Check]:
    cast, student = _player(stage, objective, 0.2)
    silent = replace(objective, adversary=None)
    loss, found = silent.loss("student", cast, stage.batch(COUNT), turn())
    total = found["consistency"] + objective.backward * found["backward"] + objective.straight * found["straight"]
    yield below("the loss is the sum of its terms at their weights", float(loss.detach()) / total - 1.0, 1e-5)
    slopes = []
    for kind in (silent, replace(silent, straight=0.0)):
        student.zero_grad()
        kind.loss("student", cast, stage.batch(COUNT), turn())[0].backward()
        slopes.append(float(student.offset.grad or 0.0))
    yield holds("own lines have a gradient", abs(slopes[0] - slopes[1]) > 1e-6)


def _times(times: BothWays) -> Iterator[Check]:
    for path in (VP(), RectifiedFlow()):
        label = f"times, {path.kind}: "
        t, down, up = times.draw(path, 16384, turn())
        tau, low, high = (FLOW.time(path, each) for each in (t, down, up))
        top = float(FLOW.time(path, torch.tensor([path.start], dtype=torch.float64)))
        rules = {
            "t inside the path": (t <= path.start) & (t >= path.end),
            "down below and up above": (down <= t) & (up >= t),
            "up inside the path": up <= path.start,
            "up within reach": high - tau <= times.reach + 1e-6,
            "down within reach, or the sample": (tau - low <= times.reach + 1e-6) | (low == 0),
            "the sample below the anchor": (low == 0) | (low >= times.anchor - 1e-6),
        }
        for name, kept in rules.items():
            yield holds(f"{label}{name}", bool(kept.all()))
        begun = (t == path.start).double().mean() - times.start_share
        yield between(f"{label}share that begins at the noisiest", begun, -0.02, 0.02)
        inner = (tau < 0.8 * top) & (tau > 0.3)
        yield between(f"{label}mean way up", (high - tau)[inner].mean() / times.reach, 0.45, 0.55)
        yield between(f"{label}mean way down", (tau - low)[inner].mean() / times.reach, 0.45, 0.55)

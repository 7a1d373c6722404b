"""The oracle of laws matched in place of points: moment matching, and a flow map that is its own fake score."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand
from fewstep.models.paths import VP, Path, RectifiedFlow

from ..errors import RecipeError
from ..objectives import moments
from ..objectives.moments import MomentMatching
from ..objectives.twin import ThreeKinds, TwinFlow, tangent_weight, twin
from ..parts.distances import Squared
from ..parts.objective import Cast
from ..parts.steps import ReferenceBatch, ReferenceField, SameNoise
from ..parts.tangent import FLOW, DataField
from ..parts.times import clean
from ..recipes.recipe import Recipe
from .continuous import COUNT, WORLDS, Spread, hub_checks
from .flow import Halfway, pair_checks
from .parts import source_checks
from .steps import reference_checks
from .straight import Gated, held_still
from .world import Bent, Check, World, below, between, holds, turn, world


def checks(recipe: Recipe, objective: MomentMatching) -> Iterator[Check]:
    yield from _discrepancy(objective)
    yield from _nearer(objective)
    yield from _weight(objective)
    for path, prediction in (*WORLDS[:3], WORLDS[4]):
        stage, label = world(path, prediction), f"{path.kind} {prediction}: "
        yield from _mean(label, stage, objective)
        yield from hub_checks(label, stage)
    for prediction in ("v", "eps"):
        yield from _still(f"{prediction}: ", world(VP(), prediction), objective)
    yield from _groups(objective)
    yield from pair_checks(objective.pairs)
    yield from source_checks(objective.source)
    if isinstance(objective.step, ReferenceBatch):
        yield from reference_checks(objective.step)


def _discrepancy(objective: MomentMatching) -> Iterator[Check]:
    """The statistic against sums written out, and what it must not depend on."""
    rng = torch.Generator().manual_seed(0)
    y, aim = (torch.randn(3, 4, 2, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    kernel = objective.kernel
    found = moments.discrepancy(kernel, y, aim, scale)
    for g in range(3):
        total = 0.0
        for i in range(4):
            for j in range(4):
                for a, b, sign in ((y, y, 1.0), (aim, aim, 1.0), (y, aim, -2.0)):
                    far = float((a[g, i] - b[g, j]).norm())
                    total += sign * 2.718281828459045 ** (-float(scale[g]) * far / (kernel.width * 6**0.5)) / 16
        yield below(f"discrepancy: sums written out, group {g}", float(found[g]) - total, 1e-6)
    mixed = aim[:, torch.tensor([2, 0, 3, 1])]
    yield below("discrepancy: the order of the aims", moments.discrepancy(kernel, y, mixed, scale) - found, 1e-7)
    yield below("discrepancy: none of equal groups", moments.discrepancy(kernel, y, y[:, [1, 0, 3, 2]], scale), 1e-7)
    one = moments.discrepancy(kernel, y[:, :1], aim[:, :1], scale) - 2.0 * (
        1.0 - kernel(y[:, :1], aim[:, :1], scale)[:, 0, 0]
    )
    yield below("discrepancy: a group of one is 2 - 2 k", one, 1e-7)
    alone = torch.eye(4, dtype=torch.bool).expand(3, 4, 4)
    each = (2.0 - 2.0 * kernel(y, aim, scale).diagonal(dim1=1, dim2=2)).mean(1)
    yield below("discrepancy: rows that are alone", moments.discrepancy(kernel, y, aim, scale, alone) - each, 1e-7)
    x = torch.zeros(1, 2, 3, dtype=torch.float64, requires_grad=True)
    kernel(x, x, torch.ones(1)).sum().backward()
    yield holds("kernel: a slope where two are one", x.grad is not None and bool(torch.isfinite(x.grad).all()))


def _nearer(objective: MomentMatching) -> Iterator[Check]:
    """r is a constant step of level below t, never below s, and s where the step would pass it."""
    for path in (VP(), RectifiedFlow()):
        t, s = objective.pairs.draw(path, 4096, turn())
        r = objective.nearer(path, t, s)
        label = f"nearer, {path.kind}: "
        yield holds(f"{label}between s and t", bool(((r >= s) & (r <= t)).all()))
        inside = (r > s) & (t < 0.9 * path.start)
        steps = (path.level(t) - path.level(r))[inside]
        yield between(f"{label}some pairs have room", inside.double().mean(), 0.05, 1.0)
        yield below(f"{label}one step of level", (steps.max() - steps.min()) / steps.mean(), 1e-6)
        wanted = min(objective.nearer.highest, path.level(path.start) if path.kind == "vp" else 80.0)  # type: ignore[attr-defined]
        halvings = torch.log2(wanted / steps.mean()) - objective.nearer.k  # type: ignore[attr-defined]
        yield below(f"{label}the range over 2^k", halvings, 0.05)
        tight = objective.nearer(path, t, t)
        yield below(f"{label}no room, no step", torch.where(torch.isinf(t), 0.0, tight - t), 1e-12)


def _weight(objective: MomentMatching) -> Iterator[Check]:
    """Against the paper's formula with the derivative of its log signal-to-noise ratio taken by autograd."""
    tau = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    snr = 2.0 * ((1.0 - tau) / tau).log()
    (slope,) = torch.autograd.grad(snr.sum(), tau)
    w = objective.weight
    wanted = 0.5 * torch.sigmoid(w.b - snr) * -slope * (1.0 - tau) ** w.power / ((1.0 - tau) ** 2 + tau**2)
    path = RectifiedFlow()
    yield below("weight: the formula", (w(path, tau.detach()) / wanted - 1.0).detach(), 1e-9)
    level = VP().level(torch.tensor([300.0, 700.0], dtype=torch.float64))
    there = w(VP(), torch.tensor([300.0, 700.0], dtype=torch.float64)) - w(path, level / (1.0 + level))
    yield below("weight: by noise level on every path", there, 1e-9)


def _cast(stage: World, gain: float = 0.0, offset: float = 0.0) -> tuple[Cast, Bent]:
    student = Bent(stage.jumper(lambda t, cond: cond["s"]), gain, offset)
    return Cast({"student": student.denoiser()}), student


def _plain(objective: MomentMatching, group: int) -> MomentMatching:
    return replace(objective, pairs=Halfway(0.3, 0.8), group=group, by_condition=False, step=SameNoise())


def _mean(label: str, stage: World, objective: MomentMatching) -> Iterator[Check]:
    """At the exact map both landings have one law: no pull in the mean, and back to it from either side."""
    plain = _plain(objective, 64)
    pulls: list[float] = []
    for offset in (-0.3, 0.0, 0.3):
        cast, student = _cast(stage, 0.0, offset)
        for step in range(2):
            plain.loss("student", cast, stage.batch(4096, step), turn(step))[0].backward()
        pulls.append(float(student.offset.grad or 0.0))
    yield holds(f"{label}pulled to the exact map from both sides", pulls[0] < 0.0 < pulls[2])
    yield below(f"{label}pull at the exact map over that beside it", 2.0 * pulls[1] / (pulls[2] - pulls[0]), 0.15)
    cast, _ = _cast(stage)
    residuals = [
        plain.loss("student", cast, stage.batch(512), turn())[1]["residual"],
        _plain(replace(objective, nearer=Here()), 64).loss("student", cast, stage.batch(512), turn())[1]["residual"],
    ]
    yield below(f"{label}residual where r is t", residuals[1], 1e-6)
    yield between(f"{label}residual where it is below", residuals[0], 1e-4, float("inf"))


@dataclass(frozen=True)
class Here:
    """r = t, where both landings are one."""

    def __call__(self, path: Path, t: Tensor, s: Tensor) -> Tensor:
        return t


def _still(label: str, stage: World, objective: MomentMatching) -> Iterator[Check]:
    """The landings from r have no gradient, and what those from t have is that of the loss."""
    plain = _plain(objective, 4)
    learner = Gated(stage.jumper(lambda t, cond: cond["s"]), 0.2, 0.1)
    cast, batch = Cast({"student": learner.denoiser()}), stage.batch(COUNT)
    plain.loss("student", cast, batch, turn())[0].backward()

    def loss() -> float:
        with torch.enable_grad():
            return float(plain.loss("student", cast, batch, turn())[0].detach())

    for name, weight in learner.named_parameters():
        assert weight.grad is not None
        with torch.no_grad():
            weight.add_(1e-3)
            high = loss()
            weight.sub_(2e-3)
            low = loss()
            weight.add_(1e-3)
        yield below(
            f"{label}gradient of {name}, aims held still", float(weight.grad) / ((high - low) / 2e-3) - 1.0, 0.02
        )


def _groups(objective: MomentMatching) -> Iterator[Check]:
    """Rows of a group share their times; a batch that is no whole number of groups is refused."""
    stage, asked = world(VP(), "v"), list[tuple[Tensor, Tensor]]()
    perfect = stage.jumper(lambda t, cond: cond["s"])

    def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        asked.append((t, cond["s"]))
        return perfect.raw(x, t, cond)

    cast = Cast({"student": Denoiser(net, stage.path, stage.prediction)})
    size = objective.group
    objective.loss("student", cast, stage.batch(4 * size), turn())
    t, s = (value.reshape(4, size) for value in asked[-1])
    yield holds("groups: one time for each", bool((t == t[:, :1]).all() and (s == s[:, :1]).all()))
    yield holds("groups: another time for the next", len(t[:, 0].unique()) == 4)
    if size > 1:
        try:
            objective.loss("student", cast, stage.batch(4 * size + 1), turn())
            refused = False
        except RecipeError:
            refused = True
        yield holds("groups: a part of one is refused", refused)


def twin_checks(recipe: Recipe, objective: TwinFlow) -> Iterator[Check]:
    for path, prediction in WORLDS:
        stage, label = world(path, prediction), f"{path.kind} {prediction}: "
        yield from _missing(label, stage, objective)
        yield from _matched(label, stage, objective)
        yield from hub_checks(label, stage)
    yield from _guided(objective)
    yield from _kinds(objective.pairs)
    yield from _lesson(objective)
    yield from _parts(objective)
    if isinstance(objective.field, ReferenceField):
        yield from field_checks(objective.field)
        yield from reference_checks(ReferenceBatch())
    for prediction in ("v", "eps"):
        stage = world(VP(), prediction)
        learner = Gated(_double(stage), 0.05, 0.02)
        yield from held_still(f"{prediction}: ", _unweighted(objective), {}, learner, stage.batch(COUNT))
    yield from source_checks(objective.source)


def _double(stage: World) -> Denoiser:
    """The exact flow map, and at negative times the velocity to its own samples, whose law is the data's."""
    ahead, back = stage.jumper(lambda t, cond: cond["s"], takes_w=True), stage.teacher(takes_w=True)

    def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        mirrored = expand((t < 0).double(), x) > 0
        return torch.where(mirrored, back.raw(x, t.abs(), cond), ahead.raw(x, t.abs(), cond))

    return Denoiser(net, stage.path, stage.prediction)


def _unweighted(objective: TwinFlow) -> TwinFlow:
    return replace(objective, empty_share=0.0, rho=0.0, matching=0.0, distance=Squared())


def _missing(label: str, stage: World, objective: TwinFlow) -> Iterator[Check]:
    """What is missed at the exact map, along its own velocity, is of the order of h; beside it, more."""
    path, student = stage.path, _double(stage)
    t, s = Halfway(0.3, 0.9).draw(path, COUNT, turn())
    x, cond = stage.marginal(t), stage.batch(COUNT).cond
    v = FLOW.velocity(path, t, *stage.teacher().both(x, t, cond))
    u = FLOW.ask(student, x, t, {**cond, "s": s})
    found = []
    for h in (0.04, 0.02, 0.01):
        wide = replace(objective.missing, h=h, bound=1e9)
        found.append(float(wide(student, u, v, x, t, s, cond, turn()).square().mean().sqrt()))
    yield below(f"{label}missed at the exact map, h = 0.01", found[-1], 2e-2)
    for coarse, finer in pairwise(found):
        yield between(f"{label}missed: ratio when h halves", coarse / finer, 1.7, 2.3)
    one = replace(objective.missing, bound=1e9, parts=1)(student, u, v, x, t, s, cond, turn())
    yield below(f"{label}missed: by one own step as by several", float(one.square().mean().sqrt()) - found[-1], 1e-3)
    wide = replace(objective.missing, bound=1e9)
    off = wide(student, u + 0.01, v, x, t, s, cond, turn()) - wide(student, u, v, x, t, s, cond, turn())
    step = (FLOW.time(path, t) - FLOW.time(path, s)).clamp(max=wide.h)
    gap = FLOW.time(path, t) - FLOW.time(path, s)
    wanted = 0.01 * torch.where(gap > 0, gap / step.clamp(min=1e-12), torch.ones_like(gap))
    far = step > 1e-3
    yield below(f"{label}missed: an error of u counts by its length over h", (off[:, 0, 0] / wanted - 1.0)[far], 0.05)
    cut = objective.missing(student, u + 100.0, v, x, t, s, cond, turn())
    yield below(f"{label}missed: cut at the bound", cut - objective.missing.bound, 1e-9)


def _matched(label: str, stage: World, objective: TwinFlow) -> Iterator[Check]:
    """No pull where the samples' law is the data's, and towards the data where it is not."""
    batch, student = stage.batch(COUNT), _double(stage)
    u = torch.zeros_like(batch.x0)
    found = objective.matched(student, u, batch.x0, batch.cond, turn())
    yield below(f"{label}pull of one step where both laws are one", found, 1e-9)
    for moved in (0.4, -0.4):
        other = replace(stage, data=stage.data.moved(moved))

        def net(x: Tensor, t: Tensor, cond: Condition, other: World = other) -> Tensor:
            mirrored = expand((t < 0).double(), x) > 0
            back = other.teacher().raw(x, t.abs(), cond)
            return torch.where(mirrored, back, stage.teacher().raw(x, t.abs(), cond))

        learner = torch.zeros_like(batch.x0).requires_grad_()
        told = Denoiser(net, stage.path, stage.prediction)
        plain = replace(objective, pull=Squared())
        plain.matched(told, learner, batch.x0 + moved, batch.cond, turn()).backward()
        assert learner.grad is not None  # a smaller velocity u = eps - x0 is a larger sample
        yield holds(f"{label}pull back of samples off by {moved}", float(learner.grad.mean()) * moved < 0.0)


def _guided(objective: TwinFlow) -> Iterator[Check]:
    """A student guided at w is where its own guidance of rho = 1 - 1/w leaves nothing missed, in the mean."""
    stage, count = world(RectifiedFlow(), "flow"), 16384
    batch = stage.batch(count)
    for rho in (0.0, 0.5, 2.0 / 3.0):
        w = torch.full((count,), 1.0 / (1.0 - rho), dtype=torch.float64)
        plain = replace(objective, rho=rho, distance=Squared(), missing=replace(objective.missing, bound=1e9))
        plain = replace(plain, pairs=ThreeKinds(Spread(0.4, 0.6)), field=DataField())
        slopes = []
        for offset in (0.0, 0.1):
            student = Bent(_double(stage), 0.0, offset)
            told, empty = {**batch.cond, "w": w}, batch.uncond
            plain.mapped(student.denoiser(), batch.x0, told, empty, turn())[0].backward()
            slopes.append(float(student.offset.grad or 0.0))
        yield below(
            f"own guidance, rho {rho:.2f}: mean gradient at the guided map over that beside it",
            slopes[0] / slopes[1],
            0.25,
        )


def _kinds(pairs: ThreeKinds) -> Iterator[Check]:
    for path in (VP(), RectifiedFlow()):
        label, count = f"kinds, {path.kind}: ", 9000
        t, s = pairs.draw(path, count, turn())
        whole, short, other = (slice(k * count // 3, (k + 1) * count // 3) for k in range(3))
        told = bool((t[whole] == path.start).all()) and bool((s[whole] == clean(path)).all())
        yield holds(f"{label}a third goes the whole way", told)
        yield holds(f"{label}none goes up", bool((s <= t).all()))
        tau, low = FLOW.time(path, t), FLOW.time(path, s)
        share = 1.0 - low / tau.clamp(min=1e-9)
        inner = tau > 0.3
        yield below(f"{label}short ways: longest", share[short][inner[short]].max() - pairs.near, 0.005)
        yield between(f"{label}any ways: mean length", share[other][inner[other]].mean(), 0.45, 0.55)
        weights = tangent_weight(path, t, s)
        yield between(f"{label}weight of the whole way", weights[whole].max(), 1.0, 1.1)
        yield between(f"{label}weight of the shortest", weights[short].max(), 3.5, 4.08)


def field_checks(field: ReferenceField) -> Iterator[Check]:
    """The data's own pair where a row is alone; near the teacher's answer where many are of its condition."""
    stage, gaps = world(VP(), "v"), []
    for count in (32, 512):
        batch, noise = stage.batch(count), turn().noise(stage.batch(count).x0)
        t = torch.full((count,), 600.0, dtype=torch.float64)
        x = field.mixing.mix(stage.path, batch.x0, t, noise)
        alone = {"ctx": torch.arange(float(count))[:, None, None]}
        own = field(stage.teacher(), batch, noise, x, t, alone)
        for name, found, wanted in zip(("sample", "noise"), own, (batch.x0, noise), strict=True):
            yield below(f"field: the {name} itself, alone among {count}", found - wanted, 1e-9)
        mean, eps = field(stage.teacher(), batch, noise, x, t, batch.cond)
        x0, wanted = stage.teacher().both(x, t, batch.cond)
        gaps.append(float((mean - x0).square().mean() / (batch.x0 - x0).square().mean()) ** 0.5)
        yield below(f"field: noise and sample make x_t, of {count}", stage.teacher().mix(mean, eps, t) - x, 1e-9)
    yield between("field: distance from the teacher over a pair's, of 512", gaps[1], 0.0, 0.5)
    yield between("field: which falls with the rows", gaps[1] / gaps[0], 0.0, 0.8)


def _parts(objective: TwinFlow) -> Iterator[Check]:
    """The loss is its three parts on the rows that are theirs, and nothing else."""
    stage, again = world(VP(), "v"), turn()
    batch, student = stage.batch(COUNT), Bent(_double(stage), 0.05, 0.02).denoiser()
    found, metrics = objective.loss("student", Cast({"student": student}), batch, turn())
    cond, last = objective.told(batch, again), COUNT - COUNT // 4
    most = {name: value[:last] for name, value in cond.items()}
    empty = {name: value[:last] for name, value in batch.uncond.items()}
    mapped, u, made, _ = objective.mapped(student, batch.x0[:last], most, empty, again)
    whole = last // 3
    first = {name: value[:whole] for name, value in most.items()}
    matched = objective.matched(student, u[:whole], made[:whole], first, again)
    rest = {name: value[last:] for name, value in cond.items()}
    false = objective.mirrored(student, batch.x0[last:], rest, again)
    total = mapped + objective.matching * matched + false
    yield below("the loss is its three parts", float((found / total).detach()) - 1.0, 1e-9)
    yield below("the twin's own is told", metrics["twin"] - float(false.detach()), 1e-9)


def _lesson(objective: TwinFlow) -> Iterator[Check]:
    """The twin learns the velocity to the student's own samples, at negative times alone."""
    stage, count = world(RectifiedFlow(), "flow"), 8192
    batch, plain = stage.batch(count), replace(objective, distance=Squared(), times=Spread(0.3, 0.7))
    slopes = []
    for offset in (-0.1, 0.0, 0.1):
        weight = torch.tensor(offset, dtype=torch.float64, requires_grad=True)
        exact, asked = _double(stage), list[Tensor]()

        def net(x: Tensor, t: Tensor, cond: Condition, weight: Tensor = weight, exact: Denoiser = exact) -> Tensor:
            asked.append(t)  # noqa: B023
            return exact.raw(x, t, cond) + weight * expand((t < 0).double(), x)

        student = Denoiser(net, stage.path, stage.prediction)
        plain.mirrored(student, batch.x0, batch.cond, turn()).backward()
        slopes.append(float(weight.grad or 0.0))
        told = [bool((t < 0).all()) for t in asked]
    yield holds("twin: one answer at the noisiest time, then one at negative times", told == [False, True])
    yield holds("twin: pulled to the velocity of own samples from both sides", slopes[0] < 0.0 < slopes[2])
    yield below("twin: slope at it over that beside it", slopes[1] / slopes[2], 0.25)
    seen: list[tuple[Tensor, Tensor]] = []

    def note(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        seen.append((t, cond["s"]))
        return x

    x, t = batch.x0[:4], torch.linspace(0.2, 0.8, 4, dtype=torch.float64)
    twin(Denoiser(note, stage.path, stage.prediction)).raw(x, t, batch.cond)
    yield holds("twin: asked at minus t", torch.equal(seen[0][0], -t))

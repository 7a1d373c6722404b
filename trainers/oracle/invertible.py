"""The oracle of invertible consistency: the exact flow is the zero of both directions, and undoes itself.

The student's own loss is the oracle of consistency's; here are the inverse's and the cycles between the two.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.models.denoiser import Denoiser
from fewstep.models.paths import VP, Path
from fewstep.runtime.sampling.plan_methods import inverse_rows

from ..objectives.invertible import Invertible, RisingPairs, UpperEdges
from ..parts.distances import Squared
from ..parts.objective import Cast, Turn
from ..parts.times import grid
from ..recipes.recipe import Recipe
from . import consistency as oracle_consistency
from .parts import perfect_student
from .world import Bent, Check, World, below, between, gradient_checks, holds, recipe_spec, turn, world

COUNT = 256


@dataclass(frozen=True)
class _Above:
    """Pairs a fixed distance apart, s above t, both in the middle of the path."""

    distance: float

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        width = path.start - path.end
        t = path.end + width * torch.linspace(0.2, 0.6, count, dtype=torch.float64)
        return t, t + self.distance * width


@dataclass(frozen=True)
class _Far:
    """An end above every pair of `_Above`."""

    def __call__(self, path: Path, t: Tensor, s: Tensor, turn: Turn) -> Tensor:
        return torch.full_like(t, path.end + 0.8 * (path.start - path.end))


def checks(recipe: Recipe, objective: Invertible) -> Iterator[Check]:
    yield from oracle_consistency.checks(recipe, objective.reverse)
    yield from _pairs(objective)
    yield from _edges(objective)
    yield from _sold(recipe, objective)
    for prediction in ("v", "eps"):
        stage, label = world(VP(), prediction), f"{prediction}: "
        yield from _forward(label, stage, objective)
        yield from _cycle(label, stage, objective)
        yield from _routing(label, stage, objective)


def _told(objective: Invertible) -> Invertible:
    """Of networks that are told where they land: no estimate that is not can be right for two ends."""
    reverse, forward = (oracle_consistency.knowing(part) for part in (objective.reverse, objective.forward))
    return replace(objective, reverse=reverse, forward=forward)


def _cast(stage: World, objective: Invertible, gain: float = 0.0) -> tuple[Cast, dict[str, Bent]]:
    student = Bent(perfect_student(stage, objective.reverse), gain, 0.5 * gain)
    inverse = Bent(stage.jumper(lambda t, cond: cond["s"]), 0.8 * gain, -0.5 * gain)
    modules = {objective.reverse.target: deepcopy(student), objective.forward.target: deepcopy(inverse)}
    modules |= {"student": student, "inverse": inverse, "teacher": Bent(stage.teacher())}
    return Cast({name: module.denoiser() for name, module in modules.items()}), modules


def _pairs(objective: Invertible) -> Iterator[Check]:
    drawn, path = objective.forward.pairs, VP()
    yield holds("inverse: pairs rise", isinstance(drawn, RisingPairs))
    t, s = drawn.draw(path, 8192, turn())
    table = grid(path, objective.points)
    low, high = table[:-1], table[1:]
    found = torch.searchsorted(table, t)
    yield holds("inverse: t on the grid, all of it but the last time", torch.equal(t.unique(), low))
    yield holds("inverse: s is the next time above", torch.equal(s, high[found]))


def _edges(objective: Invertible) -> Iterator[Check]:
    """Ends are the edges above, counted by hand; cycles run between the two edges of one phase, from noised data."""
    path, ends = VP(), objective.forward.ends
    yield holds("inverse: ends are edges above", isinstance(ends, UpperEdges))
    t, s = objective.forward.pairs.draw(path, 2048, turn())
    edges = [(path.start + 1) * k / objective.phases - 1 for k in range(1, objective.phases + 1)]
    wanted = torch.tensor([min(e for e in edges if e > value) for value in t.tolist()], dtype=torch.float64)
    end = ends(path, t, s, turn())
    yield holds("inverse: ends, counted by hand", torch.equal(end, wanted) and bool((end >= s).all()))
    low, high = objective.edges(path, turn(), 8192)
    phases = {(lo, hi) for lo, hi in zip(low.tolist(), high.tolist(), strict=True)}
    first = (path.start + 1) / objective.points - 1
    yield holds("cycle: the two edges of a phase", phases == set(pairwise([first, *edges])))
    stage = world(path, "v")
    batch = stage.batch(4096)
    cast, _ = _cast(stage, _told(objective))
    for player, begin in (("student", 0), ("inverse", 1)):
        begun, _ = _told(objective).round_trip(player, cast, batch, turn())
        again = turn()
        start = objective.edges(path, again, 4096)[begin]
        truth = objective.reverse.source.mixing.draw(path, batch, start, again)
        yield below(f"cycle: the {player}'s begins with data noised to its end", begun - truth, 1e-9)


def _sold(recipe: Recipe, objective: Invertible) -> Iterator[Check]:
    """The runtime takes a picture up by hops that the inverse was trained for: between the edges that cycles run."""
    spec = recipe_spec(recipe, VP(), "v")
    inverse = recipe_spec(replace(recipe, sampling=recipe.beside["inverse"]), VP(), "v")
    rows = inverse_rows("inverse", inverse, spec, next(iter(spec.grids.values()))[0])
    low, _ = objective.edges(VP(), turn(), 8192)
    yield holds("inverse: asked at the lower edges of the phases", [row.t for row in rows] == low.unique().tolist())
    yield holds("inverse: no guidance, no noise", all(row.w == 1.0 and not row.pair and row.c == 0.0 for row in rows))
    stage = world(VP(), "v", mean=0.3)
    student = stage.jumper(lambda t, cond: cond["s"])
    high = [*low.unique().tolist()[1:], VP().start]
    t = torch.full((64,), rows[0].t, dtype=torch.float64)
    x = first = stage.marginal(t)
    cond = stage.batch(64).cond
    for row, up in zip(rows, high, strict=True):
        now, to = (torch.full_like(t, value) for value in (row.t, up))
        x = row.a * x + row.b * student.raw(x, now, {**cond, "s": to})
    down = student.jump(x, torch.full_like(t, VP().start), t, {**cond, "s": t})
    yield below("inverse: the rows go up the exact flow", down - first, 1e-6)


def _forward(label: str, stage: World, objective: Invertible) -> Iterator[Check]:
    """The inverse's consistency loss has the exact flow for its zero, at the solver's order."""
    told = replace(_told(objective), preserve=0.0)
    found = []
    for gap in (0.02, 0.01, 0.005):
        kind = replace(told, forward=replace(told.forward, pairs=_Above(gap), ends=_Far()))
        cast, _ = _cast(stage, kind)
        found.append(kind.loss("inverse", cast, stage.batch(COUNT), turn())[1]["residual"])
    yield below(f"{label}inverse: residual at the exact flow, one step of 0.005", found[-1], 4e-3)
    for coarse, finer in pairwise(found):
        yield between(f"{label}inverse: residual ratio when the step halves", coarse / finer, 3.6, 4.4)
    cast, _ = _cast(stage, told)
    own = told.loss("inverse", cast, stage.batch(COUNT), turn())[1]["residual"]
    yield below(f"{label}inverse: residual at the exact flow, own pairs", own, 0.1)
    bent, _ = _cast(stage, told, 0.2)
    beside = told.loss("inverse", bent, stage.batch(COUNT), turn())[1]["residual"]
    yield between(f"{label}inverse: residual beside it", beside, 2.0 * own, float("inf"))


def _cycle(label: str, stage: World, objective: Invertible) -> Iterator[Check]:
    """What the exact flow has done it undoes, in both directions; `preserve` weighs what is left."""
    told = _told(objective)
    cast, _ = _cast(stage, told)
    bent, _ = _cast(stage, told, 0.2)
    batch = stage.batch(COUNT)
    for player in objective.players:
        begun, ended = told.round_trip(player, cast, batch, turn())
        yield below(f"{label}cycle of the {player}: exact maps undo each other", ended - begun, 1e-7)
        begun, ended = told.round_trip(player, bent, batch, turn())
        apart = (ended - begun).detach().abs().mean()
        yield between(f"{label}cycle of the {player}: bent ones do not", apart, 1e-2, 1e9)
        weights = (0.0, objective.preserve)
        losses = [replace(told, preserve=weight).loss(player, bent, batch, turn())[0].detach() for weight in weights]
        kept = told.loss(player, bent, batch, turn())[1]["preserve"]
        added = (losses[1] - losses[0]) / (objective.preserve * kept)
        yield below(f"{label}cycle of the {player}: its weight in the loss", added - 1.0, 1e-4)


def _routing(label: str, stage: World, objective: Invertible) -> Iterator[Check]:
    """Each turn teaches its own player, and by the gradient it gets when the other and its own target stand still."""
    told, batch = _told(objective), stage.batch(COUNT)
    held = ("student", "inverse")
    for player in held:
        cast, modules = _cast(stage, told, 0.2)
        smooth = replace(told, cycle=Squared())
        smooth.loss(player, cast, batch, turn())[0].backward()
        learned = {name for name, module in modules.items() if any(w.grad is not None for w in module.parameters())}
        yield holds(f"{label}the {player}'s turn teaches the {player} alone", learned == {player})
        still = deepcopy(modules[player]).requires_grad_(False).denoiser()
        parts = {"student": "reverse", "inverse": "forward"}
        part = parts[player]
        fixed = replace(smooth, **{part: replace(getattr(smooth, part), target="held")})
        roles = {**cast.roles, "held": still}

        def loss(fixed: Invertible = fixed, player: str = player, roles: dict[str, Denoiser] = roles) -> Tensor:
            return fixed.loss(player, Cast(roles), batch, turn())[0]

        yield from gradient_checks(f"{label}{player}: ", loss, modules[player], 0.02, 1e-4)

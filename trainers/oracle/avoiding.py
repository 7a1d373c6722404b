"""The oracle of guidance away from a drawn prompt: the method within, and who is told what.

For one Gaussian whose mean the condition moves, guidance away from n moves it by n + w (c - n): the exact student reads
n from what it is told, so it is wrong wherever that is not what the teacher was guided away from.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.paths import VP

from ..objectives.avoiding import Avoiding
from ..objectives.consistency import Consistency
from ..objectives.guidance import GuidanceDistillation
from ..parts.objective import Batch, Cast
from ..recipes.recipe import Recipe
from . import consistency as oracle_consistency
from . import guidance as oracle_guidance
from .world import Bent, Check, World, below, between, holds, turn, world

COUNT = 256
WITHIN: dict[type, Callable[[Recipe, Any], Iterator[Check]]] = {
    Consistency: oracle_consistency.checks,
    GuidanceDistillation: oracle_guidance.checks,
}


def checks(recipe: Recipe, objective: Avoiding) -> Iterator[Check]:
    yield from WITHIN[type(objective.inner)](recipe, objective.inner)
    yield from _told(objective)
    for prediction in ("v", "eps"):
        yield from _zero(f"{prediction}: ", world(VP(), prediction), objective)


def _batch(stage: World, count: int = COUNT) -> Batch:
    """Every row has a prompt of its own, and samples of it."""
    batch = stage.batch(count)
    ctx = torch.linspace(0.1, 0.9, count, dtype=torch.float64)[:, None, None]
    shared = {"size_ids": torch.arange(count, dtype=torch.float64)[:, None]}
    x0 = batch.x0 - batch.cond["ctx"] + ctx
    return Batch(x0, {"ctx": ctx, **shared}, {"ctx": torch.zeros_like(ctx), **shared})


def _told(objective: Avoiding) -> Iterator[Check]:
    """The empty prompt in its share of the rows, else another row's and never one's own; told as it is avoided."""
    batch = _batch(world(VP(), "v"), 4096)
    told = objective.told(batch, turn())
    avoided, own = told.uncond["ctx"].flatten(), batch.cond["ctx"].flatten()
    empty = avoided == 0.0
    yield between("avoided: share of the empty prompt", empty.double().mean() - objective.empty, -0.03, 0.03)
    yield holds("avoided: another row's, not one's own", not bool((avoided == own).any()))
    yield holds("avoided: prompts of the batch", set(avoided[~empty].tolist()) <= set(own.tolist()))
    yield holds("avoided: told as it is", torch.equal(told.cond["neg_ctx"], told.uncond["ctx"]))
    yield holds("avoided: one's own prompt stays", torch.equal(told.cond["ctx"], batch.cond["ctx"]))
    sizes = torch.equal(told.uncond["size_ids"], batch.uncond["size_ids"])
    yield holds("avoided: the picture's size is one's own", sizes)
    yield holds("avoided: samples stay", told.x0 is batch.x0)


def _zero(label: str, stage: World, objective: Avoiding) -> Iterator[Check]:
    """The student that reads both prompts right is the zero, up to the teacher's steps; one that reads none is not."""
    w = objective.guidance.low
    inner = objective.inner
    if isinstance(inner, Consistency):
        fine = replace(oracle_consistency.knowing(inner), step=replace(inner.step, parts=128))  # type: ignore[type-var]
        objective, perfect = replace(objective, inner=fine), stage.jumper(lambda t, cond: cond["s"])
    else:
        perfect = stage.teacher()

    def reading(away: Callable[[Condition], Tensor]) -> Denoiser:
        def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            n = away(cond)
            return perfect.raw(x, t, {**cond, "ctx": n + w * (cond["ctx"] - n)})

        return Denoiser(net, stage.path, stage.prediction)

    found = []
    for away in (lambda cond: cond["neg_ctx"], lambda cond: torch.zeros_like(cond["ctx"])):
        cast = Cast({"student": Bent(reading(away)).denoiser(), "teacher": Bent(stage.teacher()).denoiser()})
        found.append(objective.loss("student", cast, _batch(stage), turn(99))[1]["residual"])
    yield below(f"{label}avoided: residual of the student that reads it", found[0], 0.02)
    yield between(f"{label}avoided: residual of one that reads none", found[1], 0.1, float("inf"))

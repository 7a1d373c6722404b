"""Checks of parts that several methods share: sources of x_t, guidance, rollouts, and the student they aim at."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, times
from fewstep.models.paths import VP
from fewstep.models.spec import SamplerSpec
from fewstep.runtime.sampling.samplers import path_start, updates

from ..distribution.also import Also
from ..parts.jumps import LcmJump, TwoTimeJump
from ..parts.objective import Turn
from ..parts.rollout import BackwardSimulation
from ..parts.transitions import guided
from ..recipes.recipe import Recipe
from .world import SHAPE, Bent, Check, World, absorbed, below, between, holds, recipe_spec, turn, world


def perfect_student(stage: World, objective: Any) -> Denoiser:
    """The student that the objective aims at: guided at the w it is given, or at its one w where it has no input."""
    if isinstance(objective.jump, LcmJump):
        exact = stage.consistency(objective.jump.boundary, takes_w=True)
    else:
        told = isinstance(objective.jump, TwoTimeJump)
        exact = stage.jumper((lambda t, cond: cond["s"]) if told else None, takes_w=True)
    scale = objective.guidance
    if scale.low != scale.high:
        return exact
    return absorbed(exact, scale.low)


def source_checks(source: Any) -> Iterator[Check]:
    """x_t must be alpha x0 + sigma noise, and pure noise at the start where the source says so."""
    stage = world(VP(), "v")
    path, count = stage.path, 2048
    batch = stage.batch(count)
    moved = replace(batch, x0=batch.x0 + 1.0)
    for share in (0.1, 0.5, 0.9):
        t = torch.full((count,), path.start * share, dtype=torch.float64)
        first, second = source.draw(path, batch, t, turn()), source.draw(path, moved, t, turn())
        yield below(f"source: signal at {share}", (second - first) - path.alpha(path.start * share), 1e-9)
        noise = (first - path.alpha(path.start * share) * batch.x0).std() / path.sigma(path.start * share)
        yield between(f"source: noise at {share}", noise, 0.97, 1.03)
    if source.pure_at_start:
        t = torch.full((count,), path.start, dtype=torch.float64)
        first, second = source.draw(path, batch, t, turn()), source.draw(path, moved, t, turn())
        yield below("source: signal left at the start", second - first, 1e-12)


def guidance_checks(stage: World) -> Iterator[Check]:
    """`guided` in both conventions, and against the exact denoiser of the guided data."""
    batch = stage.batch(6)
    t = torch.linspace(100.0, 900.0, 6, dtype=torch.float64)
    x = stage.marginal(t)
    w = torch.tensor([1.0, 1.5, 2.0, 4.0, 7.0, 0.0], dtype=torch.float64)
    teacher = stage.teacher()
    ours = guided(teacher, batch.uncond, w).x0(x, t, batch.cond)
    truth = stage.teacher(takes_w=True).x0(x, t, {**batch.cond, "w": w})
    yield below("guidance u + w (c - u): the guided Gaussian", ours - truth, 1e-9)
    cond, uncond = teacher.x0(x, t, batch.cond), teacher.x0(x, t, batch.uncond)
    omega = (w - 1.0).reshape(-1, *([1] * len(SHAPE)))
    yield below("guidance c + omega (c - u) with omega = w - 1", ours - (cond + omega * (cond - uncond)), 1e-9)


def rollout_checks(recipe: Recipe, rollout: BackwardSimulation) -> Iterator[Check]:
    """A student's training inputs are the states of its own sampler, draw by draw, and every state is reached (T7)."""
    stage = world(VP(), "v")
    spec = recipe_spec(recipe, stage.path, stage.prediction)
    student = stage.teacher()  # imperfect on purpose: a wrong time or coefficient shows
    batch = stage.batch(16)
    gaps, reached = [], set()
    for step in range(60):
        ours = rollout.make(student, batch, turn(step)).x0
        again = turn(step)
        walked = rollout.exit(stage.path, again)
        reached.add(walked)
        gaps.append(float((ours - sampled(student, spec, walked, batch.x0, batch.cond, again)).abs().max()))
    yield below("rollout: against the sampler of the recipe, same draws", max(gaps), 1e-9)
    aside = any(isinstance(term, Also) for term in getattr(recipe.objective, "terms", {}).get("student", ()))
    counts = rollout.grids.counts if aside else tuple(spec.grids)  # another objective may teach the other step counts
    wanted = {spec.grids[n][: k + 1] for n in counts for k in range(n)}
    yield holds("rollout: every state of every grid is reached, and no other", reached == wanted)
    learner = Bent(student).denoiser()
    asked = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            made = rollout.make(learner, batch, turn())
        asked.append((made.x0.requires_grad, made.x.requires_grad))
    yield holds("rollout: gradient through the last step alone", asked == [(True, False), (False, False)])


def sampled(
    student: Denoiser, spec: SamplerSpec, walked: tuple[float, ...], like: Tensor, cond: Condition, again: Turn
) -> Tensor:  # fmt: skip
    """The runtime's sampler along the first times of one of its grids, ending there as at a last step."""
    steps = next(n for n, grid in sorted(spec.grids.items()) if grid[: len(walked)] == walked)
    x = again.noise(like) * path_start(spec.path)
    rows = updates(spec, steps)[: len(walked)]
    last = updates(replace(spec, grids={len(walked): walked}), len(walked))[-1]
    for (t, update), _ in pairwise([*rows[:-1], last]):
        x = update.a * x + update.b * student.raw(x, times(t, x), cond) + update.c * again.noise(x)
    t, update = last
    return update.a * x + update.b * student.raw(x, times(t, x), cond)

"""The oracle of guidance distillation: the guided denoiser in closed form is its zero, at every time and every scale.

For one Gaussian whose mean the condition moves, guidance at w moves it w times as far, so the student that is aimed at
is the exact denoiser of the moved data.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.models.denoiser import Denoiser
from fewstep.models.paths import VP, RectifiedFlow, TrigFlow

from ..objectives.guidance import GuidanceDistillation
from ..parts.objective import Cast
from ..parts.transitions import TeacherWalk, guided
from ..recipes.recipe import Recipe
from .distillation import time_checks
from .parts import guidance_checks, source_checks
from .world import SHIFT, Bent, Check, World, absorbed, below, between, gradient_checks, holds, turn, world

COUNT = 256
WORLDS = ((VP(), "v"), (VP(), "eps"), (RectifiedFlow(), "flow"), (TrigFlow(), "trig"))


def checks(recipe: Recipe, objective: GuidanceDistillation) -> Iterator[Check]:
    for path, prediction in WORLDS:
        stage, label = world(path, prediction), f"{path.kind} {prediction}: "
        yield from _zero(label, stage, objective)
        yield from _slopes(label, stage, objective)
    stage = world(VP(), "v")
    yield from _scales(recipe, stage, objective)
    yield from time_checks(recipe, objective.times)
    yield from source_checks(objective.source.mixing)
    yield from guidance_checks(stage)
    if isinstance(objective.source, TeacherWalk):
        yield from _walk(stage, objective.source)


def _perfect(stage: World, objective: GuidanceDistillation) -> Denoiser:
    """Guided at the w it is given, or at its one w where it is told none."""
    scale = objective.guidance
    if scale.low == scale.high:
        return absorbed(stage.teacher(), scale.low)
    return stage.teacher(takes_w=True)


def _cast(stage: World, student: Denoiser, gain: float = 0.0) -> tuple[Cast, Bent, Bent]:
    learner, teacher = Bent(student, gain, 0.5 * gain), Bent(stage.teacher())
    return Cast({"student": learner.denoiser(), "teacher": teacher.denoiser()}), learner, teacher


def _zero(label: str, stage: World, objective: GuidanceDistillation) -> Iterator[Check]:
    cast, _, _ = _cast(stage, _perfect(stage, objective))
    loss, metrics = objective.loss("student", cast, stage.batch(COUNT), turn())
    yield below(f"{label}loss at the exact guided denoiser", loss, 1e-9)
    yield below(f"{label}residual at the exact guided denoiser", metrics["residual"], 1e-6)
    plain, _, _ = _cast(stage, stage.teacher())
    unguided = objective.loss("student", plain, stage.batch(COUNT), turn())[1]["residual"]
    yield between(f"{label}residual of the teacher without guidance", unguided, 0.1 * SHIFT, float("inf"))


def _slopes(label: str, stage: World, objective: GuidanceDistillation) -> Iterator[Check]:
    """Only the student learns, by its own gradient, back to where it is right."""
    cast, student, teacher = _cast(stage, _perfect(stage, objective), gain=0.2)
    batch = stage.batch(COUNT)

    def again() -> Tensor:
        return objective.loss("student", cast, batch, turn())[0]

    again().backward()
    yield holds(f"{label}no gradient reaches the teacher", all(w.grad is None for w in teacher.parameters()))
    yield from gradient_checks(label, again, student)


def _scales(recipe: Recipe, stage: World, objective: GuidanceDistillation) -> Iterator[Check]:
    """The scales of the contract are trained, and a student that is told another scale than the teacher's is wrong."""
    drawn = objective.guidance.draw(8192, turn())
    low, high = objective.guidance.low, objective.guidance.high
    yield below("scales: lowest that is drawn", drawn.min() - low, 0.01 * (high - low) + 1e-12)
    yield below("scales: highest that is drawn", drawn.max() - high, 0.01 * (high - low) + 1e-12)
    sold = recipe.sampling
    told = sold is not None and sold.guidance_mode == "embedded"
    yield holds("scales: told where several are trained, taken in where one is", told == (low < high))
    if told and sold is not None:
        yield holds("scales: all that are sold are trained", sold.guidance_range == (low, high))
        perfect = _perfect(stage, objective)
        shifted = Denoiser(
            lambda x, t, cond: perfect.raw(x, t, {**cond, "w": cond["w"] + 0.5}), stage.path, stage.prediction
        )
        cast, _, _ = _cast(stage, shifted)
        residual = objective.loss("student", cast, stage.batch(COUNT), turn())[1]["residual"]
        yield between("scales: residual where another scale is told, half a unit off", residual, 0.1 * SHIFT, 10.0)


def _walk(stage: World, source: TeacherWalk) -> Iterator[Check]:
    """States are those of the guided ODE from the start's noise: its exact map, nearer with every part."""
    w, count = 3.0, COUNT
    batch = stage.batch(count)
    scale = torch.full((count,), w, dtype=torch.float64)
    teacher = guided(stage.teacher(), batch.uncond, scale)
    noise = turn().noise(batch.x0)
    t = torch.full((count,), 300.0, dtype=torch.float64)
    start = torch.full_like(t, stage.path.start)
    flow = absorbed(stage.jumper(lambda *_: t), w)
    exact = flow.jump(source.mixing.mix(stage.path, batch.x0, start, noise), start, t, batch.cond)
    gaps = [
        float((replace(source, parts=k).at(teacher, batch, t, noise, batch.cond) - exact).abs().max())
        for k in (50, 100)
    ]
    yield below("walk: state at 300 against the guided flow, 100 parts", gaps[1], 0.05)
    yield between("walk: gap ratio when the parts double", gaps[0] / gaps[1], 1.7, 2.3)

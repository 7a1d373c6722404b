"""One recipe on the plane: the same `Recipe` value as for pictures; the network, the data and the budget are others.

What a picture's student takes from its teacher's weights, a student here takes from one network that was fitted to the
exact denoiser beforehand, the same for all recipes.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, guide, times
from fewstep.models.paths import VP
from fewstep.models.paths import Path as NoisePath
from fewstep.models.spec import Guidance, Latent, SamplerSpec
from fewstep.runtime.sampling.samplers import start_scale, updates

from ..distribution.adaptation import ADAPTED
from ..distribution.control_terms import CONTROL
from ..errors import RecipeError
from ..loop.checkpoint_search import Kept, Saving, settle, weights_of
from ..loop.loop import LoopSettings, train
from ..loop.method import Assembled
from ..loop.player import Player, PlayerSettings
from ..parts.objective import Turn
from ..parts.pairs import PairSource, draw_pairs
from ..parts.times import clean
from ..parts.transitions import NoisedData
from ..recipes.casting import assemble_stage
from ..recipes.recipe import Recipe, Stage
from .control import ControlledPoints, asked
from .net import PlaneNet, plane_student
from .networks import Count, PlaneNetworks
from .partners import Routed
from .plane import CLASSES, PREDICTIONS, Plane, PlaneSource, conditions, plane, reference_points
from .scores import sliced_distance
from .sources import CellPoints, FewShots, ForgettingPoints, moved_plane


@dataclass(frozen=True, kw_only=True)
class PlaneBudget:
    """What every recipe gets. steps: optimiser steps of the student's turn order, shared by a recipe's stages in
    proportion to what they ask for. rate: factor on every recipe's learning rates, since this network is small.
    start_steps: those of the network that students start from."""

    steps: int = 4000
    batch: int = 256
    rate: float = 5.0
    start_steps: int = 8000
    pairs: int = 16384
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A student, its sampling contract, the scale it was guided at, and what it cost.

    before: the student that the last stage began with, where that one tunes what the stage before made.
    """

    net: PlaneNet | Routed
    spec: SamplerSpec
    w: float
    seconds: float
    count: Count = field(compare=False)
    before: PlaneNet | None = None


def fit_start(data: Plane, budget: PlaneBudget) -> PlaneNet:
    """The network that stands for the teacher's weights: fitted to the exact v on VP. It serves every path."""
    torch.manual_seed(budget.seed)
    net = PlaneNet(VP())
    teacher = data.teacher(VP())
    player = Player("student", net, PlayerSettings(lr=2e-3, warmup=50, cooldown=0.5, ema={"kept": 0.99}))
    source = PlaneSource(data, budget.batch, seed=budget.seed)
    for step in range(budget.start_steps):
        batch = source.batch(step)
        turn = Turn.of(budget.seed, step, budget.start_steps, "start")
        t = turn.uniform(0.0, VP().start, budget.batch)
        x = NoisedData(pure_at_start=False).draw(VP(), batch, t, turn)
        label = batch.cond["label"] * (turn.uniform(0.0, 1.0, budget.batch) >= 0.1)[:, None]
        with torch.no_grad():
            aim = teacher.raw(x, t, {"label": label})
        player.update((net(x, t, {"label": label}) - aim).square().mean(), turn.progress)
    kept: PlaneNet = player.averages["kept"].requires_grad_(False)  # type: ignore[assignment]
    return kept


def run_recipe(recipe: Recipe, data: Plane, start: PlaneNet, budget: PlaneBudget) -> Trained:
    """Train all stages of a recipe within the budget.

    Errors: `RecipeError` for a recipe that only pictures' networks can follow; `TrainingDiverged`.
    """
    check_fits(recipe)
    path = recipe_path(recipe)
    count, seconds = Count(), 0.0
    previous: PlaneNet | None = None
    before: PlaneNet | None = None
    parts: list[Any] = []
    asked = sum(stage.steps for stage in recipe.stages)
    for stage in recipe.stages:
        steps = max(1, round(budget.steps * stage.steps / asked))
        before = previous if stage.start == "previous" else None
        begun = start if before is None else before
        plan = stage.student or recipe.student
        net = plane_student(begun, plan, path=path, seed=budget.seed, fresh=stage.start == "noise")
        method = _assemble(recipe, stage, net, start, previous, data, budget, count)
        shelf = Kept()
        saving = method if stage.search is None else Saving(method, stage.search, stage.average, shelf)
        seconds += _train(recipe, stage, method, saving, steps, data, budget)
        student = method.players[0]
        kept = student.module if stage.average is None else student.averages[stage.average]
        assert isinstance(kept, PlaneNet)  # `net`, or an average of it
        previous = kept
        if stage.search is not None:
            begun_s = time.perf_counter()
            saved = [*shelf.all(), weights_of(student, stage.average)]
            settle(stage.search, saved, previous, _distance(recipe, stage, data, budget), budget.seed)
            seconds += time.perf_counter() - begun_s
        if stage.cell is not None:
            parts.append(previous)
    assert previous is not None  # a recipe has a stage
    made = Routed(parts) if parts else previous
    return Trained(made.eval(), plane_spec(recipe), sampling_scale(recipe), seconds, count, before)


def check_fits(recipe: Recipe) -> None:
    """Errors: `RecipeError` naming what the plane has not."""
    if recipe.sampling is None:
        raise RecipeError(
            f"{recipe.name} sells students that are sampled as their teacher; the plane compares step counts"
        )
    plane_student(PlaneNet(VP(), width=4), recipe.student, path=VP(), seed=0)


def recipe_path(recipe: Recipe) -> NoisePath:
    """The path that a recipe's student lives on: its own, or Stable Diffusion's where it takes any teacher's."""
    return recipe.path or VP()


def sampling_scale(recipe: Recipe) -> float:
    """The guidance scale to compare at: what the sampler is asked for, or what was taken in, or 1."""
    if recipe.sampling is not None and recipe.sampling.guidance_mode != "none":
        return recipe.sampling.guidance_default
    taken = [getattr(stage.objective, "guidance", None) for stage in recipe.stages]
    taken += [stage.pairs.guidance for stage in recipe.stages if stage.pairs is not None]
    return next((float(scale.high) for scale in taken if scale is not None), 1.0)


def plane_spec(recipe: Recipe) -> SamplerSpec:
    """The sampling contract that the recipe's student would be sold with, on the recipe's path."""
    s, path = recipe.sampling, recipe_path(recipe)
    assert s is not None  # `check_fits`
    return SamplerSpec(
        prediction=PREDICTIONS[path.kind], path=path, sampler=s.sampler, grids=s.grids.of(path),
        stochastic=s.stochastic, gamma=s.gamma, phases=s.phases,
        guidance=Guidance(mode=s.guidance_mode, default=s.guidance_default, range=s.guidance_range),
        boundary=s.boundary, latent=Latent(channels=2, factor=1, scale=1.0), sizes=((1, 1),), recipe=recipe.name,
    )  # fmt: skip


@torch.no_grad()
def sample_points(trained: Trained, cond: Condition, uncond: Condition, steps: int, *, seed: int) -> Tensor:
    """Points [B, 2] by the runtime's coefficients `x <- A x + B F + C z + D m`, in float64."""
    spec, rng = trained.spec, torch.Generator().manual_seed(seed)
    if trained.net.control is not None and CONTROL not in cond:
        cond = asked(plane(), cond, seed)
    shape = (cond["label"].shape[0], 2)

    def noise() -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    rows = updates(spec, steps)
    x = noise() * start_scale(spec, rows[0][0])
    estimate = torch.zeros(shape, dtype=torch.float64)
    for t, update in rows:
        second = times(clean(spec.path) if update.lands is None else update.lands, x)
        f = trained.net(x, times(t, x), {**cond, "w": times(trained.w, x), "s": second})
        if spec.guidance.mode == "cfg" and trained.w != 1.0:
            f = guide(trained.net(x, times(t, x), {**uncond, "s": second}), f, trained.w)
        remembered = estimate
        if update.keep is not None:
            estimate = update.keep[0] * x + update.keep[1] * f
        x = update.a * x + update.b * f + update.d * remembered
        if update.c:
            x = x + update.c * noise()
    return x


def _assemble(
    recipe: Recipe, stage: Stage, net: PlaneNet, start: PlaneNet, previous: Any, data: Plane, budget: PlaneBudget,
    count: Count,
) -> Assembled:  # fmt: skip
    """The stage's cast; its teacher is the closed form, the stage before or the stage's own start."""
    held = {"start": net, "previous": previous}.get(stage.teacher)
    networks = PlaneNetworks(
        recipe, stage, net, held, start, recipe_path(recipe), data, count, budget.rate, budget.seed
    )
    return assemble_stage(networks)


def _distance(recipe: Recipe, stage: Stage, data: Plane, budget: PlaneBudget) -> Callable[[Any], float]:
    """The benchmark's distance of a network's samples, mean over classes and step counts, on draws of its own. A search
    has four times the samples it asks for, since points are cheap."""
    plan, spec, w = stage.search, plane_spec(recipe), sampling_scale(recipe)
    assert plan is not None
    labels = torch.arange(CLASSES).repeat_interleave(4 * plan.samples)
    cond, uncond = conditions(labels)
    aim = reference_points(data, labels, w, seed=budget.seed + 17).chunk(CLASSES)

    def distance(net: Any) -> float:
        student, found = Trained(net.eval(), spec, w, 0.0, Count()), 0.0
        for steps in plan.steps:
            points = sample_points(student, cond, uncond, steps, seed=budget.seed + 18).chunk(CLASSES)
            found += sum(sliced_distance(a.double(), b.double()) for a, b in zip(points, aim, strict=True))
        return found / (CLASSES * len(plan.steps))

    return distance


def _train(
    recipe: Recipe, stage: Stage, method: Assembled, saving: Assembled | Saving, steps: int, data: Plane,
    budget: PlaneBudget,
) -> float:  # fmt: skip
    """Seconds of training, drawing of pairs included."""
    begun = time.perf_counter()
    source: Any = PlaneSource(data, budget.batch, seed=budget.seed)
    if stage.pairs is not None:
        plan = replace(stage.pairs, count=min(stage.pairs.count, budget.pairs))
        drawn = _quietly(
            lambda: draw_pairs(method.cast["teacher"], stage.teacher == "teacher", plan, source, seed=budget.seed)
        )
        source = PairSource(drawn, source, budget.batch, seed=budget.seed)
    if ADAPTED in stage.objective.roles:
        source = FewShots(PlaneSource(moved_plane(data), budget.batch, seed=budget.seed))
    if stage.cell is not None:
        source = CellPoints(source, stage.cell)
    if stage.forget is not None:
        source = ForgettingPoints(source, stage.forget)
    if recipe.student.control:
        source = ControlledPoints(source)
    settings = LoopSettings(
        steps=steps, seed=budget.seed, bf16=False, checkpoint_every=0, max_bad_steps=recipe.run.max_bad_steps
    )
    with tempfile.TemporaryDirectory() as folder:
        _quietly(lambda: train(saving, source, settings, Path(folder), label=recipe.name))
    return time.perf_counter() - begun


def _quietly(run: Callable[[], Any]) -> Any:
    with contextlib.redirect_stderr(io.StringIO()):
        return run()

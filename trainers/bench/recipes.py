"""`fewstep bench recipes`: every recipe on one two-dimensional teacher, with one budget, at 1, 2 and 4 steps.

A recipe is the same value as for pictures (`trainers.plane.run`). Its student is compared with what it aims at: the
data, or for recipes of guidance the guided data; beside it stands the teacher's own ODE, at as many network evaluations
(under guidance each of its steps costs two) and at 100 steps. Each recipe's result is kept in the folder under a digest
of its description and the budget, so a run that was cut goes on where it was, and a changed recipe alone is trained
anew.
"""

import argparse
import hashlib
import inspect
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fewstep.models.arguments import read_count
from fewstep.models.errors import FewstepError
from fewstep.models.files import write_whole
from fewstep.runtime.engines.measurement import machine_facts

from ..plane.run import PlaneBudget
from ..recipes.recipe import Recipe, describe

STEPS = (1, 2, 4)
EVALUATIONS = (2, 4, 8, 20)
"""Step counts, and so network evaluations, of students whose guidance alone is distilled; their teacher takes half."""
MANY = 100
"""Steps of the teacher's ODE that few-step students are held against."""
NEAR = 1.2
FEW = ("lcm", "progressive", "sid", "w-embedding")
"""What `--quick` trains where no recipes are named: one of each way of being sampled, one of distribution matching."""

SETTINGS = {
    "order": 2, "points": 24, "pair_steps": 200, "pairs": 16384, "start_steps": 64, "difference": 0.005,
    "guidance_high": 2.0, "gap_mean": -1.0, "adaptive": 0.0, "told": True,
    "normalised": False,
}  # fmt: skip
"""What two dimensions need and pictures can do without. Solvers are of second order or of many steps, since 50 of first
order leave as much error by themselves as is allowed, and this teacher costs little. So a grid does with fewer points,
and a student has fewer links to carry its end through. Derivatives are by differences, as a forward derivative of so
small a network costs ten of its evaluations. Scores are compared at lower levels, as these modes are a tenth of the
data wide. No adaptive weight: the length of an error tells here which datum was drawn, as it does not among the many
numbers of a picture, and the weighted mean over data is another than the mean; nor is a score identity divided by the
mean of two numbers. Few-step SiD's fake is told the step."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is the same for every recipe. points: of each class, to measure on. guidance: of recipes that take it in.
    settings: further ones, of all recipes that have them."""

    budget: PlaneBudget
    points: int = 4096
    guidance: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=lambda: dict(SETTINGS))
    seed: int = 0


FULL = Setup(budget=PlaneBudget())
QUICK = Setup(budget=PlaneBudget(steps=400, start_steps=800, batch=256, pairs=4096), points=1024)


def on_plane(name: str, setup: Setup) -> Recipe:
    """The recipe with the benchmark's settings, where it has them, but one about guidance as it is."""
    from ..recipes.registry import find_recipe

    function = find_recipe(name)
    recipe = function()
    if recipe.family == "guidance":
        return recipe
    known = inspect.signature(function).parameters
    scales = dict.fromkeys(("guidance", "guidance_low", "guidance_default"), setup.guidance)
    wanted = {**setup.settings, **scales}
    return function(**{key: value for key, value in wanted.items() if key in known})


def counts_of(recipe: Recipe) -> tuple[int, ...]:
    """The step counts at which a recipe is measured, where its student has them."""
    return EVALUATIONS if recipe.family == "guidance" else STEPS


def listed(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(recipes to train, recipe -> why the plane is not for it). All registered ones where none are named.

    Errors: `RecipeError` for an unknown name, and for a named one that does not fit.
    """
    from ..plane.run import check_fits
    from ..recipes.registry import RECIPES, find_recipe

    chosen, left_out = [], {}
    for name in names or RECIPES:
        try:
            check_fits(find_recipe(name)())
            chosen.append(name)
        except FewstepError as error:
            if names:
                raise
            left_out[name] = str(error)
    return chosen, left_out


def key_of(name: str, setup: Setup) -> str:
    """A digest of everything that a recipe's result follows from, but the code; a new part's default changes none."""
    return _digest({"recipe": describe(on_plane(name, setup), whole=False), "setup": _measured(setup)})


def _measured(setup: Setup) -> Any:
    """The setup without the recipes' settings: a recipe as it is here says which of them it has, a teacher has none."""
    return describe(replace(setup, settings={}))


def _digest(said: Any) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def measure(name: str, setup: Setup, folder: Path) -> dict[str, Any]:
    """One recipe's row: trained and measured, or read back where its key is the same. Also keeps a few points of it."""
    import torch

    from ..distribution.adaptation import learns_adapted
    from ..plane.plane import CLASSES, conditions, plane
    from ..plane.run import run_recipe, sample_points, sampling_scale
    from ..plane.scores import score
    from ..plane.sources import MOVED, moved_plane

    file, key = _row_file(name, folder), key_of(name, setup)
    if (kept := _read(file, key)) is not None:
        return kept
    recipe, data = on_plane(name, setup), plane()
    trained = run_recipe(recipe, data, _start(setup, folder), setup.budget)
    labels = torch.arange(CLASSES).repeat_interleave(setup.points)
    cond, uncond = conditions(labels)
    w = sampling_scale(recipe)
    labels, aim = aimed_at(recipe, labels, _reference(setup, w, folder))
    if learns_adapted(recipe):
        data, aim = moved_plane(data), aim + torch.tensor(MOVED, dtype=aim.dtype)
    scores, shown = {}, {}
    for steps in (n for n in counts_of(recipe) if n in trained.spec.grids):
        points = sample_points(trained, cond, uncond, steps, seed=setup.seed + 5)
        scores[str(steps)] = asdict(score(data, points, aim, labels))
        shown[str(steps)] = points[:: max(1, setup.points // 150)].float().tolist()
    row = {
        "key": key, "recipe": name, "family": recipe.family, "paper": recipe.paper, "guidance": w,
        "evaluations_per_step": per_step(w) if trained.spec.guidance.mode == "cfg" else 1,
        "seconds": round(trained.seconds, 1), "student_evaluations": trained.count.student,
        "teacher_evaluations": trained.count.teacher, "steps": scores, "points": shown,
    }  # fmt: skip
    if recipe.reward is not None:
        row["reward"] = reward_cells(recipe, data, trained, aim, labels, setup.seed + 5)
    return _write(file, row)


def aimed_at(recipe: Recipe, labels: Any, aim: Any) -> tuple[Any, Any]:
    """The classes that the student should give where `labels` are asked for, and points of these: others than asked
    where a recipe forgets one."""
    from ..plane.sources import meant

    given = meant(recipe.stages[-1].forget, labels)
    aim = aim.clone()
    for c in given[given != labels].unique():
        aim[(given == c) & (labels != c)] = aim[labels == c]
    return given, aim


def reward_cells(recipe: Recipe, data: Any, trained: Any, aim: Any, labels: Any, seed: int) -> dict[str, Any]:
    """The mean reward of what is aimed at, and per step count of the student, with its distance; the same of the
    student that was tuned, where the recipe tuned one."""
    from dataclasses import replace

    from ..plane.plane import conditions
    from ..plane.rewards import plane_reward
    from ..plane.run import sample_points
    from ..plane.scores import score

    judge, (cond, uncond) = plane_reward(recipe.reward or "", data), conditions(labels)

    def cells(student: Any) -> dict[str, dict[str, float]]:
        found = {}
        for steps in (n for n in counts_of(recipe) if n in trained.spec.grids):
            points = sample_points(student, cond, uncond, steps, seed=seed)
            mean = float(judge(points, cond).mean())
            found[str(steps)] = {"reward": mean, "swd": score(data, points, aim, labels).swd}
        return found

    before = {} if trained.before is None else cells(replace(trained, net=trained.before.eval()))
    return {"aim": float(judge(aim, cond).mean()), "before": before, "after": cells(trained)}


def teacher_row(w: float, setup: Setup, folder: Path) -> dict[str, Any]:
    """The teacher's own ODE at few step counts and at many, and two draws of what is aimed at."""
    import torch

    from ..plane.plane import CLASSES, plane, reference_points, teacher_points
    from ..plane.scores import score

    counts = sorted({*STEPS, *(n // per_step(w) for n in EVALUATIONS), MANY})
    key = _digest([_measured(setup), w, counts])
    file = folder / f"teacher-{w:g}.json"
    if (kept := _read(file, key)) is not None:
        return kept
    data, labels = plane(), torch.arange(CLASSES).repeat_interleave(setup.points)
    aim = _reference(setup, w, folder)
    scores, shown = {}, {}
    for steps in counts:
        points = teacher_points(data, labels, w, steps, seed=setup.seed + 5)
        scores[str(steps)] = asdict(score(data, points, aim, labels))
        shown[str(steps)] = points[:: max(1, setup.points // 150)].float().tolist()
    again = reference_points(data, labels, w, seed=setup.seed + 2)
    scores["reference"] = asdict(score(data, again, aim, labels))
    return _write(file, {"key": key, "guidance": w, "steps": scores, "points": shown})


def compare(names: Sequence[str], setup: Setup, folder: Path, *, jobs: int = 1) -> dict[str, Any]:
    """The report as plain JSON; its `run` says what this call trained, in how long. Errors: `RecipeError`,
    `TrainingDiverged`."""
    from tqdm import tqdm

    begun = time.perf_counter()
    chosen, left_out = listed(names)
    anew = [name for name in chosen if _read(_row_file(name, folder), key_of(name, setup)) is None]
    folder.mkdir(parents=True, exist_ok=True)
    _start(setup, folder)
    scales = sorted({_scale(name, setup) for name in chosen})
    teachers = {f"{w:g}": teacher_row(w, setup, folder) for w in scales}
    rows = []
    with tqdm(total=len(chosen), desc="recipes", unit="recipe", dynamic_ncols=True) as bar:
        for row in _each(chosen, setup, folder, jobs):
            bar.set_postfix_str(row["recipe"])
            bar.update()
            rows.append(row)
    for row in rows:
        row["against"] = _against(row, teachers[f"{row['guidance']:g}"])
    order = {name: k for k, name in enumerate(chosen)}
    run = {"trained": len(anew), "kept": len(chosen) - len(anew), "jobs": jobs}
    return {
        "machine": machine_facts(), "setup": describe(setup), "teacher": teachers,
        "run": {**run, "minutes": round((time.perf_counter() - begun) / 60, 1)},
        "rows": sorted(rows, key=lambda row: order[row["recipe"]]), "left_out": left_out,
    }  # fmt: skip


def _each(chosen: Sequence[str], setup: Setup, folder: Path, jobs: int) -> Any:
    if jobs == 1:
        yield from (measure(name, setup, folder) for name in chosen)
        return
    with _pool(jobs) as pool:
        yield from pool.map(measure, chosen, [setup] * len(chosen), [folder] * len(chosen))


def _pool(jobs: int) -> ProcessPoolExecutor:
    """Processes that share the cores: each would take all of them otherwise, and wait for the others at every step."""
    import multiprocessing

    import torch

    own, spawn = max(1, torch.get_num_threads() // jobs), multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(own,))


def per_step(w: float) -> int:
    """Network evaluations of one step of a teacher guided at w."""
    return 1 if w == 1.0 else 2


def _against(row: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, dict[str, float | bool]]:
    """Per step count: the distance over the teacher's at as many evaluations, and over its distance at many steps."""
    many = teacher["steps"][str(MANY)]["swd"]
    found = {}
    for steps, scores in row["steps"].items():
        as_many = max(1, int(steps) * row["evaluations_per_step"] // per_step(row["guidance"]))
        same = scores["swd"] / teacher["steps"][str(as_many)]["swd"]
        found[steps] = {
            "of_same": round(same, 4), "of_many": round(scores["swd"] / many, 4), "better": same < 1.0,
            "near": scores["swd"] <= NEAR * many,
        }  # fmt: skip
    return found


def _scale(name: str, setup: Setup) -> float:
    from ..plane.run import sampling_scale

    return sampling_scale(on_plane(name, setup))


def _start(setup: Setup, folder: Path) -> Any:
    """The network that students start from, fitted once per budget."""
    from fewstep.models.paths import VP

    from ..plane.net import PlaneNet
    from ..plane.plane import plane
    from ..plane.run import fit_start

    budget = setup.budget
    file = folder / f"start-{budget.start_steps}-{budget.batch}-{budget.seed}.safetensors"
    from safetensors.torch import load_model, save

    if file.is_file():
        net = PlaneNet(VP())
        load_model(net, file)
        return net
    net = fit_start(plane(), budget)
    write_whole(file, save(net.state_dict()))
    return net


def _reference(setup: Setup, w: float, folder: Path) -> Any:
    """Points to compare with, kept as they take seconds to draw."""
    import torch
    from safetensors.torch import load_file, save

    from ..plane.plane import CLASSES, plane, reference_points

    file = folder / f"reference-{w:g}-{setup.points}-{setup.seed}.safetensors"
    if not file.is_file():
        labels = torch.arange(CLASSES).repeat_interleave(setup.points)
        write_whole(file, save({"points": reference_points(plane(), labels, w, seed=setup.seed + 1)}))
    return load_file(file)["points"]


def _row_file(name: str, folder: Path) -> Path:
    return folder / "recipes" / f"{name}.json"


def _read(file: Path, key: str) -> dict[str, Any] | None:
    try:
        row = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return row if row.get("key") == key else None


def _write(file: Path, row: dict[str, Any]) -> dict[str, Any]:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(row).encode())
    return row


def command(argv: list[str]) -> int:
    """`fewstep bench recipes [NAME ...]`."""
    parser = argparse.ArgumentParser(
        prog="fewstep bench recipes",
        description="Train recipes on one two-dimensional teacher with one budget, and compare them at 1, 2, 4 steps.",
        epilog="example: fewstep bench recipes lcm progressive --out build/recipes",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes; all that fit the plane where none are named")
    parser.add_argument("--out", default="build/recipes", help="folder of results, table and picture (%(default)s)")
    parser.add_argument("--budget", type=read_count, metavar="STEPS", help="optimiser steps of each recipe")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small budget, and only a few recipes where none are named; fails where one is worse than its teacher",
    )
    parser.add_argument("--seed", type=int, default=0, help="of networks, draws and samples (%(default)s)")
    parser.add_argument("--jobs", type=read_count, default=1, help="recipes trained at a time (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")
    args = parser.parse_args(argv)

    from dataclasses import replace

    from .recipes_report import draw_samples, markdown

    setup = QUICK if args.quick else FULL
    steps = setup.budget.steps if args.budget is None else args.budget
    setup = replace(setup, seed=args.seed, budget=replace(setup.budget, steps=steps, seed=args.seed))
    folder = Path(args.out)
    report = compare(args.names or (FEW if args.quick else ()), setup, folder, jobs=args.jobs)
    draw_samples(report, folder / "recipes.png")
    plain = {**report, "rows": [{k: v for k, v in row.items() if k != "points"} for row in report["rows"]]}
    plain["teacher"] = {w: {"steps": row["steps"]} for w, row in report["teacher"].items()}
    (folder / "recipes.json").write_text(json.dumps(plain, indent=1) + "\n")
    table = markdown(plain)
    (folder / "recipes.md").write_text(table)
    if args.json:
        json.dump(plain, sys.stdout, indent=1)
        print()
    else:
        print(table)
        print(f"wrote {folder}/recipes.md, .json and .png")
    if args.quick and (found := worse(plain)):
        print(f"worse than the teacher's own ODE at their fewest steps: {', '.join(found)}", file=sys.stderr)
        return 1
    return 0


def worse(report: Mapping[str, Any]) -> list[str]:
    """Recipes whose student at its fewest steps is farther off than the teacher's ODE of as many evaluations: there
    the ODE is at its worst, so even a short training must beat it."""
    return [row["recipe"] for row in report["rows"] if not row["against"][min(row["against"], key=int)]["better"]]

"""`fewstep bench scenes`: recipes trained on the built-in teacher with one budget, and how good their students are.

Each recipe is distilled as `fewstep distill` does it, with the same optimiser steps, batch, seed and teacher; what is
measured is what `fewstep bench quality` measures. A run can be broken off: recipes that are done are read back, one
that was under way goes on from its checkpoint.
"""

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.models.arguments import read_count, read_output
from fewstep.models.bundle import Bundle, load_bundle
from fewstep.models.files import write_whole
from fewstep.runtime.engines.measurement import machine_facts

from ..errors import RecipeError
from ..pictures import quality
from ..pictures.quality import STUDENT_STEPS, TEACHER_STEPS, PromptSet, measure_bundle, measure_data, table
from ..recipes.recipe import Recipe, Stage, configure, describe
from ..recipes.registry import find_recipe
from ..runs.folders import run_folder

if TYPE_CHECKING:
    from ..pictures.data import Latents

FLAGSHIPS = ("lcm", "tcd", "pcm", "scm", "rf++", "instaflow", "anyflow", "meanflow", "imm", "sana-sprint")


@dataclass(frozen=True, kw_only=True)
class SceneBudget:
    """What every recipe gets. steps: optimiser steps, shared by a recipe's stages in proportion to what they ask for.
    prompts: how many captions the figures are over. pairs: the most samples with their noise that a stage may draw of
    its teacher beforehand."""

    steps: int = 3000
    batch: int = 64
    prompts: int = 256
    pairs: int = 8192
    seed: int = 0


def budgeted(name: str, budget: SceneBudget) -> Recipe:
    """A registered recipe with this budget in place of its own.

    Errors: `RecipeError` for an unknown recipe, or one whose students are sampled as their teacher.
    """
    recipe = configure(find_recipe(name), {"batch": budget.batch, "seed": budget.seed})
    if recipe.sampling is None:
        raise RecipeError(
            f"{name} sells students that are sampled as their teacher; `fewstep bench compression` has them"
        )
    asked = sum(stage.steps for stage in recipe.stages)

    def cut(stage: Stage) -> Stage:
        pairs = stage.pairs and replace(stage.pairs, count=min(stage.pairs.count, budget.pairs))
        return replace(stage, steps=max(1, round(budget.steps * stage.steps / asked)), pairs=pairs)

    return replace(recipe, stages=tuple(cut(stage) for stage in recipe.stages))


def bench_scenes(
    names: Sequence[str], teacher: Bundle, out: Path, budget: SceneBudget, *, device: str | None = None,
    data: "Latents | None" = None, save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The report: the teacher's rows, and every recipe's. save: called with it after each recipe.

    Errors: those of `distill`.
    """
    prompt_set = quality.draw_prompts(budget.prompts, budget.seed)
    report: dict[str, Any] = {
        "teacher": teacher.name,
        "budget": asdict(budget),
        "machine": machine_facts(),
        "data": {name: round(value, 4) for name, value in asdict(measure_data(prompt_set)).items()},
        "teacher_rows": [_row(teacher, None, count, prompt_set) for count in TEACHER_STEPS],
        "rows": [],
    }
    drawn = cache(lambda: data or _data(teacher, budget, out))
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        report["rows"] += trained(name, teacher, out, budget, prompt_set, device=device, data=drawn)
        if save is not None:
            save(report)
    return report


def trained(
    name: str, teacher: Bundle, out: Path, budget: SceneBudget, prompt_set: PromptSet, *, data: "Callable[[], Latents]",
    device: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One recipe's rows, read back from `out` where they are of the same recipe, teacher and budget.

    data: draws what all recipes train on; asked for only where one trains.
    """
    from ..runs.distill import distill

    recipe = budgeted(name, budget)
    said = json.dumps([describe(recipe, whole=False), asdict(budget), teacher.weights_digest], sort_keys=True)
    key = hashlib.sha256(said.encode()).hexdigest()
    kept = out / f"{name}-{key[:12]}.json"
    if kept.is_file():
        rows: list[dict[str, Any]] = json.loads(kept.read_text())
        return rows
    root = out / f"{name}-{key[:12]}"
    run, begun_s = run_folder(root), time.perf_counter()
    whole = not (root.exists() or run.exists())  # else part of its time was spent before
    student = load_bundle(root) if (root / "bundle.json").is_file() else distill(
        recipe, teacher, root, resume=run.is_dir(), device=device, data=data()
    )  # fmt: skip
    seconds = round(time.perf_counter() - begun_s, 1) if whole else None
    counts = [count for count in STUDENT_STEPS if student.spec.allows(count)]
    rows = [{**_row(student, name, count, prompt_set), "train_seconds": seconds} for count in counts]
    write_whole(kept, (json.dumps(rows, indent=1) + "\n").encode())
    return rows


def _data(teacher: Bundle, budget: SceneBudget, out: Path) -> "Latents":
    """The same encoded scenes for every recipe, kept beside the results."""
    from ..runs.settling import training_data

    kept = str(out / f"latents-{teacher.weights_digest[:12]}-{budget.seed}.safetensors")
    recipe = budgeted("lcm", budget)
    return training_data(replace(recipe, run=replace(recipe.run, latents=kept)), teacher)


def _row(bundle: Bundle, recipe: str | None, steps: int, prompt_set: PromptSet) -> dict[str, Any]:
    measured = measure_bundle(bundle, steps, prompt_set)
    about = {"model": bundle.name} if recipe is None else {"model": recipe, "recipe": recipe}
    return {**about, **asdict(measured.row), "strict": measured.strict, "seconds": measured.seconds}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a table: real scenes and the teacher first."""
    real = {"model": "real scenes", "steps": "", "nfe": "", "guidance": "", **report["data"]}
    return table([real, *report["teacher_rows"], *report["rows"]])


def command(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 2 wrong use."""
    budget = SceneBudget()
    parser = argparse.ArgumentParser(
        prog="fewstep bench scenes",
        description="Recipes trained on the built-in teacher with one budget; Frechet distance, compliance, diversity.",
        epilog="example: fewstep bench scenes lcm imm --steps 3000 --out build/scenes --json docs/recipes/scenes.json",
    )
    parser.add_argument("recipes", nargs="*", help=f"which ones ({', '.join(FLAGSHIPS)})")
    parser.add_argument("--teacher", default="scenes-teacher", metavar="DIR", help="the teacher (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/scenes"), help="students and results (%(default)s)")
    for name, about in (
        ("steps", "optimiser steps of each"),
        ("batch", "pictures per step"),
        ("prompts", "captions"),
        ("pairs", "samples drawn of a teacher"),
    ):
        usual = getattr(budget, name)
        parser.add_argument(f"--{name}", type=read_count, default=usual, help=f"{about} (%(default)s)")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--json", type=read_output, metavar="F", help="write the report here, after every recipe")
    args = parser.parse_args(argv)
    names = args.recipes or FLAGSHIPS
    budget = SceneBudget(steps=args.steps, batch=args.batch, prompts=args.prompts, pairs=args.pairs)
    for name in names:  # said before hours of work
        budgeted(name, budget)
    said = shlex.join(["fewstep", "bench", "scenes", *argv])

    def save(report: dict[str, Any]) -> None:
        report["command"] = said
        if args.json is not None:
            write_whole(args.json, (json.dumps(report, indent=1) + "\n").encode())

    args.out.mkdir(parents=True, exist_ok=True)
    report = bench_scenes(names, load_bundle(args.teacher), args.out, budget, device=args.device, save=save)
    print(markdown(report))
    return 0

"""`fewstep recipes --methods docs/methods.md`: every recipe with its parts, its evidence and what its paper reports.

Nothing here is typed twice: parts come from the `Recipe` value, the text and what stayed unverified from its function's
docstring, the oracle's verdict from the evidence, quality from the results that `fewstep bench` wrote.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ..evidence import ROOMS, read_evidence
from ..recipes.recipe import Recipe, RecipeFunction, is_given
from .headlines import HEADLINES

RESULTS = ROOMS / "docs" / "recipes"
"""Where results are committed: plane.json of `fewstep bench recipes`, scenes.json of `fewstep bench quality --json`."""
UNVERIFIED = "Unverified: "


def plane_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Recipe -> step count -> distance, its share of the teacher's at as many evaluations, and whether it is near the
    teacher's 100 steps; empty where nothing was measured.

    A row of other settings than the recipe has now is left out.
    """
    from .recipes import FULL, key_of

    report = _read(folder / "plane.json")
    return {
        row["recipe"]: {
            n: {"swd": score["swd"], **{k: row["against"][n][k] for k in ("of_same", "near")}}
            for n, score in row["steps"].items()
        }
        for row in report.get("rows", ())
        if row.get("key") == _key(row["recipe"], lambda name: key_of(name, FULL))
    }


def scenes_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Recipe -> step count -> Frechet distance, compliance, diversity on the built-in scenes: the shipped student's, or
    what scenes.json has of it."""
    from ..recipes.registry import RECIPES
    from .commands import shipped_quality

    found: dict[str, dict[str, Any]] = {}
    for row in _read(folder / "scenes.json").get("rows", ()):
        if row.get("recipe") in RECIPES:
            found.setdefault(row["recipe"], {})[str(row["steps"])] = row
    return {name: rows for name in RECIPES if (rows := shipped_quality(name) or found.get(name, {}))}


def unverified(function: RecipeFunction) -> str | None:
    """What of a recipe no source could settle, and how it was decided: its docstring from "Unverified: " on."""
    text = " ".join((inspect.getdoc(function) or "").split())
    return text.partition(UNVERIFIED)[2] or None


def parts(value: Any) -> str:
    """A part as its constructor would be written, without what is as by default."""
    if is_dataclass(value) and not isinstance(value, type):
        held = ((f, getattr(value, f.name)) for f in fields(value))
        given = [f"{f.name}={parts(item)}" for f, item in held if is_given(f, item)]
        return f"{type(value).__name__}({', '.join(given)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {parts(item)}' for name, item in value.items())}}}"
    if isinstance(value, tuple):
        return f"({', '.join(parts(item) for item in value)})"
    if isinstance(value, float):
        return f"{value:g}"
    return str(getattr(value, "__name__", value))


def needs(recipe: Recipe) -> str:
    """What it learns from: a teacher or weights to start from, pictures or prompts alone, pairs drawn beforehand."""
    start = "random weights" if recipe.stages[0].start == "noise" else "a denoiser to start from"
    found = ["a teacher" if recipe.needs.teacher else start]
    found.append("pictures" if recipe.needs.data else "prompts")
    if pairs := max((stage.pairs.count for stage in recipe.stages if stage.pairs is not None), default=0):
        found.append(f"{pairs} pairs that the teacher draws")
    if recipe.needs.critic:
        found.append("a critic")
    return ", ".join(found)


def memory(recipe: Recipe) -> float:
    """Float32 copies of the denoiser's weights that training holds: weights, averages, and of what trains a gradient
    and two moments; of LoRA, adapters and single layers, next to nothing. Activations come on top."""
    return max(_copies(recipe, stage) for stage in recipe.stages)


def _copies(recipe: Recipe, stage: Any) -> float:
    plan = recipe.student
    small = any((plan.lora_rank, plan.adapter_width, plan.negative, plan.runs, plan.probe))
    held = 1.0 if "teacher" in stage.objective.roles else 0.0
    for name in stage.objective.players:
        trained = 0.0 if small and name == "student" else 3.0
        held += 1.0 + len(stage.player_settings[name].ema) + trained
    return held


def methods_page() -> str:
    """The whole page."""
    from ..recipes.registry import RECIPES

    recipes = {name: (function, function()) for name, function in RECIPES.items()}
    rows = evidence_of(recipes)
    lines = [*HEAD, *_overview(recipes, rows)]
    for family in dict.fromkeys(recipe.family for _, recipe in recipes.values()):
        lines += ["", f"## {family}"]
        for name, (function, recipe) in recipes.items():
            if recipe.family == family:
                lines += ["", *_section(name, function, recipe, rows[name])]
    return "\n".join(lines) + "\n"


def evidence_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Recipe -> oracle: "passed", "failed" or "none"; checks: how many passed; plane, scenes: figures by step count."""
    proven = (read_evidence("oracle") or {}).get("recipes", {})
    plane, scenes = plane_results(), scenes_results()
    return {
        name: {
            "oracle": proven.get(name, {}).get("status", "none"),
            "checks": sum(check["passed"] for check in proven.get(name, {}).get("checks", ())),
            "plane": plane.get(name, {}),
            "scenes": scenes.get(name, {}),
        }
        for name in names
    }


HEAD = (
    "# Methods",
    "",
    "Written by `fewstep recipes --methods docs/methods.md`; the equations are in [docs/recipes](recipes/README.md).",
    "",
    "- **Oracle**: closed-form checks passed (`python -m fewstep.trainers.oracle`).",
    "- **Plane**: sliced Wasserstein distance of `fewstep bench recipes` at each count of network evaluations, and in",
    "  brackets its share of the teacher's own ODE at as many; `*` where it is within 1.2 of that ODE at 100 steps.",
    "- **Scenes**: Frechet distance / compliance / diversity of the built-in family's student at each step count.",
    "- **Memory**: float32 copies of the denoiser's weights that training holds; a gradient and two moments are three.",
    "- **Paper**: what its authors report, FID at 1 / 2 steps unless said: other data, other networks, other budgets.",
    "",
)


def _overview(recipes: Mapping[str, tuple[RecipeFunction, Recipe]], rows: Mapping[str, Any]) -> Iterator[str]:
    head = ("recipe", "family", "steps", "needs", "memory", "oracle", "plane", "scenes", "paper", "unverified")
    yield _line(head)
    yield _line(["---"] * len(head))
    for name, (function, recipe) in recipes.items():
        row = rows[name]
        yield _line((
            f"[{name}](#{_anchor(name)})", recipe.family, _steps(recipe), needs(recipe), f"{memory(recipe):g}",
            row["oracle"], plane_cell(row["plane"]), scenes_cell(row["scenes"]), HEADLINES.get(name, "-"),
            "yes" if unverified(function) else "-",
        ))  # fmt: skip


def _section(name: str, function: RecipeFunction, recipe: Recipe, row: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {name}"
    yield ""
    yield _linked(recipe.paper)
    yield ""
    yield re.sub(r"\s*\n(?=\S)", " ", inspect.getdoc(function) or "").replace(UNVERIFIED, f"**{UNVERIFIED.strip()}** ")
    yield ""
    for stage in recipe.stages:
        label = "" if len(recipe.stages) == 1 else f", stage {stage.name}"
        yield f"- Loss{label}: `{parts(stage.objective)}`"
    yield f"- Student: `{parts(recipe.student)}`"
    yield f"- Sampler: `{parts(recipe.sampling)}`" if recipe.sampling is not None else "- Sampler: its teacher's"
    plural = "s" if len(recipe.stages) > 1 else ""
    total = sum(stage.steps for stage in recipe.stages)
    asked = f"{needs(recipe)}; {memory(recipe):g} copies of the weights"
    yield f"- Needs {asked}; {total} steps in {len(recipe.stages)} stage{plural}."
    yield f"- Oracle: {row['oracle']}, {row['checks']} checks."
    yield f"- Plane: {plane_cell(row['plane'])}. Scenes: {scenes_cell(row['scenes'])}."
    yield f"- The paper: {HEADLINES.get(name, 'no figure was at hand')}."


def plane_cell(found: Mapping[str, Any]) -> str:
    """Step counts with distance, share of the teacher's, and a star where it is near the teacher's 100 steps."""
    cells = [f"{n}: {one['swd']:.3f} ({one['of_same']:.2f}){'*' if one['near'] else ''}" for n, one in found.items()]
    return "; ".join(cells) or "-"


def scenes_cell(found: Mapping[str, Any]) -> str:
    cells = [
        f"{n}: {one['frechet']:.2f} / {one['compliance']:.2f} / {one['diversity']:.2f}" for n, one in found.items()
    ]
    return "; ".join(cells) or "-"


def _steps(recipe: Recipe) -> str:
    return " ".join(map(str, recipe.steps)) or "as teacher"


def _linked(paper: str) -> str:
    """The paper, its arXiv number a link."""
    return re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper) + "."


def _anchor(name: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^a-z0-9-]", "", name)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _key(name: str, key_of: Callable[[str], str]) -> str | None:
    from ..recipes.registry import RECIPES

    return key_of(name) if name in RECIPES else None


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    return found

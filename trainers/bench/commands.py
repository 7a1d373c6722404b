"""The trainers' commands: `fewstep distill` and `fewstep recipes`."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def distill(argv: list[str]) -> int:
    """`fewstep distill RECIPE --teacher DIR --out DIR`, also under torchrun."""
    parser = argparse.ArgumentParser(
        prog="fewstep distill",
        description="Distil a teacher bundle into a few-step student bundle.",
        epilog="example: fewstep distill lcm --teacher scenes-teacher --out runs/lcm --minutes 10 --set lr=2e-4",
    )
    parser.add_argument("recipe", help="which recipe; `fewstep recipes` lists them")
    parser.add_argument("--teacher", default="scenes-teacher", help="bundle folder or shipped name (%(default)s)")
    parser.add_argument("--out", help="folder of the student bundle; the run is kept beside it in OUT.run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; repeatable")
    parser.add_argument("--steps", type=int, help="training steps (of each stage); the same as --set steps=N")
    parser.add_argument("--minutes", type=float, help="stop after this long; alone, train for all of it")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (the best there is)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT.run")
    parser.add_argument("--dry-run", action="store_true", help="print the whole configuration and its memory, and stop")
    args = parser.parse_args(argv)

    from fewstep.models.bundle import load_bundle

    from ..recipes.recipe import configure, describe, parse_setting
    from ..recipes.registry import find_recipe
    from ..runs.budget import estimate, estimated
    from ..runs.distill import distill as run

    settings = dict(parse_setting(text) for text in args.set)
    if args.steps is not None:
        settings["steps"] = args.steps
    elif args.minutes is not None:
        settings.setdefault("steps", UNBOUNDED_STEPS)
    recipe = configure(find_recipe(args.recipe), settings)
    if args.dry_run:
        print(json.dumps({"recipe": describe(recipe), "estimate": estimate(recipe, args.teacher)}, indent=1))
        return 0
    if args.out is None:
        parser.error("--out is needed, unless --dry-run")
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    teacher = load_bundle(args.teacher)
    if first and not args.resume:
        print(estimated(recipe, teacher, int(os.environ.get("WORLD_SIZE", "1"))), file=sys.stderr)
    seconds = None if args.minutes is None else args.minutes * 60
    bundle = run(recipe, teacher, args.out, resume=args.resume, max_seconds=seconds, device=args.device)
    if not first:
        return 0
    steps, spacing = ", ".join(map(str, bundle.spec.steps)), bundle.spec.spacing
    if not steps and spacing is not None:
        steps = f"1 to {spacing.max_steps}"
    print(f"{bundle.root}: {args.recipe} student of {bundle.spec.teacher} for {steps} steps")
    for name in recipe.beside:
        print(f"{bundle.root}-{name}: its {name}")
    for file in sorted(Path(f"{bundle.root}.run").glob("*/outside.json")):
        print(f"outside of what {args.recipe} usually shows, in {file.parent}:")
        print("".join(f"  {text}\n" for text in json.loads(file.read_text()).values()), end="")
    parts = [stage.name for stage in recipe.stages[:-1] if stage.cell is not None]
    for name in parts:
        print(f"{bundle.root}-{name}: the student of {name}")
    if parts:
        print(f"{bundle.root}.group.json: serve them as one with --group")
    return 0


UNBOUNDED_STEPS = 1_000_000
"""Where time alone ends a run."""


def recipes(argv: list[str]) -> int:
    """`fewstep recipes [--json | --methods FILE]`."""
    parser = argparse.ArgumentParser(
        prog="fewstep recipes",
        description="List every recipe: family, paper, needs, step counts, oracle status and measured quality.",
        epilog="example: fewstep recipes --json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--methods", metavar="FILE", help="write the page of all methods to this file instead")
    args = parser.parse_args(argv)
    if args.methods is not None:
        from .methods_page import methods_page

        Path(args.methods).write_text(methods_page())
        print(f"wrote {args.methods}")
        return 0
    rows = recipe_rows()
    if args.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return 0
    head = {
        "name": "recipe",
        "family": "family",
        "steps": "steps",
        "needs": "needs",
        "oracle": "oracle",
        "paper": "paper",
    }
    lines = [head]
    for row in rows:
        needs = ", ".join(name for name, wanted in row["needs"].items() if wanted)
        steps = " ".join(map(str, row["steps"])) or "as teacher"
        lines.append({**row, "needs": needs, "steps": steps})
    widths = {key: 2 + max(len(line[key]) for line in lines) for key in head}
    for line in lines:
        print("".join(f"{line[key]:<{width}}" for key, width in widths.items()).rstrip())
    return 0


def recipe_rows() -> list[dict[str, Any]]:
    """What `fewstep recipes --json` prints."""
    from dataclasses import asdict

    from ..recipes.registry import RECIPES
    from .methods_page import evidence_of, unverified

    found = evidence_of(RECIPES)
    rows = []
    for name, function in RECIPES.items():
        recipe = function()
        rows.append(
            {
                "name": name,
                "family": recipe.family,
                "paper": recipe.paper,
                "needs": asdict(recipe.needs),
                "steps": list(recipe.steps),
                "oracle": found[name]["oracle"],
                "plane": found[name]["plane"],
                "quality": found[name]["scenes"],
                "unverified": unverified(function),
            }
        )
    return rows


def shipped_quality(recipe: str) -> dict[str, Any]:
    """Step count -> measured quality of the shipped student of a recipe; empty where none is shipped or measured."""
    from fewstep.models.bundle import REFERENCE

    found: dict[str, Any] = {}
    for file in sorted(REFERENCE.glob("*/bundle.json")):
        spec = json.loads(file.read_text())["spec"]
        if spec["recipe"] == recipe:
            found |= {str(row["steps"]): {k: v for k, v in row.items() if k != "steps"} for row in spec["quality"]}
    return found

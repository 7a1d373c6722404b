"""What a run may write over: an earlier student and its run, and nothing else."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.models.bundle import Bundle

from ..errors import CheckpointError, RecipeError
from ..loop.checkpoint import has_checkpoint
from ..recipes.recipe import Recipe


def run_folder(out: Path) -> Path:
    """Where a run keeps its configuration, checkpoints, metrics and samples: beside the student it makes."""
    return out.with_name(out.name + ".run")


def check_out(out: Path, *sources: Bundle) -> None:
    """Nothing but an earlier student and its run is ever replaced. sources: the bundles that the run reads.

    Errors: `RecipeError` naming the folder that holds something else.
    """
    for source in sources:
        if out.resolve() == source.root.resolve():
            raise RecipeError(f"{out} is {source.name}, which the run reads; give the student another folder")
    for folder, mark in ((out, "bundle.json"), (run_folder(out), "config.json")):
        if folder.exists() and not (folder / mark).is_file() and (folder.is_file() or any(folder.iterdir())):
            raise RecipeError(f"{folder} exists and holds no {mark}; choose another --out, or empty it")


@contextmanager
def in_place_of(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which takes its place when all went well and is gone when not."""
    beside = out.with_name(out.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        shutil.rmtree(out, ignore_errors=True)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_partners(recipe: Recipe, out: Path) -> None:
    """That `partners` names an earlier run of this recipe, before anything is encoded or that run's folder is emptied.

    Errors: `RecipeError`.
    """
    if recipe.run.partners is None:
        return
    theirs = Path(recipe.run.partners)
    if theirs.resolve() == run_folder(out).resolve():
        raise RecipeError(f"partners is {str(theirs)!r}, which a run to {out} writes anew; choose another --out")
    for stage in recipe.stages:
        if len(stage.objective.players) == 1:
            raise RecipeError(f"partners is set, and in {recipe.name} the student trains alone; leave it out")
        if not has_checkpoint(theirs / stage.name):
            raise RecipeError(
                f"partners is {str(theirs)!r}, which holds no run of {stage.name!r}; name the OUT.run of a student "
                "that the same recipe trained"
            )


def open_run(run: Path, told: Mapping[str, Any], *, resume: bool = False, same: bool = True) -> None:
    """A fresh run folder with the configuration `told` in it, or to resume one there; told the `same`, unless told not.

    Errors: `CheckpointError` where there is nothing to resume, or it was configured otherwise.
    """
    wanted = json.dumps(told, indent=1) + "\n"
    config = run / "config.json"
    if not resume:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
    elif not config.is_file():
        raise CheckpointError(f"{run} holds no run; leave out --resume to start anew")
    elif same and config.read_text() != wanted:
        raise CheckpointError(f"{config} differs from this configuration; repeat its settings, or start anew")
    config.write_text(wanted)

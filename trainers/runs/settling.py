"""What a recipe leaves to its teacher, decided: which runs of a transformer's layers are to be replaced."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fewstep.models.bundle import Bundle
from fewstep.models.networks import as_network

from ..errors import CheckpointError, RecipeError
from ..networks.probing import Probe, find_runs
from ..networks.student import load_denoiser
from ..networks.surgery import Run, replace_runs
from ..parts.times import grid
from ..parts.transitions import noised
from ..pictures.data import Latents, LatentSource, encode_folder, encode_scenes, load_latents, save_latents
from ..pictures.scenes import SIZE
from ..recipes.recipe import Recipe


def training_data(recipe: Recipe, teacher: Bundle, first: int | None = None) -> Latents:
    """The recipe's data, encoded by the teacher; kept in and read from the file `run.latents` where it is named.

    first: only so many of its samples, which are not kept.
    """
    kept = Path(recipe.run.latents) if recipe.run.latents else None
    if kept is not None and kept.exists():
        return load_latents(kept)
    if recipe.run.data is not None:
        data = encode_folder(teacher, Path(recipe.run.data), first=first)
    else:
        if (SIZE, SIZE) not in teacher.spec.sizes:
            print(
                f"note: data is not set, so {recipe.name} learns the built-in scenes of {SIZE}x{SIZE} pixels, which "
                f"{teacher.name!r} does not draw; name a folder with --set data=DIR",
                file=sys.stderr,
            )
        count = recipe.run.scenes if first is None else min(first, recipe.run.scenes)
        data = encode_scenes(teacher, count, seed=recipe.run.seed)
    if kept is not None and first is None:
        save_latents(kept, data)
    return data


def settled(
    recipe: Recipe, teacher: Bundle, data: Latents | None = None, kept: Path | None = None,
    device: torch.device | str = "cpu",
) -> Recipe:  # fmt: skip
    """The recipe with its runs named, found on the first samples of the data where they were not.

    kept: a file that remembers them, so that a resumed run prunes as it did.

    Errors: `RecipeError` for runs that the teacher does not have or where none are found.
    """
    probe = recipe.student.probe
    if probe is None or recipe.student.runs:
        return recipe
    if kept is not None and kept.is_file():
        try:
            runs = tuple(Run.read(text) for text in json.loads(kept.read_text())["runs"])
        except (ValueError, KeyError, TypeError, RecipeError) as error:
            raise CheckpointError(f"{kept} holds no runs ({error}); start anew without --resume") from error
    else:
        runs = choose_runs(teacher, probe, lambda: data or training_data(recipe, teacher, probe.samples), device)
    if kept is not None and not kept.is_file():
        kept.write_text(json.dumps({"runs": [str(run) for run in runs]}) + "\n")
    return replace(recipe, student=replace(recipe.student, runs=runs))


def choose_runs(
    teacher: Bundle, probe: Probe, data: Callable[[], Latents], device: torch.device | str = "cpu"
) -> tuple[Run, ...]:
    """The runs of the teacher's layers, judged on samples of the data noised to several times.

    Errors: `RecipeError`, also for a teacher without a stack of layers, before any data is encoded.
    """
    network, path = load_denoiser(teacher), teacher.spec.path
    replace_runs(network, ())
    found = data()
    source = LatentSource(found, teacher.text_encoder(), probe.samples, spec=teacher.spec, device=device)
    rows = torch.arange(min(probe.samples, len(found)))
    batch = source.gather(torch.stack([rows, torch.zeros_like(rows)], dim=1))
    net = as_network(teacher.family.denoiser(network, False).to(device))
    noise = torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(0)).to(device)

    def answer() -> None:
        for time in grid(path, probe.times).tolist():
            t = torch.full((len(rows),), time, dtype=torch.float64, device=device)
            net(noised(path, batch.x0, t, noise), t, batch.cond)

    return find_runs(network, answer, probe)

"""What a run will hold in memory, from its networks and one small step, without training anything."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep.models.bundle import Bundle, as_bundle

from ..loop.memory import Memory, memory_of
from ..loop.method import Assembled
from ..networks.rewards import with_prompts_for
from ..networks.student import build_student, load_denoiser, merged
from ..pictures.data import LatentSource
from ..recipes.casting import assemble_stage
from ..recipes.recipe import Recipe, Stage
from .control import control_networks, control_source, followed
from .settling import settled, training_data

FEW = 16
"""Samples that are encoded to look at."""


def estimate(recipe: Recipe, teacher: str | Path | Bundle) -> dict[str, Any]:
    """Of the last stage: parameters and bytes per player, what a step adds at its peak, and the sum of all, in bytes.

    Errors: `BundleError` where the teacher cannot be opened; `RecipeError` as when it is trained.
    """
    bundle = as_bundle(teacher)
    recipe = settled(recipe, bundle)
    method, frozen = assembled(recipe, bundle)
    players = {}
    for player in method.players:
        weights, trained = count(player.module), sum(w.numel() for w in player.weights)
        averages = sum(count(average) for average in player.averages.values())
        held = 4 * (weights + averages + 3 * trained)
        players[player.name] = {
            "parameters": weights, "trained": trained, "averages": len(player.averages), "bytes": held,
        }  # fmt: skip
    found = memory_before(recipe, recipe.stages[-1], bundle, method, frozen)
    told = {"teacher_parameters": count(frozen), "players": players, "bytes": found.total}
    told |= {"step_bytes": found.step, "stage_steps": {each.name: each.steps for each in recipe.stages}}
    return told | ({"runs": [str(run) for run in recipe.student.runs]} if recipe.student.runs else {})


def estimated(recipe: Recipe, teacher: str | Path | Bundle, parts: int = 1) -> Memory:
    """What one of `parts` processes with whole weights will hold in the last stage."""
    bundle = as_bundle(teacher)
    recipe = settled(recipe, bundle)
    method, frozen = assembled(recipe, bundle)
    return memory_before(recipe, recipe.stages[-1], bundle, method, frozen, parts)


def assembled(recipe: Recipe, bundle: Bundle) -> tuple[Assembled, Any]:
    """The last stage's method as its run assembles it, and the teacher's network. Errors: those of the run."""
    from .distill import assemble

    stage = recipe.stages[-1]
    if recipe.student.control:
        networks = control_networks(recipe, followed(recipe), bundle, torch.device("cpu"))
        return assemble_stage(networks), networks.alone
    frozen = merged(load_denoiser(bundle))
    learner = build_student(bundle, stage.student or recipe.student, fold_scale=1.0)
    return assemble(recipe, stage, bundle, frozen, learner), frozen


def memory_before(recipe: Recipe, stage: Stage, teacher: Bundle, method: Any, frozen: Any, parts: int = 1) -> Memory:
    """Of an assembled stage, seen on a few samples of its data. parts: processes that share a batch."""
    device = next(method.players[0].module.parameters()).device
    run, few = recipe.run, replace(recipe, run=replace(recipe.run, latents=None, batch=FEW))
    beside: tuple[Any, ...]
    if recipe.student.control:
        source = control_source(few, teacher, device, first=FEW)
        beside = frozen, source
    else:
        data = with_prompts_for(recipe.reward, training_data(few, teacher, first=FEW), teacher)
        text = teacher.text_encoder()
        source = LatentSource(data, text, FEW, seed=run.seed, bf16=run.bf16, device=device, spec=teacher.spec)
        beside = frozen, source, teacher.decoder()  # it draws the run's pictures
    batch = source.batch(0)
    batch = replace(batch, noise=torch.randn_like(batch.x0)) if stage.pairs is not None else batch
    batch = replace(batch, taught=batch.cond) if stage.forget is not None else batch
    rows = run.batch // (run.accumulate * parts)
    return memory_of(method, batch, rows=rows, beside=beside, bf16=run.bf16, seed=run.seed, accumulate=run.accumulate)


def count(network: Any, *, trained: bool = False) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not trained)

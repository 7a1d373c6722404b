"""Train a little and print, as JSON, the memory that was estimated and that the process then held at its peak.

    python tests/measure_memory.py RECIPE BATCH [lora]

What code costs that is loaded on the way is not part of either: the same recipe first trains a tiny network.
"""

import gc
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from fewstep.models.bundle import load_bundle
from fewstep.trainers.loop.loop import LoopSettings, train
from fewstep.trainers.loop.memory import peak_bytes
from fewstep.trainers.networks.student import Student, build_student, load_denoiser
from fewstep.trainers.pictures.data import LatentSource
from fewstep.trainers.recipes.recipe import configure
from fewstep.trainers.recipes.registry import RECIPES
from fewstep.trainers.runs.budget import memory_before
from fewstep.trainers.runs.distill import assemble
from fewstep.trainers.runs.settling import training_data
from tiny import make_tiny_bundle


def held() -> int:
    """Bytes in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run(recipe, teacher, folder):
    """One step of each player; the estimate beforehand."""
    source = LatentSource(training_data(recipe, teacher), teacher.text_encoder(), recipe.run.batch, spec=teacher.spec)
    source.batch(0)
    gc.collect()
    before, stage = held(), recipe.stages[-1]
    learner, frozen = build_student(teacher, recipe.student, fold_scale=1.0), load_denoiser(teacher)
    method = assemble(recipe, stage, teacher, frozen, learner)
    del learner
    estimate = memory_before(recipe, stage, teacher, method, frozen)
    del frozen
    train(method, source, LoopSettings(steps=2, bf16=False, checkpoint_every=0), folder)
    return before, estimate


def main() -> None:
    name, batch, *lora = sys.argv[1:]
    recipe = configure(RECIPES[name], {"bf16": False, "batch": int(batch), "scenes": 16})
    stage = recipe.stages[-1]
    each_step = {who: replace(how, every=1) for who, how in stage.player_settings.items()}
    recipe = replace(recipe, stages=(replace(stage, player_settings=each_step),))
    if lora:
        (stage,) = recipe.stages
        untold = replace(stage, objective=replace(stage.objective, told=False))
        recipe = replace(recipe, student=Student(lora_rank=16), fake=Student(lora_rank=16), stages=(untold,))
    with tempfile.TemporaryDirectory() as folder:
        first = replace(recipe, run=replace(recipe.run, batch=2))
        run(first, make_tiny_bundle(Path(folder) / "tiny"), Path(folder) / "warm")
        before, estimate = run(recipe, load_bundle("scenes-teacher"), Path(folder) / "run")
    estimated = estimate.total - text_bytes()
    peak = peak_bytes(torch.device("cpu")) - before
    print(json.dumps({"estimate": estimated, "peak": peak, "step": estimate.step}))


def text_bytes() -> int:
    """Of the text network, which stood in memory before."""
    return sum(w.nbytes for w in load_bundle("scenes-teacher").text_encoder().parameters())


if __name__ == "__main__":
    main()

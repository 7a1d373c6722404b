"""Train a little and print, as JSON, the memory that was estimated and that the process then held at its peak.

    python tests/measure_memory.py RECIPE BATCH [lora | KEY=VALUE ...]

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
from fewstep.trainers.loop.memory import peak_bytes, weight_bytes
from fewstep.trainers.networks.student import Student
from fewstep.trainers.pictures.data import LatentSource
from fewstep.trainers.recipes.recipe import configure, parse_setting
from fewstep.trainers.recipes.registry import RECIPES
from fewstep.trainers.runs.budget import assembled, memory_before
from fewstep.trainers.runs.control import control_source
from fewstep.trainers.runs.settling import training_data
from tiny import make_tiny_bundle


def held() -> int:
    """Bytes in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run(recipe, teacher, folder):
    """(bytes held before, the estimate's, those of a step) of one step of each player."""
    if recipe.student.control:
        source = control_source(recipe, teacher, torch.device("cpu"))
    else:
        data = training_data(recipe, teacher)
        source = LatentSource(data, teacher.text_encoder(), recipe.run.batch, spec=teacher.spec)
    source.batch(0)
    gc.collect()
    before, stage = held(), recipe.stages[-1]
    method, frozen = assembled(recipe, teacher)
    painter = None if recipe.student.control else teacher.decoder()  # as a run on pictures has one
    estimate = memory_before(recipe, stage, teacher, method, frozen)
    del frozen
    train(method, source, LoopSettings(steps=2, bf16=False, checkpoint_every=0), folder)
    del painter
    return before, estimate.total - weight_bytes(source), estimate.step


def main() -> None:
    name, batch, *more = sys.argv[1:]
    settings = dict(parse_setting(text) for text in more if text != "lora")
    recipe = configure(RECIPES[name], {"bf16": False, "batch": int(batch), "scenes": 16, **settings})
    stage = recipe.stages[-1]
    each_step = {who: replace(how, every=1) for who, how in stage.player_settings.items()}
    recipe = replace(recipe, stages=(replace(stage, player_settings=each_step),))
    if "lora" in more:
        (stage,) = recipe.stages
        untold = replace(stage, objective=replace(stage.objective, told=False))
        recipe = replace(recipe, student=Student(lora_rank=16), fake=Student(lora_rank=16), stages=(untold,))
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_tiny_bundle(Path(folder) / "tiny")
        init = recipe.run.init and str(make_tiny_bundle(Path(folder) / "lcm", kind="lcm").root)
        first = replace(recipe, run=replace(recipe.run, batch=2, init=init))
        run(first, tiny, Path(folder) / "warm")
        before, estimate, step = run(recipe, load_bundle("scenes-teacher"), Path(folder) / "run")
    peak = peak_bytes(torch.device("cpu")) - before
    print(json.dumps({"estimate": estimate, "peak": peak, "step": step}))


if __name__ == "__main__":
    main()

"""What a run will hold in memory, counted from its networks without training anything."""

from pathlib import Path
from typing import Any

from fewstep.models.bundle import load_bundle

from .recipe import Recipe
from .settling import settled
from .student import build_student, fake_of, load_denoiser

BYTES = 4
"""Weights, gradients, optimiser moments and averages are float32."""


def estimate(recipe: Recipe, teacher: str | Path) -> dict[str, Any]:
    """Parameters per player and bytes of weights, gradients, AdamW's two moments and averages; activations come on top.

    Errors: `BundleError` where the teacher cannot be opened.
    """
    bundle = load_bundle(teacher)
    recipe = settled(recipe, bundle)
    teacher_unet = load_denoiser(bundle)
    student = build_student(bundle, recipe.student, fold_scale=1.0)
    stage = recipe.stages[-1]
    networks = {"student": student}
    if "fake" in stage.objective.players:
        from .critics import MIDDLE, FakeWithCritic

        networks["fake"] = FakeWithCritic(
            fake_of(teacher_unet, recipe.fake, bundle.spec.path), _never, recipe.critic or MIDDLE
        )
    total = count(teacher_unet) * BYTES
    players = {}
    for name, network in networks.items():
        averages = len(stage.player_settings[name].ema)
        weights, trained = count(network), count(network, trained=True)
        held = BYTES * (weights * (1 + averages) + 3 * trained)
        players[name] = {"parameters": weights, "trained": trained, "averages": averages, "bytes": held}
        total += held
    steps = {stage.name: stage.steps for stage in recipe.stages}
    found = {"teacher_parameters": count(teacher_unet), "players": players, "bytes": total, "stage_steps": steps}
    return found | ({"runs": [str(run) for run in recipe.student.runs]} if recipe.student.runs else {})


def _never(*asked: Any) -> Any:
    raise TypeError("a network that is counted is not asked")


def count(network: Any, *, trained: bool = False) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not trained)

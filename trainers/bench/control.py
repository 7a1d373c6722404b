"""`fewstep bench control`: a few-step student that follows edges, by ControlNets that came to it in different ways.

Ways: none; the teacher's ControlNet carried over; one trained on the student itself (`control-student`); one by joint
distribution matching (`jdm`). The trained ones begin from the one carried over, and also from a fresh one: where the
first follows already, only the second says whether a method teaches following. All are given the same number of
optimiser steps of the ControlNet. Each is asked for the edges of real scenes with their captions. Agreement is of the
outlines found in its pictures with the asked ones (`trainers.pictures.edges`); diversity is that of `fewstep bench
quality`, in units of real scenes of the captions alone, which edges do not hold in place.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.models.arguments import read_count
from fewstep.models.bundle import Bundle
from fewstep.models.networks import ControlNet, DenoiserNet, as_network
from fewstep.runtime.engines.measurement import machine_facts

from ..pictures import scenes
from ..pictures.compliance import check
from ..pictures.data import to_pixels, tokenize
from ..pictures.diversity import diversity
from ..pictures.edges import agreement
from ..pictures.features import extract, load_features
from ..pictures.preview import sample
from ..pictures.quality import DIVERSITY_PROMPTS, REAL_PER_PROMPT, SEEDS_PER_PROMPT, Pictures
from ..recipes.control import CARRIED, FRESH
from ..recipes.recipe import Recipe, configure
from ..recipes.registry import find_recipe
from ..runs.control import control_start, train_control
from .ways import read_ways

TRAINED = {
    "control-student": ("control-student", CARRIED),
    "jdm": ("jdm", CARRIED),
    "control-student-fresh": ("control-student", FRESH),
    "jdm-fresh": ("jdm", FRESH),
}
"""Way -> its recipe, and where its ControlNet begins."""
WAYS = ("none", "carried", *TRAINED)
TRAIN_STEPS = 100


@dataclass(frozen=True)
class Asked:
    """What every way is asked for: captions, their text features and the edges [N, 3, 64, 64] of scenes of them.

    real: features [Q, seeds, D] of other scenes of the first Q captions, the unit of diversity.
    """

    captions: tuple[scenes.Caption, ...]
    ctx: Tensor
    edges: Tensor
    real: Tensor


@dataclass(frozen=True, kw_only=True)
class ControlRow:
    """trained: optimiser steps of the ControlNet. steps: of sampling. diversity: 1.0 as real scenes of the captions."""

    way: str
    trained: int
    steps: int
    precision: float
    recall: float
    f1: float
    compliance: float
    diversity: float


def asked(bundle: Bundle, count: int, seed: int) -> Asked:
    rng = random.Random(seed)
    drawn = [scenes.sample(rng) for _ in range(count)]
    with torch.no_grad():
        ctx = bundle.text_encoder()(tokenize(bundle.tokenizer, [s.caption.text for s in drawn]).long())
    edges = torch.stack([to_pixels(scenes.edges(s.scene)).add(1.0).div(2.0) for s in drawn])
    few = [s.caption for s in drawn[:DIVERSITY_PROMPTS]]
    alike = [scenes.render(scenes.sample_like(caption, rng)) for caption in few for _ in range(REAL_PER_PROMPT)]
    real = extract(load_features(), np.stack([np.asarray(picture) for picture in alike]))
    return Asked(tuple(s.caption for s in drawn), ctx, edges, real.reshape(len(few), REAL_PER_PROMPT, -1))


def measure(way: str, bundle: Bundle, net: Any, steps: int, wanted: Asked, *, trained: int = 0) -> ControlRow:
    """Sample the bundle under a ControlNet, or without where `net` is None; the first captions by further seeds too."""
    unet, spec, latent = bundle.load("unet").eval(), bundle.spec, bundle.spec.latent
    control = None if net is None else ControlNet(net.eval())
    cond = {"ctx": wanted.ctx} if control is None else {"ctx": wanted.ctx, "edge": wanted.edges}
    side = scenes.SIZE // latent.factor
    network, decoder = as_network(DenoiserNet(unet), control), bundle.decoder()

    def draw(first: int, seed: int) -> Tensor:
        shape, told = (first, latent.channels, side, side), {name: value[:first] for name, value in cond.items()}
        made = sample(network, spec, steps, told, shape, w=spec.guidance.default, seed=seed)
        with torch.no_grad():
            pictures: Tensor = decoder(made)
        return pictures.clamp(-1.0, 1.0)

    pictures, few = draw(len(wanted.captions), 0), len(wanted.real)
    further = [draw(few, seed) for seed in range(1, SEEDS_PER_PROMPT)]
    eye = load_features()
    features = torch.stack([extract(eye, as_bytes(each)) for each in (pictures[:few], *further)], 1)
    met = [check(picture, caption).score for picture, caption in zip(as_bytes(pictures), wanted.captions, strict=True)]
    found = agreement(pictures, wanted.edges)
    return ControlRow(
        way=way, trained=trained, steps=steps, precision=found.precision, recall=found.recall, f1=found.f1,
        compliance=float(np.mean(met)), diversity=diversity(features, wanted.real),
    )  # fmt: skip


def as_bytes(pictures: Tensor) -> Pictures:
    """[N, 3, H, W] in [-1, 1] -> [N, H, W, 3] uint8."""
    return ((pictures + 1.0) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def recipe_of(way: str, changes: dict[str, Any], trained: int) -> Recipe:
    """The recipe of a trained way, so long that the ControlNet is stepped `trained` times. Errors: `RecipeError`."""
    name, start = TRAINED[way]
    settings = {**changes, "start": start}
    every = configure(find_recipe(name), settings).stages[-1].player_settings["student"].every
    return configure(find_recipe(name), {**settings, "steps": trained * every})


def bench(
    student: Bundle, teacher: Bundle, out: Path, ways: Sequence[str], changes: dict[str, Any], prompts: int,
    steps: Sequence[int], trained: int,
) -> dict[str, Any]:  # fmt: skip
    """The report. trained: optimiser steps of each way's ControlNet. Errors: those of `train_control`."""
    wanted, rows, seconds = asked(student, prompts, seed=1), [], {}
    for way in ways:
        net, begun = None if way == "none" else control_start(student, teacher), time.perf_counter()
        if way in TRAINED:
            recipe = recipe_of(way, {"init": str(student.root), **changes}, trained)
            net = train_control(recipe, teacher, out / way).load("controlnet")
            seconds[way] = round(time.perf_counter() - begun, 1)
        own = trained if way in TRAINED else 0
        rows += [asdict(measure(way, student, net, count, wanted, trained=own)) for count in steps]
    return {
        "student": student.name, "prompts": prompts, "machine": machine_facts(), "training_s": seconds, "rows": rows,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    figures = ("precision", "recall", "f1", "compliance", "diversity")
    head = ("ControlNet", "trained", "steps", "precision", "recall", "F1", "compliance", "diversity")
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        found = " | ".join(f"{row[name]:.3f}" for name in figures)
        lines.append(f"| {row['way']} | {row['trained']} | {row['steps']} | {found} |")
    return "\n".join(lines)


def command(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="fewstep bench control",
        description="ControlNets of a few-step student: agreement of outlines with the asked edges, compliance and "
        "diversity.",
        epilog="example: fewstep bench control --out build/control --steps 1,4 --train-steps 150",
    )
    parser.add_argument(
        "--train-steps", type=read_count, default=TRAIN_STEPS,
        help="optimiser steps of each trained ControlNet; a way whose ControlNet is stepped in every second step of "
        "its run takes twice as many (%(default)s)",
    )  # fmt: skip
    steps = (1, 4)
    asked = read_ways(
        argv, parser, WAYS, steps, measured="measure", prompts="scenes to follow", settings="a setting of the recipes"
    )
    args = asked.args
    if fixed := sorted({"steps", "start"} & set(asked.changes)):
        parser.error(f"--set {fixed[0]} is the comparison's own; use --train-steps for steps, --ways for the start")
    found = bench(
        asked.student, asked.teacher, args.out, args.ways, asked.changes, args.prompts, args.steps, args.train_steps
    )
    print(table(found["rows"]))
    asked.keep(found)
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))

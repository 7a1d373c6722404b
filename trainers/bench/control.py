"""`fewstep bench control`: a few-step student that follows edges, by ControlNets that came to it in different ways.

Ways: none; the teacher's ControlNet carried over; one trained on the student itself (`control-student`); one by joint
distribution matching (`jdm`). Each is asked for the edges of real scenes with their captions. Agreement is of the
outlines found in its pictures with the asked ones (`trainers.pictures.edges`).
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.models.bundle import Bundle
from fewstep.models.networks import ControlNet, DenoiserNet, as_network
from fewstep.runtime.engines.measurement import machine_facts

from ..pictures import scenes
from ..pictures.compliance import check
from ..pictures.data import to_pixels, tokenize
from ..pictures.edges import agreement
from ..pictures.preview import sample
from ..recipes.recipe import configure
from ..recipes.registry import find_recipe
from ..runs.control import control_start, train_control
from .ways import read_ways

WAYS = ("none", "carried", "control-student", "jdm")
TRAINED = ("control-student", "jdm")


@dataclass(frozen=True)
class Asked:
    """What every way is asked for: captions, their text features and the edges [N, 3, 64, 64] of scenes of them."""

    captions: tuple[scenes.Caption, ...]
    ctx: Tensor
    edges: Tensor


@dataclass(frozen=True, kw_only=True)
class ControlRow:
    way: str
    steps: int
    precision: float
    recall: float
    f1: float
    compliance: float


def asked(bundle: Bundle, count: int, seed: int) -> Asked:
    rng = random.Random(seed)
    drawn = [scenes.sample(rng) for _ in range(count)]
    with torch.no_grad():
        ctx = bundle.text_encoder()(tokenize(bundle.tokenizer, [s.caption.text for s in drawn]).long())
    edges = torch.stack([to_pixels(scenes.edges(s.scene)).add(1.0).div(2.0) for s in drawn])
    return Asked(tuple(s.caption for s in drawn), ctx, edges)


def measure(way: str, bundle: Bundle, net: Any, steps: int, wanted: Asked, seed: int = 0) -> ControlRow:
    """Sample the bundle under a ControlNet, or without where `net` is None."""
    unet, spec, latent = bundle.load("unet").eval(), bundle.spec, bundle.spec.latent
    control = None if net is None else ControlNet(net.eval())
    cond = {"ctx": wanted.ctx} if control is None else {"ctx": wanted.ctx, "edge": wanted.edges}
    side = scenes.SIZE // latent.factor
    shape = (len(wanted.captions), latent.channels, side, side)
    made = sample(as_network(DenoiserNet(unet), control), spec, steps, cond, shape, w=spec.guidance.default, seed=seed)
    with torch.no_grad():
        pictures = bundle.decoder()(made).clamp(-1.0, 1.0)
    pixels = ((pictures + 1.0) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    met = [check(picture, caption).score for picture, caption in zip(pixels, wanted.captions, strict=True)]
    found = agreement(pictures, wanted.edges)
    return ControlRow(
        way=way, steps=steps, precision=found.precision, recall=found.recall, f1=found.f1,
        compliance=float(np.mean(met)),
    )  # fmt: skip


def bench(
    student: Bundle, teacher: Bundle, out: Path, ways: Sequence[str], changes: dict[str, Any], prompts: int,
    steps: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """The report. Errors: those of `train_control`."""
    wanted, rows = asked(student, prompts, seed=1), []
    for way in ways:
        net = None if way == "none" else control_start(student, teacher, "carried")
        if way in TRAINED:
            recipe = configure(find_recipe(way), {"init": str(student.root), **changes})
            net = train_control(recipe, teacher, out / way).load("controlnet")
        rows += [asdict(measure(way, student, net, count, wanted)) for count in steps]
    return {"student": student.name, "prompts": prompts, "machine": machine_facts(), "rows": rows}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| ControlNet | steps | precision | recall | F1 | compliance |", "| --- |" + " ---: |" * 5]
    for row in rows:
        figures = " | ".join(f"{row[name]:.3f}" for name in ("precision", "recall", "f1", "compliance"))
        lines.append(f"| {row['way']} | {row['steps']} | {figures} |")
    return "\n".join(lines)


def command(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="fewstep bench control",
        description="ControlNets of a few-step student: agreement of outlines with the asked edges, and compliance.",
        epilog="example: fewstep bench control --out build/control --steps 1,4 --set steps=150",
    )
    steps = (1, 4)
    asked = read_ways(
        argv, parser, WAYS, steps, measured="measure", prompts="scenes to follow", settings="a setting of both recipes"
    )
    args = asked.args
    found = bench(asked.student, asked.teacher, args.out, args.ways, asked.changes, args.prompts, args.steps)
    print(table(found["rows"]))
    asked.keep(found)
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))

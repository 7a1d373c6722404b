"""Planted faults in consistency's parts, and what a planted fault is (`test_oracle_mutants` plants them)."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from fewstep.models.denoiser import expand
from fewstep.trainers.loop import player
from fewstep.trainers.objectives import consistency
from fewstep.trainers.objectives.consistency import AsEstimates, CarriedToClean, Consistency, Denoising
from fewstep.trainers.parts import laws, steps, transitions
from fewstep.trainers.parts.ends import AnyBelow, MergedTargets, PhaseEdges
from fewstep.trainers.parts.jumps import TwoTimeJump
from fewstep.trainers.parts.laws import AnyTwo, KarrasPairs, MappedPairs, Neighbours
from fewstep.trainers.parts.steps import AdjustedStep, ReferenceBatch, SameNoise, SdeStep


@dataclass(frozen=True)
class Mutant:
    """Replace `attribute` of `owner` by `faulty(original)`; `caught_by` are recipes."""

    owner: Any
    attribute: str
    faulty: Any
    caught_by: tuple[str, ...]


def attached_residual(original):
    """The target keeps its gradient."""

    def residual(student, target, jump, x_t, t, x_s, s, end, cond, turn=None):
        there = s == end
        aim = jump(target, x_s, torch.where(there, t, s), end, cond)
        return jump(student, x_t, t, end, cond), torch.where(expand(there, x_s) > 0, x_s, aim)

    return residual


def other_end(original):
    """The target lands elsewhere than the student."""

    def residual(student, target, jump, x_t, t, x_s, s, end, cond, turn=None):
        guess, _ = original(student, target, jump, x_t, t, x_s, s, end, cond, turn)
        return guess, original(student, target, jump, x_t, t, x_s, s, 0.5 * (end.clamp(min=0.0) + s), cond, turn)[1]

    return residual


def first_order(original):
    return lambda denoiser, x, times, cond: transitions.ddim_chain(denoiser, x, times, cond)


def fresh_noise(original):
    """The point at s has noise of its own."""

    def step(self, teacher, at, s, turn):
        return original(self, teacher, replace(at, noise=turn.noise(at.noise)), s, turn)

    return step


def clean_point(original):
    """The sample in place of x_s."""
    return lambda self, teacher, at, s, turn: at.x0


def loud(original):
    """Noise is added, and none of the solver's own is taken away for it."""

    def step(self, teacher, at, s, turn):
        x = at.x
        for high, low in pairwise(steps.between(at.t, s, self.parts)):
            spread = self.eta * steps.posterior_std(teacher.path, high, low)
            x = teacher.jump(x, high, low, at.cond) + expand(spread, x) * turn.noise(x)
        return x

    return step


def even_batch(original):
    """Every row of the batch counts alike."""

    def step(self, teacher, at, s, turn):
        path, mean = teacher.path, at.x0.mean(0, keepdim=True).expand_as(at.x0)
        eps = (at.x - expand(path.alpha(at.t), mean) * mean) / expand(path.sigma(at.t), mean)
        return expand(path.alpha(s), mean) * mean + expand(path.sigma(s), eps) * eps

    return step


def swapped(original):
    def draw(self, path, count, turn):
        t, s = original(self, path, count, turn)
        return s, t

    return draw


def above(original):
    """The end lies above s, at t."""
    return lambda self, path, t, s, turn: t


def next_edge(original):
    """The edge of the phase above."""
    return lambda self, path, t, s, turn: original(self, path, (t - 250.0).clamp(min=1.0), s, turn)


def only_clean(original):
    return lambda self, path, t, s, turn: torch.full_like(t, float("-inf"))


def anybody(original):
    """All rows count as of one condition."""
    return lambda cond: torch.ones_like(original(cond))


def of_time(original):
    """1 / (t - s) in native times where levels are meant."""
    return lambda self, path, t, s: (t - s).clamp(min=1e-6, max=1e3) ** -self.per_gap


FROM_DATA = ("ct", "ict", "ect", "slct", "lcf")
PHASED = ("pcm", "multistep-cm")
CONSISTENCY_MUTANTS = {
    "target: not detached": Mutant(
        consistency, "consistency_residual", attached_residual,
        ("lcm", "lcm-lora", "cd", "ct", "ect", "tcd", "pcm", "tdd", "std", "mlcm", "direct-cm", "hyper-sd", "scott"),
    ),
    "target: lands elsewhere": Mutant(
        consistency, "consistency_residual", other_end, ("tcd", "pcm", "hyper-sd", "std")
    ),
    "solver: Heun without its correction": Mutant(steps, "heun", first_order, ("cd", "ctm")),
    "pair: noise of its own at s": Mutant(SameNoise, "__call__", fresh_noise, FROM_DATA),
    "pair: the sample in place of x_s": Mutant(SameNoise, "__call__", clean_point, ("ct", "ict", "ect", "lcf")),
    "pair: every reference counts alike": Mutant(ReferenceBatch, "__call__", even_batch, ("sct",)),
    "solver: noise on top of the whole step": Mutant(SdeStep, "__call__", loud, ("scott",)),
    "solver: aDDIM adjusts nothing": Mutant(
        AdjustedStep, "__call__", lambda g: lambda s, teacher, at, low, turn: teacher.jump(at.x, at.t, low, at.cond),
        ("multistep-cm",),
    ),
    "time: t and s swapped on a Karras grid": Mutant(KarrasPairs, "draw", swapped, ("cd", "ct", "ict", "slct")),
    "time: t and r swapped": Mutant(MappedPairs, "draw", swapped, ("ect", "sct")),
    "time: t and u swapped": Mutant(AnyTwo, "draw", swapped, ("ctm",)),
    "time: neighbours swapped": Mutant(Neighbours, "draw", swapped, ("multistep-cm",)),
    "time: levels taken for times": Mutant(
        laws, "at_levels", lambda g: lambda path, level: level, ("cd", "ict", "ect")
    ),
    "end: at t": Mutant(PhaseEdges, "__call__", above, (*PHASED, "hyper-sd")),
    "end: of another phase": Mutant(PhaseEdges, "__call__", next_edge, (*PHASED, "mlcm")),
    "end: always clean": Mutant(AnyBelow, "__call__", only_clean, ("tcd", "ctm", "std")),
    "end: targets of s, not below": Mutant(
        MergedTargets, "__call__", lambda g: lambda self, path, t, s, turn: s * 0.5, ("tdd",)
    ),
    "jump: the landing is not told": Mutant(
        TwoTimeJump, "__call__", lambda g: lambda self, d, x, t, s, cond: d.jump(x, t, s, {**cond, "s": t}),
        ("ctm", "tcd"),
    ),
    "compare: landings, not estimates": Mutant(
        AsEstimates, "__call__", lambda g: lambda self, target, y, x_t, t, end, cond: y, ("multistep-cm",)
    ),
    "compare: not carried to clean data": Mutant(
        CarriedToClean, "__call__", lambda g: lambda self, target, y, x_t, t, end, cond: y, ("ctm",)
    ),
    "weight: gaps in time": Mutant(Consistency, "gap_weight", of_time, ("ict", "ect", "sct", "slct")),
    "coupling: none": Mutant(Consistency, "coupled", lambda g: lambda self, batch, noise, turn: noise, ("slct",)),
    "coupling: across conditions": Mutant(steps, "same_condition", anybody, ("slct", "sct")),
    "aside: the noise for the sample": Mutant(
        Denoising, "__call__", lambda g: lambda self, student, at: g(self, student, replace(at, x0=at.noise)), ("slct",)
    ),
    "average: the target's decay stands still": Mutant(
        player, "decay_at", lambda g: lambda rule, n, progress: 0.9, ("ct",)
    ),
}  # fmt: skip

"""Planted faults in critics, their losses and what stands beside them (`test_oracle_mutants` plants them)."""

from dataclasses import replace

import torch
from mutants import Mutant

from fewstep.trainers.distribution import also, discriminator, self_paced
from fewstep.trainers.distribution.adaptation import TaughtBy
from fewstep.trainers.distribution.discriminator import Adversary
from fewstep.trainers.distribution.distribution import DistributionMatching
from fewstep.trainers.distribution.self_paced import DrawnWalk, NextCount
from fewstep.trainers.networks.critics import TeacherEye
from fewstep.trainers.parts.gan_losses import R1, ApproximateR1, FiniteDifference, Hinge, Relativistic
from fewstep.trainers.parts.noised_rollout import NoisedRollout, SampledTimes, StartMoreOften
from fewstep.trainers.parts.rollout import Made
from fewstep.trainers.pictures import parting
from fewstep.trainers.plane import sources


def other_side(original):
    """A regulariser of the samples where that of the data was meant."""
    return lambda self, real, fake, turn: original(self, fake, real, turn)


def unlazy(original):
    """Every step, with the weight of one in so many."""

    def loss(self, real, fake, turn):
        return original(replace(self, every=1), real, fake, turn) * self.every

    return loss


def blind(original):
    """The frozen network runs without gradient: the student hears nothing."""

    def see(self, x, t, cond):
        with torch.no_grad():
            return original(self, x, t, cond)

    return see


def everywhere(original):
    """Data under their own condition are fakes too, where neighbours agree."""
    return lambda cond: torch.ones(len(next(iter(cond.values()))), dtype=torch.bool)


def clean_input(original):
    """The teacher is shown the sample as it is."""
    return lambda self, path, t, noise: self.x0


def even(original):
    return lambda self, path, count, turn: original(replace(self, weights=()), path, count, turn)


def never_the_start(original):
    return lambda self, path, count, turn: original(replace(self, share=0.0), path, count, turn)


def another_state(original):
    """The sample is of other noise than the state that is told."""

    def make(self, student, batch, turn):
        made = original(self, student, batch, turn)
        return replace(made, x=original(self, student, batch, turn).x)

    return make


def one_noise(original):
    kept = {}
    return lambda path, x0, t, noise: original(path, x0, t, kept.setdefault(x0.shape, noise))


def attached_walk(original):
    """The gradient goes through the whole walk."""

    def walk(self, *args):
        no_grad = torch.no_grad
        torch.no_grad = torch.enable_grad
        try:
            return original(self, *args)
        finally:
            torch.no_grad = no_grad

    return walk


def as_drawn(original):
    """What stands before it changes its draws."""

    def loss(self, made, cast, batch, turn):
        value, metrics = self.objective.loss("student", cast, batch, turn)
        return self.weight * value, metrics

    return loss


def neighbours(original):
    def telling(self, cond, made):
        return original(self, cond, replace(made, t=made.t.roll(1, 0)))

    return telling


SPRINT = ("sana-sprint",)
ADVERSARIAL_MUTANTS: dict[str, Mutant] = {
    "hinge: data called fake": Mutant(Hinge, "critic", lambda g: lambda self, r, f: g(self, f, r), ("add", *SPRINT)),
    "hinge: student pushed down": Mutant(Hinge, "student", lambda g: lambda self, f, r: -g(self, f, r), ("add",)),
    "hinge: said to be a ratio": Mutant(Hinge, "is_ratio", lambda g: True, ("add",)),
    "hinge: one margin of 0": Mutant(
        Hinge, "critic", lambda g: lambda self, r, f: torch.relu(-r).mean() + torch.relu(1.0 + f).mean(), ("add",)
    ),
    "relativistic: the pair swapped": Mutant(
        Relativistic, "critic", lambda g: lambda self, r, f: g(self, f, r), ("asd",)
    ),
    "relativistic: student pushed down": Mutant(
        Relativistic, "student", lambda g: lambda self, f, r: g(self, r, f), ("asd",)
    ),
    "ratio: a hinge is let in": Mutant(
        DistributionMatching, "__post_init__", lambda g: lambda self: None, ("add", "asd")
    ),
    "R1: of the samples": Mutant(R1, "loss", other_side, ("gdd", "gdd-i")),
    "R1: every step": Mutant(R1, "loss", unlazy, ("gdd", "gdd-i")),
    "R1: twice as strong": Mutant(R1, "loss", lambda g: lambda self, *a: 2.0 * g(self, *a), ("gdd", "add")),
    "differences: not divided by their width": Mutant(
        FiniteDifference, "slope", lambda g: lambda self, side, turn: self.width**2 * g(self, side, turn), ("asd",)
    ),
    "aR1: of the samples": Mutant(ApproximateR1, "loss", other_side, ("ladd",)),
    "aR1: another width": Mutant(
        ApproximateR1, "loss", lambda g: lambda self, *a: g(replace(self, width=1.0), *a), ("ladd",)
    ),
    "critic: no gradient through the teacher": Mutant(TeacherEye, "see", blind, ("ladd", *SPRINT)),
    "critic: neighbours of one condition are fakes": Mutant(discriminator, "apart", everywhere, SPRINT),
    "teacher's aim: at the clean sample": Mutant(Made, "at", clean_input, ("add",)),
    "noised: every time as often": Mutant(SampledTimes, "draw", even, ("ladd",)),
    "noised: the start as rare as any": Mutant(StartMoreOften, "draw", never_the_start, SPRINT),
    "noised: sample and state of two draws": Mutant(NoisedRollout, "make", another_state, ("ladd", "add")),
    "walk: noise kept where it should be fresh": Mutant(self_paced, "noised", one_noise, ("asd",)),
    "walk: gradient through all of it": Mutant(DrawnWalk, "walk", attached_walk, ("asd",)),
    "walk: never stops on its way": Mutant(
        DrawnWalk, "make", lambda g: lambda self, *a: g(replace(self, ends=1.0), *a), ("asd",)
    ),
    "next count: of a walk that stopped": Mutant(
        DrawnWalk, "count", lambda g: lambda self, made, path: len(made.before) + 1, ("asd",)
    ),
    "next count: its own": Mutant(
        NextCount, "after", lambda g: lambda self, made, path: g(self, made, path) and len(made.before) + 1, ("asd",)
    ),
    "told: another sample's step": Mutant(Adversary, "telling", neighbours, ("add", "ladd")),
    "parts: the farthest centroid": Mutant(
        parting, "nearest", lambda g: lambda points, chosen: g(-points, chosen), ("msd",)
    ),
    "parts: a class left to the first": Mutant(
        sources, "part_of", lambda g: lambda label, of: max(0, g(label, of) - 1), ("msd",)
    ),
    "taught by another: the first after all": Mutant(
        TaughtBy, "loss", lambda g: lambda self, *rest: self.term.loss(*rest), ("uni-dad",)
    ),
    "beside: draws of its own changed by others": Mutant(also.Also, "loss", as_drawn, SPRINT),
}

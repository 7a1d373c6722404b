"""Planted faults in couplings of noise and samples, and in the teacher's part on a student's own walk."""

from dataclasses import replace

import torch
from mutants import Mutant

from fewstep.trainers.objectives import reflow, variational
from fewstep.trainers.objectives.backward import BackwardDistillation, Shift
from fewstep.trainers.objectives.invertible import Invertible, LowerEdges, RisingPairs, UpperEdges
from fewstep.trainers.objectives.variational import VariationalCoupling
from fewstep.trainers.oracle import variational as oracle_variational
from fewstep.trainers.parts.rollout import BackwardSimulation
from fewstep.trainers.parts.steps import SameNoise
from fewstep.trainers.parts.times import EvenGrids


def fresh_point(original):
    """Noise of its own carries x^ to gamma(t)."""
    return lambda self, teacher, x0, eps, *rest: original(self, teacher, x0, torch.randn_like(eps), *rest)


def attached_walk(original):
    """The loss walks again, with a gradient: of the whole walk, where only the last evaluation's is meant."""

    def loss(self, player, cast, batch, turn):
        kept, metrics = original(self, player, cast, batch, turn)
        t = torch.full((batch.x0.shape[0],), cast["student"].path.start, dtype=torch.float64)
        return kept + cast["student"].x0(batch.x0, t, {**batch.cond, "w": t * 0 + 1.0}).square().mean(), metrics

    return loss


def of_data(original):
    """x_t from the batch's samples, which leak into it."""

    def reach(self, student, like, cond, turn):
        x, t = original(self, student, like, cond, turn)
        return x + 0.1 * like, t

    return reach


def own_noise_at_s(original):
    def step(self, teacher, at, s, turn):
        return original(self, teacher, replace(at, noise=turn.noise(at.noise)), s, turn)

    return step


def both_turns(original):
    """The student's turn leaves a gradient in the encoder."""

    def loss(self, player, cast, batch, turn):
        kept, metrics = original(self, player, cast, batch, turn)
        return kept + variational.posterior(cast["encoder"], batch.x0, batch.cond)[0].square().mean(), metrics

    return loss


def attached_cycle(original):
    """The way there is taken with a gradient too, so that a turn teaches both players."""

    def round_trip(self, player, cast, batch, turn):
        begun, _ = original(self, player, cast, batch, replace(turn))
        low, high = begun.new_tensor([249.0]), begun.new_tensor([499.0])
        low, high = low.double().expand(len(begun)), high.double().expand(len(begun))
        cond = {**batch.cond, "w": torch.ones_like(low)}
        up = self.forward.jump(cast["inverse"], begun, low, high, cond)
        return begun, self.reverse.jump(cast["student"], up, high, low, cond)

    return round_trip


def other_way(original):
    """Both cycles begin at the upper edge."""
    return lambda self, player, cast, batch, turn: original(self, "inverse", cast, batch, turn)


COUPLED_MUTANTS: dict[str, Mutant] = {
    "pairs: the noise is not the sample's own": Mutant(
        reflow.Annealing, "noise", lambda g: lambda s, z, turn: turn.noise(z), ("get",)
    ),
    "shift: gamma stays at t": Mutant(Shift, "__call__", lambda g: lambda self, path, t: t, ("imagine-flash",)),
    "shift: above t": Mutant(
        Shift, "__call__", lambda g: lambda self, path, t: t + 0.5 * (path.start - t), ("imagine-flash",)
    ),
    "shift: another noise": Mutant(BackwardDistillation, "aim", fresh_point, ("imagine-flash",)),
    "backward: a gradient elsewhere": Mutant(BackwardDistillation, "loss", attached_walk, ("imagine-flash",)),
    "backward: the data leak": Mutant(BackwardSimulation, "reach", of_data, ("imagine-flash",)),
    "inverse: ends of the phase below": Mutant(
        UpperEdges, "__call__", lambda g: lambda self, path, t, s, turn: g(self, path, t - 250.0, s, turn), ("icd",)
    ),
    "inverse: pairs fall": Mutant(
        RisingPairs, "draw", lambda g: lambda self, path, count, turn: g(self, path, count, turn)[::-1], ("icd",)
    ),
    "inverse: asked at the upper edges": Mutant(
        LowerEdges, "of", lambda g: lambda self, path: EvenGrids((self.phases,)).of(path), ("icd",)
    ),
    "cycle: a gradient on the way there": Mutant(Invertible, "round_trip", attached_cycle, ("icd",)),
    "cycle: always from above": Mutant(Invertible, "round_trip", other_way, ("icd",)),
    "coupling: noise of its own at s": Mutant(SameNoise, "__call__", own_noise_at_s, ("vct",)),
    "coupling: the encoder learns in the student's turn": Mutant(VariationalCoupling, "loss", both_turns, ("vct",)),
    "coupling: deviation without its shift": Mutant(variational, "UNIT", lambda g: 0.0, ("vct",)),
    "KL: mean over elements": Mutant(
        oracle_variational, "divergence", lambda g: lambda mean, std: g(mean, std) / mean[0].numel(), ("vct",)
    ),
    "KL: halved in the loss": Mutant(
        variational, "divergence", lambda g: lambda mean, std: 0.5 * g(mean, std), ("vct",)
    ),
    "KL: its weight ignores the gap": Mutant(
        VariationalCoupling, "per_gap", lambda g: lambda self, path, turn: 1.0, ("vct",)
    ),
}

"""Planted faults in control and fine-tuning (`test_oracle_mutants` plants them)."""

from dataclasses import replace

from mutants import Mutant, attached_residual

from fewstep.trainers.distribution import control_terms, score_gap
from fewstep.trainers.distribution.control_terms import Follow
from fewstep.trainers.objectives import consistency
from fewstep.trainers.objectives.distillation import KnowledgeDistillation
from fewstep.trainers.parts.steps import SameNoise
from fewstep.trainers.plane.control import Likelihood


def against(original):
    """The samples are pushed away from their control."""
    return lambda cast, name: lambda x, cond: -original(cast, name)(x, cond)


def cut_off(original):
    """The detector sees samples that have no gradient."""
    return lambda cast, name: lambda x, cond: original(cast, name)(x.detach() + 0.0 * x, cond)


def whole_square(original):
    """`(x - c)^2 / tau^2`: the half is forgotten."""
    return lambda self, x, cond: 2.0 * original(self, x, cond)


def fresh_noise(original):
    """The neighbour has noise of its own."""

    def step(self, teacher, at, s, turn):
        return original(self, teacher, replace(at, noise=turn.noise(at.noise)), s, turn)

    return step


def shrunken(original):
    """The pictures are learned at another scale than they are encoded in."""

    def loss(self, player, cast, batch, turn):
        return original(self, player, cast, replace(batch, x0=0.8 * batch.x0), turn)

    return loss


JDM = ("jdm",)
CONTROL_MUTANTS: dict[str, Mutant] = {
    "control: samples pushed away": Mutant(control_terms, "reward_of", against, JDM),
    "control: detector without a gradient": Mutant(control_terms, "reward_of", cut_off, JDM),
    "control: twice the likelihood": Mutant(Likelihood, "__call__", whole_square, JDM),
    "control: weight ignored": Mutant(
        Follow, "loss", lambda g: lambda self, *given: g(replace(self, weight=1.0 + self.weight), *given), JDM
    ),
    "control: real and fake swapped": Mutant(
        score_gap, "dmd_gradient", lambda g: lambda real, fake, *rest: g(fake, real, *rest), JDM
    ),
    "control: the neighbour's noise is fresh": Mutant(SameNoise, "__call__", fresh_noise, ("control-student",)),
    "control: target keeps its gradient": Mutant(
        consistency, "consistency_residual", attached_residual, ("control-student", "finetune-student")
    ),
    "finetune: pictures at another scale": Mutant(KnowledgeDistillation, "loss", shrunken, ("finetune-student",)),
}

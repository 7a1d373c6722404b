"""Planted faults in guidance distillation (`test_oracle_mutants` plants them)."""

from mutants import Mutant

from fewstep.models.denoiser import expand
from fewstep.trainers.objectives import guidance
from fewstep.trainers.objectives.guidance import GuidanceDistillation
from fewstep.trainers.parts import transitions
from fewstep.trainers.parts.times import UniformScale
from fewstep.trainers.parts.transitions import TeacherWalk

TOLD = ("w-embedding", "agd")
ALL = (*TOLD, "lora-guided")


def attached(original):
    """A further term, whose gradient is not the method's."""

    def loss(self, player, cast, batch, turn):
        kept, metrics = original(self, player, cast, batch, turn)
        t = turn.uniform(1.0, 1.0 + 1e-9, batch.x0.shape[0])
        return kept + cast["teacher"].x0(batch.x0, t, batch.cond).square().mean(), metrics

    return loss


def unguided_walk(original):
    """States of the data's own trajectories, where those under guidance are meant."""
    return lambda self, teacher, batch, t, noise, cond: self.mixing.mix(teacher.path, batch.x0, t, noise)


def short_walk(original):
    """The walk's last step is left out."""
    return lambda self, teacher, batch, t, noise, cond: original(self, teacher, batch, 1.02 * t, noise, cond)


GUIDANCE_MUTANTS: dict[str, Mutant] = {
    "guidance: the teacher has none": Mutant(guidance, "guided", lambda g: lambda teacher, uncond, w: teacher, ALL),
    "guidance: the scale is not told": Mutant(
        guidance, "with_scale", lambda g: lambda cond, w: g(cond, 0.0 * w + 1.0), TOLD
    ),
    "guidance: omega is told for w": Mutant(guidance, "with_scale", lambda g: lambda cond, w: g(cond, w - 1.0), TOLD),
    "guidance: distilled with its sign flipped": Mutant(
        transitions, "guide", lambda g: lambda u, c, w: u - expand(w, c) * (c - u), ALL
    ),
    "guidance: distilled off by one, c + w (c - u)": Mutant(
        transitions, "guide", lambda g: lambda u, c, w: c + expand(w, c) * (c - u), ALL
    ),
    "guidance: half of the scales": Mutant(
        UniformScale, "draw", lambda g: lambda s, *a: g(UniformScale(s.low, 0.5 * (s.low + s.high)), *a), TOLD
    ),
    "guidance: gradient reaches the teacher": Mutant(GuidanceDistillation, "loss", attached, ALL),
    "guidance: states of no walk": Mutant(TeacherWalk, "at", unguided_walk, ("agd",)),
    "guidance: walks that end early": Mutant(TeacherWalk, "at", short_walk, ("agd",)),
}  # fmt: skip

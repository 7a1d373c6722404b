"""Planted faults in flow maps, continuous-time consistency and reflow (`test_oracle_mutants` plants them)."""

from dataclasses import replace

import torch
from mutants import Mutant

from fewstep.models.denoiser import expand
from fewstep.trainers.objectives import from_noise, reflow
from fewstep.trainers.objectives.continuous import ContinuousConsistency
from fewstep.trainers.objectives.flow_map import Derivative, FlowMap, FlowPairs, Halves
from fewstep.trainers.objectives.from_noise import Displaced
from fewstep.trainers.parts.tangent import FLOW, DataField, Hub, Jvp
from fewstep.trainers.parts.u_shape import UShaped

SCM = ("scm", "sana-sprint", "tbcm")


def still(original):
    """The derivative in time at a fixed x: the trajectory does not move."""

    def along(self, path, x0, eps, t, scale=1.0):
        dx, dt = original(self, path, x0, eps, t, scale)
        return torch.zeros_like(dx), dt

    return along


def other_sign(original):
    """v + (t - s) du/dt."""

    def aim(self, network, asked, turn):
        v = FLOW.velocity(network.path, asked.t, asked.x0, asked.eps)
        return 2.0 * v - original(self, network, asked, turn)

    return aim


def same_place(original):
    """Both halves from where the whole begins."""

    def aim(self, network, asked, turn):
        return FLOW.ask(network, asked.x, asked.t, {**asked.cond, "s": asked.s})

    return aim


def displaced_sign(original):
    def aim(self, student, teacher, z, t, s, cond, turn):
        there = student.jump(z, t, s, {**cond, "s": s})
        s, u = original(self, student, teacher, z, t, s, cond, turn)
        return s, 2.0 * FLOW.ask(teacher, there, s, cond) - u

    return aim


def other_weights(original):
    """The teacher's step counts as if it were the whole way."""

    def stepped(student, teacher, z, t, s, to, cond, turn):
        u = original(student, teacher, z, t, s, to, cond, turn)
        far = expand(FLOW.time(student.path, s) - FLOW.time(student.path, to), z)
        return u * (1.0 + far)

    return stepped


def attached(original):
    """A further term, whose gradient is not the method's."""

    def loss(self, player, cast, batch, turn):
        kept, metrics = original(self, player, cast, batch, turn)
        student = cast["student"]
        t = torch.full((batch.x0.shape[0],), student.path.start, dtype=torch.float64)
        return kept + student.x0(batch.x0, t, {**batch.cond, "s": t}).square().mean(), metrics

    return loss


FLOW_MUTANTS: dict[str, Mutant] = {
    "tangent: x stands still": Mutant(Hub, "along", still, (*SCM, "meanflow", "anyflow")),
    "tangent: sign flipped": Mutant(
        Jvp, "__call__", lambda g: lambda self, *a: -g(self, *a), ("scm", "meanflow", "freeflow")
    ),
    "tangent: pace of the hub left out": Mutant(
        Hub, "pace", lambda g: lambda self, path, t: torch.ones_like(t), ("scm", "meanflow", "boot")
    ),
    "tangent: sample and noise swapped": Mutant(
        Hub, "velocity", lambda g: lambda self, path, t, x0, eps: g(self, path, t, eps, x0), ("scm", "shortcut")
    ),
    "tangent: warm-up ignored": Mutant(ContinuousConsistency, "rise", lambda g: lambda self, turn: 1.0, ("scm",)),
    "tangent: normalised over the batch": Mutant(
        ContinuousConsistency, "normalised", lambda g: lambda self, x: x / (x.square().mean().sqrt() + 0.1), SCM
    ),
    "tangent: another term with a gradient": Mutant(ContinuousConsistency, "loss", attached, SCM),
    "flow map: sign of the derivative": Mutant(Derivative, "__call__", other_sign, ("meanflow", "anyflow")),
    "flow map: halves from one place": Mutant(Halves, "__call__", same_place, ("shortcut",)),
    "flow map: t and s swapped": Mutant(
        FlowPairs, "draw", lambda g: lambda self, *a: g(self, *a)[::-1], ("meanflow", "anyflow", "shortcut")
    ),
    "flow map: noise is the sample's opposite": Mutant(
        DataField, "__call__",
        lambda g: lambda self, teacher, batch, noise, *a: g(self, teacher, replace(batch, x0=-batch.x0), noise, *a),
        ("meanflow", "shortcut"),
    ),
    "flow map: gradient elsewhere": Mutant(FlowMap, "loss", attached, ("meanflow", "shortcut")),
    "from noise: sign of the displacement": Mutant(Displaced, "__call__", displaced_sign, ("freeflow",)),
    "from noise: the teacher's step too long": Mutant(from_noise, "stepped", other_weights, ("boot", "freeflow")),
    "from noise: gradient elsewhere": Mutant(from_noise.FromNoise, "loss", attached, ("boot",)),
    "reflow: the pair's noise is not used": Mutant(
        reflow.Annealing, "noise", lambda g: lambda s, z, turn: turn.noise(z), ("reflow", "instaflow", "rf++")
    ),
    "reflow: times not mirrored": Mutant(
        UShaped, "draw", lambda g: lambda self, path, count, turn: g(self, path, count, turn).clamp(min=0.5), ("rf++",)
    ),
}  # fmt: skip

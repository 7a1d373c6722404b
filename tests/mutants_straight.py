"""Planted faults in straight trajectories, moment matching and the twin (`test_oracle_mutants` plants them)."""

from dataclasses import replace

import torch
from mutants import Mutant
from mutants_flow import attached

from fewstep.trainers.objectives import consistency, moments, self_corrected, straight, twin
from fewstep.trainers.objectives.moments import Decrement, Laplace, LogSnrWeight, MomentMatching
from fewstep.trainers.objectives.self_corrected import BothWays, SelfCorrected
from fewstep.trainers.objectives.straight import Anchored, SameSlope, StraightTrajectory
from fewstep.trainers.objectives.twin import Recursive, ThreeKinds, TwinFlow
from fewstep.trainers.parts import steps
from fewstep.trainers.parts.tangent import FLOW
from fewstep.trainers.parts.times import clean


def unpaired(original):
    """The pairs' noise in another order."""
    return lambda batch: original(batch).flip(0)


def from_data(original):
    """The sample where the student's own should be."""

    def made(student, noise, cond, turn):
        return original(student, noise, cond, turn).detach() + 0.3

    return made


def upwards(original):
    """The way down in place of the way up."""

    def draw(self, path, count, turn):
        t, down, _ = original(self, path, count, turn)
        return t, down, torch.where(down == clean(path), t, down)

    return draw


def late_pairs(original):
    """Times of their own in each row, groups or not."""

    def matched(self, path, count, turn):
        t, s = original(self, path, count, turn)
        return t.flip(0), s

    return matched


def open_aim(original):
    """The landing from r keeps its gradient."""

    def residual(student, target, jump, x_t, t, x_s, s, end, cond, turn=None):
        there = s == end
        aim = jump(target, x_s, torch.where(there, t, s), end, cond)
        stays = there.to(x_s).reshape(-1, *[1] * (x_s.ndim - 1)) > 0
        return jump(student, x_t, t, end, cond), torch.where(stays, x_s, aim)

    return residual


def same_sign(original):
    """Every pair of rows attracts."""

    def found(kernel, y, aim, scale, alike=None):
        return -2.0 * kernel(y, aim, scale).mean((1, 2))

    return found


def unwalked(original):
    """What is missed is counted as if the rest were walked in no time."""
    return lambda self, network, x, t, s, valid, cond, turn: x


def same_time(original):
    """The fake velocity is asked at positive times."""
    return lambda network: replace(network, net=lambda x, t, cond: network.raw(x, t, {**cond, "s": t}))


def whole_walk(original):
    def missing(self, network, u, v, x, t, s, cond, turn):
        return -original(self, network, u, v, x, t, s, cond, turn)

    return missing


def pushed(original):
    """Samples are pushed away from the data."""

    def matched(self, student, u, made, cond, turn):
        return -original(self, student, u, made, cond, turn)

    return matched


STRAIGHT_MUTANTS: dict[str, Mutant] = {
    "slopes: lines to their own times": Mutant(
        straight, "slope", lambda g: lambda path, x, t, y, end: g(path, x, t, y, end * 0.5), ("consistency-fm",)
    ),
    "slopes: also where s is the end": Mutant(
        SameSlope, "__call__",
        lambda g: lambda self, path, guess, aim, x_t, t, x_s, s, end: g(
            self, path, guess, aim, x_t, t, x_s, torch.full_like(s, path.start), end
        ),
        ("consistency-fm",),
    ),
    "anchor: none": Mutant(
        Anchored, "draw", lambda g: lambda self, path, count, turn: self.pairs.draw(path, count, turn),
        ("consistency-fm",),
    ),
    "anchor: t with it": Mutant(
        Anchored, "draw", lambda g: lambda self, *a: (lambda t, s: (t, torch.where(s > 300.0, s, clean(a[0]))))(
            *g(self, *a)
        ),
        ("consistency-fm",),
    ),
    "consistency: undetached aim": Mutant(
        consistency, "consistency_residual", open_aim, ("consistency-fm",)
    ),
    "straight: noise of another pair": Mutant(straight, "paired_noise", unpaired, ("traflow",)),
    "straight: gradient elsewhere": Mutant(StraightTrajectory, "loss", attached, ("traflow",)),
    "straight: halves from one place": Mutant(
        straight, "Halves", lambda g: lambda: lambda network, asked, turn: FLOW.ask(
            network, asked.x, asked.t, {**asked.cond, "s": asked.t}
        ),
        ("traflow",),
    ),
    "straight: output of something else": Mutant(straight, "one_step", from_data, ("traflow",)),
    "both ways: never up": Mutant(BothWays, "draw", upwards, ("scflow",)),
    "both ways: too far": Mutant(
        BothWays, "draw", lambda g: lambda self, *a: g(replace(self, reach=2.0 * self.reach), *a), ("scflow",)
    ),
    "self-corrected: lines of other samples": Mutant(self_corrected, "one_step", from_data, ("scflow",)),
    "self-corrected: gradient elsewhere": Mutant(SelfCorrected, "loss", attached, ("scflow",)),
    "self-corrected: critic's losses swapped": Mutant(
        self_corrected, "critic_loss", lambda g: lambda real, fake: g(fake, real), ("scflow",)
    ),
    "self-corrected: the student lowers its logits": Mutant(
        self_corrected, "deceiver_loss", lambda g: lambda fake: g(-fake), ("scflow",)
    ),
    "moments: every pair attracts": Mutant(moments, "discrepancy", same_sign, ("imm",)),
    "moments: kernel of squares": Mutant(
        Laplace, "__call__", lambda g: lambda self, x, y, scale: g(self, x * x.abs(), y * y.abs(), scale), ("imm",)
    ),
    "moments: undetached aim": Mutant(moments, "consistency_residual", open_aim, ("imm",)),
    "moments: r above t": Mutant(Decrement, "__call__", lambda g: lambda self, path, t, s: t + 1.0, ("imm",)),
    "moments: r half way": Mutant(Decrement, "__call__", lambda g: lambda self, path, t, s: 0.5 * (t + s), ("imm",)),
    "moments: weight of the noise": Mutant(
        LogSnrWeight, "__call__", lambda g: lambda self, path, t: path.level(t), ("imm",)
    ),
    "moments: times within a group": Mutant(
        MomentMatching, "groups", lambda g: lambda self, rows: g(self, rows.flip(0)), ("imm",)
    ),
    "moments: gradient elsewhere": Mutant(MomentMatching, "loss", attached, ("imm",)),
    "twin: nothing is walked": Mutant(Recursive, "walked", unwalked, ("twinflow",)),
    "twin: sign of what is missed": Mutant(Recursive, "__call__", whole_walk, ("twinflow",)),
    "twin: at positive times": Mutant(twin, "twin", same_time, ("twinflow",)),
    "twin: pushed away from the data": Mutant(TwinFlow, "matched", pushed, ("twinflow",)),
    "twin: t and s swapped": Mutant(
        ThreeKinds, "draw", lambda g: lambda self, *a: g(self, *a)[::-1], ("twinflow",)
    ),
    "twin: the shortest ways count least": Mutant(
        twin, "tangent_weight", lambda g: lambda path, t, s: 1.0 / g(path, t, s), ("twinflow",)
    ),
    "reference: rows of any condition": Mutant(
        steps, "same_condition", lambda g: lambda cond: torch.ones_like(g(cond)), ("imm", "twinflow")
    ),
    "reference: the pair alone": Mutant(
        steps, "reference_estimates", lambda g: lambda path, at: (at.x0.double(), at.noise.double()),
        ("imm", "twinflow"),
    ),
    "twin: gradient elsewhere": Mutant(TwinFlow, "loss", attached, ("twinflow",)),
}  # fmt: skip

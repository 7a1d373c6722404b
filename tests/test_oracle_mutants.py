"""Planted faults in the real code, each of which the oracle suite must catch; without them it passes (test_oracle).

A mutant is data: what is replaced by what, and who must notice. Each is a mistake that is easily made here.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from mutants import CONSISTENCY_MUTANTS, Mutant
from mutants_adapted import ADAPTED_MUTANTS
from mutants_adversarial import ADVERSARIAL_MUTANTS
from mutants_control import CONTROL_MUTANTS
from mutants_coupled import COUPLED_MUTANTS
from mutants_distribution import DISTRIBUTION_MUTANTS
from mutants_flow import FLOW_MUTANTS
from mutants_guidance import GUIDANCE_MUTANTS
from mutants_identity import IDENTITY_MUTANTS
from mutants_reward import REWARD_MUTANTS
from mutants_score import SCORE_MUTANTS
from mutants_straight import STRAIGHT_MUTANTS

from fewstep.models.denoiser import Denoiser, expand
from fewstep.runtime.sampling import samplers
from fewstep.runtime.sampling.samplers import Update
from fewstep.trainers.objectives import distillation, progressive, reflow
from fewstep.trainers.objectives.reflow import Annealing
from fewstep.trainers.oracle import distillation as oracle_distillation
from fewstep.trainers.oracle.samplers import sampler_checks
from fewstep.trainers.oracle.suite import checks_of
from fewstep.trainers.parts import pairs, steps, transitions
from fewstep.trainers.parts import times as training_times
from fewstep.trainers.parts.jumps import LcmJump
from fewstep.trainers.parts.objective import Switch, Turn
from fewstep.trainers.parts.times import GridPairs, GridTimes, HalvingPairs
from fewstep.trainers.pictures import plot
from fewstep.trainers.recipes.registry import RECIPES


def noisy_chain(original):
    """Fresh noise where the ODE was meant."""

    def chain(denoiser, x, ts, cond):
        for t, s in pairwise(ts):
            x = denoiser.mix(denoiser.x0(x, t, cond), torch.randn_like(x), s)
        return x

    return chain


def noisy_jump(original):
    def jump(self, x, t, s, cond):
        return self.mix(self.x0(x, t, cond), torch.randn_like(x), s)

    return jump


def unscaled_jump(original):
    """Times in [0, 1] where the boundary scalings expect 0 .. 999."""

    def jump(self, denoiser, x, t, s, cond):
        scaled = self.boundary.timestep_scaling * t.double() / 1000.0
        square = self.boundary.sigma_data**2
        skip, out = square / (scaled**2 + square), scaled / (scaled**2 + square).sqrt()
        return expand(skip, x) * x + expand(out, x) * denoiser.x0(x, t, cond)

    return jump


def late_index(original):
    """n = (i + 1) N / points: one past the trained time, and out of the table at the end."""
    return lambda path, points: original(path, points) + 1.0


def swapped_pairs(original):
    def draw(self, path, count, turn):
        t, s = original(self, path, count, turn)
        return s, t

    return draw


def swapped_triples(original):
    def draw(self, path, count, turn):
        t, mid, s = original(self, path, count, turn)
        return t, torch.where(mid > s, s, mid), torch.where(mid > s, mid, s)

    return draw


def with_noise(rule):
    """A sampler with fresh noise in place of its noise estimate."""

    def noisy(step, spec):
        alpha, sigma = step.land()
        return Update(alpha * step.out.x0_x, alpha * step.out.x0_f, sigma, lands=step.to)

    return noisy


def noise_at_the_end(rule):
    def late(step, spec):
        update = rule(step, spec)
        return Update(update.a, update.b, update.c or 0.1)

    return late


def scaled_time(original):
    """The network is told t / 1000."""
    return lambda self, x, t, cond: self.net(x, t / 1000.0, cond)


def eps_for_x0(original):
    return lambda self, x, t, cond: self.both(x, t, cond)[1]


def unscaled_features(original):
    """A stage of large numbers counts for more than all others."""

    def loss(mine, theirs):
        gaps = [(mine[name] - aim).square().mean() for name, aim in theirs.items()]
        return torch.stack(gaps).mean() if gaps else torch.zeros(())

    return loss


def never_off(original):
    """The switch is not obeyed."""

    def lead(*networks):
        original(*networks)
        return Switch()

    return lead


def unsized_noise(original):
    def noise(self, paired, turn):
        beta = self.beta(turn)
        return (1.0 - beta) * paired + beta * turn.noise(paired)

    return noise


def unannealed(original):
    def loss(self, player, cast, batch, turn):
        return original(self, player, cast, batch, replace(turn, step=turn.total))

    return loss


def even_times(original):
    return lambda self, path, count, turn: original(GridTimes(self.points, 0.0), path, count, turn)


LCM, PD = ("lcm",), ("progressive",)
FEATURES = ("bk-sdm", "edgefusion", "a-sdm", "vdmini", "linfusion", "ppcl")
MUTANTS = (
    CONSISTENCY_MUTANTS
    | CONTROL_MUTANTS
    | COUPLED_MUTANTS
    | DISTRIBUTION_MUTANTS
    | ADAPTED_MUTANTS
    | ADVERSARIAL_MUTANTS
    | FLOW_MUTANTS
    | REWARD_MUTANTS
    | STRAIGHT_MUTANTS
    | GUIDANCE_MUTANTS
    | IDENTITY_MUTANTS
    | SCORE_MUTANTS
    | {
        "guidance: sign flipped": Mutant(
            transitions, "guide", lambda g: lambda u, c, w: u - expand(w, c) * (c - u), ("lcm", "dmd2", "progressive")
        ),
        "guidance: off by one, c + w (c - u)": Mutant(
            transitions, "guide", lambda g: lambda u, c, w: c + expand(w, c) * (c - u), ("lcm", "lcm-lora", "dmd2")
        ),
        "guidance: halves swapped": Mutant(transitions, "guide", lambda g: lambda u, c, w: g(c, u, w), PD),
        "prediction: eps taken for x0": Mutant(Denoiser, "x0", eps_for_x0, ("lcm", "dmd2", "progressive", "bk-sdm")),
        "time: network told t / 1000": Mutant(Denoiser, "raw", scaled_time, ("lcm", "dmd2", "progressive", "bk-sdm")),
        "time: boundary scalings on t / 1000": Mutant(LcmJump, "__call__", unscaled_jump, ("lcm", "dmd2")),
        "time: grid index off by one": Mutant(training_times, "grid", late_index, ("lcm", "bk-sdm", "slim")),
        "time: one-step times as rare as any": Mutant(GridTimes, "draw", even_times, ("edgefusion", "slim")),
        "time: t and s swapped in the pair": Mutant(GridPairs, "draw", swapped_pairs, ("lcm", "lcm-lora")),
        "time: t and s swapped in the solver": Mutant(
            steps,
            "ddim_chain",
            lambda g: lambda d, x, ts, c: g(d, x, ts[::-1], c),
            (*LCM, "tcd", "mlcm", "std", "direct-cm"),
        ),
        "time: mid and s swapped": Mutant(HalvingPairs, "draw", swapped_triples, PD),
        "time: t and s swapped in the inverse": Mutant(
            progressive, "inverse_ddim", lambda g: lambda p, x_s, x_t, t, s: g(p, x_s, x_t, s, t), PD
        ),
        "solver: fresh noise in the teacher's step": Mutant(
            steps, "ddim_chain", noisy_chain, (*LCM, "pcm", "hyper-sd", "tdd")
        ),
        "solver: fresh noise in the teacher's two steps": Mutant(Denoiser, "jump", noisy_jump, PD),
        "target: dropout masks of its own": Mutant(Turn, "share_dropout", lambda g: lambda self: None, LCM),
        "source: signal and noise swapped": Mutant(
            transitions, "noised", lambda g: lambda p, x0, t, noise: g(p, noise, t, x0), ("lcm", "progressive")
        ),
        "features: not in proportion to their size": Mutant(distillation, "feature_loss", unscaled_features, FEATURES),
        "stages: fed by each other": Mutant(
            oracle_distillation, "lead", lambda g: lambda *networks: None, ("a-sdm", "ppcl")
        ),
        "stages: always fed by the teacher": Mutant(oracle_distillation, "lead", never_off, ("ppcl",)),
        "reflow: noises mixed without keeping their size": Mutant(Annealing, "noise", unsized_noise, ("slim",)),
        "reflow: noise stays independent": Mutant(
            Annealing, "noise", lambda g: lambda s, z, turn: turn.noise(z), ("slim",)
        ),
        "reflow: from the pairs to independent noise": Mutant(
            Annealing, "beta", lambda g: lambda self, turn: 1.0 - g(self, turn), ("slim",)
        ),
        "reflow: x_t of the pair's own noise": Mutant(reflow.AnnealingReflow, "loss", unannealed, ("slim",)),
        "pairs: fresh noise on the way": Mutant(pairs, "ddim_chain", noisy_chain, ("slim",)),
        "pairs: one noise for all": Mutant(
            Turn, "noise", lambda g: lambda self, x: g(self, x[:1]).expand_as(x), ("slim",)
        ),
    }
)
SAMPLER_MUTANTS = {
    "ddim: fresh noise": ("ddim", with_noise),
    "euler: fresh noise": ("euler", with_noise),
    "lcm: noise after the last step": ("lcm", noise_at_the_end),
    "lcm: no noise": ("lcm", lambda rule: lambda step, spec: Update(rule(step, spec).a, rule(step, spec).b, 0.0)),
    "lcm: DDIM in its place": ("lcm", lambda rule: samplers.ddim),
    "tcd: gamma ignored": ("tcd", lambda rule: samplers.ddim),
    "tcd: always as stochastic as LCM": ("tcd", with_noise),
    "trig: lands where it left": (
        "trig", lambda rule: lambda step, spec: rule(type(step)(step.t, step.t, step.last, step.path, step.out), spec),
    ),
    "edm: noise not reduced by the floor": (
        "edm", lambda rule: lambda step, spec: replace(rule(step, spec), c=0.0 if step.last else step.to),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(plot, "plot_losses", lambda log, picture: None)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # an undetached target's metrics
@pytest.mark.parametrize(("name", "recipe"), [(n, r) for n, m in MUTANTS.items() for r in m.caught_by])
def test_mutant_is_caught(name, recipe, monkeypatch):
    mutant = MUTANTS[name]
    original = getattr(mutant.owner, mutant.attribute)
    monkeypatch.setattr(mutant.owner, mutant.attribute, mutant.faulty(original))
    failed = (check.name for check in checks_of(RECIPES[recipe]()) if not check.passed)
    assert any(not check.startswith("runs:") for check in failed), f"{name} passed {recipe}"


@pytest.mark.parametrize("name", SAMPLER_MUTANTS)
def test_sampler_mutant_is_caught(name, monkeypatch):
    sampler, faulty = SAMPLER_MUTANTS[name]
    assert all(check.passed for check in sampler_checks(sampler))
    monkeypatch.setitem(samplers.SAMPLERS, sampler, faulty(samplers.SAMPLERS[sampler]))
    assert not all(check.passed for check in sampler_checks(sampler))


def test_every_recipe_has_mutants():
    assert {recipe for mutant in MUTANTS.values() for recipe in mutant.caught_by} == set(RECIPES)

"""Continuous-time consistency as recipes: sCM and its relatives, on a student of any path.

Papers count in data of deviation 0.5; latents and the plane have 1. Guidance scales follow u + w (c - u).
"""

from dataclasses import replace

from ..distribution.also import Also
from ..distribution.discriminator import Adversary, Deceive, Judge
from ..distribution.distribution import DistributionMatching
from ..loop.player import PlayerSettings
from ..networks.critics import BLOCKS, TEACHER, CriticPlan
from ..networks.student import Student
from ..objectives.continuous import ContinuousConsistency
from ..parts.distances import Squared
from ..parts.gan_losses import R1, Hinge
from ..parts.laws import LogNormal
from ..parts.noised_rollout import NoisedRollout, StartMoreOften
from ..parts.tangent import TeacherField, tangent_of
from ..parts.times import LcmGrids, UniformScale
from ..parts.transitions import NoisedData, TeacherWalk
from .forms import learn, multistep, single
from .recipe import Needs, Recipe, RecipeFunction, Sampling, Stage


def scm(
    *, steps: int = 3000, lr: float = 1e-5, mean: float = 0.2, std: float = 1.6, warmup: float = 0.2,
    floor: float = 1.0, difference: float = 0.0, guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """sCM / sCD, Lu & Song 2024 (arXiv 2410.11081): tangent regression, normalised, with tangent warm-up.

    ln level ~ N(mean, std^2); those given are SANA-Sprint's for latents (the paper: -1 and 1.4 of data of deviation
    0.5). The paper's learned weight is left out: it divides the loss at each time by its size, which the normalisation
    makes nearly 1, and cancels the prior weight beside it. floor: beside the root mean square of the tangent; the
    paper's 0.1 is beside its norm over all elements. difference: step of central differences, 0 for an exact
    derivative. The paper: warm-up over 10,000 steps, 400,000 in all.
    """
    objective = _objective(mean, std, warmup, floor, difference, UniformScale(guidance, guidance))
    paper = "Lu & Song 2024, Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models, arXiv:2410.11081"
    return single("scm", paper, objective, learn(lr), steps, multistep(), family="continuous")


def sana_sprint(
    *, steps: int = 3000, lr: float = 7e-5, critic_lr: float = 1e-4, mean: float = 0.2, std: float = 1.6,
    warmup: float = 0.2, floor: float = 1.0, difference: float = 0.0, gan: float = 0.5, start_share: float = 0.5,
    renoise_mean: float = -0.6, renoise_std: float = 1.0, r1: float = 1e-2, guidance_low: float = 1.5,
    guidance_high: float = 6.0, guidance_default: float = 3.0, guidance_width: int = 256,
) -> Recipe:  # fmt: skip
    """SANA-Sprint, Chen et al. 2025 (arXiv 2503.09641): sCM, and LADD's adversary at weight `gan`; the scale an input.

    The adversary's samples are of times drawn anew, the noisiest with probability `start_share`; it is a hinge GAN on
    the frozen teacher's blocks at ln level ~ N(-0.6, 1), both sides at one time, with data under a neighbour's prompt
    as further fakes. gan 0 is sCM alone. The short change of the teacher's time embedding is left out. The paper: w of
    4, 4.5 and 5, warm-up over 4000 steps, lr 2e-6, the critic in turns with the student.
    """
    scale = UniformScale(guidance_low, guidance_high)
    trajectory = _objective(mean, std, warmup, floor, difference, scale)
    adversary = Adversary(
        student_weight=gan, critic_weight=1.0, times=LogNormal(renoise_mean, renoise_std), loss=Hinge(),
        same_times=True, misaligned=True, told=True, regularisers=(R1(r1, 8, on="features"),) if r1 else (),
    )  # fmt: skip
    rollout = NoisedRollout(StartMoreOften(LogNormal(mean, std), start_share), guidance=scale)
    terms = {"student": (Also(trajectory), Deceive(adversary)), "critic": (Judge(adversary),)}
    players = {"student": learn(lr), "critic": PlayerSettings(lr=critic_lr, betas=(0.0, 0.99), warmup=50, clip_norm=10)}
    objective = DistributionMatching(rollout=rollout, terms=terms) if gan else trajectory
    sampling = Sampling(
        sampler="lcm", grids=LcmGrids((1, 2, 4, 8)), stochastic=True, guidance_mode="embedded",
        guidance_default=guidance_default, guidance_range=(guidance_low, guidance_high),
    )  # fmt: skip
    stage = Stage(
        name="sana-sprint", objective=objective, steps=steps,
        player_settings={name: players[name] for name in objective.players},
    )  # fmt: skip
    return Recipe(
        name="sana-sprint", family="continuous", needs=Needs(critic=bool(gan)), stages=(stage,), sampling=sampling,
        student=Student(guidance_width=guidance_width), critic=CriticPlan(features=TEACHER, depths=BLOCKS, step=True),
        paper="Chen et al. 2025, SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency, arXiv:2503.09641",
    )  # fmt: skip


def tbcm(
    *, steps: int = 3000, lr: float = 1e-5, walk: int = 6, mean: float = 0.2, std: float = 1.6, warmup: float = 0.2,
    floor: float = 1.0, difference: float = 0.0, guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """TBCM, 2025 (hustvl/TBCM): sCM's loss at states of the teacher's own walks from noise, with no data.

    Each state has a walk of `walk` even steps of its own, where the paper takes all of one walk of 16; the rate is
    sCM's. Its filter of black pictures is left out. Unverified: the paper's calming of the tangent late in the run;
    decided: none.
    """
    base = _objective(mean, std, warmup, floor, difference, UniformScale(guidance, guidance))
    objective = replace(base, source=TeacherWalk(walk))
    paper = "TBCM 2025, Image-Free Timestep Distillation via Continuous-Time Consistency (github.com/hustvl/TBCM)"
    return single("tbcm", paper, objective, learn(lr), steps, multistep(), needs=Needs(data=False), family="continuous")


def _objective(
    mean: float, std: float, warmup: float, floor: float, difference: float, scale: UniformScale
) -> ContinuousConsistency:
    return ContinuousConsistency(
        times=LogNormal(mean, std), source=NoisedData(), field=TeacherField(), tangent=tangent_of(difference),
        distance=Squared(), guidance=scale, cfg=True, warmup=warmup, floor=floor,
    )  # fmt: skip


CONTINUOUS: dict[str, RecipeFunction] = {"scm": scm, "sana-sprint": sana_sprint, "tbcm": tbcm}

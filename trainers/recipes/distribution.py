"""Score distillation: the student's law is pulled to the teacher's by the gap between two scores."""

from typing import Any

from fewstep.models.spec import Boundary

from ..distribution.discriminator import Adversary, Deceive, Judge
from ..distribution.distribution import DistributionMatching
from ..distribution.score_gap import Denoise, ScoreGap
from ..loop.player import PlayerSettings
from ..networks.student import Student
from ..parts.distances import snr_plus_one
from ..parts.jumps import LcmJump
from ..parts.laws import LogNormal
from ..parts.rollout import BackwardSimulation
from ..parts.times import LcmGrids, UniformScale, UniformTimes
from .recipe import Needs, Recipe, RecipeFunction, Sampling, Stage

TOLD = Student(second_time=True)
"""A fake score that is told at which time a student's step began."""


def matcher(lr: float, every: int = 1) -> PlayerSettings:
    """A student that follows scores: a long fall of its rate, since the gap it follows is as noisy at the end."""
    return PlayerSettings(lr=lr, every=every, warmup=10, cooldown=0.6, clip_norm=10.0, ema={"kept": 0.98})


def follower(lr: float) -> PlayerSettings:
    """A fake score, which settles as the student does; what it follows moves on, so its gradients have no momentum."""
    return PlayerSettings(lr=lr, betas=(0.0, 0.999), warmup=10, cooldown=0.6, clip_norm=10.0)


def dmd2(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, every: int = 2, guidance: float = 3.0,
    gan_student: float = 3e-3, gan_critic: float = 1e-2, gan_share: float = 0.5, gap_mean: float = 0.5,
    gap_std: float = 1.2, counts: tuple[int, ...] = (1, 2, 4), grid_weights: tuple[float, ...] = (),
    misaligned: bool = False, extra_layers: tuple[int, ...] = (),
) -> Recipe:  # fmt: skip
    """DMD2, Yin et al. 2024 (arXiv 2405.14867): distribution matching, two time scales, GAN, backward simulation.

    Student: `carry(x, (mu_fake - mu_real) / |x - mu_real|) + gan_student softplus(-l(x_t))` every `every` steps. Fake:
    denoising of fresh student samples `+ gan_critic (softplus(l(x_t)) + softplus(-l(data_t)))` every step. One student
    serves all `counts`, drawn by grid_weights, so the fake is told from where a sample's step began; the teacher's
    guidance is taken in. ln level of both scores ~ N(gap_mean, gap_std^2), as EDM does (there -0.5, 1.2): even times of
    Stable Diffusion's path look at fine detail too rarely. The finer what the data tell apart, the lower gap_mean; too
    low costs pictures their layout. misaligned: data under a neighbour's caption are further fakes, so that the critic
    reads captions (as SANA-Sprint). extra_layers: transformer layers that the student has besides, by stage of a U-Net,
    which begin as the identity; teacher and fake stay as they are. The paper: a student for each step count, ratio 5 to
    10, lr 5e-7 to 1e-5, even times.
    """
    objective = DistributionMatching(
        rollout=BackwardSimulation(LcmGrids(counts), grid_weights, LcmJump()),
        terms=dmd2_terms(
            ScoreGap(times=LogNormal(gap_mean, gap_std), guidance=UniformScale(guidance, guidance), cfg=True),
            Adversary(
                student_weight=gan_student, critic_weight=gan_critic, times=UniformTimes(), share=gan_share,
                misaligned=misaligned,
            ),
        ),
        told=True,
    )  # fmt: skip
    stage = Stage(
        name="dmd2", objective=objective, steps=steps,
        player_settings={"student": matcher(lr, every), "fake": follower(fake_lr)},
    )  # fmt: skip
    return Recipe(
        name="dmd2",
        family="distribution",
        paper="Yin et al. 2024, Improved Distribution Matching Distillation, arXiv:2405.14867",
        needs=Needs(critic=True),
        student=Student(extra_layers=extra_layers),
        stages=(stage,),
        sampling=renoised(counts),
        fake=TOLD,
    )


def dmd2_terms(gap: ScoreGap, adversary: Adversary | None) -> dict[str, tuple[Any, ...]]:
    """Both players' terms: a gap and a GAN term, denoising at the gap's own times and the critic's loss."""
    denoise = Denoise(times=gap.times, weight=snr_plus_one)
    if adversary is None:
        return {"student": (gap,), "fake": (denoise,)}
    return {"student": (gap, Deceive(adversary)), "fake": (denoise, Judge(adversary))}


def renoised(counts: tuple[int, ...]) -> Sampling:
    """LCM's sampler on LCM's grid: clean estimates and fresh noise, with no guidance."""
    return Sampling(
        sampler="lcm", grids=LcmGrids(counts), stochastic=True, boundary=Boundary(),
        guidance_mode="none", guidance_default=1.0, guidance_range=(1.0, 1.0),
    )  # fmt: skip


DISTRIBUTION: dict[str, RecipeFunction] = {"dmd2": dmd2}

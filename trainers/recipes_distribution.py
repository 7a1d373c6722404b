"""Score distillation: the student's law is pulled to the teacher's by the gap between two scores."""

from fewstep.models.spec import Boundary

from .discriminator import Adversary, Deceive, Judge
from .distances import snr_plus_one
from .distribution import DistributionMatching
from .jumps import LcmJump
from .player import PlayerSettings
from .recipe import Needs, Recipe, RecipeFunction, Sampling, Stage
from .rollout import BackwardSimulation
from .score_gap import Denoise, ScoreGap
from .student import Student
from .times import LcmGrids, UniformScale, UniformTimes


def dmd2(
    *, steps: int = 2000, lr: float = 5e-5, fake_lr: float = 1e-4, every: int = 4, guidance: float = 3.0,
    gan_student: float = 3e-3, gan_critic: float = 1e-2, gan_share: float = 0.5,
    grid_weights: tuple[float, ...] = (2.0, 1.0, 1.0),
) -> Recipe:  # fmt: skip
    """DMD2, Yin et al. 2024 (arXiv 2405.14867): distribution matching, two time scales, GAN, backward simulation.

    Student: `carry(x, (mu_fake - mu_real) / |x - mu_real|) + gan_student softplus(-l(x_t))` every `every` steps. Fake:
    denoising of fresh student samples `+ gan_critic (softplus(l(x_t)) + softplus(-l(data_t)))` every step. One student
    serves 1, 2 and 4 steps; the teacher's guidance is taken in. The paper: ratio 5 to 10, lr 5e-7 to 1e-5.
    """
    grids = LcmGrids((1, 2, 4))
    adversary = Adversary(student_weight=gan_student, critic_weight=gan_critic, times=UniformTimes(), share=gan_share)
    gap = ScoreGap(times=UniformTimes(0.02, 0.98), guidance=UniformScale(guidance, guidance), cfg=True)
    objective = DistributionMatching(
        rollout=BackwardSimulation(grids, grid_weights, LcmJump()),
        terms={
            "student": (gap, Deceive(adversary)),
            "fake": (Denoise(times=UniformTimes(), weight=snr_plus_one), Judge(adversary)),
        },
    )
    players = {
        "student": PlayerSettings(lr=lr, every=every, warmup=10, cooldown=0.3, clip_norm=10.0, ema={"kept": 0.98}),
        "fake": PlayerSettings(lr=fake_lr, warmup=10, clip_norm=10.0),
    }
    return Recipe(
        name="dmd2",
        family="distribution",
        paper="Yin et al. 2024, Improved Distribution Matching Distillation, arXiv:2405.14867",
        needs=Needs(critic=True),
        student=Student(),
        stages=(Stage(name="dmd2", objective=objective, player_settings=players, steps=steps),),
        sampling=Sampling(
            sampler="lcm", grids=grids, stochastic=True, boundary=Boundary(),
            guidance_mode="none", guidance_default=1.0, guidance_range=(1.0, 1.0),
        ),
    )  # fmt: skip


DISTRIBUTION: dict[str, RecipeFunction] = {"dmd2": dmd2}

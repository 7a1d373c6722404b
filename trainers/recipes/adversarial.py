"""Adversarial recipes: the student's law is pulled to the data's, or a teacher's, by a critic.

Guidance scales follow u + w (c - u).
"""

from dataclasses import replace

from ..distribution.adaptation import ADAPTED, TaughtBy
from ..distribution.adversarial import TeacherAim, signal
from ..distribution.discriminator import Adversary, Deceive, Judge
from ..distribution.distribution import DistributionMatching, Term
from ..distribution.score_gap import Denoise, ScoreGap
from ..distribution.self_paced import BesideNext, DrawnWalk, NextCount
from ..errors import RecipeError
from ..loop.player import PlayerSettings
from ..networks.critics import BLOCKS, TEACHER, VISION, CriticPlan
from ..networks.student import PLAIN, Student
from ..parts.distances import snr_plus_one
from ..parts.gan_losses import R1, ApproximateR1, FiniteDifference, Hinge, Relativistic, Softplus
from ..parts.jumps import ToClean
from ..parts.laws import LogitNormal, LogNormal
from ..parts.noised_rollout import NoisedRollout, SampledTimes
from ..parts.pairs import Pairs
from ..parts.rollout import BackwardSimulation, Rollout
from ..parts.times import LcmGrids, UniformScale, UniformTimes
from ..pictures.parting import Cell
from .distribution import dmd2_terms, follower, matcher
from .forms import multistep
from .recipe import Needs, Recipe, RecipeFunction, Stage


def gdd(
    *, steps: int = 3000, lr: float = 5e-5, critic_lr: float = 1e-4, r1: float = 0.1, r1_every: int = 16,
    vision: str | None = None,
) -> Recipe:  # fmt: skip
    """GDD, Zheng & Yang 2024 (arXiv 2405.20750): the teacher's weights as the start of a GAN, and no other teacher.

    Student: `softplus(-l(x))`, x one step from noise; critic: `softplus(l(x)) + softplus(-l(data)) + r1/2 |grad l|^2`
    every `r1_every` steps, on frozen vision networks at several depths. The paper: VGG16 and EfficientNet, Adam with
    beta1 0, lr 1e-4 for both (CIFAR-10), r1 1e-4 of pictures' many pixels, five to ten million pictures.
    """
    return _gdd("gdd", steps, lr, critic_lr, R1(r1, r1_every), vision, PLAIN)


def gdd_i(
    *, steps: int = 3000, lr: float = 1e-4, critic_lr: float = 1e-4, r1: float = 0.1, r1_every: int = 16,
    vision: str | None = None,
) -> Recipe:  # fmt: skip
    """GDD-I, the same paper: blocks' convolutions and projections stay the teacher's, norms and attention train.

    The paper freezes every weight of a block with "conv" or "proj" in its name, most of the network;
    `fewstep distill gdd-i --dry-run` prints the share that trains.
    """
    student = Student(frozen=("conv", "proj"))
    return _gdd("gdd-i", steps, lr, critic_lr, R1(r1, r1_every), vision, student)


def _gdd(
    name: str, steps: int, lr: float, critic_lr: float, r1: R1, vision: str | None, student: Student
) -> Recipe:  # fmt: skip
    adversary = Adversary(student_weight=1.0, critic_weight=1.0, times=None, regularisers=(r1,))
    paper = "Zheng & Yang 2024, Diffusion Models Are Innate One-Step Generators, arXiv:2405.20750"
    rollout = BackwardSimulation(LcmGrids((1,)), (), ToClean())
    plan = CriticPlan(features=VISION, depths=(), text=True, network=vision)
    return _adversarial(
        name, paper, rollout, adversary, plan, steps, lr, critic_lr, counts=(1,), student=student, teacher=False
    )


def add(
    *, steps: int = 3000, lr: float = 5e-5, critic_lr: float = 1e-4, teacher_scale: float = 2.5, r1: float = 0.1,
    guidance: float = 3.0, vision: str | None = None,
) -> Recipe:  # fmt: skip
    """ADD, Sauer et al. 2023 (arXiv 2311.17042): a hinge GAN on decoded pictures beside a teacher's estimate.

    Student: `-mean l(x) + teacher_scale alpha_t |x - sg teacher_w(alpha x + sigma n, t)|^2`, x from data noised to
    one of four times, the noisiest noise alone. Critic: StyleGAN-T's heads on a frozen DINO, told the text, R1 on what
    the heads are fed. The paper: scale 2.5, R1 1e-5. Unverified: all constants; decided: these, in turns.
    """
    adversary = Adversary(
        student_weight=1.0,
        critic_weight=1.0,
        times=None,
        loss=Hinge(),
        regularisers=(R1(r1, on="features"),),
        told=True,
    )
    aim = TeacherAim(
        times=UniformTimes(), weight=signal, guidance=UniformScale(guidance, guidance), cfg=True, scale=teacher_scale
    )
    paper = "Sauer et al. 2023, Adversarial Diffusion Distillation, arXiv:2311.17042"
    rollout = NoisedRollout(SampledTimes(LcmGrids((1, 2, 4))))
    plan = CriticPlan(features=VISION, depths=(), text=True, step=True, network=vision)
    return _adversarial("add", paper, rollout, adversary, plan, steps, lr, critic_lr, (aim,))


def ladd(
    *, steps: int = 3000, lr: float = 5e-5, critic_lr: float = 1e-4, every: int = 1, ar1: float = 10.0,
    width: float = 0.1, mean: float = 0.0, std: float = 1.0, pairs: int = 8192, pair_steps: int = 64,
    time_weights: tuple[float, ...] = (0.4, 0.2, 0.2, 0.2), guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """LADD, Sauer et al. 2024 (arXiv 2403.12015): a GAN on the frozen teacher's features of noised latents, alone.

    Data are the guided teacher's own samples; both sides are noised alike, logit t ~ N(mean, std^2), and the student
    learns through the teacher: `softplus(-l(x_t))`. Critic: heads on several of its blocks, with aR1. FastGen: the
    student every second step, lr 2e-6, 4e-6. Unverified: times and their weights; decided: the paper's late ones.
    """
    adversary = Adversary(
        student_weight=1.0, critic_weight=1.0, times=LogitNormal(mean, std), loss=Softplus(),
        regularisers=(ApproximateR1(ar1, width),), same_times=True, same_noise=True, told=True,
    )  # fmt: skip
    paper = "Sauer et al. 2024, Fast High-Resolution Image Synthesis with LADD, arXiv:2403.12015"
    rollout = NoisedRollout(SampledTimes(LcmGrids((1, 2, 4)), time_weights))
    plan = CriticPlan(features=TEACHER, depths=BLOCKS, step=True)
    found = _adversarial("ladd", paper, rollout, adversary, plan, steps, lr, critic_lr, every=every)
    drawn = Pairs(count=pairs, steps=pair_steps, guidance=UniformScale(guidance, guidance))
    return replace(found, stages=(replace(found.stages[0], pairs=drawn),), needs=Needs(data=False, critic=True))


def asd(
    *, steps: int = 2000, lr: float = 5e-5, fake_lr: float = 1e-4, every: int = 4, guidance: float = 3.0,
    gan_student: float = 1e-2, gan_critic: float = 1e-2, slope: float = 1e-2,
    grid_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0), gap_mean: float = 0.5, gap_std: float = 1.2,
) -> Recipe:  # fmt: skip
    """ASD, Yang et al. 2025 (arXiv 2511.01419): DMD, and n steps held against the same student's n + 1.

    Student: DMD's gap `+ gan_student softplus(l_n(x^(n+1)) - l_n(x^n))`; fake: denoising `+ gan_critic` times the pair
    swapped, with R1 and R2 by finite differences of 0.05. l_n is the n-th of the heads on the fake's blocks; the last
    count has DMD alone; the fake is told where a step began. Half the walks stop on their way and have DMD alone, its
    exits being drawn as in Self Forcing (Huang et al. 2025). The paper: video, slope 600, blocks 12, 21, 29.
    Unverified: gan_student, how often walks end; decided: DMD2's size, half.
    """
    grids = LcmGrids((1, 2, 3, 4))
    walk = DrawnWalk(grids, grid_weights, ToClean())
    after = NextCount(walk)
    adversary = Adversary(
        student_weight=gan_student, critic_weight=gan_critic, times=UniformTimes(), loss=Relativistic(), real=after,
        regularisers=(FiniteDifference(slope),),
    )  # fmt: skip
    law = LogNormal(gap_mean, gap_std)
    gap = ScoreGap(times=law, guidance=UniformScale(guidance, guidance), cfg=True)
    terms: dict[str, tuple[Term, ...]] = {
        "student": (gap, BesideNext(Deceive(adversary), after)),
        "fake": (Denoise(times=law, weight=snr_plus_one), BesideNext(Judge(adversary), after)),
    }
    players = {"student": matcher(lr, every), "fake": follower(fake_lr)}
    stage = Stage(
        name="asd",
        objective=DistributionMatching(rollout=walk, terms=terms, told=True),
        player_settings=players,
        steps=steps,
    )
    return Recipe(
        name="asd", family="adversarial", needs=Needs(data=False, critic=True), student=PLAIN, stages=(stage,),
        sampling=replace(multistep(), grids=grids), fake=Student(second_time=True),
        critic=CriticPlan(depths=(0.25, 0.5, 0.75), by_steps=True),
        paper="Yang et al. 2025, One-Step Causal Video Generation via Adversarial Self-Distillation, arXiv:2511.01419",
    )  # fmt: skip


def msd(
    *, students: int = 4, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, every: int = 2,
    guidance: float = 3.0, gan_student: float = 3e-3, gan_critic: float = 1e-2, gan_share: float = 0.5,
    gap_mean: float = 0.5, gap_std: float = 1.2,
) -> Recipe:  # fmt: skip
    """MSD, Song et al. 2024 (arXiv 2410.23274): the conditions in K parts, a one-step student for each, served as one.

    Each is trained as DMD2's, on its own part alone: the gap of scores, a GAN on the fake's middle. A prompt goes to
    the nearest of K centroids of text embeddings, in training and in `fewstep serve --group OUT.group.json`; `steps`
    are those of each student. Left out: the paper's smaller students, which need a pretraining, and its regression.
    """
    if students < 1:
        raise RecipeError(f"msd: students is {students}; it must be 1 or more")
    grids = LcmGrids((1,))
    adversary = Adversary(student_weight=gan_student, critic_weight=gan_critic, times=UniformTimes(), share=gan_share)
    gap = ScoreGap(times=LogNormal(gap_mean, gap_std), guidance=UniformScale(guidance, guidance), cfg=True)
    objective = DistributionMatching(rollout=BackwardSimulation(grids, (), ToClean()), terms=dmd2_terms(gap, adversary))
    players = {"student": matcher(lr, every), "fake": follower(fake_lr)}
    stages = tuple(
        Stage(
            name=f"part-{k + 1}", objective=objective, player_settings=players, steps=steps,
            cell=Cell(k, students) if students > 1 else None,
        )
        for k in range(students)
    )  # fmt: skip
    return Recipe(
        name="msd", family="distribution", needs=Needs(critic=True), student=PLAIN, stages=stages,
        sampling=replace(multistep(), grids=grids),
        paper="Song et al. 2024, Multi-Student Diffusion Distillation for Better One-Step Generators, arXiv:2410.23274",
    )  # fmt: skip


def uni_dad(
    *, adapted: str | None = None, steps: int = 2000, lr: float = 5e-5, fake_lr: float = 1e-4, every: int = 4,
    source: float = 1.0, target: float = 1.0, guidance: float = 3.0, gan_student: float = 1.5e-2,
    gan_critic: float = 5e-2, gap_mean: float = 0.5, gap_std: float = 1.2,
) -> Recipe:  # fmt: skip
    """Uni-DAD, Bahram et al. 2025 (arXiv 2511.18281): distilled and adapted to a few pictures in one run.

    Student: `source` times DMD's gap to the teacher, `target` times that to a fine-tuned one (`adapted`), each by its
    own W, `+ gan_student` of a hinge GAN whose real data are the few pictures of the new domain; fake: denoising
    `+ gan_critic` of the hinge, patch heads on all its blocks. The paper: weights 1 and 1, GAN 0.015 and 0.05, ratio
    5, lr 2e-6, three steps. target 0 is DMD2 with these heads, on new data.
    """
    grids = LcmGrids((1, 2, 4))
    adversary = Adversary(student_weight=gan_student, critic_weight=gan_critic, times=UniformTimes(), loss=Hinge())
    law = LogNormal(gap_mean, gap_std)
    gap = ScoreGap(times=law, guidance=UniformScale(guidance, guidance), cfg=True)
    gaps = [TaughtBy(gap, role, weight) for role, weight in (("teacher", source), (ADAPTED, target)) if weight]
    objective = DistributionMatching(
        rollout=BackwardSimulation(grids, (2.0, 1.0, 1.0), ToClean()),
        terms={
            "student": (*gaps, Deceive(adversary)),
            "fake": (Denoise(times=law, weight=snr_plus_one), Judge(adversary)),
        },
        told=True,
    )
    players = {"student": matcher(lr, every), "fake": follower(fake_lr)}
    stage = Stage(name="uni-dad", objective=objective, player_settings=players, steps=steps)
    return Recipe(
        name="uni-dad", family="adversarial", needs=Needs(critic=True), student=PLAIN, stages=(stage,),
        sampling=replace(multistep(), grids=grids), critic=CriticPlan(depths=(), kernel=1), adapted=adapted,
        fake=Student(second_time=True),
        paper="Bahram et al. 2025, Unified Distillation and Adaptation of Diffusion Models, arXiv:2511.18281",
    )  # fmt: skip


def _adversarial(
    name: str, paper: str, rollout: Rollout, adversary: Adversary, plan: CriticPlan, steps: int, lr: float,
    critic_lr: float, beside: tuple[Term, ...] = (), *, counts: tuple[int, ...] = (1, 2, 4), student: Student = PLAIN,
    teacher: bool = True, every: int = 1,
) -> Recipe:  # fmt: skip
    """A student and a critic of frozen features; `beside` are the student's other terms."""
    objective = DistributionMatching(
        rollout=rollout, terms={"student": (*beside, Deceive(adversary)), "critic": (Judge(adversary),)}
    )
    betas = (0.0, 0.99)
    players = {
        "student": PlayerSettings(
            lr=lr, betas=betas, every=every, warmup=50, cooldown=0.4, clip_norm=10.0, ema={"kept": 0.998}
        ),
        "critic": PlayerSettings(lr=critic_lr, betas=betas, warmup=50, cooldown=0.4, clip_norm=10.0),
    }
    stage = Stage(name=name, objective=objective, player_settings=players, steps=steps)
    return Recipe(
        name=name, family="adversarial", paper=paper, needs=Needs(teacher=teacher, critic=True), student=student,
        stages=(stage,), sampling=replace(multistep(), grids=LcmGrids(counts)), critic=plan,
    )  # fmt: skip


ADVERSARIAL: dict[str, RecipeFunction] = {
    "gdd": gdd,
    "gdd-i": gdd_i,
    "add": add,
    "ladd": ladd,
    "asd": asd,
    "msd": msd,
    "uni-dad": uni_dad,
}

"""Distribution matching for students of several steps: split guidance, laws of trajectories, phases, any schedule.

Guidance scales follow u + w (c - u).
"""

from dataclasses import replace
from typing import Any

from ..distribution.also import Also
from ..distribution.backtrack import Trail
from ..distribution.discriminator import Adversary, Deceive
from ..distribution.distribution import DistributionMatching
from ..distribution.only import Only
from ..distribution.score_gap import Denoise, ScoreGap
from ..distribution.stabiliser import GuidanceAlone, MeanVariance
from ..distribution.subinterval import DenoiseLanding, DenoiseTrajectory
from ..errors import RecipeError
from ..networks.student import PLAIN
from ..parts.distances import snr_plus_one
from ..parts.jumps import LcmJump, ToClean
from ..parts.laws import LogNormal
from ..parts.rollout import BackwardSimulation, Rollout
from ..parts.score_times import START, Window
from ..parts.segments import RandomWalk, Segments
from ..parts.times import EvenGrids, LcmGrids, UniformScale, UniformTimes
from .continuous import scm
from .distribution import TOLD, dmd2_terms, follower, matcher, renoised
from .forms import chain
from .recipe import Needs, Recipe, RecipeFunction, Sampling, Stage

GRIDS = LcmGrids((1, 2, 4))
KEPT = 0.97
"""What a fake score keeps of itself when it merges with its student (SenseFlow, Flash-DMD)."""


def decoupled_dmd(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, every: int = 2, guidance: float = 3.0,
    gap_mean: float = 0.5, gap_std: float = 1.2, stabiliser: str = "matching", steady: float = 1.0,
    steady_mean: float = 0.0, steady_variance: float = 1.0,
) -> Recipe:  # fmt: skip
    """Decoupled DMD, Liu et al. 2025 (arXiv 2511.22677): guidance's part of the gap at noise and times of its own.

    `mu_real = mu_cond(x_t) + (w - 1) (mu_cond - mu_uncond)(x_t')`, t at any level, t' above the time at which the
    student's step began. No GAN. With one draw for both it is DMD2's gap, bit for bit. stabiliser: what holds samples
    together while guidance drives them, the "matching" of scores, or "mean-variance", the paper's prior on each
    sample's two moments (SDXL: 0.075 and 0.81), for which no fake is trained. Unverified: rates and ratio, the prior's
    weight `steady`; decided: DMD2's, 1.
    """
    if stabiliser not in ("matching", "mean-variance"):
        raise RecipeError(f"decoupled-dmd: stabiliser is {stabiliser!r}; choose matching or mean-variance")
    gap = ScoreGap(
        times=LogNormal(gap_mean, gap_std), guidance=UniformScale(guidance, guidance), cfg=True,
        augment=Window(UniformTimes(), START),
    )  # fmt: skip
    paper = "Liu et al. 2025, Decoupled DMD: CFG Augmentation as the Spear, arXiv:2511.22677"
    rollout = BackwardSimulation(GRIDS, (), LcmJump())
    terms, sampling = dmd2_terms(gap, None), renoised((1, 2, 4))
    if stabiliser == "mean-variance":
        held = MeanVariance(weight=steady, mean=steady_mean, variance=steady_variance)
        terms = {"student": (GuidanceAlone(gap), held)}
    return few_steps("decoupled-dmd", paper, rollout, terms, steps, lr, fake_lr, every, sampling, data=False)


def tdm(
    *, steps: int = 2000, lr: float = 5e-5, fake_lr: float = 4e-4, every: int = 1, count: int = 4,
    guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """TDM, Luo et al. 2025 (arXiv 2503.06674): the law of every state of the student's own trajectory, with no data.

    Each sample has a segment of its own, from t to s; `x_s = alpha_s x0 + sigma_s eps` is noised on to any time above
    s. Student: `carry(x0, (mu_fake - mu_real) / |x0 - mu_real|)` there. Fake: the student's x0 from there, weighted by
    min(SNR, 5) and by how likely the mixed noise is. The paper: 4 segments, ratio 1, the fake five times as fast.
    """
    scale, window = UniformScale(guidance, guidance), Window(UniformTimes(), low=0.02, high=0.98, margin=0.01)
    gap, fake = ScoreGap(times=window, guidance=scale, cfg=True), DenoiseTrajectory(times=window)
    terms = {"student": (gap,), "fake": (fake,)}
    paper = "Luo et al. 2025, Learning Few-Step Diffusion Models by Trajectory Distribution Matching, arXiv:2503.06674"
    rollout = Segments(EvenGrids((count,)))
    return few_steps("tdm", paper, rollout, terms, steps, lr, fake_lr, every, chain((count,)), data=False)


def phased_dmd(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 4e-4, every: int = 2, count: int = 4, phases: int = 2,
    guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """Phased DMD, Fan et al. 2025 (arXiv 2510.27684): distribution matching inside each interval of noise.

    A step from anywhere in a phase jumps to its end s; both scores are of `x_t | x_s`, t above s, and the fake learns
    the target that is unbiased there (`subinterval.landing_aim`). The paper has a student (LoRA) and a fake for each
    phase; here one student is told the time anyway, and one fake is told where the step began. Unverified: the weight
    of the fake's loss, min(1 / b^2, 10), and of the gap; decided: that, and DMD's.
    """
    if count % phases:
        raise RecipeError(f"phased-dmd: {count} steps do not part into {phases} phases; change either")
    scale, window = UniformScale(guidance, guidance), Window(UniformTimes(), low=0.02, high=0.98, margin=0.02)
    gap = ScoreGap(times=window, guidance=scale, cfg=True)
    terms = {"student": (gap,), "fake": (DenoiseLanding(times=window, weight=snr_plus_one),)}
    paper = "Fan et al. 2025, Phased DMD: Score Matching within Subintervals, arXiv:2510.27684"
    rollout = Segments(EvenGrids((count,)), phases, alone=False)
    return few_steps("phased-dmd", paper, rollout, terms, steps, lr, fake_lr, every, chain((count,)), data=False)


def cdm(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, every: int = 2, most: int = 6, off: float = 0.5,
    guidance: float = 3.0, keep: float = 0.999, gap_mean: float = 0.5, gap_std: float = 1.2,
) -> Recipe:  # fmt: skip
    """CDM, 2026 (github.com/byliutao/CDM): matching with no fixed steps, on random schedules and off the trajectory.

    The student walks 1 to `most` steps of random times by its own ODE; its estimate at a drawn step, or where the
    step's velocity leads at another time (with probability `off`; the paper has no guidance's part there), goes to
    Decoupled DMD's gap. Walks keep above a quarter of the path, so students of up to 4 even steps are sold. The fake
    also merges with the student. The paper: up to 28 steps, w = 7, ratio 2, merge 0.999. Unverified: guidance's own
    normaliser; decided: one for the whole gap, at least 0.1 as theirs.
    """
    gap = ScoreGap(
        times=LogNormal(gap_mean, gap_std), guidance=UniformScale(guidance, guidance), cfg=True, floor=0.1,
        augment=Window(UniformTimes(0.02), START, above=False),
    )  # fmt: skip
    paper = "CDM 2026, Continuous-Time Distribution Matching for Few-Step Distillation (github.com/byliutao/CDM)"
    rollout, sampling = RandomWalk(most, off=off), chain((1, 2, 4))
    return few_steps(
        "cdm", paper, rollout, dmd2_terms(gap, None), steps, lr, fake_lr, every, sampling, keep=keep, data=False
    )


def flash_dmd(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, every: int = 2, guidance: float = 3.0,
    split: float = 0.6, gan_student: float = 0.1, gan_critic: float = 0.1, keep: float = KEPT, gap_mean: float = 0.5,
    gap_std: float = 1.2,
) -> Recipe:  # fmt: skip
    """Flash-DMD, 2025 (arXiv 2511.20549), its distillation: matching where steps begin high, an adversary below.

    A step that begins above `split` of the path has the score gap alone, one below it the GAN term alone, on its clean
    estimate noised anew. The fake learns by denoising and merges with the student, `fake <- keep fake + (1 - keep) G`.
    The paper's critic looks at pictures by SAM; here it looks at latents by the fake's middle. Its preferences among
    samples are another recipe (pso). Unverified: split and weights; decided: 0.6, so that of four steps two are below,
    and 0.1.
    """
    adversary = Adversary(student_weight=gan_student, critic_weight=gan_critic, times=UniformTimes(0.0, split))
    gap = ScoreGap(times=LogNormal(gap_mean, gap_std), guidance=UniformScale(guidance, guidance), cfg=True)
    both = dmd2_terms(gap, adversary)
    terms = {"student": (Only(gap, split, 1.0), Only(Deceive(adversary), 0.0, split)), "fake": both["fake"]}
    paper = "Flash-DMD 2025, High-Fidelity Few-Step Generation with Joint Reinforcement Learning, arXiv:2511.20549"
    rollout, sampling = BackwardSimulation(GRIDS, (1.0, 1.0, 2.0), LcmJump()), renoised((1, 2, 4))
    return few_steps("flash-dmd", paper, rollout, terms, steps, lr, fake_lr, every, sampling, keep=keep, critic=True)


def rcm(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, every: int = 2, guidance: float = 3.0,
    consistency: float = 1.0, mean: float = -0.8, std: float = 1.6, warmup: float = 0.2, floor: float = 1.0,
    difference: float = 0.0, gap_mean: float = 0.0, gap_std: float = 1.6,
) -> Recipe:  # fmt: skip
    """rCM, Zheng et al. 2025 (arXiv 2510.08431): sCM on data, which covers, and DMD on samples, which sharpens.

    `consistency sCM + carry(x, (mu_fake - mu_real) / |x - mu_real|)`, ln level ~ N(-0.8, 1.6^2) on data and
    N(0, 1.6^2) on samples; the fake learns with weight 1 / sin^2. The paper: weights 100 and 1 of sums over elements,
    where its tangent is divided by its norm over all of them; ratio 5, and a power average.
    """
    law = LogNormal(gap_mean, gap_std)
    gap = ScoreGap(times=law, guidance=UniformScale(guidance, guidance), cfg=True)
    base = scm(mean=mean, std=std, warmup=warmup, floor=floor, difference=difference, guidance=guidance)
    terms = {
        "student": (gap, Also(base.objective, consistency)),
        "fake": (Denoise(times=law, weight=snr_plus_one),),
    }
    paper = "Zheng et al. 2025, Large Scale Diffusion Distillation via Score-Regularized Consistency, arXiv:2510.08431"
    rollout, sampling = BackwardSimulation(GRIDS, (), ToClean()), replace(renoised((1, 2, 4)), boundary=None)
    return few_steps("rcm", paper, rollout, terms, steps, lr, fake_lr, every, sampling)


def disback(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, every: int = 2, guidance: float = 3.0,
    points: int = 4, out: float = 0.1, back: float = 0.5, gan_student: float = 3e-3, gan_critic: float = 1e-2,
    gap_mean: float = 0.5, gap_std: float = 1.2,
) -> Recipe:  # fmt: skip
    """DisBack, Zhang et al. 2024 (arXiv 2408.15991): DMD2 towards a trail of scores that leads back to the teacher.

    For the share `out` of the run the fake alone learns, on samples of the student as it began, and leaves `points`
    snapshots; then these stand for the teacher, the last first, until the share `back`. The paper: snapshots each 100
    steps, a switch each 1000, w = 8, one step.
    """
    trail = Trail(points, out, back)
    gap = ScoreGap(times=LogNormal(gap_mean, gap_std), guidance=UniformScale(guidance, guidance), cfg=True, trail=trail)
    adversary = Adversary(student_weight=gan_student, critic_weight=gan_critic, times=UniformTimes(), share=0.5)
    terms = dmd2_terms(gap, adversary)
    terms["student"] = tuple(Only(term, after=out) for term in terms["student"])
    paper = "Zhang et al. 2024, Distribution Backtracking Builds A Faster Convergence Trajectory, arXiv:2408.15991"
    rollout = BackwardSimulation(LcmGrids((1,)), (), LcmJump())
    plain = few_steps("disback", paper, rollout, terms, steps, lr, fake_lr, every, renoised((1,)), critic=True)
    (stage,) = plain.stages
    players = {**stage.player_settings, "fake": replace(stage.player_settings["fake"], ema=trail.averages)}
    return replace(plain, stages=(replace(stage, player_settings=players),))


def few_steps(
    name: str, paper: str, rollout: Rollout, terms: dict[str, tuple[Any, ...]], steps: int, lr: float, fake_lr: float,
    every: int, sampling: Sampling, *, keep: float | None = None, data: bool = True, critic: bool = False,
) -> Recipe:  # fmt: skip
    """A student of several steps and, where it has terms, a fake told where each began, merging with the student
    where it keeps a share `keep` of itself."""
    matched = "fake" in terms
    objective = DistributionMatching(rollout=rollout, terms=terms, told=matched)
    fake = follower(fake_lr) if keep is None else replace(follower(fake_lr), merge={"student": keep})
    players = {"student": matcher(lr, every), "fake": fake} if matched else {"student": matcher(lr, 1)}
    stage = Stage(name=name, objective=objective, steps=steps, player_settings=players)
    return Recipe(
        name=name, family="distribution", paper=paper, needs=Needs(data=data, critic=critic), student=PLAIN,
        stages=(stage,), sampling=sampling, fake=TOLD if matched else PLAIN,
    )  # fmt: skip


MULTISTEP: dict[str, RecipeFunction] = {
    "decoupled-dmd": decoupled_dmd, "tdm": tdm, "phased-dmd": phased_dmd, "cdm": cdm,
    "flash-dmd": flash_dmd, "rcm": rcm, "disback": disback,
}  # fmt: skip

"""Samples corrected or compared as laws: Langevin steps, mixtures of scores, a ratio alone, random embeddings."""

from dataclasses import replace

from ..distribution.also import Also
from ..distribution.density_ratio import ClimbRatio
from ..distribution.discriminator import Adversary, Deceive, Judge
from ..distribution.distribution import DistributionMatching
from ..distribution.embedding import EmbeddingLoss, RandomNetworks
from ..distribution.expectation import Expectation, Langevin
from ..distribution.mixture_scores import AmortisedGap, DenoiseMixture, FitRatio, RatioGap, Shares
from ..distribution.score_gap import ScoreGap
from ..errors import RecipeError
from ..networks.student import Student
from ..parts.distances import level, snr_plus_one
from ..parts.jumps import ToClean
from ..parts.rollout import BackwardSimulation
from ..parts.times import LcmGrids, UniformScale
from .consistency import cd
from .identity import FAKE_TIMES, GAP_TIMES, WITH_DATA, from_noise, gap_times, plain_fake
from .recipe import Needs, Recipe, RecipeFunction


def emd(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, langevin_steps: int = 4, noise_step: float = 0.16,
    start_step: float = 1.6e-5, guidance: float = 3.0, start: float = 0.625,
    gap_mean: float | None = None, gap_std: float = 1.2,
) -> Recipe:  # fmt: skip
    """EM distillation, Xie et al. 2024 (arXiv 2405.16852): samples corrected by Langevin steps, then learned.

    `|g(z_K) - sg(g(z_K) + sigma / alpha c)|^2`, (z_K, c) by `langevin_steps` joint steps of the noise e and the start z
    under p / q; c is what the scores have added to e, the noise itself is left out. The paper: 16 steps, the start at
    log SNR -6.
    Unverified: the step sizes; decided: 0.4^2 and 0.004^2. One step of e alone is the score gap.
    """
    times, fake_times = gap_times(gap_mean, gap_std)
    scale = UniformScale(guidance, guidance)
    term = Expectation(
        times=times, guidance=scale, cfg=True, langevin=Langevin(
            steps=langevin_steps, noise_step=noise_step, start_step=start_step),
    )  # fmt: skip
    return from_noise(
        "emd", "Xie et al. 2024, EM Distillation for One-step Diffusion Models, arXiv:2405.16852",
        (term,), (plain_fake(fake_times),), (lr, fake_lr), steps, start=start,
    )  # fmt: skip


def smt(
    *, steps: int = 2000, lr: float = 5e-5, fake_lr: float = 2e-4, every: int = 4, ends: float = 0.25,
    gan_student: float = 3e-3, gan_critic: float = 1e-2, width: int = 256, start: float = 0.625,
) -> Recipe:  # fmt: skip
    """Score-of-mixture training, Jayashankar et al. 2025 (arXiv 2502.09609): no teacher; its weights are the start.

    One network, told a, gives the clean estimate mu_a of a p + (1 - a) q for every a; the student descends mu_0 - mu_a
    at the length of mu_0 - mu_1 over |x - mu_1|, a even on (0, 1]; and DMD2's GAN. The paper: one update in five of the
    student, rates 1 to 5 (1e-4 and 5e-4) or 1 to 10, the GAN at 3e-3 and 1e-2.
    Unverified: how often a is 0, 1/2 or 1 in the fake's training; decided: one time in four.
    """
    adversary = Adversary(student_weight=gan_student, critic_weight=gan_critic, times=GAP_TIMES)
    fake = DenoiseMixture(times=FAKE_TIMES, weight=snr_plus_one, shares=Shares(ends))
    return from_noise(
        "smt", "Jayashankar, Ryu & Wornell 2025, Score-of-Mixture Training, arXiv:2502.09609",
        (AmortisedGap(times=GAP_TIMES), Deceive(adversary)), (fake, Judge(adversary)), (lr, fake_lr), steps,
        start=start, every=every, needs=Needs(teacher=False, critic=True), fake_plan=Student(guidance_width=width),
    )  # fmt: skip


def smd(
    *, steps: int = 2000, lr: float = 5e-5, fake_lr: float = 1e-4, ends: float = 0.25, fit: float = 1.0,
    deceive: float = 3e-3, guidance: float = 3.0, start: float = 0.625,
) -> Recipe:  # fmt: skip
    """Score-of-mixture distillation, the same paper (arXiv 2502.09609), with a teacher.

    `lam (mu_fake - mu_real) / (|x - mu_real| a)`, lam = sigmoid(l + logit a); the critic's l makes
    lam mu_real + (1 - lam) mu_fake denoise samples and data in the shares 1 - a and a. The paper: deceive 3e-3, lr of l
    5e-5.
    Unverified: the weight of the fit beside the fake's denoising; decided: 1.
    """
    scale = UniformScale(guidance, guidance)
    gap = RatioGap(times=GAP_TIMES, guidance=scale, cfg=True, deceive=deceive)
    fitted = FitRatio(times=FAKE_TIMES, guidance=scale, cfg=True, weight=snr_plus_one, shares=Shares(ends), scale=fit)
    return from_noise(
        "smd", "Jayashankar, Ryu & Wornell 2025, Score-of-Mixture Distillation, arXiv:2502.09609",
        (gap,), (plain_fake(), fitted), (lr, fake_lr), steps, start=start, needs=WITH_DATA,
    )  # fmt: skip


def ratio_one_step(
    *, steps: int = 2000, lr: float = 4e-5, critic_lr: float = 2e-4, every: int = 1, start: float = 0.625,
    gap_mean: float | None = None, gap_std: float = 1.2,
) -> Recipe:  # fmt: skip
    """One-step training without distillation, Zhang et al. 2025 (arXiv 2502.08005): a ratio in place of the scores.

    A critic told the time learns l = log(p_t / q_t) from noised data and samples; the student descends `-w_t l(x_t)`.
    The teacher gives its weights to both and is never asked.
    Unverified: w_t and the ratio of updates; decided: sigma / alpha, which makes it the gap of noise estimates, and 1.
    """
    times, _ = gap_times(gap_mean, gap_std)
    adversary = Adversary(student_weight=0.0, critic_weight=1.0, times=times)
    return from_noise(
        "ratio-one-step", "Zhang et al. 2025, Towards Training One-Step Diffusion Models Without Distillation, "
        "arXiv:2502.08005", (ClimbRatio(times=times, weight=level),), (Judge(adversary),), (lr, critic_lr), steps,
        start=start, every=every, needs=Needs(teacher=False, critic=True),
    )  # fmt: skip


def embedding_loss(
    *, base: str = "dmd", steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, weight: float = 1.0,
    networks: int = 2, width: int = 64, kernel: str = "gaussian", guidance: float = 3.0, start: float = 0.625,
    grid_weights: tuple[float, ...] = (1.0, 1.0, 4.0), gap_mean: float | None = None, gap_std: float = 1.2,
) -> Recipe:  # fmt: skip
    """Embedding loss ("Efficient Diffusion Distillation via Embedding Loss"): another method and an MMD beside it.

    The base's own objective and `weight MMD^2` of samples and data in the features of random networks, drawn anew each
    step. base: "dmd", DMD's score gap; "diff-instruct", the gap that is not divided by the teacher's error; of both one
    student serves 1, 2 and 4 steps, as in DMD2's recipe, so the fake is told where a step began. "cd", consistency
    distillation, whose samples of one step from noise the MMD compares; it has no fake and learns at all times, so
    fake_lr, start, grid_weights and gap_mean are not for it, and its own recipe's lr is 3e-4.
    Unverified: the number of networks, the kernel and the weight; decided: 2, Gaussian at three widths, 1.
    """
    if base not in ("dmd", "diff-instruct", "cd"):
        raise RecipeError(f"embedding-loss: base is {base!r}; choose one of dmd, diff-instruct, cd")
    term = EmbeddingLoss(weight=weight, networks=RandomNetworks(count=networks, width=width), kernel=kernel)
    if base == "cd":
        return _beside(cd(steps=steps, lr=lr, guidance=guidance), term)
    times, fake_times = gap_times(gap_mean, gap_std)
    gap = ScoreGap(times=times, guidance=UniformScale(guidance, guidance), cfg=True)
    gap = gap if base == "dmd" else replace(gap, floor=None)
    return from_noise(
        "embedding-loss", EMBEDDED, (gap, term), (plain_fake(fake_times),), (lr, fake_lr), steps, start=start,
        counts=(1, 2, 4), weights=grid_weights, told=True, needs=Needs(),
    )  # fmt: skip


EMBEDDED = "Efficient Diffusion Distillation via Embedding Loss, 2025"


def _beside(base: Recipe, term: EmbeddingLoss) -> Recipe:
    """A recipe of the student alone, sold as it is, with the term on its samples of one step from pure noise."""
    (stage,) = base.stages
    objective = DistributionMatching(
        rollout=BackwardSimulation(LcmGrids((1,)), (), ToClean()), terms={"student": (Also(stage.objective), term)}
    )
    stage = replace(stage, name="embedding-loss", objective=objective)
    return replace(base, name="embedding-loss", family="distribution", paper=EMBEDDED, stages=(stage,))


MIXTURE: dict[str, RecipeFunction] = {
    "emd": emd, "smt": smt, "smd": smd, "ratio-one-step": ratio_one_step, "embedding-loss": embedding_loss,
}  # fmt: skip

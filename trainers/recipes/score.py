"""One-step generators by score distillation: Diff-Instruct, VSD, SwiftBrush, SNOOPI, DMD, f-distill.

Guidance scales follow u + w (c - u). Levels are in units of data of deviation 1, twice the papers'.
"""

from dataclasses import replace
from typing import Any

from ..distribution.anchor import Regress
from ..distribution.distribution import DistributionMatching
from ..distribution.score_gap import Denoise, ScoreGap, signal_times_noise
from ..errors import RecipeError
from ..networks.student import PLAIN, Student
from ..parts.distances import Squared, snr, snr_plus_one
from ..parts.divergences import Divergence
from ..parts.jumps import LcmJump
from ..parts.laws import LogNormal
from ..parts.pairs import Pairs
from ..parts.rollout import BackwardSimulation
from ..parts.times import LcmGrids, UniformScale, UniformTimes
from .distribution import dmd2, dmd2_terms, follower, matcher, renoised
from .recipe import Needs, Recipe, RecipeFunction, Stage

ONE_STEP = LcmGrids((1,))


def diff_instruct(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, every: int = 1, guidance: float = 3.0,
    gap_mean: float = 0.5, gap_std: float = 1.2,
) -> Recipe:  # fmt: skip
    """Diff-Instruct, Luo et al. 2023 (arXiv 2305.18455): the reverse KL over all noise levels, for one step, no data.

    `< x, sg (mu_fake - mu_real) >`, ln level ~ N(gap_mean, gap_std^2); the fake by denoising at the same levels, in
    turns. The paper: no guidance (set guidance=1), ratio 1, lr 1e-5, gap_mean -0.5.
    """
    law = LogNormal(gap_mean, gap_std)
    gap = ScoreGap(times=law, guidance=UniformScale(guidance, guidance), cfg=True, floor=None)
    terms = {"student": (gap,), "fake": (Denoise(times=law, weight=snr_plus_one),)}
    paper = "Luo et al. 2023, Diff-Instruct: Transferring Knowledge From Pre-trained Diffusion Models, arXiv:2305.18455"
    return one_step("diff-instruct", paper, terms, steps, lr, fake_lr, every)


def vsd(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 4e-4, every: int = 1, rank: int = 16,
    student_rank: int | None = None, guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """VSD, Wang et al. 2023 (ProlificDreamer, arXiv 2305.16213): its two networks with a generator for the scene.

    `< x, sg sigma^2 (eps_real - eps_fake) >`, which is `alpha sigma (mu_fake - mu_real)`, even times; the fake is LoRA
    beside the teacher. The paper optimises particles that a camera sees, under w = 7.5 + 1, LoRA at ten times the
    rate; here x is G(z), so there is no camera and the fake is told the prompt alone. student_rank: the student is LoRA
    too, so that memory holds one network for teacher, fake and student (`trainers.networks.bank`); None trains all of
    it. LoRA asks for a higher lr, as in lcm-lora.
    """
    gap = ScoreGap(
        times=UniformTimes(0.02, 0.98), guidance=UniformScale(guidance, guidance), cfg=True, floor=None,
        weight=signal_times_noise,
    )  # fmt: skip
    terms = {"student": (gap,), "fake": (Denoise(times=UniformTimes(), weight=snr),)}
    paper = "Wang et al. 2023, ProlificDreamer: Variational Score Distillation, arXiv:2305.16213"
    return one_step("vsd", paper, terms, steps, lr, fake_lr, every, lora(rank), student=_learner(student_rank))


def swiftbrush(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 4e-4, every: int = 1, rank: int = 16,
    student_rank: int | None = None, scale: float = 4.5, nulled: float = 0.1,
) -> Recipe:  # fmt: skip
    """SwiftBrush, Nguyen & Tran 2024 (arXiv 2312.05239): VSD for a one-step generator, both scores under one guidance.

    `alpha sigma (mu_fake^w - mu_real^w)`, even times; the fake is LoRA, told nothing in `nulled` of its rows so that
    it can be guided. Where both are guided alike the student takes in no guidance: it stands still where its law is
    the teacher's own. The paper: w = 7.5, ratio 1, no data. student_rank: as in vsd.
    """
    paper = "Nguyen & Tran 2024, SwiftBrush: One-Step Text-to-Image Diffusion Model, arXiv:2312.05239"
    terms = _guided_alike(scale, scale, nulled)
    return one_step("swiftbrush", paper, terms, steps, lr, fake_lr, every, lora(rank), student=_learner(student_rank))


def snoopi(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 4e-4, every: int = 1, rank: int = 16,
    student_rank: int | None = None, scale_low: float = 2.0, scale_high: float = 7.5, nulled: float = 0.1,
) -> Recipe:  # fmt: skip
    """SNOOPI's PG-SB, Nguyen et al. 2024 (arXiv 2412.02687): SwiftBrush with the scale drawn anew for every sample.

    Its negative-prompt attention (NASA) is a way of sampling that any student has. Unverified: the range of scales;
    decided: 2 to 7.5, SwiftBrush's being its end; a range of no width is SwiftBrush. student_rank: as in vsd.
    """
    if scale_low > scale_high:
        raise RecipeError(f"snoopi: scales from {scale_low} to {scale_high}; the lower comes first")
    paper = "Nguyen et al. 2024, SNOOPI: Supercharged One-step Diffusion Distillation, arXiv:2412.02687"
    terms = _guided_alike(scale_low, scale_high, nulled)
    return one_step("snoopi", paper, terms, steps, lr, fake_lr, every, lora(rank), student=_learner(student_rank))


def dmd(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, every: int = 1, guidance: float = 3.0,
    regression: float = 0.25, pairs: int = 8192, pair_steps: int = 64, gap_mean: float = 0.5, gap_std: float = 1.2,
) -> Recipe:  # fmt: skip
    """DMD, Yin et al. 2024 (arXiv 2311.18828): DMD2's gap, and an anchor at the teacher's own pairs instead of a GAN.

    `carry(x, (mu_fake - mu_real) / |x - mu_real|) + regression |G(z) - y|^2`, y the teacher's walk from z. The paper
    compares pairs by LPIPS on pictures; here latents are compared. Unverified: regression = 0.25; decided: kept.
    """
    gap = ScoreGap(times=LogNormal(gap_mean, gap_std), guidance=UniformScale(guidance, guidance), cfg=True)
    terms = dmd2_terms(gap, None)
    terms["student"] += (Regress(jump=LcmJump(), distance=Squared(), weight=regression),)
    paper = "Yin et al. 2024, One-step Diffusion with Distribution Matching Distillation, arXiv:2311.18828"
    plan = Pairs(count=pairs, steps=pair_steps, guidance=UniformScale(guidance, guidance))
    return one_step("dmd", paper, terms, steps, lr, fake_lr, every, pairs=plan)


def f_distill(
    *, divergence: str = "js", steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, every: int = 2,
    guidance: float = 3.0, bins: int = 10, gap_mean: float = 0.5, gap_std: float = 1.2,
) -> Recipe:  # fmt: skip
    """f-distill, Xu et al. 2025 (arXiv 2502.15681): DMD2's gap weighted by `h(r) = r^2 f''(r)`, r = p / q.

    divergence: js, kl (covers every mode), rkl (DMD2 itself), softened, neyman, hellinger, jeffreys. r is the
    exponential of the critic's logit, divided by its mean in each of `bins` parts of the path, and h by its mean over
    the batch. The paper carries those means over steps with a rate of 0 to 0.5; here it is 0.
    """
    base = dmd2(steps=steps, lr=lr, fake_lr=fake_lr, every=every, guidance=guidance, gap_mean=gap_mean, gap_std=gap_std)
    return f_divergence(base, Divergence(divergence, bins=bins))


def f_divergence(base: Recipe, divergence: Divergence) -> Recipe:
    """The recipe with another divergence in its score gaps."""
    (stage,) = base.stages
    objective: Any = stage.objective
    weighed = [replace(term, divergence=divergence) if isinstance(term, ScoreGap) else term
               for term in objective.terms["student"]]  # fmt: skip
    objective = replace(objective, terms={**objective.terms, "student": tuple(weighed)})
    paper = "Xu et al. 2025, One-step Diffusion Models with f-Divergence Distribution Matching, arXiv:2502.15681"
    return replace(base, name="f-distill", paper=paper, stages=(replace(stage, name="f-distill", objective=objective),))


def lora(rank: int, setting: str = "rank") -> Student:
    """Errors: `RecipeError` naming the setting that the rank came by."""
    if rank < 1:
        raise RecipeError(f"{setting} is {rank}; LoRA has a rank of 1 or more")
    return Student(lora_rank=rank)


def _learner(rank: int | None) -> Student:
    return PLAIN if rank is None else lora(rank, "student_rank")


def one_step(
    name: str, paper: str, terms: dict[str, tuple[Any, ...]], steps: int, lr: float, fake_lr: float, every: int,
    fake: Student = PLAIN, pairs: Pairs | None = None, student: Student = PLAIN,
) -> Recipe:  # fmt: skip
    """A generator of one step from noise, with no data but prompts."""
    objective = DistributionMatching(rollout=BackwardSimulation(ONE_STEP, (), LcmJump()), terms=terms)
    stage = Stage(
        name=name, objective=objective, steps=steps, pairs=pairs,
        player_settings={"student": matcher(lr, every), "fake": follower(fake_lr)},
    )  # fmt: skip
    return Recipe(
        name=name, family="distribution", paper=paper, needs=Needs(data=False), student=student, stages=(stage,),
        sampling=renoised((1,)), fake=fake,
    )  # fmt: skip


def _guided_alike(low: float, high: float, nulled: float) -> dict[str, tuple[Any, ...]]:
    gap = ScoreGap(
        times=UniformTimes(0.02, 0.98), guidance=UniformScale(low, high), cfg=True, fake_cfg=True, floor=None,
        weight=signal_times_noise,
    )  # fmt: skip
    return {"student": (gap,), "fake": (Denoise(times=UniformTimes(), weight=snr, nulled=nulled),)}


SCORE: dict[str, RecipeFunction] = {
    "diff-instruct": diff_instruct, "vsd": vsd, "swiftbrush": swiftbrush, "snoopi": snoopi, "dmd": dmd,
    "f-distill": f_distill,
}  # fmt: skip

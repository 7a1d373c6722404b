"""Score identities: students whose law is matched by a Fisher divergence, with gradients through both networks."""

from dataclasses import replace

from ..distribution.discriminator import Adversary, Deceive, Judge
from ..distribution.distribution import DistributionMatching, Term
from ..distribution.forgetting import Forgetting, Swap
from ..distribution.score_gap import Denoise
from ..distribution.score_identity import Force, Huber, Linear, RatioWeight, ScoreIdentity
from ..errors import RecipeError
from ..loop.player import PlayerSettings
from ..networks.critics import ENCODER, CriticPlan
from ..networks.student import Student
from ..parts.distances import snr_plus_one
from ..parts.jumps import ToClean
from ..parts.laws import Law, LogNormal
from ..parts.rollout import BackwardSimulation
from ..parts.times import StartedGrids, UniformScale, UniformTimes
from .recipe import Needs, Recipe, RecipeFunction, Sampling, Stage

DATA_FREE, WITH_DATA = Needs(data=False), Needs(critic=True)
GAP_TIMES, FAKE_TIMES = UniformTimes(0.02, 0.98), UniformTimes()


def gap_times(mean: float | None, std: float) -> tuple[Law, Law]:
    """Where scores are compared, and where the fake learns: at even times, as the papers do, or both at
    ln level ~ N(mean, std^2), for data whose detail asks for it."""
    return (GAP_TIMES, FAKE_TIMES) if mean is None else (LogNormal(mean, std), LogNormal(mean, std))


def from_noise(
    name: str, paper: str, student: tuple[Term, ...], fake: tuple[Term, ...], rates: tuple[float, float], steps: int, *,
    start: float = 0.625, counts: tuple[int, ...] = (1,), weights: tuple[float, ...] = (), needs: Needs = DATA_FREE,
    every: int = 1, told: bool = False,
    fake_plan: Student | None = None, critic: CriticPlan | None = None, forget: Swap | None = None,
) -> Recipe:  # fmt: skip
    """A student sampled from noise at `start` of the path, its own samples at all step counts, a fake score beside it.

    rates: the student's and the fake's. told: the fake knows at which time a sample's step began.
    """
    grids = StartedGrids(counts, start)
    objective = DistributionMatching(
        rollout=BackwardSimulation(grids, weights, ToClean()), terms={"student": student, "fake": fake}, told=told
    )
    plan = fake_plan or Student()
    players = {
        "student": PlayerSettings(
            lr=rates[0], betas=(0.0, 0.999), every=every, warmup=10, cooldown=0.6, clip_norm=10.0, ema={"kept": 0.99}
        ),
        "fake": PlayerSettings(lr=rates[1], betas=(0.0, 0.999), warmup=10, cooldown=0.6, clip_norm=10.0),
    }
    return Recipe(
        name=name, family="distribution", paper=paper, needs=needs, student=Student(),
        stages=(Stage(name=name, objective=objective, player_settings=players, steps=steps, forget=forget),),
        sampling=Sampling(
            sampler="lcm", grids=grids, stochastic=True,
            guidance_mode="none", guidance_default=1.0, guidance_range=(1.0, 1.0),
        ),
        fake=replace(plan, second_time=True) if told else plan, critic=critic,
    )  # fmt: skip


def plain_fake(times: Law = FAKE_TIMES, guidance: float = 1.0, nulled: float = 0.0) -> Denoise:
    """The fake score's own training; a v error, as EDM's weights are."""
    return Denoise(times=times, weight=snr_plus_one, guidance=guidance, nulled=nulled)


def sid(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, alpha: float = 1.0, guidance: float = 3.0,
    fake_guidance: float = 1.0, start: float = 0.625, sida: bool = False, gan_student: float = 1e-4,
    gan_critic: float = 1e-2, gap_mean: float | None = None, gap_std: float = 1.2, normalised: bool = True,
) -> Recipe:  # fmt: skip
    """SiD, Zhou et al. 2024 (arXiv 2404.04057); with long and short guidance 2406.01561; `sida` 2410.14919.

    `(mu_real - mu_fake) . ((mu_real - x) - alpha (mu_real - mu_fake)) / |x - mu_real|`, gradients through x, x_t and
    both networks. normalised: whether it is divided so; of few numbers the length is near 0 by chance. fake_guidance:
    the scale at which the fake is trained and asked. sida: a GAN on the channel mean of the fake's encoder, which needs
    data. The paper: alpha 1.2 (1.0 with guidance, with sida), one update of each, Adam without momentum at 1e-5 (1e-6
    with guidance), batch 256 to 8192, sampled from 625 of 1000.
    """
    adversary = Adversary(student_weight=gan_student, critic_weight=gan_critic, times=GAP_TIMES, same_noise=True)
    scale = UniformScale(guidance, guidance)
    times, fake_times = gap_times(gap_mean, gap_std)
    identity = ScoreIdentity(
        times=times, guidance=scale, cfg=True, alpha=alpha, fake_guidance=fake_guidance, normalised=normalised
    )
    fooled, judged = ((Deceive(adversary),), (Judge(adversary),)) if sida else ((), ())
    return from_noise(
        "sid", "Zhou et al. 2024, Score identity Distillation, arXiv:2404.04057",
        (identity, *fooled), (plain_fake(fake_times, fake_guidance), *judged), (lr, fake_lr), steps, start=start,
        needs=WITH_DATA if sida else DATA_FREE, critic=CriticPlan(features=ENCODER) if sida else None,
    )  # fmt: skip


def sid_few_step(
    *, steps: int = 2000, lr: float = 5e-5, fake_lr: float = 2e-4, alpha: float = 1.0, mode: str = "long-short",
    guidance: float = 3.0, anti: float = -1.0, start: float = 0.625, grid_weights: tuple[float, ...] = (1.0, 1.0, 4.0),
    told: bool = False, gap_mean: float | None = None, gap_std: float = 1.2, normalised: bool = True,
) -> Recipe:  # fmt: skip
    """Few-step SiD, Zhou et al. 2025 (arXiv 2505.12674): one fake score, told no step, for the samples of all steps.

    The sample of an evenly drawn step is matched as SiD does. told: the fake knows the step, so that the law of each
    step's samples is matched; else that of their mixture, in which one step may miss what another overdoes. mode:
    "zero-cfg", teacher unguided, fake trained and asked without the prompt; "anti-cfg", teacher unguided, fake asked at
    the scale `anti` below 0; "long-short", both at `guidance`. The first two guide by what the fake leaves out. The
    adversary of the paper's variant with data (SiDA) is left out here: this recipe reads prompts alone.
    Unverified: the scale of anti-cfg; decided: -1, its fake trained with one prompt in ten left out.
    """
    asked = {"zero-cfg": (1.0, 0.0, 0.0), "anti-cfg": (1.0, 1.0, anti), "long-short": (guidance, guidance, guidance)}
    if mode not in asked:
        raise RecipeError(f"there is no mode {mode!r}; choose one of {', '.join(asked)}")
    if mode == "anti-cfg" and anti >= 0.0:
        raise RecipeError(f"anti is {anti}; anti-cfg asks its fake score at a scale below 0, or take mode zero-cfg")
    teacher, trained, evaluated = asked[mode]
    scale = UniformScale(teacher, teacher)
    times, fake_times = gap_times(gap_mean, gap_std)
    identity = ScoreIdentity(
        times=times, guidance=scale, cfg=True, alpha=alpha, fake_guidance=evaluated, normalised=normalised
    )
    fake = plain_fake(fake_times, trained, 0.1 if mode == "anti-cfg" else 0.0)
    return from_noise(
        "sid-few-step", "Zhou, Gu & Wang 2025, Few-Step Diffusion via Score identity Distillation, arXiv:2505.12674",
        (identity,), (fake,), (lr, fake_lr), steps, start=start, counts=(1, 2, 4), weights=grid_weights, told=told,
    )  # fmt: skip


def sim(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, distance: str = "huber", c: float = 0.1,
    guidance: float = 3.0, start: float = 0.625, gap_mean: float | None = None, gap_std: float = 1.2,
) -> Recipe:  # fmt: skip
    """Score implicit matching, Luo et al. 2024 (arXiv 2410.16794): any distance d of the two scores.

    `d'(mu_real - mu_fake) . (mu_fake - x)`; "huber" has d' = y / sqrt(mean y^2 + c^2), "squared" d' = y over
    |x - mu_real|, which is SiD at alpha = 1.
    Unverified: c, the weight of times and the unit of the gap; decided: 0.1, even, and clean estimates.
    """
    forces: dict[str, Force] = {"huber": Huber(c), "squared": Linear()}
    if distance not in forces:
        raise RecipeError(f"there is no distance {distance!r}; choose one of {', '.join(forces)}")
    if c <= 0.0:
        raise RecipeError(f"c is {c}; it must be above 0")
    times, fake_times = gap_times(gap_mean, gap_std)
    identity = ScoreIdentity(
        times=times, guidance=UniformScale(guidance, guidance), cfg=True,
        force=forces[distance], normalised=distance == "squared",
    )  # fmt: skip
    return from_noise(
        "sim", "Luo et al. 2024, One-Step Diffusion Distillation through Score Implicit Matching, arXiv:2410.16794",
        (identity,), (plain_fake(fake_times),), (lr, fake_lr), steps, start=start,
    )  # fmt: skip


def uni_instruct(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, divergence: str = "kl", alpha: float = 0.5,
    released: bool = False, gan_student: float = 1e-4, gan_critic: float = 1e-2, guidance: float = 3.0,
    start: float = 0.625, gap_mean: float | None = None, gap_std: float = 1.2, normalised: bool = True,
) -> Recipe:  # fmt: skip
    """Uni-Instruct, Wang et al. 2025 (arXiv 2505.20755): the score identity weighted for an f-divergence.

    `D_f = int E_q r f''(r) |s_q - s_p|^2`, r = q / p from a critic, with the gradient of its weight too (alpha 1/2);
    divergence: "kl" (of the data), "rkl", "jeffreys", "js", "chi2". The paper: weights 100 and 0.01 of the score and
    GAN terms, lr 1e-5, batch 256, start at level 2.5, and a critic that is the mean of the fake's channels as in SiDA;
    here its head learns, as DMD2's. released: the ratio as the authors' code takes it, from the value of a loss.
    Unverified: how the code mixes both gradients of js and chi2; decided: the exact gradient (docs/recipes).
    """
    adversary = Adversary(student_weight=gan_student, critic_weight=gan_critic, times=GAP_TIMES)
    times, fake_times = gap_times(gap_mean, gap_std)
    identity = ScoreIdentity(
        times=times, guidance=UniformScale(guidance, guidance), cfg=True, alpha=alpha,
        normalised=normalised, weight=RatioWeight(divergence, released=released),
    )  # fmt: skip
    return from_noise(
        "uni-instruct", "Wang et al. 2025, Uni-Instruct: unified diffusion divergence instruction, arXiv:2505.20755",
        (identity, Deceive(adversary)), (plain_fake(fake_times), Judge(adversary)), (lr, fake_lr), steps, start=start,
        needs=WITH_DATA,
    )  # fmt: skip


def sfd(
    *, steps: int = 2000, lr: float = 5e-5, fake_lr: float = 1e-4, alpha: float = 1.0, guidance: float = 3.0,
    start: float = 0.44, forget: str = "red", override: str = "blue", weight: float = 0.01, normalised: bool = True,
) -> Recipe:  # fmt: skip
    """Score forgetting distillation, Chen et al. 2024 (arXiv 2409.11219): SiD that forgets a concept on the way.

    Prompts with the word `forget` teach with `override` in its place, `weight` times as much as the others; the student
    and the fake score are asked for what the prompt says. The paper: alpha 1.2, from 440 of 1000, times 38 to 712,
    weight 0.01, lr 1e-5, no data.
    """
    if weight <= 0.0:
        raise RecipeError(
            f"weight is {weight}; with none the concept is not forgotten but left unlearned: give it some"
        )
    identity = ScoreIdentity(
        times=UniformTimes(0.038, 0.712), guidance=UniformScale(guidance, guidance), cfg=True, alpha=alpha,
        normalised=normalised,
    )  # fmt: skip
    return from_noise(
        "sfd", "Chen et al. 2024, Score Forgetting Distillation, arXiv:2409.11219",
        (Forgetting(identity, weight),), (Forgetting(plain_fake(), weight),), (lr, fake_lr), steps, start=start,
        forget=Swap(forget, override),
    )  # fmt: skip


IDENTITY: dict[str, RecipeFunction] = {
    "sid": sid, "sid-few-step": sid_few_step, "sim": sim, "uni-instruct": uni_instruct, "sfd": sfd,
}  # fmt: skip

"""Recipes that please a reward: a distillation with one beside, and three that tune a student of few steps.

The three begin with the bundle that `init` names, and keep how it is sampled; without one a short consistency
distillation comes first. All samples are guided as the student is, so no scale appears here.
"""

from dataclasses import replace

from fewstep.models.spec import Boundary

from ..distribution.distribution import DistributionMatching, Term
from ..distribution.faithful import Faithful
from ..distribution.preference import DenoisePreferred, PairedLikelihood, PreferenceGap, PreferredPairs
from ..distribution.rewarding import Favour
from ..errors import RecipeError
from ..loop.player import PlayerSettings
from ..networks.rewards import DEFAULT, check_reward
from ..networks.student import Student
from ..objectives.reward_guided import RewardGuided
from ..parts.chain import Chain
from ..parts.distances import snr_plus_one
from ..parts.jumps import LcmJump
from ..parts.objective import Objective
from ..parts.times import LcmGrids, UniformScale, UniformTimes
from .forms import learn, multistep, staged
from .lcm import latent_consistency, lcm
from .recipe import Needs, Recipe, RecipeFunction, Run, Stage


def rg_lcd(
    *, steps: int = 2000, lr: float = 3e-4, points: int = 50, huber_c: float = 0.03, target_ema: float = 0.95,
    guidance_low: float = 1.5, guidance_high: float = 6.0, guidance_default: float = 3.0, order: int = 1,
    reward: str = DEFAULT, scale: float = 0.1, proxy: bool = False, proxy_lr: float = 1e-3,
) -> Recipe:  # fmt: skip
    """Reward guided latent consistency distillation, Li et al. 2024 (arXiv 2403.11027): `LCD - scale R(f(x_t))`.

    The reward sees the one-step sample that consistency compares. proxy: a small network on latents stands for it, and
    learns which of the student's landing, the target's and the data the reward likes (the paper's LRM, which starts
    from CLIP). The paper: omega in [5, 15], huber c 0.001, scale 1 of HPSv2, lr 1e-6, proxy's 3.3e-6.
    """
    base = lcm(
        steps=steps, lr=lr, points=points, huber_c=huber_c, target_ema=target_ema, guidance_low=guidance_low,
        guidance_high=guidance_high, guidance_default=guidance_default, order=order,
    )  # fmt: skip
    loss = latent_consistency(points, huber_c, UniformScale(guidance_low, guidance_high), "target", order)
    players = dict(base.stages[0].player_settings)
    if proxy:
        players["proxy"] = PlayerSettings(lr=proxy_lr, warmup=50, cooldown=0.4)
    stage = replace(
        base.stages[0], name="rg-lcd", player_settings=players,
        objective=RewardGuided(base=loss, scale=scale, proxied=proxy),
    )  # fmt: skip
    paper = "Li et al. 2024, Reward Guided Latent Consistency Distillation, arXiv:2403.11027"
    return replace(base, name="rg-lcd", family="reward", paper=paper, stages=(stage,), reward=check_reward(reward))


def rocm(
    *, steps: int = 1000, lr: float = 2e-4, warm: int = 2000, warm_lr: float = 1e-3, rank: int = 16,
    counts: tuple[int, ...] = (1, 2, 4), guidance: float = 3.0, order: int = 1, init: str | None = None,
    reward: str = DEFAULT, scale: float = 1.0, beta: float = 3.0, divergence: str = "kl",
) -> Recipe:  # fmt: skip
    """ROCM, Shekhar & Zhang 2025 (arXiv 2503.06171): the reward of whole chains by its gradient, held to a reference.

    Maximise `scale R(x_0) - beta sum_k D(N(f_theta(x_k)) || N(f_ref(x_k)))` with the gradient through every step; D is
    kl, hellinger, fisher or js. Unverified: the weights of divergences, steps; decided: one divergence, the mean over
    elements, and at the last step, which has no noise, a deviation of 0.5.
    """
    grids = _grids("rocm", counts, 1)
    terms = (Favour(scale=scale), Faithful(divergence=divergence, weight=beta, jump=LcmJump()))
    objective = DistributionMatching(rollout=Chain(grids=grids, jump=LcmJump()), terms={"student": terms})
    paper = "Shekhar & Zhang 2025, ROCM: RLHF on consistency models, arXiv:2503.06171"
    stages = _tuned("rocm", objective, {"student": learn(lr)}, steps, init, warm, warm_lr, guidance, order)
    return _recipe("rocm", paper, stages, grids, rank, init, reward)


def pso(
    *, steps: int = 1000, lr: float = 2e-4, warm: int = 2000, warm_lr: float = 1e-3, rank: int = 16,
    counts: tuple[int, ...] = (2, 4), guidance: float = 3.0, order: int = 1, init: str | None = None,
    reward: str = DEFAULT, beta: float = 50.0, clip: float = 0.1, offline: bool = False, offline_beta: float = 5.0,
    winners: str = "reward",
) -> Recipe:  # fmt: skip
    """PSO, Miao et al. 2024 (arXiv 2410.03190): the noisy steps of the preferred of two walks become likelier.

    Online: two walks of the student per prompt, ordered by the reward; `-log sigmoid(beta (log r_win - log r_lose))`
    over their stochastic steps, r clipped to 1 +- clip. offline: two samples of the reference, and errors at the times
    that are asked; winners "data" prefers the data to the reference's samples, as in the paper's personalisation. The
    paper: beta 50, clip 0.1, LoRA of rank 16 or 32, lr 1e-5; offline beta 5.
    """
    grids, jump = _grids("pso", counts, 1 if offline else 2), LcmJump()
    if winners not in ("reward", "data") or (winners == "data" and not offline):
        raise RecipeError(f"pso: winners is {winners!r}; it is reward, or with offline=true data")
    term: Term = PairedLikelihood(beta=beta, clip=clip, jump=jump)
    if offline:
        term = PreferredPairs(beta=offline_beta, grids=grids, jump=jump, winners=winners)
    walks = Chain(grids=grids, jump=jump, gradient="each", twins=True)
    walker = "teacher" if offline else "student"
    objective = DistributionMatching(rollout=walks, terms={"student": (term,)}, walker=walker)
    paper = "Miao et al. 2024, Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample Optimization, "
    stages = _tuned("pso", objective, {"student": learn(lr)}, steps, init, warm, warm_lr, guidance, order)
    return _recipe("pso", paper + "arXiv:2410.03190", stages, grids, rank, init, reward)


def distillation_dpo(
    *, steps: int = 1000, lr: float = 4e-6, fake_lr: float = 2e-4, warm: int = 2000, warm_lr: float = 3e-4,
    counts: tuple[int, ...] = (1, 2, 4), guidance: float = 3.0, order: int = 1, init: str | None = None,
    reward: str = DEFAULT, stretch: float = 1.1, lose: float = -1.0, prefer: float = 0.2, every: int = 2,
) -> Recipe:  # fmt: skip
    """Distillation-DPO, Zhao et al. 2025 (arXiv 2504.11447): score distillation of winners and losers apart.

    Two samples, from noise n and `stretch` n; the reward says which wins (the paper, of LiDAR scans, by their Chamfer
    distance to the truth); two further networks learn the scores of winners and of losers, and are told where the last
    step began, through which the gradient is taken. The paper: losers ascend KL to the teacher (lose 1, prefer 0), SGD
    at 1e-5, w = 3.5 of c + w (c - u). Unverified: that form, whose released code has no gradient; decided: as it lowers
    the reward of a student that is right already and drifts without bound, both sides descend, and `prefer` follows the
    odds of winning, so that the law aimed at is the teacher's times these odds to its power.
    """
    grids, scale = _grids("distillation-dpo", counts, 1), UniformScale(guidance, guidance)
    objective = DistributionMatching(
        rollout=Chain(grids=grids, jump=LcmJump(), gradient="last", twins=True, stretch=stretch),
        terms={
            "student": (
                PreferenceGap(times=UniformTimes(0.02, 0.98), guidance=scale, cfg=True, lose=lose, prefer=prefer),
            ),
            "winner": (DenoisePreferred(role="winner", times=UniformTimes(), weight=snr_plus_one),),
            "loser": (DenoisePreferred(role="loser", times=UniformTimes(), weight=snr_plus_one),),
        },
    )
    score = PlayerSettings(lr=fake_lr, warmup=10, clip_norm=10.0)
    players = {"student": replace(learn(lr), every=every), "winner": score, "loser": score}
    paper = "Zhao et al. 2025, Diffusion Distillation With Direct Preference Optimization, arXiv:2504.11447"
    stages = _tuned("distillation-dpo", objective, players, steps, init, warm, warm_lr, guidance, order, "teacher")
    return _recipe("distillation-dpo", paper, stages, grids, 0, init, reward)


def _grids(name: str, counts: tuple[int, ...], fewest: int) -> LcmGrids:
    if not counts or min(counts) < fewest:
        raise RecipeError(
            f"{name}: counts is {list(counts)}; each must be at least {fewest}"
            + (", since one step has no noisy one to learn from" if fewest > 1 else "")
        )
    return LcmGrids(counts)


def _tuned(
    name: str, objective: Objective, players: dict[str, PlayerSettings], steps: int, init: str | None, warm: int,
    warm_lr: float, guidance: float, order: int, teacher: str = "start",
) -> tuple[Stage, ...]:  # fmt: skip
    """The tuning of a student, after a consistency distillation of `warm` steps where no `init` is named."""
    start = "init" if init else "previous"
    tuning = Stage(
        name=name, objective=objective, player_settings=players, steps=steps, start=start, teacher=teacher
    )  # fmt: skip
    if init:
        return (tuning,)
    if warm < 1:
        raise RecipeError(f"{name} tunes a student of few steps: name one by init=DIR, or set warm to the steps of one")
    first = latent_consistency(50, 0.001, UniformScale(guidance, guidance), "target", order)
    learner = {"student": learn(warm_lr, target=0.95)}
    return Stage(name="warm", objective=first, player_settings=learner, steps=warm), tuning


def _recipe(
    name: str, paper: str, stages: tuple[Stage, ...], grids: LcmGrids, rank: int, init: str | None, reward: str
) -> Recipe:
    sampling = replace(multistep(Boundary()), grids=grids)
    student = Student(lora_rank=rank or None)
    recipe = staged(name, paper, stages, sampling, student, needs=Needs(student=True), family="reward")
    return replace(recipe, reward=check_reward(reward), run=Run(init=init))


REWARD: dict[str, RecipeFunction] = {
    "rg-lcd": rg_lcd,
    "rocm": rocm,
    "pso": pso,
    "distillation-dpo": distillation_dpo,
}

"""Flow maps and rectified flow as recipes. Guidance scales follow u + w (c - u)."""

from ..errors import RecipeError
from ..networks.student import Student
from ..objectives.flow_map import Derivative, FlowMap, FlowPairs, Halves
from ..objectives.from_noise import Bootstrapped, Displaced, FromNoise
from ..objectives.reflow import Annealing, AnnealingReflow
from ..parts.distances import Adaptive, ScaledPseudoHuber, Squared, snr_plus_one
from ..parts.pairs import Pairs
from ..parts.tangent import DataField, TeacherField, tangent_of
from ..parts.times import GridTimes, UniformScale
from ..parts.transitions import NoisedData
from ..parts.u_shape import UShaped, towards_data
from .forms import FROM_DATA, ONE, chain, learn, single, staged
from .recipe import Needs, Recipe, RecipeFunction, Stage

TWO_TIMES = Student(second_time=True)


def meanflow(
    *, steps: int = 3000, lr: float = 3e-4, equal: float = 0.5, adaptive: float = 1.0, floor: float = 0.01,
    difference: float = 0.0,
) -> Recipe:  # fmt: skip
    """MeanFlow, Geng et al. 2025 (arXiv 2505.13447): `u = v - (t - s) du/dt`, v of the data, no teacher.

    Adaptive weight 1 / (|d|^2 + floor)^adaptive. t is even in flow time, s even below it, s = t in the share `equal`:
    the paper draws both logit-normal(-0.4, 1) with 75 % equal; a student that starts from a teacher has v already. The
    network is told s, the paper's t - s. Its guidance within the target is left out. difference: step of central
    differences, 0 for an exact derivative.
    """
    objective = FlowMap(
        pairs=FlowPairs(equal), source=NoisedData(pure_at_start=False), field=DataField(),
        aim=Derivative(tangent_of(difference)), distance=Adaptive(adaptive, floor), guidance=ONE, cfg=False,
    )  # fmt: skip
    paper = "Geng et al. 2025, Mean Flows for One-step Generative Modeling, arXiv:2505.13447"
    return single(
        "meanflow", paper, objective, learn(lr), steps, chain((1, 2, 4)), TWO_TIMES, needs=FROM_DATA, family="flow-map"
    )


def anyflow(
    *, steps: int = 3000, lr: float = 3e-4, equal: float = 0.5, clean: float = 0.25, difference: float = 0.005,
    guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """AnyFlow's first stage (NVlabs/AnyFlow): a teacher made a flow map of any steps, its derivative by differences.

    Half of the pairs have s = t, a quarter lands on clean data, h = 0.005 of unit time. Here v is the guided teacher's
    own, where the paper takes the data's and fuses guidance into the prediction. Left out: the second stage, which is
    distribution matching; the equal weight of all pairs' losses is the adaptive distance's.
    """
    objective = FlowMap(
        pairs=FlowPairs(equal, clean), source=NoisedData(), field=TeacherField(),
        aim=Derivative(tangent_of(difference)), distance=Adaptive(1.0, 0.01), cfg=True,
        guidance=UniformScale(guidance, guidance),
    )  # fmt: skip
    paper = "Gu et al. 2026, AnyFlow: Any-Step Video Diffusion with On-Policy Flow Map Distillation, arXiv:2605.13724"
    return single("anyflow", paper, objective, learn(lr), steps, chain((1, 2, 4, 8)), TWO_TIMES, family="flow-map")


def shortcut(*, steps: int = 3000, lr: float = 3e-4, equal: float = 0.5, target_ema: float = 0.95) -> Recipe:
    """Shortcut models, Frans et al. 2024 (arXiv 2410.12557): one step is two of half its length, of an average.

    Steps are of any length, where the paper's are powers of 1/2 and three quarters of the batch have none; its target
    average moves by 0.001 a step. The network is told s, the paper's the length of the step. No teacher.
    """
    objective = FlowMap(
        pairs=FlowPairs(equal), source=NoisedData(pure_at_start=False), field=DataField(), aim=Halves(),
        distance=Squared(), guidance=ONE, cfg=False, target="target",
    )  # fmt: skip
    paper = "Frans et al. 2024, One Step Diffusion via Shortcut Models, arXiv:2410.12557"
    return single(
        "shortcut", paper, objective, learn(lr, target=target_ema), steps, chain((1, 2, 4)), TWO_TIMES,
        needs=FROM_DATA, family="flow-map",
    )  # fmt: skip


def freeflow(*, steps: int = 3000, lr: float = 3e-4, difference: float = 0.0, guidance: float = 3.0) -> Recipe:
    """FreeFlow, 2025: a flow map from noise alone, with no data: `u + (T - s) d_s of it` is the teacher's velocity.

    Only its prediction loss; the correction, distribution matching, is left out. Unverified: learning rate;
    decided: that of the other flow maps.
    """
    return _from_noise(
        "freeflow",
        "Tong et al. 2025, Flow Map Distillation Without Data, arXiv:2511.19428",
        Displaced(tangent_of(difference)),
        steps,
        lr,
        guidance,
    )


def boot(*, steps: int = 3000, lr: float = 3e-4, gap: float = 0.05, guidance: float = 3.0) -> Recipe:
    """BOOT, Gu et al. 2023 (arXiv 2306.05544): from noise alone, the state at s - gap is the teacher's step from s.

    The boundary at the noise is the same rule, as a jump of no length stays. Unverified: gap, weights, and whether a
    perceptual distance is used; decided: the defaults here, equal weights, squares.
    """
    if not 0.0 < gap <= 0.5:
        raise RecipeError(f"boot: gap is {gap}; it is a step of flow time, above 0 and up to 0.5")
    paper = "Gu et al. 2023, BOOT: Data-free Distillation of Denoising Diffusion Models, arXiv:2306.05544"
    return _from_noise("boot", paper, Bootstrapped(gap), steps, lr, guidance)


def _from_noise(name: str, paper: str, aim: Displaced | Bootstrapped, steps: int, lr: float, guidance: float) -> Recipe:
    objective = FromNoise(aim=aim, distance=Squared(), guidance=UniformScale(guidance, guidance), cfg=True)
    return single(
        name, paper, objective, learn(lr), steps, chain((1,)), TWO_TIMES, needs=Needs(data=False), family="flow-map"
    )


def reflow(
    *, steps: int = 3000, lr: float = 5e-4, pairs: int = 8192, pair_steps: int = 32, start_share: float = 0.2,
    guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """Rectified flow's reflow, Liu et al. 2022 (arXiv 2209.03003): plain training on a teacher's pairs.

    `|x0_theta(x_t) - x^|^2 (SNR + 1)` on the teacher's own path; on rectified flow that is `|v - (z - x^)|^2` times
    `(1 - t)^2 + t^2`. The noisiest time is drawn in the share `start_share` more often, where the paper's is even.
    """
    stage = _paired("reflow", steps, lr, GridTimes(50, start_share), Pairs(
        count=pairs, steps=pair_steps, guidance=UniformScale(guidance, guidance)
    ))  # fmt: skip
    paper = "Liu et al. 2022, Flow Straight and Fast: Learning to Generate and Transfer Data, arXiv:2209.03003"
    return staged("reflow", paper, (stage,), chain((1, 2, 4)), needs=Needs(data=False), family="rectified-flow")


def instaflow(
    *, steps: int = 3000, lr: float = 5e-4, share: float = 0.6, pairs: int = 8192, pair_steps: int = 32,
    guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """InstaFlow, Liu et al. 2023 (arXiv 2309.06380): reflow, then one step distilled from the reflowed network's pairs.

    share: the first stage's part of the steps. The paper compares pictures by LPIPS, which is left out.
    """
    if not 0 < round(share * steps) < steps:
        raise RecipeError(f"instaflow: share is {share} of {steps} steps, and each of its two stages needs some")
    first = reflow(steps=round(share * steps), lr=lr, pairs=pairs, pair_steps=pair_steps, guidance=guidance).stages[0]
    plan = Pairs(count=pairs, steps=pair_steps, guidance=UniformScale(guidance, guidance))
    last = _paired("distil", steps - first.steps, lr, GridTimes(1), plan, teacher="previous", start="previous")
    paper = "Liu et al. 2023, InstaFlow: One Step is Enough, arXiv:2309.06380"
    return staged("instaflow", paper, (first, last), chain((1,)), needs=Needs(data=False), family="rectified-flow")


def rf_plus_plus(
    *, steps: int = 3000, lr: float = 5e-4, pairs: int = 8192, pair_steps: int = 32, slope: float = 4.0,
    huber: float = 0.00054, guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """2-RF++, Lee et al. 2024 (arXiv 2405.20320): one reflow, U-shaped times, pseudo-Huber distance weighted to data.

    Half of the flow times have density ~ exp(slope t), half are mirrored. The distance is of clean estimates, times
    (1 - t) / t. Left out: LPIPS and inverted real data.
    """
    objective = AnnealingReflow(
        times=UShaped(slope), source=NoisedData(), distance=ScaledPseudoHuber(huber), weight=towards_data,
        anneal=Annealing(0.0),
    )  # fmt: skip
    plan = Pairs(count=pairs, steps=pair_steps, guidance=UniformScale(guidance, guidance))
    stage = Stage(name="rf++", objective=objective, player_settings={"student": learn(lr)}, steps=steps, pairs=plan)
    paper = "Lee et al. 2024, Improving the Training of Rectified Flows, arXiv:2405.20320"
    return staged("rf++", paper, (stage,), chain((1, 2, 4)), needs=Needs(data=False), family="rectified-flow")


def _paired(
    name: str, steps: int, lr: float, times: GridTimes, plan: Pairs, *, teacher: str = "teacher", start: str = "init"
) -> Stage:
    objective = AnnealingReflow(
        times=times, source=NoisedData(), distance=Squared(), weight=snr_plus_one, anneal=Annealing(0.0)
    )
    return Stage(
        name=name, objective=objective, player_settings={"student": learn(lr)}, steps=steps, pairs=plan,
        teacher=teacher, start=start,
    )  # fmt: skip


FLOWS: dict[str, RecipeFunction] = {
    "meanflow": meanflow, "anyflow": anyflow, "shortcut": shortcut, "freeflow": freeflow, "boot": boot,
    "reflow": reflow, "instaflow": instaflow, "rf++": rf_plus_plus,
}  # fmt: skip

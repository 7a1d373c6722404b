"""Consistency along a trajectory as recipes: both sides land at an edge of a phase, or at any time below.

Constants are the papers' where they do not depend on size. Guidance scales follow u + w (c - u); a paper's omega of the
form c + omega (c - u) is w = 1 + omega.
"""

from ..networks.student import Student
from ..objectives.consistency import AsEstimates, CarriedToClean, Consistency, Denoising
from ..parts.curricula import Fixed, Geometric
from ..parts.distances import PseudoHuber, Squared, snr_plus_one, unweighted
from ..parts.ends import AnyBelow, MergedTargets, PhaseEdges
from ..parts.jumps import DdimJump, TwoTimeJump
from ..parts.laws import AnyTwo, Neighbours
from ..parts.steps import AdjustedStep, OdeStep
from ..parts.times import EvenGrids, GridPairs, LcmGrids, UniformScale
from ..parts.transitions import NoisedData, TeacherWalk
from .forms import chain, hopping, learn, multistep, single, staged
from .recipe import Needs, Recipe, RecipeFunction, Stage


def multistep_cm(
    *, steps: int = 3000, lr: float = 3e-4, phases: int = 4, first: int = 64, last: int = 1000, eta: float = 0.1,
    guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """Multistep consistency models, Heek et al. 2024 (arXiv 2403.06807): one consistency model in each of M segments.

    The teacher's step is aDDIM; landings are compared as the clean estimates that lead there, weighted by SNR + 1. The
    grid within the path grows from `first` to `last`; the paper ends at 1280, on a continuous path. Unverified: eta and
    the exact weight; decided: 0.1, and SNR + 1.
    """
    objective = Consistency(
        pairs=Neighbours(Geometric(first, last, of=phases)), source=NoisedData(), jump=DdimJump(), distance=Squared(),
        weight=snr_plus_one, guidance=UniformScale(guidance, guidance), cfg=True, target="student",
        step=AdjustedStep(eta), ends=PhaseEdges(Fixed(phases)), compare=AsEstimates(),
    )  # fmt: skip
    paper = "Heek et al. 2024, Multistep Consistency Models, arXiv:2403.06807"
    return single("multistep-cm", paper, objective, learn(lr), steps, chain((phases,)))


def mlcm(
    *, steps: int = 3000, lr: float = 3e-4, points: int = 50, walk: int = 8, guidance: float = 3.0, order: int = 1,
    target_ema: float = 0.95,
) -> Recipe:  # fmt: skip
    """MLCM / TLCM, Xie et al. 2024 (arXiv 2406.05768): no data; states of the teacher's own walk, 8 segments, then 1.

    The second stage takes three solver steps at once. Left out: the latent perceptual distance, rewards, DMD and GAN.
    Unverified: how many solver steps the walk has at each time; decided: `walk` even ones. The
    paper's target is the weights of the moment, target_ema 0; at learning rates as high as here those do not settle.
    """
    common = {
        "source": TeacherWalk(walk), "distance": Squared(), "weight": unweighted, "cfg": True, "target": "target",
        "guidance": UniformScale(guidance, guidance), "jump": DdimJump(),
    }  # fmt: skip
    near, far = GridPairs(points, to_clean=True), GridPairs(points, skip=3, to_clean=True)
    segments = Consistency(pairs=near, ends=PhaseEdges(Fixed(8)), step=OdeStep(order), **common)  # type: ignore[arg-type]
    whole = Consistency(pairs=far, step=OdeStep(order, parts=3), **common)  # type: ignore[arg-type]
    paper = "Xie et al. 2024, MLCM: Multistep Consistency Distillation of Latent Diffusion Model, arXiv:2406.05768"
    players = {"student": learn(lr, target=target_ema)}
    half = steps // 2
    stages = (
        Stage(name="segments", objective=segments, player_settings=players, steps=half),
        Stage(name="whole", objective=whole, player_settings=players, steps=half, start="previous"),
    )
    return staged("mlcm", paper, stages, multistep(), needs=Needs(data=False))


def tcd(
    *, steps: int = 2000, lr: float = 3e-4, points: int = 50, huber_c: float = 0.001, target_ema: float = 0.95,
    gamma: float = 0.3, guidance: float = 3.0, order: int = 1,
) -> Recipe:  # fmt: skip
    """Trajectory consistency distillation, Zheng et al. 2024 (arXiv 2402.19159): both jump to any time below.

    `huber(G_theta(x_t, t -> s) - G_ema(x_u, u -> s))`, u one DDIM step below t, s uniform below u. The network is not
    told s. Unverified: the law of s, as the training code is unreleased; decided: even below u, as the text says.
    """
    objective = Consistency(
        pairs=GridPairs(points), source=NoisedData(), jump=DdimJump(), distance=PseudoHuber(huber_c), weight=unweighted,
        guidance=UniformScale(guidance, guidance), cfg=True, target="target", step=OdeStep(order), ends=AnyBelow(),
    )  # fmt: skip
    paper = "Zheng et al. 2024, Trajectory Consistency Distillation, arXiv:2402.19159"
    return single(
        "tcd", paper, objective, learn(lr, target=target_ema), steps, hopping(LcmGrids((1, 2, 4, 8), points), gamma)
    )


def ctm(
    *, steps: int = 3000, lr: float = 3e-4, points: int = 40, parts: int = 3, target_ema: float = 0.98,
    denoising: float = 1.0, guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """Consistency trajectory models, Kim et al. 2023 (arXiv 2310.02279): a network told where it lands, t -> s.

    Both sides jump to s, from x_t and from the teacher's Heun walk to u, then by the average to clean data, where they
    are compared; denoising at s = t beside. Left out: the GAN, LPIPS and the balance of gradients between the terms.
    """
    objective = Consistency(
        pairs=AnyTwo(points), source=NoisedData(), jump=TwoTimeJump(), distance=Squared(), weight=unweighted,
        guidance=UniformScale(guidance, guidance), cfg=True, target="target", step=OdeStep(order=2, parts=parts),
        ends=AnyBelow(clean_share=0.3), compare=CarriedToClean(TwoTimeJump()),
        aside=Denoising(weight=denoising, distance=Squared()) if guidance == 1.0 else None,
    )  # fmt: skip
    paper = "Kim et al. 2023, Consistency Trajectory Models, arXiv:2310.02279"
    return single(
        "ctm", paper, objective, learn(lr, target=target_ema), steps, chain((1, 2, 4, 8)), Student(second_time=True)
    )


def pcm(
    *, steps: int = 2000, lr: float = 3e-4, phases: int = 4, points: int = 40, huber_c: float = 0.001,
    guidance: float = 3.0, order: int = 1, target_ema: float = 0.95,
) -> Recipe:  # fmt: skip
    """Phased consistency model, Wang et al. 2024 (arXiv 2405.18407): each phase of the path has an end of its own.

    The deterministic chain over `phases` steps is its sampler. The adversarial term on noised landings is left out.
    """
    objective = Consistency(
        pairs=GridPairs(points, to_clean=True), source=NoisedData(), jump=DdimJump(),
        distance=PseudoHuber(huber_c), weight=unweighted, guidance=UniformScale(guidance, guidance), cfg=True,
        target="target", step=OdeStep(order), ends=PhaseEdges(Fixed(phases)),
    )  # fmt: skip
    paper = "Wang et al. 2024, Phased Consistency Model, arXiv:2405.18407"
    return single("pcm", paper, objective, learn(lr, target=target_ema), steps, chain((phases,), "phased", phases))


def hyper_sd(
    *, steps: int = 3000, lr: float = 3e-4, points: int = 40, guidance: float = 3.0, order: int = 1,
    target_ema: float = 0.95,
) -> Recipe:  # fmt: skip
    """Hyper-SD's trajectory part, Ren et al. 2024 (arXiv 2404.13686): 8 segments, then 4, 2 and 1, to random ends.

    Each stage goes on from the one before. Left out: the GAN, the human feedback, the one-step score distillation.
    Unverified: the weights of squares and GAN, as the training code is unreleased; decided: squares alone.
    """
    stages = []
    scale, players = UniformScale(guidance, guidance), {"student": learn(lr, target=target_ema)}
    for k in (8, 4, 2, 1):
        objective = Consistency(
            pairs=GridPairs(points), source=NoisedData(), jump=DdimJump(), distance=Squared(), weight=unweighted,
            guidance=scale, cfg=True, target="target", step=OdeStep(order), ends=PhaseEdges(Fixed(k), drawn=True),
        )  # fmt: skip
        stages.append(
            Stage(
                name=f"segments-{k}", objective=objective, player_settings=players, steps=steps // 4,
                start="init" if k == 8 else "previous",
            )
        )  # fmt: skip
    paper = "Ren et al. 2024, Hyper-SD: Trajectory Segmented Consistency Model, arXiv:2404.13686"
    return staged("hyper-sd", paper, tuple(stages), chain((1, 2, 4, 8)))


def tdd(
    *, steps: int = 2000, lr: float = 3e-4, points: int = 250, huber_c: float = 0.001, eta: float = 0.3,
    empty: float = 0.2, guidance: float = 3.0, order: int = 1, target_ema: float = 0.95,
) -> Recipe:  # fmt: skip
    """Target-driven distillation, Wang et al. 2024 (arXiv 2409.01347): landings on the times that 4 to 8 steps walk.

    A share `empty` of the prompts is empty on both sides, so that the student can still be guided. The paper: w = 4.5.
    """
    grids = EvenGrids((4, 5, 6, 7, 8))
    objective = Consistency(
        pairs=GridPairs(points), source=NoisedData(), jump=DdimJump(), distance=PseudoHuber(huber_c), weight=unweighted,
        guidance=UniformScale(guidance, guidance), cfg=True, target="target", step=OdeStep(order),
        ends=MergedTargets(grids, eta=eta),
        empty_share=empty,
    )  # fmt: skip
    paper = "Wang et al. 2024, Target-Driven Distillation, arXiv:2409.01347"
    return single("tdd", paper, objective, learn(lr, target=target_ema), steps, hopping(grids, eta))


def std(
    *, steps: int = 2000, lr: float = 3e-4, points: int = 50, huber_c: float = 0.001, strength: float = 1.0,
    walk: int = 4, guidance: float = 3.0, order: int = 1, target_ema: float = 0.95,
) -> Recipe:  # fmt: skip
    """Single trajectory distillation, Xu et al. 2024 (arXiv 2412.18945): only states of walks that begin at one time.

    strength: that time as a share of the path; the paper's stylisation begins at 0.75 of it, from noised data. Its bank
    of four kept walks is a fresh walk per step here, which has the same states and repeats. The GAN is left out.
    """
    objective = Consistency(
        pairs=GridPairs(points), source=TeacherWalk(walk, strength), jump=DdimJump(), distance=PseudoHuber(huber_c),
        weight=unweighted, guidance=UniformScale(guidance, guidance), cfg=True, target="target", step=OdeStep(order),
        ends=AnyBelow(),
    )  # fmt: skip
    paper = "Xu et al. 2024, Single Trajectory Distillation, arXiv:2412.18945"
    return single(
        "std", paper, objective, learn(lr, target=target_ema), steps, hopping(LcmGrids((1, 2, 4, 8), points), 0.3)
    )


TRAJECTORY: dict[str, RecipeFunction] = {
    "multistep-cm": multistep_cm, "mlcm": mlcm, "tcd": tcd, "ctm": ctm, "pcm": pcm, "hyper-sd": hyper_sd, "tdd": tdd,
    "std": std,
}  # fmt: skip

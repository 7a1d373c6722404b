"""Consistency models as recipes: both sides say where the trajectory ends in clean data.

Constants are the papers' where they do not depend on size; noise levels are for data of deviation 1
(`trainers.parts.laws`). Guidance scales follow u + w (c - u); a paper's omega of the form c + omega (c - u) is w = 1 +
omega.
"""

from fewstep.models.spec import Boundary

from ..loop.player import PlayerSettings, TiedDecay
from ..objectives.consistency import Consistency, Denoising
from ..parts.curricula import Doubling, Fixed, Listed, SquareRoot
from ..parts.distances import Cauchy, Norm, PseudoHuber, ScaledPseudoHuber, Squared, unweighted
from ..parts.jumps import LcmJump, ToClean
from ..parts.laws import KarrasPairs, LogNormal, MappedPairs, WholeWay
from ..parts.steps import OdeStep, ReferenceBatch, SameNoise, SdeStep, exchanged
from ..parts.times import GridPairs, UniformScale
from ..parts.transitions import NoisedData
from .forms import FROM_DATA, ONE, learn, multistep, single
from .recipe import Recipe, RecipeFunction


def cd(
    *, steps: int = 2000, lr: float = 3e-4, points: int = 40, target_ema: float = 0.95, guidance: float = 3.0
) -> Recipe:
    """Consistency distillation, Song et al. 2023, algorithm 2 (arXiv 2303.01469): one Heun step of the teacher.

    `|f_theta(x_t) - f_ema(x_s)|^2`, neighbours of a Karras grid (rho 7), drawn evenly. f is the clean estimate itself,
    the paper's scalings at epsilon = 0. The paper's best distance is LPIPS, for pictures in pixels; here squares.
    """
    objective = Consistency(
        pairs=KarrasPairs(Fixed(points)), source=NoisedData(), jump=ToClean(), distance=Squared(), weight=unweighted,
        guidance=UniformScale(guidance, guidance), cfg=True, target="target", step=OdeStep(order=2),
    )  # fmt: skip
    paper = "Song et al. 2023, Consistency Models, arXiv:2303.01469"
    return single("cd", paper, objective, learn(lr, target=target_ema), steps, multistep())


def ct(*, steps: int = 4000, lr: float = 3e-4, first: int = 2, last: int = 30, mu0: float = 0.9) -> Recipe:
    """Consistency training, Song et al. 2023, algorithm 3: from data alone, random weights, the same noise at s.

    Grid points N(k) grow from `first` to `last` by the root; the target's decay is mu(k) = exp(s0 ln mu0 / (N(k) - 1)).
    The paper: 150 points at the end of 800,000 steps, at which the average looks 700 steps back.
    """
    counts = SquareRoot(first, last)
    objective = Consistency(
        pairs=KarrasPairs(counts, to_clean=True), source=NoisedData(), jump=ToClean(), distance=Squared(),
        weight=unweighted, guidance=ONE, cfg=False, target="target", step=SameNoise(),
    )  # fmt: skip
    players = PlayerSettings(
        lr=lr, warmup=50, cooldown=0.4, ema={"target": TiedDecay(mu0, counts, first), "kept": 0.99}
    )
    paper = "Song et al. 2023, Consistency Models, arXiv:2303.01469"
    return single("ct", paper, objective, players, steps, multistep(), needs=FROM_DATA, start="noise")


def ict(*, steps: int = 4000, lr: float = 3e-4, first: int = 10, last: int = 1280, huber: float = 0.00054) -> Recipe:
    """Improved consistency training, Song & Dhariwal 2023 (arXiv 2310.14189): no average, log-normal cells, 1/(t - s).

    The distance is pseudo-Huber over the whole sample, c = `huber` sqrt(elements); grids double from `first` to `last`.
    """
    objective = Consistency(
        pairs=KarrasPairs(Doubling(first, last), std=2.0, to_clean=True), source=NoisedData(), jump=ToClean(),
        distance=ScaledPseudoHuber(huber), weight=unweighted, guidance=ONE, cfg=False, target="student",
        step=SameNoise(), per_gap=1.0,
    )  # fmt: skip
    paper = "Song & Dhariwal 2023, Improved Techniques for Training Consistency Models, arXiv:2310.14189"
    return single("ict", paper, objective, learn(lr), steps, multistep(), needs=FROM_DATA, start="noise")


def ect(*, steps: int = 3000, lr: float = 3e-4, q: float = 2.0, stages: int = 8) -> Recipe:
    """Easy consistency tuning, Geng et al. 2024 (arXiv 2406.14548): from a denoiser's weights, with gaps that shrink.

    `|f_theta(x_t) - f_theta(x_r)| / (t - r)`, t log-normal, `r = t (1 - q^-(stage + 1) n(t))`: at first denoising.
    """
    paper = "Geng et al. 2024, Consistency Models Made Easy, arXiv:2406.14548"
    return single("ect", paper, tuned(q, stages, SameNoise()), learn(lr), steps, multistep(), needs=FROM_DATA)


def sct(*, steps: int = 3000, lr: float = 3e-4, q: float = 2.0, stages: int = 8) -> Recipe:
    """Stable consistency tuning, Wang et al. 2024 (arXiv 2410.18958): ECT whose x_r follows the batch's mean given x_t.

    Unverified: the paper's smoother map of gaps, its edge skipping; decided: ECT's map, no skipping.
    """
    paper = "Wang et al. 2024, Stable Consistency Tuning, arXiv:2410.18958"
    return single("sct", paper, tuned(q, stages, ReferenceBatch()), learn(lr), steps, multistep(), needs=FROM_DATA)


def tuned(q: float, stages: int, step: SameNoise | ReferenceBatch) -> Consistency:
    """ECT's parts with one way or the other from x_t to x_r."""
    return Consistency(
        pairs=MappedPairs(LogNormal(), Listed(tuple(range(stages))), q), source=NoisedData(), jump=ToClean(),
        distance=Norm(), weight=unweighted, guidance=ONE, cfg=False, target="student", step=step, per_gap=1.0,
    )  # fmt: skip


def slct(
    *, steps: int = 4000, lr: float = 3e-4, first: int = 10, last: int = 40, c: float = 0.3, denoising: float = 1.0,
    below: float = 0.3,
) -> Recipe:  # fmt: skip
    """Improved training of latent consistency models, Dao et al. 2025 (arXiv 2502.01441): iCT against outliers.

    Cauchy's distance, noise paired with samples by optimal transport, and denoising at small noise. Its finest grid has
    640 points, for runs a hundred times as long; its norm layers are left out. Unverified: how the paper's c falls with
    the number of steps, and the share of denoising; decided: c fixed, an equal share.
    """
    objective = Consistency(
        pairs=KarrasPairs(Doubling(first, last), std=2.0, to_clean=True), source=NoisedData(), jump=ToClean(),
        distance=Cauchy(c), weight=unweighted, guidance=ONE, cfg=False, target="student", step=SameNoise(), per_gap=1.0,
        coupling=exchanged, aside=Denoising(weight=denoising, distance=Squared(), below=below),
    )  # fmt: skip
    paper = "Dao et al. 2025, Improved Training Technique for Latent Consistency Models, arXiv:2502.01441"
    return single("slct", paper, objective, learn(lr), steps, multistep(), needs=FROM_DATA, start="noise")


def direct_cm(
    *, steps: int = 1500, lr: float = 3e-4, points: int = 50, parts: int = 16, guidance: float = 3.0, order: int = 1
) -> Recipe:
    """Direct CM, Vouitsis et al. 2024 (arXiv 2411.08954): the student is held against the end of the teacher's ODE.

    The teacher walks from x_t to clean data in `parts` steps each time, of first or second order; the paper walks its
    grid of 100 points.
    """
    objective = Consistency(
        pairs=WholeWay(points), source=NoisedData(), jump=LcmJump(), distance=Squared(), weight=unweighted,
        guidance=UniformScale(guidance, guidance), cfg=True, target="student", step=OdeStep(order, parts),
    )  # fmt: skip
    paper = "Vouitsis et al. 2024, Inconsistencies In Consistency Models, arXiv:2411.08954"
    return single("direct-cm", paper, objective, learn(lr), steps, multistep(Boundary(), points))


def lcf(
    *, steps: int = 1500, lr: float = 1e-4, points: int = 50, huber_c: float = 0.001, target_ema: float = 0.95
) -> Recipe:
    """Latent consistency fine-tuning, Luo et al. 2023, algorithm 4: LCM's loss with the data's own noise at s.

    For a consistency model on new data without a teacher: name it by `--set init=DIR`.
    """
    objective = Consistency(
        pairs=GridPairs(points), source=NoisedData(), jump=LcmJump(), distance=PseudoHuber(huber_c), weight=unweighted,
        guidance=ONE, cfg=False, target="target", step=SameNoise(),
    )  # fmt: skip
    paper = "Luo et al. 2023, Latent Consistency Models, arXiv:2310.04378"
    sampling = multistep(Boundary(), points)
    return single("lcf", paper, objective, learn(lr, target=target_ema), steps, sampling, needs=FROM_DATA)


def scott(
    *, steps: int = 2000, lr: float = 3e-4, points: int = 40, eta: float = 0.2, parts: int = 3,
    target_ema: float = 0.95, guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """SCott, Liu et al. 2024 (arXiv 2403.01505): LCM's loss with an SDE solver, `parts` noisy DDIM steps.

    They go 25 of 1000 down; the paper: 24. The scale is taken in at one value; the paper embeds it, and adds a GAN,
    which is left out. Unverified: lambda(t), eta; decided: no weight, 0.2.
    """
    objective = Consistency(
        pairs=GridPairs(points), source=NoisedData(), jump=LcmJump(), distance=Squared(), weight=unweighted,
        guidance=UniformScale(guidance, guidance), cfg=True, target="target", step=SdeStep(eta, parts),
    )  # fmt: skip
    paper = "Liu et al. 2024, SCott: Stochastic Consistency Distillation, arXiv:2403.01505"
    return single("scott", paper, objective, learn(lr, target=target_ema), steps, multistep(Boundary(), points))


CONSISTENCY: dict[str, RecipeFunction] = {
    "cd": cd, "ct": ct, "ict": ict, "ect": ect, "sct": sct, "slct": slct, "direct-cm": direct_cm, "lcf": lcf,
    "scott": scott,
}  # fmt: skip

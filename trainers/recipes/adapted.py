"""Recipes that adapt what is there: a combination of saved checkpoints, an adapter that reads negative prompts.

Guidance scales follow u + w (c - u); a paper's omega of the form c + omega (c - u) is w = 1 + omega.
"""

from dataclasses import replace

from ..errors import RecipeError
from ..loop.checkpoint_search import Search
from ..networks.student import Student
from ..objectives.avoiding import Avoiding
from ..objectives.consistency import Consistency
from ..objectives.guidance import GuidanceDistillation
from ..parts.curricula import Fixed
from ..parts.distances import Squared, snr_plus_one, unweighted
from ..parts.ends import PhaseEdges
from ..parts.jumps import DdimJump
from ..parts.laws import WholePhase
from ..parts.steps import OdeStep
from ..parts.times import UniformScale, UniformTimes
from ..parts.transitions import NoisedData
from .consistency import cd
from .forms import chain, learn, multistep, staged
from .recipe import Recipe, RecipeFunction, Stage


def lcsc(
    *, steps: int = 2000, lr: float = 3e-4, points: int = 40, target_ema: float = 0.95, guidance: float = 3.0,
    saved: int = 12, window: float = 0.6, population: int = 10, rounds: int = 80, spread: float = 0.15,
    score_steps: tuple[int, ...] = (1, 2, 4), samples: int = 256,
) -> Recipe:  # fmt: skip
    """LCSC, Liu et al. 2024 (arXiv 2404.02241): consistency distillation, then the best sum of checkpoints on its way.

    Coefficients sum to 1 and may be negative; an evolutionary search scores combinations by the benchmark's distance of
    their samples at `score_steps` steps. The search's code is unreleased. Unverified: population, rounds, size of
    mutations (the paper scores 5,000 to 10,000 samples by FID); decided: the checkpoints are the kept average's, evenly
    over the last `window` of the run, so that the search begins no worse than consistency distillation alone.
    """
    base = cd(steps=steps, lr=lr, points=points, target_ema=target_ema, guidance=guidance)
    plan = Search(
        saved=saved, window=window, population=population, rounds=rounds, spread=spread, steps=score_steps,
        samples=samples,
    )  # fmt: skip
    sampling = multistep()
    if not score_steps or not set(score_steps) <= set(sampling.grids.counts):
        raise RecipeError(
            f"lcsc: score_steps is {list(score_steps)}; its student has grids for {list(sampling.grids.counts)} steps"
        )
    paper = "Liu et al. 2024, Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better, "
    stage = replace(base.stages[0], name="lcsc", search=plan)
    return staged("lcsc", paper + "arXiv:2404.02241", (stage,), sampling)


def speedupnet(
    *, steps: int = 3000, lr: float = 1e-3, share: float = 0.5, phases: int = 4, points: int = 40, parts: int = 4,
    empty: float = 0.5, guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """SpeedUpNet, Chai et al. 2023 (arXiv 2312.08887): adapters of a frozen network that read a prompt to avoid.

    First they learn the offset of guidance away from a random negative prompt, `|eps - eps_w|^2` at every time; then
    few steps: one jump across a phase lands where `parts` guided steps of the teacher do. The scale is taken in at one
    value. Served with the empty prompt, or with a request's own under `negative_mode` "sun".
    Unverified: the multi-step consistency loss, its weight, the law of negative prompts; decided: the jump above, in a
    second stage of `1 - share` of the steps; the empty prompt in the share `empty` of the rows, else another sample's.
    """
    if phases < 1 or points % phases:
        raise RecipeError(f"speedupnet: {phases} phases do not divide the {points} points of its grid; change either")
    if not 0 < round(share * steps) < steps:
        raise RecipeError(f"speedupnet: share is {share} of {steps} steps, and each of its two stages needs some")
    scale = UniformScale(guidance, guidance)
    offset = GuidanceDistillation(
        times=UniformTimes(), source=NoisedData(), distance=Squared(), weight=snr_plus_one, guidance=scale
    )
    few = Consistency(
        pairs=WholePhase(points, phases), ends=PhaseEdges(Fixed(phases)), source=NoisedData(), jump=DdimJump(),
        distance=Squared(), weight=unweighted, guidance=scale, cfg=True, target="student", step=OdeStep(parts=parts),
    )  # fmt: skip
    learner, first = {"student": learn(lr)}, round(share * steps)
    stages = (
        Stage(name="offset", objective=Avoiding(inner=offset, empty=empty), player_settings=learner, steps=first),
        Stage(
            name="few-steps", objective=Avoiding(inner=few, empty=empty), player_settings=learner, steps=steps - first,
            start="previous",
        ),
    )  # fmt: skip
    paper = "Chai et al. 2023, SpeedUpNet: A Plug-and-Play Adapter Network, arXiv:2312.08887"
    return staged("speedupnet", paper, stages, chain((phases,)), Student(negative=True), family="guidance")


ADAPTED: dict[str, RecipeFunction] = {"lcsc": lcsc, "speedupnet": speedupnet}

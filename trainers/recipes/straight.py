"""Straight trajectories as recipes: few long Euler steps. Guidance scales follow u + w (c - u)."""

from ..distribution.discriminator import Adversary
from ..errors import RecipeError
from ..loop.player import PlayerSettings
from ..objectives.consistency import Consistency
from ..objectives.flow_map import FlowPairs
from ..objectives.self_corrected import BothWays, SelfCorrected
from ..objectives.straight import Anchored, SameSlope, StraightTrajectory
from ..parts.curricula import Fixed
from ..parts.distances import PseudoHuber, Squared, unweighted
from ..parts.ends import PhaseEdges
from ..parts.jumps import DdimJump
from ..parts.pairs import Pairs
from ..parts.steps import SameNoise
from ..parts.times import GridPairs, UniformScale, UniformTimes
from ..parts.transitions import NoisedData
from .flow import TWO_TIMES
from .forms import FROM_DATA, ONE, chain, learn, single, staged
from .recipe import Needs, Recipe, RecipeFunction, Stage


def consistency_fm(
    *, steps: int = 3000, lr: float = 3e-4, points: int = 50, segments: int = 2, anchor: float = 0.1,
    slopes: float = 1e-5,
) -> Recipe:  # fmt: skip
    """Consistency-FM, Yang et al. 2024 (arXiv 2407.02398): one straight line per segment, from data, no teacher.

    `|f(x_t) - sg f(x_s)|^2 + slopes |v_t - v_s|^2`, f the Euler step to the segment's end, x_t and x_s of one pair;
    below flow time `anchor` the sample is the aim. The paper's gap is 0.001 of the path, here a point of the grid.
    """
    if points % segments:
        raise RecipeError(f"consistency-fm: {points} points do not part into {segments} segments; change either")
    objective = Consistency(
        pairs=Anchored(GridPairs(points), anchor), source=NoisedData(), jump=DdimJump(), distance=Squared(),
        weight=unweighted, guidance=ONE, cfg=False, target="student", step=SameNoise(),
        ends=PhaseEdges(Fixed(segments)), slopes=SameSlope(slopes),
    )  # fmt: skip
    paper = "Yang et al. 2024, Consistency Flow Matching, arXiv:2407.02398"
    counts = tuple(sorted({1, 2, 4, segments}))
    return single("consistency-fm", paper, objective, learn(lr), steps, chain(counts), needs=FROM_DATA)


def scflow(
    *, steps: int = 3000, lr: float = 3e-4, critic_lr: float = 1e-4, reach: float = 0.1, huber_c: float = 0.01,
    backward: float = 0.1, straight: float = 0.1, gan: float = 0.1, gan_share: float = 0.5, anchor: float = 0.1,
    target_ema: float = 0.9, guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """SCFlow, Dao et al. 2024 (arXiv 2412.16906): consistency down and up, own straight lines, and an adversary.

    The adversary judges noised one-step samples by a critic on the teacher's features that trains; its times are even,
    where the paper takes the pair's own. gan 0 leaves it out. Unverified: the weights' warm-ups, which are left out.
    """
    if not 0.0 < reach <= 0.5:
        raise RecipeError(f"scflow: reach is {reach}; it is a way in flow time, above 0 and up to 0.5")
    adversary = Adversary(student_weight=gan, critic_weight=1.0, times=UniformTimes(), share=gan_share)
    objective = SelfCorrected(
        times=BothWays(reach, anchor=anchor), source=NoisedData(), distance=PseudoHuber(huber_c), backward=backward,
        straight=straight, adversary=adversary if gan else None, guidance=UniformScale(guidance, guidance), cfg=True,
    )  # fmt: skip
    players = {"student": learn(lr, target=target_ema)}
    if gan:
        players["fake"] = PlayerSettings(lr=critic_lr, warmup=50, clip_norm=10.0)
    stage = Stage(name="scflow", objective=objective, player_settings=players, steps=steps)
    paper = "Dao et al. 2024, Self-Corrected Flow Distillation, arXiv:2412.16906"
    return staged("scflow", paper, (stage,), chain((1, 2, 4, 8)), needs=Needs(critic=bool(gan)))


def traflow(
    *, steps: int = 3000, lr: float = 3e-4, pairs: int = 8192, pair_steps: int = 64, output: float = 1.0,
    velocity: float = 1.0, consistency: float = 1.0, guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """TraFlow / SCoT, Wu et al. 2025 (arXiv 2502.16972): a teacher's pairs joined by straight lines that compose.

    `output |X(z, T -> 0) - x^|^2 + velocity |u(x_t, t, s) - (z - x^)|^2 + consistency |u - sg of two own halves|^2`.
    Unverified: all but the three targets; decided: squares, equal weights, the halves meet in the middle of flow time.
    """
    if not max(output, velocity, consistency) > 0.0:
        raise RecipeError("traflow: no target has a weight; set output, velocity or consistency above 0")
    objective = StraightTrajectory(
        pairs=FlowPairs(equal=0.25), source=NoisedData(), distance=Squared(), output=output, velocity=velocity,
        consistency=consistency,
    )  # fmt: skip
    plan = Pairs(count=pairs, steps=pair_steps, guidance=UniformScale(guidance, guidance))
    stage = Stage(name="traflow", objective=objective, player_settings={"student": learn(lr)}, steps=steps, pairs=plan)
    paper = "Wu et al. 2025, TraFlow: Trajectory Distillation on Pre-Trained Rectified Flow, arXiv:2502.16972"
    needs = Needs(data=False)
    return staged("traflow", paper, (stage,), chain((1, 2, 4)), TWO_TIMES, needs=needs, family="rectified-flow")


STRAIGHT: dict[str, RecipeFunction] = {"consistency-fm": consistency_fm, "scflow": scflow, "traflow": traflow}

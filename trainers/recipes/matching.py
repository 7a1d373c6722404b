"""Flow maps that learn a law rather than a point, from data alone. Guidance scales follow u + w (c - u)."""

from ..errors import RecipeError
from ..objectives.flow_map import FlowPairs
from ..objectives.moments import Decrement, Laplace, LogSnrWeight, MomentMatching
from ..objectives.twin import Recursive, ThreeKinds, TwinFlow
from ..parts.distances import Adaptive, ScaledPseudoHuber
from ..parts.laws import BetaTimes
from ..parts.steps import ReferenceBatch, ReferenceField, SameNoise
from ..parts.tangent import DataField
from ..parts.times import UniformScale
from ..parts.transitions import NoisedData
from .flow import TWO_TIMES
from .forms import FROM_DATA, ONE, chain, learn, single
from .recipe import Recipe, RecipeFunction


def imm(
    *, steps: int = 3000, lr: float = 3e-4, group: int = 4, k: float = 8.0, b: float = 4.0, power: float = 1.0,
    by_condition: bool = False, width: float = 64.0, reference: bool = True,
) -> Recipe:  # fmt: skip
    """IMM, Zhou et al. 2025 (arXiv 2503.07565): the law of jumps t -> s is that of jumps r -> s, r a little lower.

    Squared maximum mean discrepancy of groups of `group` that share (t, s), Laplace kernel over c_out of the jump; r by
    a constant step of level, the range over 2^k (the paper: k = 12, batch 4096). reference: the sample in x_r is the
    batch's mean given x_t over rows of its condition, which is itself where no row has the same; else the paper's own.
    by_condition compares only rows of one condition. Unverified: the weight's power for latents; decided: 1.
    """
    if group < 1:
        raise RecipeError(f"imm: group is {group}; moments are matched among 1 row or more")
    objective = MomentMatching(
        pairs=FlowPairs(equal=0.0), nearer=Decrement(k), source=NoisedData(pure_at_start=False), kernel=Laplace(width),
        step=ReferenceBatch() if reference else SameNoise(), weight=LogSnrWeight(b, power), group=group,
        by_condition=by_condition, guidance=ONE,
    )  # fmt: skip
    paper = "Zhou et al. 2025, Inductive Moment Matching, arXiv:2503.07565"
    return single(
        "imm", paper, objective, learn(lr), steps, chain((1, 2, 4, 8)), TWO_TIMES, needs=FROM_DATA, family="flow-map"
    )


def twinflow(
    *, steps: int = 3000, lr: float = 3e-4, h: float = 0.01, parts: int = 2, near: float = 0.05, matching: float = 0.5,
    floor: float = 1.0, soft: float = 0.3, empty: float = 0.1, reference: bool = True, guidance: float = 3.0,
) -> Recipe:  # fmt: skip
    """TwinFlow, Cheng et al. 2025 (arXiv 2512.05150): a flow map whose negative times are its own fake score.

    A quarter of the batch each: the whole way, short ways, any way, and the twin. What u misses over a step of h is put
    right; one-step samples are pulled along the difference of both velocities, `matching` of the loss. The guidance is
    its own: rho = 1 - 1/w of the difference of its conditional and unconditional answers, the paper's 0.5 is w = 2.
    reference: the data's velocity is the batch's mean given x_t over rows of one condition, where the paper takes the
    pair's own; both are one where every row has a condition of its own. What is missed below `floor`, and differences
    of the two velocities below `soft`, count by their square, where the paper's all count alike (0.001): the mean of a
    noisy aim is kept so, and there is no drift to its median.
    """
    if guidance < 1.0:
        raise RecipeError(f"twinflow: guidance is {guidance}; its own guidance only adds, from 1 up")
    times, source = BetaTimes(), NoisedData()
    objective = TwinFlow(
        pairs=ThreeKinds(times, near), times=times, source=source, missing=Recursive(h, parts),
        field=ReferenceField(source) if reference else DataField(),
        distance=Adaptive(0.5, floor**2), pull=ScaledPseudoHuber(soft), matching=matching, rho=1.0 - 1.0 / guidance,
        empty_share=empty, guidance=UniformScale(guidance, guidance),
    )  # fmt: skip
    paper = "Cheng et al. 2025, TwinFlow: One-step Generation with Self-adversarial Flows, arXiv:2512.05150"
    return single(
        "twinflow", paper, objective, learn(lr), steps, chain((1, 2, 4, 8)), TWO_TIMES, needs=FROM_DATA,
        family="flow-map",
    )  # fmt: skip


MATCHING: dict[str, RecipeFunction] = {"imm": imm, "twinflow": twinflow}

"""Control of few-step students: a ControlNet trained on the student itself, by consistency or by its samples' law.

Guidance scales follow u + w (c - u); a paper's omega of the form c + omega (c - u) is w = 1 + omega.
"""

from fewstep.models.spec import Boundary

from ..distribution.control_terms import Follow
from ..distribution.distribution import DistributionMatching
from ..distribution.score_gap import Denoise, ScoreGap
from ..errors import RecipeError
from ..loop.player import PlayerSettings
from ..networks.student import Student
from ..objectives.consistency import Consistency
from ..parts.distances import PseudoHuber, snr_plus_one, unweighted
from ..parts.jumps import LcmJump
from ..parts.laws import LogNormal
from ..parts.rollout import BackwardSimulation
from ..parts.steps import SameNoise
from ..parts.times import GridPairs, LcmGrids, UniformScale
from ..parts.transitions import NoisedData
from .distribution import follower, matcher
from .forms import ONE, learn
from .recipe import Needs, Recipe, RecipeFunction, Run, Sampling, Stage

COUNTS = (1, 2, 4)
CARRIED, FRESH = "carried", "fresh"
"""Where a ControlNet begins. A stage's start is "init" for the first, the student's own or its teacher's."""


def control_student(
    *, steps: int = 2000, lr: float = 3e-4, points: int = 50, huber_c: float = 0.03, target_ema: float = 0.95,
    start: str = CARRIED,
) -> Recipe:  # fmt: skip
    """A ControlNet trained on a frozen few-step student, as CCM (Xiao et al. 2023, arXiv 2312.06971).

    `huber(f_theta(x_t, c) - f_ema(x_s, c))` with x_s of the same data and noise: consistency training, whose answer is
    where the data's own trajectory ends given the control, so that few steps stay. Only the ControlNet learns; it
    starts as the student's own or its teacher's (`start` "carried"), or as a new one ("fresh").
    Unverified: the paper's learning rate and steps; decided: those of `lcm`.
    """
    objective = Consistency(
        pairs=GridPairs(points, to_clean=True), source=NoisedData(), jump=LcmJump(), distance=PseudoHuber(huber_c),
        weight=unweighted, guidance=ONE, cfg=False, target="target", step=SameNoise(),
    )  # fmt: skip
    paper = "Xiao et al. 2023, CCM: Adding Conditional Controls to Text-to-Image Consistency Models, arXiv:2312.06971"
    players = {"student": learn(lr, target=target_ema)}
    return _controlled("control-student", paper, objective, players, steps, points, start)


def jdm(
    *, steps: int = 2000, lr: float = 1e-4, fake_lr: float = 2e-4, every: int = 2, guidance: float = 3.0,
    follow: float = 1.0, grid_weights: tuple[float, ...] = (1.0, 1.0, 1.0), points: int = 50, gap_mean: float = 0.5,
    gap_std: float = 1.2, start: str = CARRIED,
) -> Recipe:  # fmt: skip
    """JDM, Luo et al. 2025 (arXiv 2503.06652, recalled): a new control on a few-step student by its samples' law.

    `KL(p(x, c) || q(x) q(c | x)) = E_c KL(p(x | c) || q(x)) - E log q(c | x) + const`. Student: DMD's gap with a fake
    told the control and a teacher not told it, `+ follow |detect(x) - c|^2`, a differentiable detector on the sample.
    Fake: denoising of the student's samples under their control. Only the text is guided, as both halves of the teacher
    know no control. The ControlNet starts as in `control-student`. The paper adds human feedback, which a reward of
    pictures does (`reward_scale`).
    Unverified: the bound on diffused laws, weights, the ratio of steps; decided: the times and the told fake of `dmd2`,
    the condition on the clean sample alone, which is exact as the gap's times go to clean data, every second step.
    """
    if follow < 0.0 or every < 1:
        raise RecipeError(f"jdm: follow is {follow} and every {every}; set follow to 0 or more, every to 1 or more")
    gap = ScoreGap(times=LogNormal(gap_mean, gap_std), guidance=UniformScale(guidance, guidance), cfg=True)
    objective = DistributionMatching(
        rollout=BackwardSimulation(LcmGrids(COUNTS, points), grid_weights, LcmJump()),
        terms={
            "student": (gap, Follow(weight=follow)),
            "fake": (Denoise(times=LogNormal(gap_mean, gap_std), weight=snr_plus_one),),
        },
        told=True,
    )
    players = {
        "student": matcher(lr, every),
        "fake": follower(fake_lr),
    }
    paper = "Luo et al. 2025, Adding Additional Control to One-Step Diffusion with Joint Distribution Matching, "
    return _controlled("jdm", paper + "arXiv:2503.06652", objective, players, steps, points, start)


def _controlled(
    name: str, paper: str, objective: Consistency | DistributionMatching, players: dict[str, PlayerSettings],
    steps: int, points: int, start: str,
) -> Recipe:  # fmt: skip
    """start: "carried", the ControlNet that the student or else its teacher has; "fresh", a new one of the U-Net's
    encoder, for a control that neither was taught."""
    if start not in (CARRIED, FRESH):
        raise RecipeError(f"{name}: start is {start!r}; set it to {CARRIED} or {FRESH}")
    plan, begun = Student(control=True), FRESH if start == FRESH else "init"
    return Recipe(
        name=name, family="control", paper=paper, needs=Needs(student=True, teacher=name == "jdm"), student=plan,
        fake=Student(control=True, second_time=True),
        stages=(Stage(name=name, objective=objective, player_settings=players, steps=steps, start=begun),),
        sampling=Sampling(
            sampler="lcm", grids=LcmGrids(COUNTS, points), stochastic=True, boundary=Boundary(),
            guidance_mode="none", guidance_default=1.0, guidance_range=(1.0, 1.0),
        ),
        run=Run(batch=16, scenes=2048),
    )  # fmt: skip


CONTROL: dict[str, RecipeFunction] = {"control-student": control_student, "jdm": jdm}

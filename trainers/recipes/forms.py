"""What many recipes have in common: an optimiser, a way of being sampled, a recipe of one stage or of several."""

from fewstep.models.spec import Boundary

from ..loop.player import Decay, PlayerSettings
from ..networks.student import PLAIN, Student
from ..parts.objective import Objective
from ..parts.times import EvenGrids, Grids, LcmGrids, UniformScale
from .recipe import Needs, Recipe, Sampling, Stage

FROM_TEACHER, FROM_DATA = Needs(), Needs(teacher=False)
ONE = UniformScale(1.0, 1.0)


def learn(lr: float, **averages: float | Decay) -> PlayerSettings:
    """The student's optimiser: a short rise, a long fall, the kept average and any other."""
    return PlayerSettings(lr=lr, warmup=50, cooldown=0.4, ema={**averages, "kept": 0.99})


def multistep(boundary: Boundary | None = None, points: int = 50) -> Sampling:
    """Multistep consistency sampling: clean estimates and fresh noise, at 1 to 8 steps of LCM's grid."""
    return Sampling(
        sampler="lcm", grids=LcmGrids((1, 2, 4, 8), points), stochastic=True, boundary=boundary,
        guidance_mode="none", guidance_default=1.0, guidance_range=(1.0, 1.0),
    )  # fmt: skip


def chain(counts: tuple[int, ...], sampler: str = "ddim", phases: int | None = None) -> Sampling:
    """The deterministic chain of jumps over even grids."""
    return Sampling(
        sampler=sampler, grids=EvenGrids(counts), stochastic=False, phases=phases,
        guidance_mode="none", guidance_default=1.0, guidance_range=(1.0, 1.0),
    )  # fmt: skip


def hopping(grids: Grids, gamma: float) -> Sampling:
    """TCD's sampler: jump below the next time by gamma, then noise back up to it."""
    return Sampling(
        sampler="tcd", grids=grids, stochastic=gamma > 0.0, gamma=gamma,
        guidance_mode="none", guidance_default=1.0, guidance_range=(1.0, 1.0),
    )  # fmt: skip


def single(
    name: str, paper: str, objective: Objective, players: PlayerSettings, steps: int, sampling: Sampling,
    student: Student = PLAIN, *, needs: Needs = FROM_TEACHER, start: str = "init", family: str = "consistency",
) -> Recipe:  # fmt: skip
    """A recipe of one stage."""
    stage = Stage(name=name, objective=objective, player_settings={"student": players}, steps=steps, start=start)
    return staged(name, paper, (stage,), sampling, student, needs=needs, family=family)


def staged(
    name: str, paper: str, stages: tuple[Stage, ...], sampling: Sampling, student: Student = PLAIN, *,
    needs: Needs = FROM_TEACHER, family: str = "consistency",
) -> Recipe:  # fmt: skip
    """A recipe of several stages with the usual run."""
    return Recipe(name=name, family=family, paper=paper, needs=needs, student=student, stages=stages, sampling=sampling)

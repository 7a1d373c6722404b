"""A rollout of one evaluation at noised data: the student is asked anywhere on its path, without walking there."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.models.denoiser import Denoiser
from fewstep.models.paths import Path

from ..errors import RecipeError
from .jumps import Jump, ToClean
from .laws import Law
from .objective import Batch, Turn
from .rollout import Made
from .times import Grids, UniformScale, weighed
from .transitions import NoisedData, with_scale


@dataclass(frozen=True)
class SampledTimes:
    """The times of the longest of a student's grids, noisiest first, each with its weight (evenly where none)."""

    grids: Grids
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != max(self.grids.counts):
            raise RecipeError(
                f"{len(self.weights)} weights for the {max(self.grids.counts)} times of the student's longest grid; "
                "give one for each"
            )

    def draw(self, path: Path, count: int, turn: Turn) -> Tensor:
        grid = self.grids.of(path)[max(self.grids.counts)]
        drawn = turn.choose(weighed(self.weights, len(grid)), count)
        return torch.tensor(grid, dtype=torch.float64, device=turn.rng.device)[drawn]


@dataclass(frozen=True)
class StartMoreOften:
    """Times of a law, or with probability `share` the noisiest, from which one step makes a sample (SANA-Sprint)."""

    law: Law
    share: float

    def draw(self, path: Path, count: int, turn: Turn) -> Tensor:
        t = self.law.draw(path, count, turn)
        return torch.where(turn.uniform(0.0, 1.0, count) < self.share, torch.full_like(t, path.start), t)


@dataclass(frozen=True)
class NoisedRollout:
    """The student's clean estimates of data noised to t, as LADD trains; at the noisiest time of noise alone.

    guidance: scales that the student is told, where it takes them.
    """

    times: Law
    jump: Jump = field(default_factory=ToClean)
    source: NoisedData = field(default_factory=NoisedData)
    guidance: UniformScale | None = None

    def make(self, student: Denoiser, batch: Batch, turn: Turn) -> Made:
        path, count = student.path, len(batch.x0)
        t = self.times.draw(path, count, turn)
        x = self.source.draw(path, batch, t, turn)
        cond = batch.cond if self.guidance is None else with_scale(batch.cond, self.guidance.draw(count, turn))
        return Made(self.jump(student, x, t, torch.zeros_like(t), cond), x, t)

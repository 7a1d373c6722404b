"""Backward simulation: a student's training inputs are its own states, made as its sampler makes them."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, times
from fewstep.models.paths import Path

from .jumps import Jump
from .objective import Turn
from .times import Grids
from .transitions import noised, pure_noise


@dataclass(frozen=True)
class BackwardSimulation:
    """DMD2, section 4.5: walk a grid from pure noise without gradient, stop at a drawn step, take that with gradient.

    One student serves every step count of `grids`, drawn with `weights` (evenly where empty). Between steps x0 is
    noised afresh, as the multistep consistency sampler does, or where `chained` goes on along the student's own noise
    estimate, as the deterministic chain does; the student must be sampled so. A batch shares its exit.
    """

    grids: Grids
    weights: tuple[float, ...]
    jump: Jump
    chained: bool = False

    def exit(self, path: Path, turn: Turn) -> tuple[float, ...]:
        """The times walked, the last being the one that is taken with gradient."""
        grids = self.grids.of(path)
        weights = torch.tensor(self.weights or [1.0] * len(grids), dtype=torch.float64)
        grid = grids[self.grids.counts[int(turn.choose(weights, 1))]]
        return grid[: int(turn.integers(len(grid), 1)) + 1]

    def reach(self, student: Denoiser, like: Tensor, cond: Condition, turn: Turn) -> tuple[Tensor, Tensor]:
        """(x, t): the states at the drawn step, walked to without gradient; x is shaped as `like`, t is [B]."""
        path = student.path
        walked = self.exit(path, turn)
        x = pure_noise(path, turn.noise(like))
        with torch.no_grad():
            for t, after in pairwise(walked):
                if self.chained:
                    x = student.jump(x, times(t, x), times(after, x), cond)
                else:
                    x0 = self._step(student, x, times(t, x), cond)
                    x = noised(path, x0, times(after, x), turn.noise(x))
        return x, times(walked[-1], x)

    def run(self, student: Denoiser, like: Tensor, cond: Condition, turn: Turn, *, grad: bool) -> Tensor:
        """Student samples, shaped as `like`; with gradient through the last evaluation where `grad`."""
        x, t = self.reach(student, like, cond, turn)
        with torch.set_grad_enabled(grad):
            return self._step(student, x, t, cond)

    def _step(self, student: Denoiser, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.jump(student, x, t, torch.zeros_like(t), cond)

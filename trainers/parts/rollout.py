"""What a student makes to be trained on: a rollout from noise to its own samples, as its sampler makes them."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, renoise, times
from fewstep.models.paths import Path

from .jumps import Jump
from .objective import Batch, Turn
from .times import Grids, check_grid_weights, weighed
from .transitions import noised, pure_noise


@dataclass(frozen=True)
class Made:
    """A student's samples: x0 [B, C, ...], its clean estimate of `x` [B, C, ...] at `t` [B].

    s [B], x_s: where its step landed and the state there, for methods that match the law of that state; None where the
    step ends at clean data, which is x0. before: the earlier steps of the same walk, where a rollout keeps them.
    """

    x0: Tensor
    x: Tensor
    t: Tensor
    s: Tensor | None = None
    x_s: Tensor | None = None
    before: tuple["Made", ...] = ()

    def at(self, path: Path, t: Tensor, noise: Tensor) -> Tensor:
        """The sample noised to t [B], from where its step landed: `alpha_t|s x_s + sigma_t|s noise`, s = clean or s."""
        if self.s is None or self.x_s is None:
            return noised(path, self.x0, t, noise)
        return renoise(path, self.x_s, self.s, t, noise)


class Rollout(Protocol):
    """How samples are made; with a gradient where torch's mode asks for one."""

    def make(self, student: Denoiser, batch: Batch, turn: Turn) -> Made: ...


@dataclass(frozen=True)
class BackwardSimulation:
    """DMD2, section 4.5: walk a grid from pure noise without gradient, stop at a drawn step, take that with gradient.

    One student serves every step count of `grids`, drawn with `weights` (evenly where empty). Between steps x0 is
    noised afresh, as the multistep consistency sampler does, or where `chained` goes on along the student's own noise
    estimate, as the deterministic chain does; the student must be sampled so. A batch shares its exit.

    Errors: `RecipeError` for weights that are not one for each step count.
    """

    grids: Grids
    weights: tuple[float, ...]
    jump: Jump
    chained: bool = False

    def __post_init__(self) -> None:
        check_grid_weights(self.weights, self.grids.counts)

    def exit(self, path: Path, turn: Turn) -> tuple[float, ...]:
        """The times walked, the last being the one that is taken with gradient."""
        grids = self.grids.of(path)
        grid = grids[self.grids.counts[turn.pick(weighed(self.weights, len(grids)))]]
        return grid[: turn.pick(torch.ones(len(grid))) + 1]

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

    def make(self, student: Denoiser, batch: Batch, turn: Turn) -> Made:
        x, t = self.reach(student, batch.x0, batch.cond, turn)
        return Made(self._step(student, x, t, batch.cond), x, t)

    def _step(self, student: Denoiser, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.jump(student, x, t, torch.zeros_like(t), cond)

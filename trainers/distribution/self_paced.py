"""Adversarial self-distillation (ASD, Yang et al. 2025): a student's samples of n steps against its own of n + 1.

Source: arXiv 2511.01419. The gap between neighbouring step counts is small, so the critic has an easy task and a stable
one; the longest count is held by the method beside it. Each count has a head of its own (`CriticPlan.by_steps`).
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, times

from ..parts.jumps import Jump
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from ..parts.times import Grids, check_grid_weights, weighed
from ..parts.transitions import noised, pure_noise
from .discriminator import Adversary, Deceive, Judge


@dataclass(frozen=True)
class WholeWalk:
    """The student's sampler to its end, of a step count that the batch shares; the gradient is of the last step.

    `Made.before` are the steps before it.
    """

    grids: Grids
    weights: tuple[float, ...]
    jump: Jump

    def __post_init__(self) -> None:
        check_grid_weights(self.weights, self.grids.counts)

    def make(self, student: Denoiser, batch: Batch, turn: Turn) -> Made:
        counts = self.grids.counts
        n = counts[turn.pick(weighed(self.weights, len(counts)))]
        return self.walk(student, n, batch.x0, batch.cond, turn)

    def walk(self, student: Denoiser, steps: int, like: Tensor, cond: Condition, turn: Turn) -> Made:
        grid = self.grids.of(student.path)[steps]
        x, before = pure_noise(student.path, turn.noise(like)), []
        with torch.no_grad():
            for t, after in pairwise(grid):
                before.append(self._step(student, x, times(t, x), cond))
                x = noised(student.path, before[-1].x0, times(after, x), turn.noise(x))
        return replace(self._step(student, x, times(grid[-1], x), cond), before=tuple(before))

    def _step(self, student: Denoiser, x: Tensor, t: Tensor, cond: Condition) -> Made:
        return Made(self.jump(student, x, t, torch.zeros_like(t), cond), x, t)


@dataclass(frozen=True)
class NextCount:
    """What samples of n steps are held against: the same student's of the next count of its grids."""

    walk: WholeWalk

    @torch.no_grad()
    def draw(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> Tensor:
        after = self.after(made)
        if after is None:
            raise TypeError(f"{len(made.before) + 1} steps have no next count among {self.walk.grids.counts}")
        return self.walk.walk(cast["student"], after, made.x0, batch.cond, turn).x0

    def after(self, made: Made) -> int | None:
        """The next count; None where the samples are of the last."""
        return min((n for n in self.walk.grids.counts if n > len(made.before) + 1), default=None)


@dataclass(frozen=True)
class BesideNext:
    """One side of the GAN against the next step count: silent where there is none; the critic is told n."""

    side: Deceive | Judge
    next: NextCount

    roles = ()

    @property
    def adversary(self) -> Adversary:
        return self.side.adversary

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        if self.next.after(made) is None:
            return torch.zeros((), device=made.x0.device), {}
        steps = torch.full((len(made.x0),), len(made.before) + 1, device=made.x0.device)
        return self.side.loss(made, cast, replace(batch, cond={**batch.cond, "steps": steps}), turn)

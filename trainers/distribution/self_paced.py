"""Adversarial self-distillation (ASD, Yang et al. 2025): a student's samples of n steps against its own of n + 1.

Source: arXiv 2511.01419. The gap between neighbouring step counts is small, so the critic has an easy task and a stable
one; the longest count is held by the method beside it, which learns at the times on the way too. Each count has a head
of its own (`CriticPlan.by_steps`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isclose

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, times
from fewstep.models.paths import Path

from ..parts.jumps import Jump
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from ..parts.times import Grids, check_grid_weights, weighed
from ..parts.transitions import noised, pure_noise
from .discriminator import Adversary, Deceive, Judge


@dataclass(frozen=True)
class DrawnWalk:
    """The student's sampler of a drawn step count, to a drawn step of it, whose gradient alone is kept.

    ends: how often a walk goes to its end, where it is a sample of that count; else it stops at one of the earlier
    steps, so that the student learns at every time it is asked at. `Made.before` are the steps on the way.
    """

    grids: Grids
    weights: tuple[float, ...]
    jump: Jump
    ends: float = 0.5

    def __post_init__(self) -> None:
        check_grid_weights(self.weights, self.grids.counts)

    def make(self, student: Denoiser, batch: Batch, turn: Turn) -> Made:
        counts = self.grids.counts
        n = counts[turn.pick(weighed(self.weights, len(counts)))]
        earlier = [(1.0 - self.ends) / (n - 1)] * (n - 1) if n > 1 else []
        last = turn.pick(torch.tensor([*earlier, self.ends], dtype=torch.float64))
        grid = self.grids.of(student.path)[n]
        return self.walk(student, grid[: last + 1], batch.x0, batch.cond, turn)

    def count(self, made: Made, path: Path) -> int | None:
        """The step count that this is a sample of; None where the walk stopped on its way."""
        walked = [float(step.t[0]) for step in (*made.before, made)]
        for n, grid in self.grids.of(path).items():
            if n == len(walked) and all(map(isclose, grid, walked)):
                return n
        return None

    def walk(self, student: Denoiser, grid: Sequence[float], like: Tensor, cond: Condition, turn: Turn) -> Made:
        """The steps at these times, of which the last has a gradient."""
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

    walk: DrawnWalk

    @torch.no_grad()
    def draw(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> Tensor:
        student = cast["student"]
        after = self.after(made, student.path)
        if after is None:
            raise TypeError(f"{len(made.before) + 1} steps have no next count among {self.walk.grids.counts}")
        return self.walk.walk(student, self.walk.grids.of(student.path)[after], made.x0, batch.cond, turn).x0

    def after(self, made: Made, path: Path) -> int | None:
        """The next count; None where the samples are of the last, or of none."""
        n = self.walk.count(made, path)
        return None if n is None else min((other for other in self.walk.grids.counts if other > n), default=None)


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
        if self.next.after(made, cast["student"].path) is None:
            return torch.zeros((), device=made.x0.device), {}
        steps = torch.full((len(made.x0),), len(made.before) + 1, device=made.x0.device)
        return self.side.loss(made, cast, replace(batch, cond={**batch.cond, "steps": steps}), turn)

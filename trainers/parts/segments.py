"""Rollouts along a deterministic trajectory: over its parts, where a step ends before clean data; over any times."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.models.denoiser import Denoiser, times
from fewstep.models.paths import Path

from ..errors import RecipeError
from .objective import Batch, Turn
from .rollout import Made
from .times import Grids, clean
from .transitions import noised, pure_noise


@dataclass(frozen=True)
class Segments:
    """The student's own ODE walk over its grid, cut into `phases` equal parts; a step lands at the end of its part.

    As many parts as steps match the law of every state of the walk (TDM); fewer let a part's earlier steps reach its
    end by one jump, whose law is matched there (Phased DMD). phases None: as many as steps. alone: each sample has a
    step of its own, and the whole walk is made; else a batch shares one, and walks no further.
    """

    grids: Grids
    phases: int | None = None
    alone: bool = True

    def __post_init__(self) -> None:
        if len(self.grids.counts) != 1:
            raise RecipeError(f"segments of {self.grids.counts} steps: one walk has one number of them; name one")
        if self.grids.counts[0] % (self.phases or 1):
            raise RecipeError(f"{self.grids.counts[0]} steps do not part into {self.phases} phases; change either")

    def ends(self, path: Path) -> list[tuple[float, float]]:
        """(where a step begins, where it lands) for each step of the walk."""
        (count,) = self.grids.counts
        grid, each = self.grids.of(path)[count], count // (self.phases or count)
        edges = [*grid, clean(path)]
        return [(t, edges[(k // each + 1) * each]) for k, t in enumerate(grid)]

    def make(self, student: Denoiser, batch: Batch, turn: Turn) -> Made:
        path, like = student.path, batch.x0
        table = self.ends(path)
        start = pure_noise(path, turn.noise(like))
        drawn = turn.integers(len(table), len(like)) if self.alone else turn.pick(torch.ones(len(table)))
        last = len(table) - 1 if self.alone else int(drawn)
        states = [start]
        with torch.no_grad():
            for (begun, _), (after, _) in pairwise(table[: last + 1]):
                x = states[-1]
                states.append(student.jump(x, times(begun, x), times(after, x), batch.cond))
        rows = torch.tensor(table, dtype=torch.float64, device=like.device)
        if not self.alone:
            x, (t, s) = states[-1], (times(edge, start) for edge in table[last])
        else:
            x = torch.stack(states)[drawn, torch.arange(len(like), device=like.device)]
            t, s = rows[drawn].unbind(1)
        x0, eps = student.both(x, t, batch.cond)
        return Made(x0, x, t, s, noised(path, x0, s, eps))


@dataclass(frozen=True)
class RandomWalk:
    """A deterministic walk over times drawn anew for every batch, taken at a drawn step with gradient (CDM).

    The first time is the noisiest; 0 to `most` - 1 further ones are even between shares `low` and `high` of the path.
    off: how often the student is asked off its walk, at the state that its last velocity gives for another time.
    """

    most: int = 8
    low: float = 0.25
    high: float = 0.95
    off: float = 0.5

    def __post_init__(self) -> None:
        if not (self.most >= 1 and 0.0 < self.low < self.high <= 1.0 and 0.0 <= self.off <= 1.0):
            raise RecipeError(
                f"a random walk of 1 to {self.most} steps between {self.low} and {self.high} of the path, off it with "
                f"probability {self.off}; steps are 1 or more, shares rise in 0 to 1"
            )

    def exit(self, path: Path, turn: Turn) -> tuple[tuple[float, ...], float | None]:
        """(the times walked, the last being the one asked at; the time off the walk that is asked instead)."""
        count = 1 + turn.pick(torch.ones(self.most))
        shares = sorted((self.low + (self.high - self.low) * turn.common(0.0, 1.0, self.most)[: count - 1]).tolist())
        grid = (path.start, *(self._time(path, share) for share in reversed(shares)))
        walked = grid[: 1 + turn.pick(torch.ones(count))]
        other = float(turn.common(self.low, 1.0, 1))
        return walked, self._time(path, other) if turn.pick(torch.tensor([1.0 - self.off, self.off])) else None

    def _time(self, path: Path, share: float) -> float:
        t = path.end + share * (path.start - path.end)
        return float(round(t)) if path.kind == "vp" else t

    def make(self, student: Denoiser, batch: Batch, turn: Turn) -> Made:
        path = student.path
        walked, other = self.exit(path, turn)
        x = pure_noise(path, turn.noise(batch.x0))
        with torch.no_grad():
            for begun, after in pairwise(walked):
                x = student.jump(x, times(begun, x), times(after, x), batch.cond)
            if other is not None:
                x = student.jump(x, times(walked[-1], x), times(other, x), batch.cond)
        t = times(walked[-1] if other is None else other, x)
        return Made(student.x0(x, t, batch.cond), x, t)


def step_apart(path: Path, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha_t|s, sigma_t|s): what noises a state at s on to t >= s."""
    alpha = path.alpha(t) / path.alpha(s)
    return alpha, (path.sigma(t) ** 2 - (alpha * path.sigma(s)) ** 2).clamp(min=0.0).sqrt()

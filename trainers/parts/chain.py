"""The whole walk of a few-step student, every step of it kept: what rewards and preferences of chains are taken on."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, times
from fewstep.models.paths import Path

from ..errors import RecipeError
from .jumps import Jump
from .objective import Batch, Turn
from .rollout import Made
from .times import Grids, check_grid_weights, weighed
from .transitions import noised, pure_noise

GRADIENTS = ("whole", "each", "last")


@dataclass(frozen=True, kw_only=True)
class Chain:
    """`x_0 = f(x_k, t_k), x_{k+1} = alpha x_0 + sigma n` along one grid from pure noise to its end.

    One grid of `grids` is drawn per batch, with `weights` (evenly where empty). gradient: through the "whole" chain;
    through "each" step alone, its input held; through the "last" step. twins: two walks of each condition, rows
    [first; second]; the second begins at `stretch` times the first's noise, or at its own where None.
    """

    grids: Grids
    jump: Jump
    weights: tuple[float, ...] = ()
    gradient: str = "whole"
    twins: bool = False
    stretch: float | None = None

    def __post_init__(self) -> None:
        check_grid_weights(self.weights, self.grids.counts)
        if self.gradient not in GRADIENTS:
            raise RecipeError(f"a chain's gradient is {self.gradient!r}; it must be one of {', '.join(GRADIENTS)}")

    def grid(self, path: Path, turn: Turn) -> tuple[float, ...]:
        """The times walked."""
        grids = self.grids.of(path)
        return grids[self.grids.counts[turn.pick(weighed(self.weights, len(grids)))]]

    def make(self, student: Denoiser, batch: Batch, turn: Turn) -> Made:
        """The last step, with those before it in `before`; 2 B rows where there are twins."""
        path, cond = student.path, doubled(batch.cond) if self.twins else batch.cond
        walked, steps = self.grid(path, turn), []
        x = pure_noise(path, self._first(batch.x0, turn))
        for t, after in pairwise(walked):
            made = self._step(student, x, t, cond, graded=self.gradient != "last")
            x0 = made.x0 if self.gradient == "whole" else made.x0.detach()
            s = times(after, x)
            x = noised(path, x0, s, self._noise(batch.x0, turn))
            steps.append(Made(made.x0, made.x, made.t, s, x.detach()))
        last = self._step(student, x, walked[-1], cond, graded=True)
        return Made(last.x0, last.x, last.t, before=tuple(steps))

    def _step(self, student: Denoiser, x: Tensor, t: float, cond: Condition, *, graded: bool) -> Made:
        when = times(t, x)
        with torch.set_grad_enabled(graded and torch.is_grad_enabled()):
            return Made(self.jump(student, x, when, torch.zeros_like(when), cond), x, when)

    def _first(self, like: Tensor, turn: Turn) -> Tensor:
        if not self.twins or self.stretch is None:
            return self._noise(like, turn)
        noise = turn.noise(like)
        return torch.cat([noise, self.stretch * noise])

    def _noise(self, like: Tensor, turn: Turn) -> Tensor:
        """One draw per walk, each for the rows of the batch."""
        return torch.cat([turn.noise(like) for _ in range(1 + self.twins)])


def doubled(cond: Condition) -> dict[str, Tensor]:
    """The condition of twins."""
    return {name: torch.cat([value, value]) for name, value in cond.items()}

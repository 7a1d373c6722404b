"""Invertible consistency distillation (iCD, Starodubcev et al. 2024): a student and an inverse of it.

Both are consistency models with ends inside the path. The student lands on the lower edge of its phase, from above; the
inverse on the upper edge, from below, so that a picture goes to its noise in as many steps as noise to a picture. What
one has done the other must undo: preservation losses hold each against the other across a whole phase.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition
from fewstep.models.paths import Path

from ..parts.distances import Distance
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.times import grid
from ..parts.transitions import with_scale
from .consistency import Consistency


@dataclass(frozen=True)
class RisingPairs:
    """t uniform on a grid of `points` but its last, s the point above."""

    points: int

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        table = grid(path, self.points).to(turn.rng.device)
        i = turn.integers(self.points - 1, count)
        return table[i], table[i + 1]


@dataclass(frozen=True)
class UpperEdges:
    """The edge above t of `phases` even phases: the first of those that an even grid of as many steps walks."""

    phases: int

    def __call__(self, path: Path, t: Tensor, s: Tensor, turn: Turn) -> Tensor:
        edges = grid(path, self.phases).to(t.device)
        return edges[torch.searchsorted(edges, t.contiguous(), right=True).clamp(max=self.phases - 1)]


@dataclass(frozen=True)
class LowerEdges:
    """The times at which an inverse is asked: the lower edge of each of `phases`, the first point of the grid standing
    for clean data. As a grid of steps it falls like every other; an inverse is walked up it."""

    phases: int
    points: int

    @property
    def counts(self) -> tuple[int, ...]:
        return (self.phases,)

    def of(self, path: Path) -> dict[int, tuple[float, ...]]:
        low = [float(grid(path, self.points)[0]), *grid(path, self.phases)[:-1].tolist()]
        return {self.phases: tuple(reversed(low))}


@dataclass(frozen=True, kw_only=True)
class Invertible:
    """reverse, forward: the consistency losses of the student and of the inverse. preserve: weight of both cycles.

    points: of the grid both train on; its first time stands for clean data where the inverse begins. cycle: how the end
    of a cycle is compared with its beginning. Cycles are unguided, at scale 1, as the inverse is everywhere.
    """

    reverse: Consistency
    forward: Consistency
    phases: int
    points: int
    preserve: float
    cycle: Distance

    players = ("student", "inverse")

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.reverse.roles, "inverse", self.forward.target)))

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        if player == "student":
            loss, metrics = self.reverse.loss("student", cast, batch, turn)
        else:  # the same loss, upwards: the inverse is its student
            loss, metrics = self.forward.loss("student", Cast({**cast.roles, "student": cast["inverse"]}), batch, turn)
        begun, ended = self.round_trip(player, cast, batch, turn)
        kept = self.cycle(ended, begun).mean()
        return loss + self.preserve * kept, {**metrics, "preserve": float(kept.detach())}

    def round_trip(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Tensor]:
        """(states at one edge of a phase, the same after the other network has crossed the phase and `player` has come
        back), the first without gradient."""
        path, count = cast["student"].path, batch.x0.shape[0]
        low, high = self.edges(path, turn, count)
        start, turned = (low, high) if player == "student" else (high, low)
        other = cast["inverse" if player == "student" else "student"]
        cond: Condition = with_scale(batch.cond, torch.ones_like(low))
        begun = self.reverse.source.mixing.draw(path, batch, start, turn)
        with torch.no_grad():
            there = self.reverse.jump(other, begun, start, turned, cond)
        turn.share_dropout()
        return begun, self.reverse.jump(cast[player], there, turned, start, cond)

    def edges(self, path: Path, turn: Turn, count: int) -> tuple[Tensor, Tensor]:
        """The lower and the upper edge [count] of phases drawn evenly."""
        high = grid(path, self.phases).to(turn.rng.device)
        low = torch.tensor(LowerEdges(self.phases, self.points).of(path)[self.phases], dtype=high.dtype).flip(0)
        i = turn.integers(self.phases, count)
        return low[i], high[i]

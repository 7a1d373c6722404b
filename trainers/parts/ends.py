"""Where the jumps of a pair (t, s) both land: clean data, an edge of the phase, a random or a listed time below.

An end is a callable `(path, t, s, turn) -> [B]` times, none above s. Clean data is the time `clean(path)`.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fewstep.models.paths import Path

from .curricula import Curriculum, Fixed
from .objective import Turn
from .times import Grids, clean, grid


class Ends(Protocol):
    def __call__(self, path: Path, t: Tensor, s: Tensor, turn: Turn) -> Tensor: ...


@dataclass(frozen=True)
class AtClean:
    """Clean data: consistency models, LCM."""

    def __call__(self, path: Path, t: Tensor, s: Tensor, turn: Turn) -> Tensor:
        return torch.full_like(t, clean(path))


@dataclass(frozen=True)
class PhaseEdges:
    """The edge below t of `phases` even phases (PCM, Wang et al. 2024): the times that an even grid of as many steps
    walks, and clean data.

    drawn: a uniform time between the edge and s in its place (Hyper-SD, Ren et al. 2024). The count may fall over a
    run.
    """

    phases: Curriculum = field(default_factory=lambda: Fixed(4))
    drawn: bool = False

    def __call__(self, path: Path, t: Tensor, s: Tensor, turn: Turn) -> Tensor:
        edges = grid(path, self.phases(turn)).to(t.device)
        i = torch.searchsorted(edges, t.contiguous()) - 1  # the last edge strictly below
        low = edges[i.clamp(min=0)]
        if self.drawn:
            floor = torch.where(i >= 0, low, torch.full_like(low, path.end))
            low = floor + (s - floor).clamp(min=0.0) * turn.uniform(0.0, 1.0, len(t))
            return torch.minimum(low, s)
        below = torch.where(i >= 0, low, torch.full_like(low, clean(path)))
        return torch.minimum(below, s)


@dataclass(frozen=True)
class AnyBelow:
    """A uniform time from the path's end up to s (TCD, Zheng et al. 2024; CTM, Kim et al. 2023), and clean data itself
    with probability `clean_share`, since that is where samplers end."""

    clean_share: float = 0.0

    def __call__(self, path: Path, t: Tensor, s: Tensor, turn: Turn) -> Tensor:
        low = path.end + (s - path.end).clamp(min=0.0) * turn.uniform(0.0, 1.0, len(t))
        landed = turn.uniform(0.0, 1.0, len(t)) < self.clean_share
        return torch.where(landed, torch.full_like(low, clean(path)), torch.minimum(low, s))


@dataclass(frozen=True)
class MergedTargets:
    """TDD (Wang et al. 2024): a time of the union of all inference grids, drawn among those within `reach` of the
    path below s, then moved down by up to `eta` of itself.

    grids: the step counts that the student is to serve. Below the lowest time it is the path's end.
    """

    grids: Grids
    reach: float = 0.26
    eta: float = 0.3

    def __call__(self, path: Path, t: Tensor, s: Tensor, turn: Turn) -> Tensor:
        merged = self.targets(path).to(t.device)
        width = self.reach * (path.start - path.end)
        high = torch.searchsorted(merged, s.contiguous(), right=True) - 1  # the last target not above s
        low = torch.searchsorted(merged, merged[high.clamp(min=0)] - width)
        pick = low + ((high - low + 1).clamp(min=1) * turn.uniform(0.0, 1.0, len(t))).long()
        shrink = 1.0 - self.eta * turn.uniform(0.0, 1.0, len(t))
        aim = path.end + (merged[pick.clamp(min=0)] - path.end) * shrink
        return torch.minimum(aim, s)

    def targets(self, path: Path) -> Tensor:
        """All times of all grids but the noisiest, and the path's end, rising."""
        times = {time for walked in self.grids.of(path).values() for time in walked}
        return torch.tensor([path.end, *sorted(times - {max(times), path.end})], dtype=torch.float64)

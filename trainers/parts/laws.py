"""Time laws of consistency training, in noise levels sigma / alpha: any path takes part, through `path.time(level)`.

Papers state their constants for data of deviation 0.5 (EDM). Latents and the plane have deviation 1, so the defaults
here are theirs moved by ln 2.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fewstep.models.paths import Path

from .curricula import Curriculum, Fixed
from .ends import PhaseEdges
from .objective import Turn
from .times import clean, grid

LN2 = math.log(2.0)


class Law(Protocol):
    def draw(self, path: Path, count: int, turn: Turn) -> Tensor: ...


def levels(path: Path, points: int, rho: float = 7.0) -> Tensor:
    """Karras et al. 2022, eq. 5: `points` levels, rising from the path's end to its start, even in level^(1/rho).

    A path whose start has no signal ends at level 80, as EDM does.
    """
    low = max(path.level(path.end), 0.002) if path.kind != "vp" else path.level(path.end)
    high = min(80.0, path.level(path.start)) if path.alpha(path.start) > 1e-6 else 80.0
    i = torch.linspace(0.0, 1.0, points, dtype=torch.float64)
    even: Tensor = low ** (1 / rho) + i * (high ** (1 / rho) - low ** (1 / rho))
    return even**rho


def at_levels(path: Path, level: Tensor) -> Tensor:
    """Times of levels [B]; beyond the path's range its ends, and at level 0 clean data."""
    low, high = levels(path, 2).tolist()
    t = path.time(level.clamp(low, high))
    t = torch.where(level >= high, torch.full_like(t, path.start), t)
    return torch.where(level <= 0.0, torch.full_like(t, clean(path)), t)


@dataclass(frozen=True)
class LogNormal:
    """ln level ~ N(mean, std^2), cut at the path's range (EDM, ECT: -1.1 and 2.0 for data of deviation 0.5)."""

    mean: float = -1.1 + LN2
    std: float = 2.0

    def draw(self, path: Path, count: int, turn: Turn) -> Tensor:
        drawn = turn.normal(count)
        low, high = levels(path, 2).tolist()
        return at_levels(path, (self.mean + self.std * drawn).exp().clamp(low, high))


@dataclass(frozen=True)
class LogitNormal:
    """The share of noise tau = level / (1 + level), rectified flow's time, with logit tau ~ N(mean, std^2) (SD3)."""

    mean: float = 0.0
    std: float = 1.0

    def draw(self, path: Path, count: int, turn: Turn) -> Tensor:
        return LogNormal(self.mean, self.std).draw(path, count, turn)  # logit of tau is ln level


@dataclass(frozen=True)
class BetaTimes:
    """Native time over the path's range ~ Beta(a, b) (TwinFlow), by Johnk's ratio of powers of uniforms' sums."""

    a: float = 1.0
    b: float = 1.0

    def draw(self, path: Path, count: int, turn: Turn) -> Tensor:
        # torch's Beta draws from the global generator: the quantile of a grid is exact enough and repeats by the turn
        u = turn.uniform(0.0, 1.0, count)
        x = torch.linspace(0.0, 1.0, 4097, dtype=torch.float64, device=u.device)
        mid = 0.5 * (x[1:] + x[:-1])
        mass = (mid ** (self.a - 1.0) * (1.0 - mid) ** (self.b - 1.0)).cumsum(0)
        share = x[1:][torch.searchsorted(mass / mass[-1], u).clamp(max=4095)]
        return path.end + share * (path.start - path.end)


@dataclass(frozen=True)
class KarrasPairs:
    """Neighbours on a Karras grid of `points`: (level_i+1, level_i).

    mean, std: of the log-normal whose mass in a cell is its probability (iCT, eq. 10: -1.1 and 2.0 at deviation 0.5);
    std None draws cells evenly (CD, CT).
    to_clean: the least level counts as clean data, where the sample itself is the aim (`times.GridPairs`).
    """

    points: Curriculum = field(default_factory=lambda: Fixed(40))
    rho: float = 7.0
    mean: float = -1.1 + LN2
    std: float | None = None
    to_clean: bool = False

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        """(t, s), each [count]."""
        table = levels(path, self.points(turn), self.rho).to(turn.rng.device)
        i = turn.choose(self.masses(table), count)
        low = torch.where(i > 0, table[i], 0.0) if self.to_clean else table[i]
        return at_levels(path, table[i + 1]), at_levels(path, low)

    def masses(self, table: Tensor) -> Tensor:
        """Probabilities of the cells between rising levels, which sum to 1; the ends take what lies beyond them.

        A path that is cut at level 15 (Stable Diffusion's) would else almost never train where its samplers begin.
        """
        cells = torch.ones(len(table) - 1, dtype=torch.float64, device=table.device)
        if self.std is not None:
            below = torch.erf((table.log() - self.mean) / (math.sqrt(2.0) * self.std))
            below[0], below[-1] = -1.0, 1.0
            cells = below[1:] - below[:-1]
        return cells / cells.sum()


@dataclass(frozen=True)
class MappedPairs:
    """t of a law, and ECT's r below it: `r = t (1 - q^-(stage + 1) n(t))`, n(t) = 1 + k sigmoid(-b t), not below 0.

    Geng et al. 2024, eq. 13, in levels. Where r falls to 0, or below the path's least noise, the pair lands on clean
    data. stage: a curriculum over the run (the paper: eight, each as long). `scale` is the data's deviation over EDM's
    0.5, in which t is counted in n.
    """

    law: Law
    stage: Curriculum
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    scale: float = 2.0

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        t = self.law.draw(path, count, turn)
        low, high = levels(path, 2).tolist()
        r = self.below(path.level(t).clamp(max=high), self.stage(turn))
        return t, at_levels(path, torch.where(r < low, 0.0, r))

    def below(self, level: Tensor, stage: int) -> Tensor:
        """r of a level [B], 0 where the map falls below it."""
        share = self.q ** -(stage + 1) * (1.0 + self.k * torch.sigmoid(-self.b * level / self.scale))
        return (level * (1.0 - share)).clamp(min=0.0)


@dataclass(frozen=True)
class SortedPairs:
    """The larger and the smaller of two draws of a law; `equal` is the share of pairs with both at the larger."""

    law: Law
    equal: float = 0.0

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        a, b = self.law.draw(path, count, turn), self.law.draw(path, count, turn)
        t, s = torch.maximum(a, b), torch.minimum(a, b)
        return t, torch.where(turn.uniform(0.0, 1.0, count) < self.equal, t, s)


@dataclass(frozen=True)
class Neighbours:
    """t uniform on an even grid of `points`, s the point below, clean data below the first (multistep consistency)."""

    points: Curriculum

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        table = grid(path, self.points(turn)).to(turn.rng.device)
        i = turn.integers(len(table), count)
        low = table[(i - 1).clamp(min=0)]
        return table[i], torch.where(i > 0, low, torch.full_like(low, clean(path)))


@dataclass(frozen=True)
class WholeWay:
    """t uniform on an even grid of `points`, s clean data (Direct CM)."""

    points: int = 50

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        t = grid(path, self.points).to(turn.rng.device)[turn.integers(self.points, count)]
        return t, torch.full_like(t, clean(path))


@dataclass(frozen=True)
class WholePhase:
    """t uniform on an even grid of `points`, s the edge below of `phases` even phases: where one jump is to land."""

    points: int
    phases: int

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        t = grid(path, self.points).to(turn.rng.device)[turn.integers(self.points, count)]
        return t, PhaseEdges(Fixed(self.phases))(path, t, t, turn)


@dataclass(frozen=True)
class AnyTwo:
    """Two different points of a Karras grid, the noisier first (CTM's t and u)."""

    points: int = 18
    rho: float = 7.0

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        table = levels(path, self.points, self.rho).to(turn.rng.device)
        i = turn.integers(self.points - 1, count) + 1
        j = (turn.uniform(0.0, 1.0, count) * i).long()  # any point below
        return at_levels(path, table[i]), at_levels(path, table[j])

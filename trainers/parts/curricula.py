"""Counts and gaps that change over a run: each is a pure function of its progress, 0 .. 1.

A curriculum is a callable `(turn) -> int`; the number of grid points, segments or the stage that holds now.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from .objective import Turn


class Curriculum(Protocol):
    def __call__(self, turn: Turn) -> int: ...


@dataclass(frozen=True)
class Fixed:
    """The same count all along."""

    count: int

    def __call__(self, turn: Turn) -> int:
        return self.count


@dataclass(frozen=True)
class SquareRoot:
    """N(k) of consistency training (Song et al. 2023, appendix C): intervals grow as the root of the progress.

    `ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1` grid points.
    """

    first: int = 2
    last: int = 150

    def __call__(self, turn: Turn) -> int:
        grown = turn.progress * ((self.last + 1) ** 2 - self.first**2) + self.first**2
        return max(1, math.ceil(math.sqrt(grown) - 1.0)) + 1


@dataclass(frozen=True)
class Doubling:
    """iCT (Song & Dhariwal 2023, eq. 12): `min(s0 2^floor(k / K'), s1) + 1` grid points, K' = K / (log2(s1/s0) + 1)."""

    first: int = 10
    last: int = 1280

    def __call__(self, turn: Turn) -> int:
        stages = math.floor(math.log2(self.last // self.first)) + 1
        return int(min(self.first * 2 ** math.floor(min(turn.progress, 0.999999) * stages), self.last)) + 1


@dataclass(frozen=True)
class Geometric:
    """From `first` to `last` along a geometric line over the first `share` of the run (multistep consistency models),
    rounded to a multiple of `of`."""

    first: int = 64
    last: int = 1280
    share: float = 1.0
    of: int = 1

    def __call__(self, turn: Turn) -> int:
        along = min(1.0, turn.progress / self.share)
        grown = math.exp(along * math.log(self.last / self.first)) * self.first
        return max(1, round(grown / self.of)) * self.of


@dataclass(frozen=True)
class Listed:
    """Equal parts of the run, one count each: Hyper-SD's and FlashVDM's segments 8, 4, 2, 1; ECT's stages 0, 1, ..."""

    counts: tuple[int, ...]

    def __call__(self, turn: Turn) -> int:
        return self.counts[min(len(self.counts) - 1, int(turn.progress * len(self.counts)))]

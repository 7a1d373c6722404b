"""Which times a method trains on. Grids are rising float64 tensors; pairs and samplers draw [B] times for a turn.

Time grows with noise. A landing at clean data is `clean(path)`, where alpha = 1 and sigma = 0 exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from fewstep.models.paths import Path

from ..errors import RecipeError
from .objective import Turn


def clean(path: Path) -> float:
    """The time of clean data. A discrete VP path has noise left at n = 0; its limit -inf has none."""
    return float("-inf") if path.kind == "vp" else 0.0


def grid(path: Path, points: int) -> Tensor:
    """`points` evenly spaced times, rising, the last at the noisiest time.

    On the discrete VP path n_i = (i + 1) N / points - 1, the "trailing" grid of DDIM and LCM; it is fractional where
    `points` does not divide N.
    """
    i = torch.arange(1, points + 1, dtype=torch.float64)
    if path.kind == "vp":
        return i * (path.start + 1) / points - 1
    return path.end + i * (path.start - path.end) / points


class Grids(Protocol):
    """Time grids of a student's step counts, noisiest first."""

    @property
    def counts(self) -> tuple[int, ...]: ...

    def of(self, path: Path) -> dict[int, tuple[float, ...]]: ...


def weighed(weights: Sequence[float], count: int) -> Tensor:
    """[count] float64 for `Turn.pick` and `Turn.choose`: evenly where `weights` is empty."""
    return torch.tensor(weights or [1.0] * count, dtype=torch.float64)


def check_grid_weights(weights: Sequence[float], counts: Sequence[int]) -> None:
    """Errors: `RecipeError` for weights that are not one for each step count."""
    if weights and (len(weights) != len(counts) or min(weights) < 0.0 or not any(weights)):
        raise RecipeError(
            f"grid_weights is {list(weights)}; it must weigh each of the step counts {list(counts)}, 0 or more, or be "
            "empty"
        )


@dataclass(frozen=True)
class LcmGrids:
    """Times of diffusers' `LCMScheduler`: n of the `points` trained, floor(i points / n) down from the noisiest."""

    counts: tuple[int, ...]
    points: int = 50

    def of(self, path: Path) -> dict[int, tuple[float, ...]]:
        falling = grid(path, self.points).flip(0).tolist()
        return {n: tuple(falling[i * self.points // n] for i in range(n)) for n in self.counts}


@dataclass(frozen=True)
class EvenGrids:
    """Evenly spaced times, the "trailing" spacing of DDIM."""

    counts: tuple[int, ...]

    def of(self, path: Path) -> dict[int, tuple[float, ...]]:
        return {n: tuple(grid(path, n).flip(0).tolist()) for n in self.counts}


@dataclass(frozen=True)
class StartedGrids:
    """SiD's times, evenly down from `start` of the path to clean data: start (1 - i / n), 625 of 1000 in the paper.

    A student begins there with noise of the sampler's usual size, though the path has some data left at that time.
    """

    counts: tuple[int, ...]
    start: float = 0.625

    def of(self, path: Path) -> dict[int, tuple[float, ...]]:
        first = path.end + self.start * (path.start - path.end)
        times = {n: [path.end + (first - path.end) * (1.0 - i / n) for i in range(n)] for n in self.counts}
        whole = path.kind == "vp"
        return {n: tuple(float(round(t)) if whole else t for t in falling) for n, falling in times.items()}


@dataclass(frozen=True)
class GridPairs:
    """LCM's pairs: t uniform on a grid of `points`, s the grid point `skip` below, or the path's end below the first.

    The diffusers scripts space the grid by `points` = 50 of 1000 and step by one point, that is 20 native steps.
    to_clean: clean data in place of the path's end, for jumps to clean data that are no identity at that end. Then the
    step's own landing is the aim; without it the network's smoothness alone holds the lowest times in place.
    """

    points: int
    skip: int = 1
    to_clean: bool = False

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        """(t, s), each [count]."""
        table = grid(path, self.points).to(turn.rng.device)
        i = turn.integers(self.points, count)
        low = table[(i - self.skip).clamp(min=0)]
        last = clean(path) if self.to_clean else path.end
        return table[i], torch.where(i >= self.skip, low, torch.full_like(low, last))


@dataclass(frozen=True)
class HalvingPairs:
    """Progressive distillation's triples: t on the student's grid, s where its one step lands, mid half way between.

    `keep` names step counts of earlier, finer rounds to go on practising: times of theirs that are not on the student's
    grid get mid = s, so the target there is the teacher's own single step. `keep_share` is how often those are drawn.
    """

    steps: int
    keep: tuple[int, ...] = ()
    keep_share: float = 0.3

    def table(self, path: Path) -> tuple[Tensor, Tensor]:
        """Rows (t, mid, s) [n, 3] and their probabilities [n]."""
        fine = _with_clean(path, 2 * self.steps)
        rows = [(fine[i], fine[i - 1], fine[i - 2]) for i in range(2, 2 * self.steps + 1, 2)]
        known = {t for t, _, _ in rows}
        kept = []
        for count in sorted(self.keep):
            edges = _with_clean(path, count)
            kept += [(t, s, s) for s, t in pairwise(edges) if t not in known]
            known.update(edges)
        share = self.keep_share if kept else 0.0
        weights = [(1 - share) / len(rows)] * len(rows) + [share / max(1, len(kept))] * len(kept)
        return torch.tensor(rows + kept, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """(t, mid, s), each [count]."""
        rows, weights = self.table(path)
        t, mid, s = rows.to(turn.rng.device)[turn.choose(weights, count)].unbind(1)
        return t, mid, s


@dataclass(frozen=True)
class UniformTimes:
    """t uniform between two fractions of the path's range (DMD2: 0.02 and 0.98); whole on the discrete VP path."""

    low: float = 0.0
    high: float = 1.0

    def draw(self, path: Path, count: int, turn: Turn) -> Tensor:
        if path.kind == "vp":
            steps = path.start + 1
            return turn.uniform(self.low * steps, self.high * steps, count).floor()
        width = path.start - path.end
        return turn.uniform(path.end + self.low * width, path.end + self.high * width, count)


@dataclass(frozen=True)
class GridTimes:
    """t uniform on a grid of `points`, and the noisiest with probability `start_share` on top.

    A one-step student is asked at the noisiest time alone, a few-step one there first.
    """

    points: int = 50
    start_share: float = 0.0

    def draw(self, path: Path, count: int, turn: Turn) -> Tensor:
        table = grid(path, self.points).to(turn.rng.device)
        drawn = table[turn.integers(self.points, count)]
        return torch.where(turn.uniform(0.0, 1.0, count) < self.start_share, table[-1], drawn)


@dataclass(frozen=True)
class UniformScale:
    """A guidance scale w per sample, uniform on [low, high], in the convention u + w (c - u)."""

    low: float
    high: float

    def draw(self, count: int, turn: Turn) -> Tensor:
        return turn.uniform(self.low, self.high, count)


def _with_clean(path: Path, steps: int) -> list[float]:
    return [clean(path), *grid(path, steps).tolist()]

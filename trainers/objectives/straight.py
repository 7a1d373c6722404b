"""Straight trajectories: consistency and rectified flow at once, so that few long Euler steps are enough.

Consistency-FM asks consistency models of each segment of the path for one velocity (`SameSlope` of `Consistency`);
TraFlow fits straight lines through a teacher's pairs and its own jumps to each other; SCFlow ties consistency in both
directions to its own straight lines (`trainers.objectives.self_corrected`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand
from fewstep.models.paths import Path

from ..parts.distances import Distance
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.pairs import paired_noise
from ..parts.tangent import FLOW
from ..parts.times import clean
from ..parts.transitions import NoisedData, pure_noise
from .consistency import Pairs
from .flow_map import Asked, Halves


@dataclass(frozen=True)
class Anchored:
    """Pairs whose s becomes clean data where it lies below `below` of flow time: there the sample itself is the aim.

    Consistency-FM's boundary, 0.9 of its data, is 0.1 here.
    """

    pairs: Pairs
    below: float

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        t, s = self.pairs.draw(path, count, turn)
        return t, torch.where(FLOW.time(path, s) < self.below, torch.full_like(s, clean(path)), s)


@dataclass(frozen=True)
class SameSlope:
    """`weight |v_t - v_s|^2`, [B]: velocities in flow time of the lines from x_t and x_s to their landings at one end.

    Consistency-FM (Yang et al. 2024): 1e-5. Where s is the end there is no second line, and the term is 0.
    """

    weight: float

    def __call__(
        self, path: Path, guess: Tensor, aim: Tensor, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor, end: Tensor
    ) -> Tensor:
        apart = slope(path, x_t, t, guess, end) - slope(path, x_s, s, aim, end)
        return self.weight * apart.flatten(1).square().mean(1) * (s > end).to(apart)


def slope(path: Path, x: Tensor, t: Tensor, y: Tensor, end: Tensor) -> Tensor:
    """Velocity in flow time of the straight line from x at t down to y at `end`."""
    gap = (FLOW.time(path, t) - FLOW.time(path, end)).clamp(min=1e-6)
    return (expand(FLOW.scale(path, t), x) * x - expand(FLOW.scale(path, end), y) * y) / expand(gap, x)


@dataclass(frozen=True, kw_only=True)
class StraightTrajectory:
    """TraFlow (Wu et al. 2025): three targets of a flow map on a teacher's pairs (z, x^).

    `output |X(z, T -> 0) - x^| + velocity |u - (z - x^)| + consistency |u - sg two own halves|`, u = u(x_t, t, s) and
    x_t on the straight line of the pair. An output's distance is that of velocities over the whole way.
    """

    pairs: Pairs
    source: NoisedData
    distance: Distance
    output: float
    velocity: float
    consistency: float

    players = ("student",)
    roles = ("student",)
    two_times = True

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        """Errors: `DataError` for a batch without the noise of its samples."""
        student, noise = cast["student"], paired_noise(batch)
        path = student.path
        t, s = self.pairs.draw(path, batch.x0.shape[0], turn)
        x_t = self.source.mix(path, batch.x0, t, noise)
        with torch.no_grad():
            halves = Halves()(student, Asked(x_t, t, s, batch.x0, noise, batch.cond), turn)
        turn.share_dropout()
        u = FLOW.ask(student, x_t, t, {**batch.cond, "s": s})
        line = noise - batch.x0
        found = {
            "output": self.distance(one_step(student, noise, batch.cond, turn), batch.x0).mean(),
            "velocity": self.distance(u, line).mean(),
            "consistency": self.distance(u, halves.detach()).mean(),
        }
        total = sum((getattr(self, name) * term for name, term in found.items()), torch.zeros_like(found["output"]))
        return total, {
            "residual": float((u.detach() - halves).square().mean().sqrt()),
            **{name: float(term.detach()) for name, term in found.items()},
        }


def one_step(student: Denoiser, noise: Tensor, cond: Condition, turn: Turn) -> Tensor:
    """The student's sample of noise in one evaluation."""
    path = student.path
    start = torch.full((len(noise),), path.start, dtype=torch.float64, device=noise.device)
    turn.share_dropout()
    return student.x0(pure_noise(path, noise), start, {**cond, "s": torch.full_like(start, clean(path))})

"""Times and weights of reflowed networks, in rectified flow's time tau = sigma / (alpha + sigma), on any path."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.paths import Path

from .objective import Turn
from .tangent import FLOW


def flow_time_to_path(path: Path, tau: Tensor) -> Tensor:
    """Native times of tau [B] in 0 .. 1, cut at the path's range."""
    a, b = (float(FLOW.time(path, torch.tensor(t, dtype=torch.float64))) for t in (path.end, path.start))
    inside = tau.clamp(max(a, 1e-9), min(b, 1.0 - 1e-9))
    t = path.time(inside / (1.0 - inside))
    return torch.where(tau >= b, torch.full_like(t, path.start), t.clamp(path.end, path.start))


@dataclass(frozen=True)
class UShaped:
    """Half of the times have density ~ exp(slope tau), half are their mirror images (Lee et al. 2024: slope 4)."""

    slope: float = 4.0

    def draw(self, path: Path, count: int, turn: Turn) -> Tensor:
        u = turn.uniform(0.0, 1.0, count)
        high = torch.log1p(u * math.expm1(self.slope)) / self.slope
        mirrored = turn.uniform(0.0, 1.0, count) < 0.5
        return flow_time_to_path(path, torch.where(mirrored, 1.0 - high, high))


def towards_data(path: Path, t: Tensor) -> Tensor:
    """(1 - tau) / tau: 2-RF++'s weight 1 - tau, of the distance of velocities, as one of clean estimates."""
    return path.level(t) ** -1

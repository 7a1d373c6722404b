"""How close points of the plane are to those they should be: sliced Wasserstein distance, modes and their weights."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .plane import Plane

DIRECTIONS = 32
COVERED = 0.25
"""A mode is covered where it gets at least this part of its share."""


@dataclass(frozen=True)
class PlaneScore:
    """swd: sliced Wasserstein distance (of order 1), mean over directions and classes, in deviations of the data.
    coverage: share of the modes that are covered. weight_error: total variation between the modes' shares, mean over
    the classes."""

    swd: float
    coverage: float
    weight_error: float


def score(data: Plane, points: Tensor, reference: Tensor, labels: Tensor) -> PlaneScore:
    """points, reference: [B, 2] of the classes [B]; both hold as many of each class. Points that are not numbers count
    as infinitely far."""
    if not bool(torch.isfinite(points).all()):
        return PlaneScore(math.inf, 0.0, 1.0)
    distance, covered, wrong, modes = 0.0, 0.0, 0.0, 0
    classes = labels.unique().tolist()
    for c in classes:
        mine, theirs = points[labels == c].double(), reference[labels == c].double()
        distance += sliced_distance(mine, theirs) / len(classes)
        centres = data.data.means[data.owner == c]
        got, wanted = shares(mine, centres), shares(theirs, centres)
        real = wanted > 0.02  # guidance may empty a mode
        covered += float((got[real] >= COVERED * wanted[real]).sum())
        modes += int(real.sum())
        wrong += 0.5 * float((got - wanted).abs().sum()) / len(classes)
    return PlaneScore(distance, covered / modes, wrong)


def sliced_distance(a: Tensor, b: Tensor) -> float:
    """Mean over even directions of the 1-Wasserstein distance between projections; a and b [N, 2].

    Of order 1 rather than 2, since that of order 2 grows with the root of the share of points in a wrong mode: between
    two draws of the data themselves it is five times as large.
    """
    angle = torch.arange(DIRECTIONS, dtype=torch.float64) * math.pi / DIRECTIONS
    axes = torch.stack([angle.cos(), angle.sin()])
    return float(((a @ axes).sort(0).values - (b @ axes).sort(0).values).abs().mean())


def shares(points: Tensor, centres: Tensor) -> Tensor:
    """[K]: how much of the points [N, 2] is nearest to each centre [K, 2]."""
    nearest = torch.cdist(points, centres).argmin(1)
    return torch.bincount(nearest, minlength=len(centres)).double() / len(points)

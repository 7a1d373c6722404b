"""How far two outputs lie apart: relative L2 and peak, each of the worst sample of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Apart:
    """relative: |a - b| / |b|. peak: the largest single difference relative to the sample's largest value.

    Both are infinite for other shapes, another number of outputs, or values that are not finite on either side.
    """

    relative: float
    peak: float

    def __or__(self, other: "Apart") -> "Apart":
        """The worse of two."""
        return Apart(max(self.relative, other.relative), max(self.peak, other.peak))


SAME = Apart(0.0, 0.0)
LOST = Apart(float("inf"), float("inf"))


def apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Apart:
    """The worst of several outputs [B, ...]."""
    worst = SAME if len(found) == len(wanted) else LOST
    for a, b in zip(found, wanted, strict=False):
        worst |= Apart(relative_error(a, b), peak_error(a, b))
    return worst


def relative_error(found: Tensor, wanted: Tensor) -> float:
    if not _comparable(found, wanted):
        return float("inf")
    a, b = found.flatten(1).double(), wanted.flatten(1).double()
    return float(((a - b).norm(dim=1) / b.norm(dim=1).clamp_min(_TINY)).max())


def peak_error(found: Tensor, wanted: Tensor) -> float:
    if not _comparable(found, wanted):
        return float("inf")
    a, b = found.flatten(1).double(), wanted.flatten(1).double()
    return float(((a - b).abs().amax(dim=1) / b.abs().amax(dim=1).clamp_min(_TINY)).max())


def _comparable(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and all(bool(torch.isfinite(x).all()) for x in (found, wanted))

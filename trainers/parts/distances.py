"""How two samples are compared, and how much each time counts.

A distance maps two tensors [B, C, ...] to [B]; it averages over elements, so a learning rate survives a change of size.
A weight maps (path, t [B]) to [B].
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.models.paths import Path


class Distance(Protocol):
    def __call__(self, a: Tensor, b: Tensor) -> Tensor: ...


class Weight(Protocol):
    def __call__(self, path: Path, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Squared:
    """Mean squared difference."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.float() - b.float()).flatten(1).square().mean(1)


@dataclass(frozen=True)
class Absolute:
    """Mean absolute difference."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.float() - b.float()).flatten(1).abs().mean(1)


@dataclass(frozen=True)
class PseudoHuber:
    """`sqrt(d^2 + c^2) - c`, per element and then averaged (LCM, c = 0.001)."""

    c: float = 0.001

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        d = (a.float() - b.float()).flatten(1)
        return ((d.square() + self.c**2).sqrt() - self.c).mean(1)


@dataclass(frozen=True)
class SamplePseudoHuber:
    """`sqrt(|d|^2 + c^2) - c` over the whole sample (iCT, Song & Dhariwal 2023, c = 0.00054 sqrt(elements))."""

    c: float

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        d = (a.float() - b.float()).flatten(1)
        return (d.square().sum(1) + self.c**2).sqrt() - self.c


@dataclass(frozen=True)
class ScaledPseudoHuber:
    """The same with c = `share` sqrt(elements), iCT's rule (0.00054)."""

    share: float = 0.00054

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return SamplePseudoHuber(self.share * a[0].numel() ** 0.5)(a, b)


@dataclass(frozen=True)
class Norm:
    """`|d|`, the length of the difference over the whole sample (ECT, Geng et al. 2024), `floor` under its root."""

    floor: float = 1e-12

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return ((a.float() - b.float()).flatten(1).square().sum(1) + self.floor).sqrt()


@dataclass(frozen=True)
class Cauchy:
    """`log(1 + |d|^2 / (2 c^2))` over the whole sample: what lies far away stops pulling (Dao et al. 2025)."""

    c: float

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.log1p((a.float() - b.float()).flatten(1).square().sum(1) / (2.0 * self.c**2))


@dataclass(frozen=True)
class Adaptive:
    """`|d|^2 / sg(|d|^2 + c)^p` over the whole sample (MeanFlow, Geng et al. 2025: p = 1)."""

    p: float = 1.0
    c: float = 1e-3

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        square = (a.float() - b.float()).flatten(1).square().sum(1)
        return square / (square.detach() + self.c) ** self.p


def unweighted(path: Path, t: Tensor) -> Tensor:
    return torch.ones_like(t, dtype=torch.float64)


def level(path: Path, t: Tensor) -> Tensor:
    """sigma / alpha."""
    return path.level(t)


def snr(path: Path, t: Tensor) -> Tensor:
    """alpha^2 / sigma^2: turns an x0 error into an eps error."""
    return path.level(t) ** -2


def snr_plus_one(path: Path, t: Tensor) -> Tensor:
    """SNR + 1: turns an x0 error into a v error."""
    return snr(path, t) + 1.0


def truncated_snr(path: Path, t: Tensor) -> Tensor:
    """max(SNR, 1), Salimans & Ho 2022."""
    return snr(path, t).clamp(min=1.0)

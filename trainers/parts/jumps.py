"""What a student's one evaluation is said to be: an estimate of the sample at a time s, given the sample at t.

A jump is a callable `(denoiser, x, t, s, cond) -> x at s`. Consistency functions that only reach clean data ignore s.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand
from fewstep.models.spec import Boundary


class Jump(Protocol):
    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor: ...


@dataclass(frozen=True)
class ToClean:
    """f(x, t) = x0 estimate. With a TrigFlow or EDM network this is sCM's and ECT's consistency function."""

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        return denoiser.x0(x, t, cond)


@dataclass(frozen=True)
class LcmJump:
    """f(x, t) = c_skip x + c_out x0, the scalings of Luo et al. 2023: f(x, 0) = x, and nearly x0 everywhere else."""

    boundary: Boundary = field(default_factory=Boundary)

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        scaled = self.boundary.timestep_scaling * t.double()
        square = self.boundary.sigma_data**2
        skip, out = square / (scaled**2 + square), scaled / (scaled**2 + square).sqrt()
        return expand(skip, x) * x + expand(out, x) * denoiser.x0(x, t, cond)


@dataclass(frozen=True)
class DdimJump:
    """G(x, t -> s) = alpha_s x0 + sigma_s eps: TCD, PCM, Hyper-SD, and Euler flow maps. G(x, t -> t) = x exactly."""

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        return denoiser.jump(x, t, s, cond)


@dataclass(frozen=True)
class TwoTimeJump:
    """The same, of a network that is told where it lands: `s` in its condition (CTM, flow maps)."""

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        return denoiser.jump(x, t, s, {**cond, "s": s})

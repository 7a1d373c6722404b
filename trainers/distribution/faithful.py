"""How far apart two Gaussians of equal deviation are, and the term that keeps a student's walk near a reference's.

A divergence maps d [B, ...], the difference of means over the deviation, element by element, to [B]: elements are
independent, and theirs are averaged.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.models.denoiser import expand

from ..errors import RecipeError
from ..parts.jumps import Jump
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made

NODES = 64


def kl(d: Tensor) -> Tensor:
    """`d^2 / 2`."""
    return 0.5 * d.square().flatten(1).mean(1)


def hellinger(d: Tensor) -> Tensor:
    """The squared distance, `1 - exp(-d^2 / 8)`."""
    return (1.0 - torch.exp(-d.square() / 8.0)).flatten(1).mean(1)


def fisher(d: Tensor) -> Tensor:
    """`E |grad log p - grad log q|^2 = d^2 / sigma^2`, in units of 1 / sigma^2: `d^2`."""
    return d.square().flatten(1).mean(1)


def js(d: Tensor) -> Tensor:
    """Jensen-Shannon, `log 2 - E_z softplus(d z - d^2 / 2)`, z standard normal, by Gauss-Hermite quadrature."""
    points, weights = (torch.tensor(v).to(d) for v in np.polynomial.hermite_e.hermegauss(NODES))
    inner = softplus(d[..., None] * points - 0.5 * d[..., None].square())
    return (math.log(2.0) - (inner * weights).sum(-1) / weights.sum()).flatten(1).mean(1)


DIVERGENCES: Mapping[str, Callable[[Tensor], Tensor]] = {"kl": kl, "hellinger": hellinger, "fisher": fisher, "js": js}


@dataclass(frozen=True, kw_only=True)
class Faithful:
    """`weight sum_k D(N(alpha f_theta(x_k), sigma^2) || N(alpha f_ref(x_k), sigma^2))` over a walk's steps (ROCM).

    A step's Gaussian is that of the state where it lands; the last step lands on clean data, where `last` is the
    deviation. The reference is the teacher role, asked at the student's own states.
    """

    divergence: str
    weight: float
    jump: Jump
    last: float = 0.5

    roles = ("teacher",)
    through_networks = True

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise RecipeError(f"divergence is {self.divergence!r}; it must be one of {', '.join(DIVERGENCES)}")

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        apart = torch.stack([self.apart(step, cast, batch) for step in (*made.before, made)]).sum(0).mean()
        return self.weight * apart, {"divergence": float(apart.detach())}

    def apart(self, step: Made, cast: Cast, batch: Batch) -> Tensor:
        """[B]: the divergence of one step; a gradient also passes through the state that it is taken from."""
        path = cast["teacher"].path
        theirs = self.jump(cast["teacher"], step.x, step.t, torch.zeros_like(step.t), batch.cond)
        d = step.x0 - theirs
        if step.s is None:
            return DIVERGENCES[self.divergence](d / self.last)
        return DIVERGENCES[self.divergence](expand(path.alpha(step.s) / path.sigma(step.s), d) * d)

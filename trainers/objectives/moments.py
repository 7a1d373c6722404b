"""Inductive moment matching (Zhou, Ermon & Song 2025, arXiv 2503.07565): landings at s from t have the law of those
from a time r a little below t.

The two laws are compared by the maximum mean discrepancy of small groups of samples that share their times, in place of
sample against sample: a group of one is consistency training. No teacher and no average is needed.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.models.denoiser import expand
from fewstep.models.paths import Path

from ..errors import RecipeError
from ..parts.jumps import TwoTimeJump
from ..parts.laws import at_levels, levels
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.steps import At, Step, same_condition
from ..parts.tangent import FLOW
from ..parts.times import UniformScale
from ..parts.transitions import NoisedData, with_scale
from .consistency import consistency_residual
from .flow_map import Pairs


class Nearer(Protocol):
    """The time r between s and t from which the aim lands."""

    def __call__(self, path: Path, t: Tensor, s: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Decrement:
    """`r = max(s, level^-1(level(t) - (highest - lowest) / 2^k))`, the paper's mapping, its highest level 160 (k = 12).

    Below the path's least noise r is s, where the landing is known.
    """

    k: float = 12.0
    highest: float = 160.0

    def __call__(self, path: Path, t: Tensor, s: Tensor) -> Tensor:
        low, high = levels(path, 2).tolist()
        top = min(self.highest, high)
        below = path.level(t).clamp(max=top) - (top - low) / 2.0**self.k
        r = torch.where(below > low, at_levels(path, below.clamp(min=low)), s)
        return torch.maximum(s, torch.minimum(r, t))


@dataclass(frozen=True)
class Laplace:
    """`exp(-scale max(|x - y|, 1e-8) / (width sqrt(elements)))`, for x, y [G, M, ...] and scale [G]: [G, M, M].

    The paper divides by the elements: width is sqrt(elements), 64 for its latents. A narrow kernel sees no other row.
    """

    width: float = 64.0
    floor: float = 1e-8

    def __call__(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        a, b = x.flatten(2).float(), y.flatten(2).float()
        square = (a[:, :, None] - b[:, None]).square().sum(3)
        far = square.clamp(min=self.floor**2).sqrt()  # clamped first: a root has no slope at 0
        return torch.exp(-scale.to(far)[:, None, None] * far / (self.width * a.shape[2] ** 0.5))


@dataclass(frozen=True)
class LogSnrWeight:
    """`sigmoid(b - lambda) (-d lambda / dt) a^power / (2 (a^2 + tau^2))`, a = 1 - tau, lambda = 2 ln(a / tau).

    The paper: b = 4 and power 2 on latents of ImageNet, 5 and 1 on CIFAR-10 (its power is unverified).
    """

    b: float = 4.0
    power: float = 1.0

    def __call__(self, path: Path, t: Tensor) -> Tensor:
        a, tau = (value.clamp(min=1e-3) for value in FLOW.mix(path, t))
        snr = 2.0 * (a / tau).log()
        return torch.sigmoid(self.b - snr) / (tau * a) * a**self.power / (a**2 + tau**2)


def discrepancy(kernel: Laplace, y: Tensor, aim: Tensor, scale: Tensor, alike: Tensor | None = None) -> Tensor:
    """[G]: mean over a group's pairs of `k(y, y) + k(aim, aim) - 2 k(y, aim)`, y and aim [G, M, ...].

    alike: [G, M, M], which rows count as one law's; the mean is then over those.
    """
    each = kernel(y, y, scale) + kernel(aim, aim, scale) - kernel(y, aim, scale) - kernel(aim, y, scale)
    if alike is None:
        return each.mean((1, 2))
    kept = alike.to(each)
    return (each * kept).sum((1, 2)) / kept.sum((1, 2))


@dataclass(frozen=True, kw_only=True)
class MomentMatching:
    """`weight(t) MMD^2(jump(x_t; t -> s), sg jump(x_r; r -> s))`, x_r of the same sample and noise.

    group: rows that share (t, s) and are compared with each other. by_condition: only those of one condition are. The
    kernel measures what a landing changes by as a velocity on flow's hub, that is over c_out of the paper's jump.
    """

    pairs: Pairs
    nearer: Nearer
    source: NoisedData
    step: Step
    kernel: Laplace
    weight: LogSnrWeight
    group: int
    by_condition: bool
    guidance: UniformScale

    players = ("student",)
    roles = ("student",)
    two_times = True
    whole_batch = True

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        """Errors: `RecipeError` for a batch that is not a whole number of groups."""
        student, count = cast["student"], batch.x0.shape[0]
        path = student.path
        if count % self.group:
            raise RecipeError(
                f"moments are matched in groups of {self.group}, and the batch is {count}; set batch to a multiple of "
                f"{self.group}, or group to a divisor of {count}"
            )
        t, s = (each.repeat_interleave(self.group) for each in self.pairs.draw(path, count // self.group, turn))
        r = self.nearer(path, t, s)
        cond, noise = with_scale(batch.cond, self.guidance.draw(count, turn)), turn.noise(batch.x0)
        with torch.no_grad():
            x_t = self.source.mix(path, batch.x0, t, noise)
            x_r = self.step(student, At(x_t, t, batch.x0, noise, cond, self.source), r, turn)
        y, aim = consistency_residual(student, student, TwoTimeJump(), x_t, t, x_r, r, s, cond, turn)
        gap = FLOW.time(path, t) - FLOW.time(path, s)
        scale = (FLOW.scale(path, s) / gap.clamp(min=1e-6))[:: self.group]
        alike = None
        if self.by_condition:
            same = same_condition(cond).reshape(count // self.group, self.group, count // self.group, self.group)
            alike = same.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        each = discrepancy(self.kernel, self.groups(y), self.groups(aim), scale, alike)
        each = each * self.weight(path, t)[:: self.group].to(each)
        gone = expand(FLOW.scale(path, s) / gap.clamp(min=1e-6), y)
        return each.mean(), {"residual": float((gone * (y.detach() - aim)).square().mean().sqrt())}

    def groups(self, rows: Tensor) -> Tensor:
        """[B, ...] -> [G, M, ...]."""
        return rows.reshape(-1, self.group, *rows.shape[1:])

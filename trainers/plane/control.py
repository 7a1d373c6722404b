"""A control of the plane's points: the first coordinate, seen through noise. The exact answer is a posterior."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition

from ..distribution.control_terms import CONTROL
from ..parts.objective import Batch, derive
from .plane import Plane

NOISE = 0.3
"""Deviation of the control around the coordinate; all data have deviation 1."""


def seen(points: Tensor, seed: int) -> Tensor:
    """The control [B, 1] of points [B, 2]."""
    rng = torch.Generator().manual_seed(derive(seed, CONTROL))
    return points[:, :1].float() + NOISE * torch.randn(len(points), 1, generator=rng)


def asked(data: Plane, cond: Condition, seed: int) -> dict[str, Tensor]:
    """The condition with controls of points of the classes asked for: over these, posteriors are the classes' law."""
    rng = torch.Generator().manual_seed(derive(seed, "asked"))
    return {**cond, CONTROL: seen(data.draw(cond["label"].argmax(1), rng), seed)}


@dataclass(frozen=True)
class Likelihood:
    """`log q(c | x) = -(x_1 - c)^2 / (2 NOISE^2)` [B]."""

    noise: float = NOISE

    def __call__(self, x: Tensor, cond: Condition) -> Tensor:
        return -(x[:, 0] - cond[CONTROL][:, 0].to(x)).square() / (2.0 * self.noise**2)


class ControlledPoints:
    """The plane's batches, each point with the control that was seen of it."""

    def __init__(self, source: Any) -> None:
        self.source, self.size, self.seed = source, source.size, source.seed

    def batch(self, step: int) -> Batch:
        found: Batch = self.source.batch(step)
        told = {**found.cond, CONTROL: seen(found.x0, derive(self.seed, step))}
        return Batch(found.x0, told, found.uncond, found.noise, found.taught)

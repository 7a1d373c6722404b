"""Flow maps: one network for the jump from any t to any s, as a mean velocity on rectified flow's hub.

`X(x, t -> s) = x - (t - s) u(x, t, s)`; u(x, t, t) is the velocity itself. What u should be is told by one of several
identities: the derivative of it along a trajectory (MeanFlow), or two of its own half steps (shortcut models).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand
from fewstep.models.paths import Path

from ..parts.distances import Distance
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.tangent import FLOW, Field, Tangent
from ..parts.times import UniformScale, clean
from ..parts.transitions import NoisedData, guided, with_scale
from ..parts.u_shape import flow_time_to_path


class Pairs(Protocol):
    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class FlowPairs:
    """t even in the hub's time, s even below it; s = t in the share `equal`, clean data in the share `to_clean`.

    start_share: of the pairs that begin at the noisiest time, where samplers do.
    """

    equal: float = 0.5
    to_clean: float = 0.1
    start_share: float = 0.1

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        last = torch.full((count,), path.start, dtype=torch.float64, device=turn.rng.device)
        top = FLOW.time(path, last)
        tau = torch.where(turn.uniform(0.0, 1.0, count) < self.start_share, top, top * turn.uniform(0.0, 1.0, count))
        t = flow_time_to_path(path, tau)
        s = torch.minimum(flow_time_to_path(path, tau * turn.uniform(0.0, 1.0, count)), t)
        kind = turn.uniform(0.0, 1.0, count)
        s = torch.where(kind < self.equal, t, s)
        return t, torch.where(kind >= 1.0 - self.to_clean, torch.full_like(s, clean(path)), s)


@dataclass(frozen=True)
class Asked:
    """A question to a flow map: x at t, s below it, and (x0, eps) of the trajectory through x."""

    x: Tensor
    t: Tensor
    s: Tensor
    x0: Tensor
    eps: Tensor
    cond: Condition

    def gap(self, path: Path) -> Tensor:
        """t - s in the hub's time, [B]."""
        return FLOW.time(path, self.t) - FLOW.time(path, self.s)


class Aim(Protocol):
    def __call__(self, network: Denoiser, asked: Asked, turn: Turn) -> Tensor:
        """What u(x, t, s) should be, by the network's own answers."""
        ...


@dataclass(frozen=True)
class Derivative:
    """`u = v - (t - s) du/dt` along the trajectory (MeanFlow, Geng et al. 2025, eq. 6)."""

    tangent: Tangent

    def __call__(self, network: Denoiser, asked: Asked, turn: Turn) -> Tensor:
        path, told = network.path, {**asked.cond, "s": asked.s}

        def mean_velocity(x: Tensor, t: Tensor) -> Tensor:
            turn.share_dropout()
            return FLOW.ask(network, x, t, told)

        direction = FLOW.along(path, asked.x0, asked.eps, asked.t)
        slope = self.tangent(mean_velocity, asked.x, asked.t, *direction)
        v = FLOW.velocity(path, asked.t, asked.x0, asked.eps)
        return v - expand(asked.gap(path), v) * slope


@dataclass(frozen=True)
class Halves:
    """The mean of two own steps, each half as long in the hub's time; v where s = t (shortcut models)."""

    def __call__(self, network: Denoiser, asked: Asked, turn: Turn) -> Tensor:
        path, x, t, s, cond = network.path, asked.x, asked.t, asked.s, asked.cond
        half = 0.5 * (FLOW.time(path, t) + FLOW.time(path, s))
        mid = torch.where(t == s, t, path.time(half / (1.0 - half)))
        turn.share_dropout()
        x0, eps = network.both(x, t, {**cond, "s": mid})
        turn.share_dropout()
        second = FLOW.ask(network, network.mix(x0, eps, mid), mid, {**cond, "s": s})
        v = FLOW.velocity(path, t, asked.x0, asked.eps)
        return torch.where(expand((t == s).to(v), v) > 0, v, 0.5 * (eps - x0 + second))


@dataclass(frozen=True, kw_only=True)
class FlowMap:
    """The parts of a flow-map method: `distance(u(x_t, t, s), sg aim)`.

    target: the role whose answers make the aim, "student" or an average.
    """

    pairs: Pairs
    source: NoisedData
    field: Field
    aim: Aim
    distance: Distance
    guidance: UniformScale
    cfg: bool
    target: str = "student"

    players = ("student",)
    two_times = True

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("student", "teacher", self.target)))

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        student, count = cast["student"], batch.x0.shape[0]
        t, s = self.pairs.draw(student.path, count, turn)
        w = self.guidance.draw(count, turn)
        cond, noise = with_scale(batch.cond, w), turn.noise(batch.x0)
        teacher = guided(cast["teacher"], batch.uncond, w) if self.cfg else cast["teacher"]
        with torch.no_grad():
            x = self.source.mix(student.path, batch.x0, t, noise)
            x0, eps = self.field(teacher, batch, noise, x, t, cond)
            aim = self.aim(cast[self.target], Asked(x, t, s, x0, eps, cond), turn).detach()
        turn.share_dropout()
        u = FLOW.ask(student, x, t, {**cond, "s": s})
        return self.distance(u, aim).mean(), {"residual": float((u.detach() - aim).square().mean().sqrt())}

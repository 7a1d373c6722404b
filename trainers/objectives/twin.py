"""TwinFlow (Cheng et al. 2025, arXiv 2512.05150): a flow map that is its own fake score, at negative times.

One network answers with a mean velocity at times of the path, and at their negatives with the velocity towards its own
one-step samples, the twin trajectory. Where both velocities agree the samples have the data's law, so their difference
is a gradient for one step, with no second network and no adversary. Times are rectified flow's, seen from any path.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand
from fewstep.models.paths import Path

from ..errors import RecipeError
from ..parts.distances import Distance
from ..parts.laws import Law
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.tangent import FLOW, Field
from ..parts.times import UniformScale, clean
from ..parts.transitions import NoisedData, with_scale
from ..parts.u_shape import flow_time_to_path
from .straight import one_step


def twin(network: Denoiser) -> Denoiser:
    """The network at the negative of each time: the velocity towards its own samples."""

    def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return network.raw(x, -t, {**cond, "s": t})

    return Denoiser(net, network.path, network.prediction)


@dataclass(frozen=True)
class ThreeKinds:
    """Pairs (t, s), a third each: from the noisiest time to clean data; s within `near` of t's part; any s below t."""

    law: Law
    near: float = 0.05

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]:
        kind = (3.0 * turn.places(count) + 1e-9).floor()  # a third's first row is a whole number but for rounding
        t = self.law.draw(path, count, turn)
        t = torch.where(kind == 0, torch.full_like(t, path.start), t)
        share = turn.uniform(0.0, 1.0, count) * torch.where(kind == 1, self.near, 1.0)
        s = torch.minimum(flow_time_to_path(path, FLOW.time(path, t) * (1.0 - share)), t)
        return t, torch.where(kind == 0, torch.full_like(s, clean(path)), s)


def tangent_weight(path: Path, t: Tensor, s: Tensor) -> Tensor:
    """`tan((1 - (t - s)) pi / 2.5) + 1`, [B]: short jumps count up to four times as much as the whole way."""
    return ((1.0 - FLOW.time(path, t) + FLOW.time(path, s)) * math.pi / 2.5).tan() + 1.0


@dataclass(frozen=True)
class Recursive:
    """What u(x_t, t, s) misses: `((t - s) u - S) / h - v`, S the way that its own `parts` steps go from t - h to s.

    h: flow time that v is followed for (the paper: 0.01), or all of t - s where that is less. bound: of each element.
    """

    h: float = 0.01
    parts: int = 2
    bound: float = 1.0

    def __call__(
        self, network: Denoiser, u: Tensor, v: Tensor, x: Tensor, t: Tensor, s: Tensor, cond: Condition, turn: Turn
    ) -> Tensor:
        path = network.path
        high, low = FLOW.time(path, t), FLOW.time(path, s)
        near = torch.where(high - self.h > low, flow_time_to_path(path, high - self.h), s)
        near = torch.maximum(near, s)
        h = high - FLOW.time(path, near)
        state = expand(FLOW.scale(path, t), x) * x - expand(h, x) * v
        end = self.walked(network, state / expand(FLOW.scale(path, near), x), near, s, t, cond, turn)
        way = state - expand(FLOW.scale(path, s), x) * end
        missed = (expand(high - low, x) * u - way) / expand(h.clamp(min=1e-6), x) - v
        return torch.where(expand(h, x) > 0, missed, u - v).clamp(-self.bound, self.bound)

    def walked(
        self, network: Denoiser, x: Tensor, t: Tensor, s: Tensor, valid: Tensor, cond: Condition, turn: Turn
    ) -> Tensor:
        """x at s by the network's own jumps, even in flow time; rows that are there already stay (valid: any time)."""
        path, there, at = network.path, t == s, t
        for k in range(1, self.parts + 1):
            tau = torch.lerp(FLOW.time(path, t), FLOW.time(path, s), k / self.parts)
            to = s if k == self.parts else torch.where(there, s, torch.maximum(flow_time_to_path(path, tau), s))
            stays = there | (at == to)
            turn.share_dropout()
            moved = network.jump(x, torch.where(stays, valid, at), to, {**cond, "s": to})
            x, at = torch.where(expand(stays, x) > 0, x, moved), to
        return x


@dataclass(frozen=True, kw_only=True)
class TwinFlow:
    """The parts of TwinFlow. A quarter of the batch, the last, teaches the twin; the rest is of the three kinds.

    field: whose velocity at x_t is followed, of the data. matching: weight of the pull of one-step samples to the data,
    pull the distance that it is. rho: how much of its own guidance, conditional less unconditional velocity, is added
    to the data's. empty_share: of the rows that have no condition.
    """

    pairs: ThreeKinds
    times: Law
    source: NoisedData
    field: Field
    missing: Recursive
    distance: Distance
    pull: Distance
    matching: float
    rho: float
    empty_share: float
    guidance: UniformScale

    players = ("student",)
    roles = ("student",)
    two_times = True

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        """Errors: `RecipeError` for a batch of fewer than four."""
        student, count = cast["student"], batch.x0.shape[0]
        if count < 4:
            raise RecipeError(f"twinflow parts a batch in four, and this one is {count}; set batch to 4 or more")
        quarter = count // 4
        cond, kept = self.told(batch, turn), slice(0, count - quarter)
        first = {name: value[kept] for name, value in cond.items()}
        empty = {name: value[kept] for name, value in batch.uncond.items()}
        mapped, u, made, metrics = self.mapped(student, batch.x0[kept], first, empty, turn)
        whole = slice(0, (count - quarter + 2) // 3)  # rows of the first kind
        told = {name: value[whole] for name, value in first.items()}
        total = mapped + self.matching * self.matched(student, u[whole], made[whole], told, turn)
        other = {name: value[count - quarter :] for name, value in cond.items()}
        false = self.mirrored(student, batch.x0[count - quarter :], other, turn)
        return total + false, {**metrics, "twin": float(false.detach())}

    def told(self, batch: Batch, turn: Turn) -> Condition:
        """The condition, emptied in the share that keeps an unconditional answer."""
        count = batch.x0.shape[0]
        empty = turn.uniform(0.0, 1.0, count) < self.empty_share
        cond = {
            name: torch.where(expand(empty, value) > 0, batch.uncond.get(name, value), value)
            for name, value in batch.cond.items()
        }
        return with_scale(cond, self.guidance.draw(count, turn))

    def mapped(
        self, student: Denoiser, x0: Tensor, cond: Condition, empty: Condition, turn: Turn
    ) -> tuple[Tensor, Tensor, Tensor, Metrics]:
        """(loss, u, clean estimates, metrics) of the flow map."""
        path = student.path
        t, s = self.pairs.draw(path, len(x0), turn)
        noise = turn.noise(x0)
        x = self.source.mix(path, x0, t, noise)
        turn.share_dropout()
        made, eps = student.both(x, t, {**cond, "s": s})
        u = FLOW.velocity(path, t, made, eps)
        with torch.no_grad():
            v = FLOW.velocity(path, t, *self.field(student, Batch(x0, cond, empty), noise, x, t, cond))
            if self.rho:
                sides = []
                for side in (cond, {**cond, **empty}):
                    turn.share_dropout()
                    sides.append(FLOW.ask(student, x, t, {**side, "s": t}))
                v = v + self.rho * (sides[0] - sides[1])
            aim = u - self.missing(student, u, v, x, t, s, cond, turn)
        each = self.distance(u, aim.detach()) * tangent_weight(path, t, s).to(u)
        return each.mean(), u, made.detach(), {"residual": float((u.detach() - aim).square().mean().sqrt())}

    def matched(self, student: Denoiser, u: Tensor, made: Tensor, cond: Condition, turn: Turn) -> Tensor:
        """Pull of one-step velocities u, which gave `made`, by how the twin's velocity differs from the data's."""
        with torch.no_grad():
            t = self.times.draw(student.path, len(u), turn)
            x = self.source.mix(student.path, made, t, turn.noise(made))
            ours, theirs = FLOW.ask(twin(student), x, t, cond), FLOW.ask(student, x, t, {**cond, "s": t})
            aim = u - (ours - theirs).clamp(-self.missing.bound, self.missing.bound)
        return self.pull(u, aim).mean()

    def mirrored(self, student: Denoiser, like: Tensor, cond: Condition, turn: Turn) -> Tensor:
        """The twin's own lesson: the velocity towards one-step samples, with noise that is not theirs."""
        with torch.no_grad():
            made = one_step(student, turn.noise(like), cond, turn)
            t, noise = self.times.draw(student.path, len(like), turn), turn.noise(like)
            x = self.source.mix(student.path, made, t, noise)
        turn.share_dropout()
        return self.distance(FLOW.ask(twin(student), x, t, cond), noise - made).mean()

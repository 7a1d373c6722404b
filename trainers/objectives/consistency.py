"""Consistency: two points of one trajectory must land at one place.

`loss = weight |jump(student; x_t, t -> end) - sg jump(target; x_s, s -> end)|`. The family of methods is its parts:
which pairs (t, s), where x_t comes from, how x_s is had from it, where the jumps land, how landings are compared.
Covers CD, CT, iCT, ECT, LCM, TCD, PCM, CTM, multistep consistency and relatives (`trainers.recipes.consistency`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand
from fewstep.models.paths import Path

from ..parts.distances import Distance, Weight
from ..parts.ends import AtClean, Ends
from ..parts.jumps import Jump, TwoTimeJump
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.steps import At, OdeStep, Step
from ..parts.times import UniformScale, clean
from ..parts.transitions import NoisedData, guided, inverse_ddim, with_scale

Coupling = Callable[[Tensor, Tensor, Condition, Turn], Tensor]
"""(x0, noise, condition, turn) -> the noise in an order of its own."""


class Pairs(Protocol):
    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor]: ...


class Source(Protocol):
    """Where x_t comes from: the batch and its noise, or a teacher's own walk. `mixing` says how noise is mixed in."""

    @property
    def mixing(self) -> NoisedData: ...

    def at(self, teacher: Denoiser, batch: Batch, t: Tensor, noise: Tensor, cond: Condition) -> Tensor: ...


class Compare(Protocol):
    """Brings a landing y at `end` to where landings are compared."""

    def __call__(self, target: Denoiser, y: Tensor, x_t: Tensor, t: Tensor, end: Tensor, cond: Condition) -> Tensor: ...


@dataclass(frozen=True)
class AtLanding:
    """As they are."""

    def __call__(self, target: Denoiser, y: Tensor, x_t: Tensor, t: Tensor, end: Tensor, cond: Condition) -> Tensor:
        return y


@dataclass(frozen=True)
class AsEstimates:
    """As the clean estimates at t whose one step lands there (Heek et al. 2024: inverse DDIM)."""

    def __call__(self, target: Denoiser, y: Tensor, x_t: Tensor, t: Tensor, end: Tensor, cond: Condition) -> Tensor:
        return inverse_ddim(target.path, y, x_t, t, end)


@dataclass(frozen=True)
class CarriedToClean:
    """After the target's own jump from `end` to clean data (CTM, Kim et al. 2023, eq. 8)."""

    jump: Jump

    def __call__(self, target: Denoiser, y: Tensor, x_t: Tensor, t: Tensor, end: Tensor, cond: Condition) -> Tensor:
        there = torch.full_like(end, clean(target.path))
        landed = torch.isinf(end) if target.path.kind == "vp" else end == there
        carried = self.jump(target, y, torch.where(landed, t, end), there, cond)
        return torch.where(expand(landed, y) > 0, y, carried)


def consistency_residual(
    student: Denoiser, target: Denoiser, jump: Jump, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor, end: Tensor,
    cond: Condition, turn: Turn | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(where the student lands from x_t, where the target lands from x_s), the second without gradient.

    Where s is the end already, x_s itself is the aim. Both are evaluated under the same dropout masks where a turn is
    given.
    """
    there = s == end
    with torch.no_grad():
        if turn is not None:
            turn.share_dropout()
        aim = jump(target, x_s, torch.where(there, t, s), end, cond)
        aim = torch.where(expand(there, x_s) > 0, x_s, aim)
    if turn is not None:
        turn.share_dropout()
    return jump(student, x_t, t, end, cond), aim.detach()


class Slopes(Protocol):
    """A further term [B] of both landings, from x_t and from x_s at one end."""

    def __call__(
        self, path: Path, guess: Tensor, aim: Tensor, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor, end: Tensor
    ) -> Tensor: ...


@dataclass(frozen=True)
class Landed:
    """A consistency loss [] with its metrics, and as they were compared the student's landing `guess`, which has a
    gradient, the target's `aim`, and the condition of both."""

    loss: Tensor
    metrics: Metrics
    guess: Tensor
    aim: Tensor
    cond: Condition


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """A denoising term beside (CTM's, sLCT's): `weight |x0_theta(x_t, t) - x0|`, at levels below `below` alone."""

    weight: float
    distance: Distance
    below: float | None = None

    def __call__(self, student: Denoiser, at: At) -> Tensor:
        told = {**at.cond, "s": at.t}
        each = self.distance(student.x0(at.x, at.t, told), at.x0)
        if self.below is not None:
            each = each * (student.path.level(at.t) < self.below).to(each)
        return self.weight * each.mean()


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """The parts of a consistency method.

    guidance: scale given to the student and to the teacher. cfg: whether the teacher is guided by two evaluations, or
    takes the scale as an input or not at all. target: the role that answers at s, "target" (an average) or "student".
    empty_share: of the rows whose condition is emptied on both sides, so that the student keeps one to be guided from.
    per_gap: power of 1 / (level(t) - level(s)) in the weight (iCT: 1). coupling: the noise's own order, None as drawn.
    slopes: compares the lines to both landings beside the landings (Consistency-FM).
    """

    pairs: Pairs
    source: Source
    jump: Jump
    distance: Distance
    weight: Weight
    guidance: UniformScale
    cfg: bool
    target: str
    step: Step = field(default_factory=OdeStep)
    ends: Ends = field(default_factory=AtClean)
    compare: Compare = field(default_factory=AtLanding)
    empty_share: float = 0.0
    per_gap: float = 0.0
    coupling: Coupling | None = None
    aside: Denoising | None = None
    slopes: Slopes | None = None

    players = ("student",)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("student", "teacher", self.target)))

    @property
    def two_times(self) -> bool:
        """Whether the student is told where it lands."""
        return isinstance(self.jump, TwoTimeJump)

    @property
    def whole_batch(self) -> bool:
        """Whether samples look at each other, so that a batch cannot be shared out."""
        return self.coupling is not None

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        found = self.landed(cast, batch, turn)
        return found.loss, found.metrics

    def landed(self, cast: Cast, batch: Batch, turn: Turn) -> Landed:
        """The loss, and what it compared."""
        student, target = cast["student"], cast[self.target]
        path, count = student.path, batch.x0.shape[0]
        t, s = self.pairs.draw(path, count, turn)
        end = self.ends(path, t, s, turn)
        w = self.guidance.draw(count, turn)
        cond = with_scale(self.some_emptied(batch, turn), w)
        teacher = guided(cast["teacher"], batch.uncond, w) if self.cfg else cast["teacher"]
        noise = self.coupled(batch, turn.noise(batch.x0), turn)
        with torch.set_grad_enabled(noise.requires_grad):  # a learned coupling learns through x_t
            x_t = self.source.at(teacher, batch, t, noise, cond)
        here = At(x_t, t, batch.x0, noise, cond, self.source.mixing)
        with torch.no_grad():
            x_s = self.step(teacher, here, s, turn)
        guess, aim = consistency_residual(student, target, self.jump, x_t, t, x_s, s, end, cond, turn)
        lines = None if self.slopes is None else self.slopes(path, guess, aim, x_t, t, x_s, s, end)
        guess = self.compare(target, guess, x_t, t, end, cond)
        with torch.no_grad():
            aim = self.compare(target, aim, x_t, t, end, cond)
        each = self.distance(guess, aim) * (self.weight(path, t) * self.gap_weight(path, t, s)).to(guess)
        each = each if lines is None else each + lines
        loss = each.mean()
        metrics = {"residual": float((guess.detach() - aim).square().mean().sqrt())}
        if self.aside is not None:
            beside = self.aside(student, here)
            loss, metrics = loss + beside, {**metrics, "aside": float(beside.detach())}
        return Landed(loss, metrics, guess, aim, cond)

    def some_emptied(self, batch: Batch, turn: Turn) -> Condition:
        if not self.empty_share:
            return batch.cond
        empty = turn.uniform(0.0, 1.0, batch.x0.shape[0]) < self.empty_share
        return {
            name: torch.where(expand(empty, value) > 0, batch.uncond.get(name, value), value)
            for name, value in batch.cond.items()
        }

    def coupled(self, batch: Batch, noise: Tensor, turn: Turn) -> Tensor:
        """The noise in the order of the coupling."""
        return noise if self.coupling is None else self.coupling(batch.x0, noise, batch.cond, turn)

    def gap_weight(self, path: Path, t: Tensor, s: Tensor) -> Tensor:
        """[B]: (level(t) - level(s))^-per_gap, as in weights 1 / (t - r) on EDM."""
        if not self.per_gap:
            return torch.ones_like(t)
        return (path.level(t).clamp(max=80.0) - path.level(s)).clamp(min=1e-6) ** -self.per_gap

"""How x_s is had from x_t: a teacher's ODE or SDE, the data's own noise, a batch of reference samples.

A step is a callable `(teacher, at, s, turn) -> x_s` without gradient; `at` is what is known at t.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand
from fewstep.models.paths import Path

from .objective import Batch, Turn
from .times import clean
from .transitions import NoisedData, ddim_chain


@dataclass(frozen=True)
class At:
    """A training state: x [B, C, ...] at t [B]; the sample and the noise that it was mixed of, by `mixing`."""

    x: Tensor
    t: Tensor
    x0: Tensor
    noise: Tensor
    cond: Condition
    mixing: NoisedData


class Step(Protocol):
    needs_teacher: bool

    def __call__(self, teacher: Denoiser, at: At, s: Tensor, turn: Turn) -> Tensor: ...


@dataclass(frozen=True)
class OdeStep:
    """`parts` steps of the probability-flow ODE, even in native time, of order 1 (DDIM) or 2 (Heun).

    No second-order step ends at clean data, so there order 2 goes to the path's end first, and on by one of order 1.
    """

    order: int = 1
    parts: int = 1
    needs_teacher = True

    def __call__(self, teacher: Denoiser, at: At, s: Tensor, turn: Turn) -> Tensor:
        if self.order == 1:
            return ddim_chain(teacher, at.x, between(at.t, s, self.parts), at.cond)
        there = s == clean(teacher.path)
        low = torch.where(there, torch.full_like(s, teacher.path.end), s)
        x = heun(teacher, at.x, between(at.t, low, self.parts), at.cond)
        if not bool(there.any()):
            return x
        return torch.where(expand(there, x) > 0, teacher.jump(x, low, s, at.cond), x)


@dataclass(frozen=True)
class SdeStep:
    """DDIM with noise (Song et al. 2020, eq. 16; SCott's solver): eta = 0 is the ODE, 1 ancestral sampling."""

    eta: float
    parts: int = 3
    needs_teacher = True

    def __call__(self, teacher: Denoiser, at: At, s: Tensor, turn: Turn) -> Tensor:
        x = at.x
        for high, low in pairwise(between(at.t, s, self.parts)):
            x0, eps = teacher.both(x, high, at.cond)
            spread = self.eta * posterior_std(teacher.path, high, low)
            rest = (teacher.path.sigma(low) ** 2 - spread**2).clamp(min=0.0).sqrt()
            x = expand(teacher.path.alpha(low), x) * x0 + expand(rest, x) * eps + expand(spread, x) * turn.noise(x)
        return x


@dataclass(frozen=True)
class AdjustedStep:
    """aDDIM (Heek et al. 2024, eq. 8): the noise part is made longer by what the clean estimate lacks.

    `z_s = alpha_s x^ + sqrt(sigma_s^2 + D / |e^|^2 (alpha_s - alpha_t sigma_s / sigma_t)^2 v) e^`, with
    `v = eta |x^ - x0|^2 / D`. The paper's eta is unverified.
    """

    eta: float = 0.1
    needs_teacher = True

    def __call__(self, teacher: Denoiser, at: At, s: Tensor, turn: Turn) -> Tensor:
        x0, eps = teacher.both(at.x, at.t, at.cond)
        path, size = teacher.path, at.x[0].numel()
        missing = self.eta * (x0 - at.x0).flatten(1).square().sum(1).double() / size
        lever = path.alpha(s) - path.alpha(at.t) * path.sigma(s) / path.sigma(at.t)
        gain = size / eps.flatten(1).square().sum(1).double().clamp(min=1e-12) * lever**2 * missing
        return expand(path.alpha(s), x0) * x0 + expand((path.sigma(s) ** 2 + gain).sqrt(), eps) * eps


@dataclass(frozen=True)
class SameNoise:
    """Consistency training (Song et al. 2023): the same sample with the same noise at s. No teacher."""

    needs_teacher = False

    def __call__(self, teacher: Denoiser, at: At, s: Tensor, turn: Turn) -> Tensor:
        return at.mixing.mix(teacher.path, at.x0, s, at.noise)


@dataclass(frozen=True)
class ReferenceBatch:
    """Stable consistency tuning (Wang et al. 2024): the sample is replaced by its mean given x_t over the batch.

    `x0~ = sum_i softmax_i(log N(x_t; alpha_t x^(i), sigma_t^2)) x^(i)` over the rows of the same condition, the own one
    among them; x_s is the DDIM step of that estimate. A batch of one is consistency training.
    """

    needs_teacher = False
    whole_batch = True

    def __call__(self, teacher: Denoiser, at: At, s: Tensor, turn: Turn) -> Tensor:
        mean, eps = reference_estimates(teacher.path, at)
        out: Tensor = teacher.mix(mean, eps, s)
        return out.to(at.x.dtype)


@dataclass(frozen=True)
class ReferenceField:
    """The trajectory through x_t by the batch's own estimates (a `tangent.Field` with no teacher and less noise)."""

    mixing: NoisedData

    whole_batch = True

    def __call__(
        self, teacher: Denoiser, batch: Batch, noise: Tensor, x: Tensor, t: Tensor, cond: Condition
    ) -> tuple[Tensor, Tensor]:
        mean, eps = reference_estimates(teacher.path, At(x, t, batch.x0, noise, cond, self.mixing))
        return mean.to(x.dtype), eps.to(x.dtype)


def reference_estimates(path: Path, at: At) -> tuple[Tensor, Tensor]:
    """(sample, noise) of x_t in the mean over the batch's rows of one condition, float64; the row itself where it is
    alone."""
    alpha, sigma = at.mixing.coefficients(path, at.t)
    flat, data = at.x.flatten(1).double(), at.x0.flatten(1).double()
    gain = (alpha / sigma)[:, None]  # log N(x_t; alpha x^(i), sigma^2) but for what is the same for all i
    logits = gain / sigma[:, None] * (flat @ data.T) - 0.5 * gain**2 * data.square().sum(1)
    logits = logits.masked_fill(~same_condition(at.cond), float("-inf"))
    mean = (torch.softmax(logits, 1) @ data).reshape(at.x0.shape)
    return mean, (at.x.double() - expand(alpha, mean) * mean) / expand(sigma, mean)


def heun(denoiser: Denoiser, x: Tensor, times: tuple[Tensor, ...], cond: Condition) -> Tensor:
    """Karras et al. 2022, algorithm 1, in x / alpha over sigma / alpha; the last step to clean data is of first order.

    So is a step from where no signal is left, since the level there is infinite.
    """
    path = denoiser.path
    for t, s in pairwise(times):
        x0, eps = denoiser.both(x, t, cond)
        first = denoiser.mix(x0, eps, s)
        second = ((path.sigma(s) > 0) & (path.alpha(t) > 1e-4)).to(x.dtype)
        asked = torch.where(path.sigma(s) > 0, s, t)  # no network answers at clean data; that row is not used
        eps_s = denoiser.eps(first, asked, cond)
        reach = path.alpha(s) * (path.level(s) - path.level(t).nan_to_num(posinf=0.0))
        change = expand(0.5 * reach * second.double(), x) * (eps_s - eps)
        x = first + change
    return x


def between(t: Tensor, s: Tensor, parts: int) -> tuple[Tensor, ...]:
    """t, then even steps down to s; s may be clean data only with one part, or is reached from the path's last time."""
    far = torch.isinf(s)
    low = torch.where(far, torch.zeros_like(s), s)
    inner = [t + (low - t) * (k / parts) for k in range(parts)]
    return (*inner, s)


def posterior_std(path: Path, t: Tensor, s: Tensor) -> Tensor:
    """[B]: deviation of x_s given x_t and x0, `sigma_s sqrt(1 - (alpha_t sigma_s / (alpha_s sigma_t))^2)`."""
    ratio = path.alpha(t) * path.sigma(s) / (path.alpha(s) * path.sigma(t))
    return path.sigma(s) * (1.0 - ratio**2).clamp(min=0.0).sqrt()


def same_condition(cond: Condition) -> Tensor:
    """[B, B]: whether two rows have equal conditions, guidance scales aside."""
    first = next(iter(cond.values()))
    same = torch.ones(len(first), len(first), dtype=torch.bool, device=first.device)
    for value in (value for name, value in cond.items() if name != "w"):
        kind = torch.unique(value.flatten(1), dim=0, return_inverse=True)[1]  # a text's rows are too long to compare
        same &= kind[:, None] == kind[None]
    return same


def exchanged(x0: Tensor, noise: Tensor, cond: Condition, turn: Turn, rounds: int = 32) -> Tensor:
    """Noise in another order, nearer to its samples: a step towards minibatch optimal transport (sLCT, VCT).

    Rows of equal condition are paired off at random, and exchange their noise where that shortens the two distances; so
    each condition keeps the very noise it drew. Exact transport would be the limit of many rounds.
    """
    order = torch.arange(len(x0), device=x0.device)
    flat, far = x0.flatten(1).double(), noise.flatten(1).double()
    same = same_condition(cond)
    for _ in range(rounds):
        drawn = torch.randperm(len(x0), generator=turn.rng, device=turn.rng.device).to(x0.device)
        a, b = drawn[: len(x0) // 2 * 2].reshape(2, -1)
        gain = ((flat[a] - flat[b]) * (far[order[b]] - far[order[a]])).sum(1)
        swap = (gain > 0) & same[a, b]
        order[a], order[b] = torch.where(swap, order[b], order[a]), torch.where(swap, order[a], order[b])
    return noise[order]

"""The oracle of annealing reflow: plain training at its start, reflow at its end, and pairs as closed form has them.

For one Gaussian N(m, s^2) the teacher's ODE takes noise z to `m + s z`, so the network that reflow aims at is affine:
`x0 = m + s (x_t - alpha m) / (alpha s + sigma)`.
"""

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product

import torch
from torch import Tensor

from fewstep.models.analytic import exact, gaussian
from fewstep.models.denoiser import Condition, Denoiser, expand
from fewstep.models.paths import VP, Path, RectifiedFlow
from fewstep.models.predictions import estimates

from ..objectives.reflow import AnnealingReflow
from ..parts.objective import Batch, Cast, Turn
from ..parts.pairs import Pairs, draw_pairs
from ..parts.times import UniformScale
from ..parts.u_shape import UShaped
from ..recipes.recipe import Recipe
from .distillation import time_checks
from .parts import source_checks
from .world import Bent, Check, below, between, holds

MEAN, STD = 0.5, 0.8
TOTAL = 1000


def checks(recipe: Recipe, objective: AnnealingReflow) -> Iterator[Check]:
    annealed = objective.anneal.share > 0.0
    if annealed:
        yield from _schedule(objective)
    else:
        z = torch.randn(64, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        kept = [objective.anneal.noise(z, _turn(step)) - z for step in (0, TOTAL)]
        yield below("noise: the pair's own from first to last", torch.cat(kept), 1e-12)
    if isinstance(objective.times, UShaped):
        yield from _u_shape(objective.times)
    for path, prediction in ((VP(), "v"), (RectifiedFlow(), "flow")):
        yield from _ends(path, prediction, objective)
        if annealed:
            yield from _start(path, prediction, objective)
        yield from _end(path, prediction, objective)
        yield from _drawn(path, prediction)
    yield from time_checks(recipe, objective.times)
    yield from source_checks(objective.source)


def _turn(step: int) -> Turn:
    return Turn.of(0, step, TOTAL, "student")


def _schedule(objective: AnnealingReflow) -> Iterator[Check]:
    """beta falls from 1, to 0 where the share is up; the noise stays standard normal, sqrt(1 - beta^2) of it z."""
    anneal = objective.anneal
    betas = [anneal.beta(_turn(step)) for step in range(TOTAL + 1)]
    yield below("schedule: beta at the first step", betas[0] - 1.0, 1e-12)
    yield holds("schedule: beta never rises", all(b <= a for a, b in pairwise(betas)))
    if anneal.kind != "exponential":
        up = round(anneal.share * TOTAL)
        yield below("schedule: beta where the share is up", betas[up], 1e-12)
        yield between("schedule: beta half way there", betas[up // 2], 0.45, 0.55)
    z = torch.randn(4096, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for step in (0, TOTAL // 5, TOTAL):
        beta, mixed = betas[step], anneal.noise(z, _turn(step))
        yield between(f"schedule: variance of the noise, step {step}", mixed.var(), 0.95, 1.05)
        kept = (mixed * z).mean() / z.square().mean() - math.sqrt(1.0 - beta * beta)
        yield between(f"schedule: what is kept of z, step {step}", kept, -0.03, 0.03)


def _pairs(count: int) -> Batch:
    """Exact pairs (z, m + s z)."""
    z = torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return Batch(MEAN + STD * z, {}, {}, z)


def _ends(path: Path, prediction: str, objective: AnnealingReflow) -> Iterator[Check]:
    """The loss is, draw by draw, that of independent noise at the first step and that of the pairs at the last."""
    batch = _pairs(64)
    assert batch.noise is not None
    teacher = exact(gaussian(torch.zeros(2, 3, dtype=torch.float64), 1.0), path, prediction)  # of other data: not zero
    steps = (("first step: independent noise", 0), ("last step: the pairs", TOTAL))
    for label, step in steps if objective.anneal.share else steps[1:]:
        found = objective.loss("student", Cast({"student": teacher}), batch, _turn(step))[0]
        draws = _turn(step)
        t = objective.times.draw(path, 64, draws)
        fresh = draws.noise(batch.x0)
        noise = fresh if step == 0 else batch.noise
        x_t = expand(path.alpha(t), noise) * batch.x0 + expand(path.sigma(t), noise) * noise
        x_t = torch.where(expand((t >= path.start).double(), noise) > 0, noise, x_t)
        gap = objective.distance(teacher.x0(x_t, t, {}), batch.x0)
        wanted = (gap * objective.weight(path, t)).mean()
        yield below(f"{path.kind}: {label}", (found - wanted) / wanted, 1e-6)


def _u_shape(times: UShaped) -> Iterator[Check]:
    """A histogram of the times against `slope (e^(slope t) + e^(slope (1 - t))) / 2 (e^slope - 1)`."""
    path, edges = RectifiedFlow(), torch.linspace(0.0, 1.0, 6, dtype=torch.float64)
    t = times.draw(path, 65536, _turn(0))
    mass = (torch.exp(times.slope * edges) - torch.exp(times.slope * (1.0 - edges))) / (2 * math.expm1(times.slope))
    for k in range(5):
        share = ((t >= edges[k]) & (t < edges[k + 1])).double().mean()
        yield between(f"times: share in fifth {k}", share - (mass[k + 1] - mass[k]), -0.01, 0.01)


class _Fixed:
    """One time; the noise that is given, and fresh noise that is given."""

    def __init__(self, time: float) -> None:
        self.time = time

    def draw(self, path: Path, count: int, turn: Turn) -> Tensor:
        return torch.full((count,), self.time, dtype=torch.float64)


class _Corners(Turn):
    """A turn at the first step whose noise carries the moments exactly."""

    def noise(self, like: Tensor) -> Tensor:
        return torch.tensor(list(product((-1.0, 1.0), repeat=2)), dtype=torch.float64)[:, 1:]


def _start(path: Path, prediction: str, objective: AnnealingReflow) -> Iterator[Check]:
    """At the first step the loss is least at the exact denoiser of the teacher's samples: a plain flow's own zero."""
    data = gaussian(torch.tensor([MEAN], dtype=torch.float64), STD)
    corner = torch.tensor(list(product((-1.0, 1.0), repeat=2)), dtype=torch.float64)[:, :1]
    batch = Batch(MEAN + STD * corner, {}, {}, corner)
    for share in (0.1, 0.5, 0.9):
        fixed = replace(objective, times=_Fixed(share * path.start))
        for bend in (0.0, 0.1):
            student = Bent(exact(data, path, prediction), offset=bend)
            turn = _Corners(0, TOTAL, torch.Generator())
            fixed.loss("student", Cast({"student": student.denoiser()}), batch, turn)[0].backward()
            slopes = max(abs(float(w.grad)) for w in student.parameters() if w.grad is not None)
            if bend:
                yield between(f"{path.kind}: first step, slope beside the exact denoiser, {share}", slopes, 1e-4, 1e9)
            else:
                yield below(f"{path.kind}: first step, slope at the exact denoiser, {share}", slopes, 1e-5)


def straight(path: Path, prediction: str) -> Denoiser:
    """The network that answers with the sample of the pair that x_t lies between."""

    def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        alpha, sigma = expand(path.alpha(t), x), expand(path.sigma(t), x)
        pure = expand((t >= path.start).double(), x)
        alpha, sigma = alpha * (1 - pure), sigma * (1 - pure) + pure
        x0 = MEAN + STD * (x - alpha * MEAN) / (alpha * STD + sigma)
        c = estimates(prediction, path, t)
        return (x0 - expand(c.x0_x, x) * x) / expand(c.x0_f, x)

    return Denoiser(net, path, prediction)


def _end(path: Path, prediction: str, objective: AnnealingReflow) -> Iterator[Check]:
    """At the last step the loss has a zero, which no network has at the first; one step from noise is then exact."""
    batch, student = _pairs(256), straight(path, prediction)
    assert batch.noise is not None
    losses = [objective.loss("student", Cast({"student": student}), batch, _turn(step))[0] for step in (0, TOTAL)]
    if objective.anneal.share:
        yield between(f"{path.kind}: loss of the straight network at the first step", losses[0], 1e-2, 1e9)
    other = replace(batch, noise=batch.noise.flip(0))
    wrong = objective.loss("student", Cast({"student": student}), other, _turn(TOTAL))[0]
    yield between(f"{path.kind}: its loss with another's noise", wrong, 1e-2, 1e9)
    yield below(f"{path.kind}: loss of the straight network at the last step", losses[1], 1e-9)
    t = torch.full((256,), path.start, dtype=torch.float64)
    yield below(f"{path.kind}: one step of it lands on the pairs", student.x0(batch.noise, t, {}) - batch.x0, 1e-6)


class _Drawn:
    """Entries that are all alike: no prompt, samples of one shape."""

    def choose(self, step: int) -> Tensor:
        return torch.zeros(48, 2, dtype=torch.int64)

    def gather(self, chosen: Tensor) -> Batch:
        ctx = torch.zeros(len(chosen), 1, 1, dtype=torch.float64)
        return Batch(torch.zeros(len(chosen), 2, 3, dtype=torch.float64), {"ctx": ctx}, {"ctx": ctx})


def _drawn(path: Path, prediction: str) -> Iterator[Check]:
    """Pairs are (z, m + s z) but for the steps' error, which halves as they double; each has noise of its own."""
    teacher = exact(gaussian(torch.full((2, 3), MEAN, dtype=torch.float64), STD), path, prediction)
    start = path.alpha(path.start)  # noise is taken for the noisiest sample: what the data would have left is absent
    spread = math.hypot(start * STD, path.sigma(path.start))
    errors = []
    for steps in (64, 128, 256):
        plan = Pairs(count=96, steps=steps, guidance=UniformScale(1.0, 1.0))
        with contextlib.redirect_stderr(io.StringIO()):
            found = draw_pairs(teacher, True, plan, _Drawn())
        wanted = MEAN + STD * (found.noise - start * MEAN) / spread
        errors.append(float((found.made - wanted).square().mean().sqrt()))
    for coarse, finer in pairwise(errors):
        yield between(f"{path.kind}: error ratio of the pairs when steps double", coarse / finer, 1.6, 2.5)
    yield below(f"{path.kind}: error of the pairs at 256 steps", errors[-1], 0.03)
    yield holds(f"{path.kind}: as many pairs as asked for", found.made.shape == (96, 2, 3))
    yield holds(f"{path.kind}: noise of its own for each", len(found.noise.flatten(1).unique(dim=0)) == 96)

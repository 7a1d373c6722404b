"""Samplers on exact networks: for one Gaussian every step is affine, so a whole run's law is followed exactly.

`x <- a x + b F(x) + c z` with `F(x) = p x + q` takes N(m, v^2) to N((a + b p) m + b q, (a + b p)^2 v^2 + c^2). Nothing
is drawn, so a wrong coefficient shows at 1e-9.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.models.analytic import Landing, gaussian
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.paths import EDM, VP, Path, RectifiedFlow, TrigFlow
from fewstep.models.spec import SAMPLERS, STOCHASTIC, Guidance, Latent, SamplerSpec
from fewstep.runtime.sampling.samplers import path_start, time_pairs, updates

from ..recipes.recipe import Recipe
from .world import SHIFT, Check, World, below, between, holds, recipe_spec

COUNTS = (1, 2, 3, 4, 8)
MEAN, STD = 0.3, 0.6
CASES: dict[str, tuple[tuple[Path, str], ...]] = {
    "lcm": ((VP(), "v"), (VP(), "eps"), (RectifiedFlow(), "flow")),
    "ddim": ((VP(), "v"), (VP(), "eps"), (EDM(sigma_max=3.0), "x0"), (TrigFlow(), "trig")),
    "euler": ((RectifiedFlow(), "flow"),),
    "euler-ancestral": ((VP(), "v"), (VP(), "eps"), (RectifiedFlow(), "flow")),
    "dpmpp-2m": ((VP(), "v"), (VP(), "eps"), (RectifiedFlow(), "flow")),
    "phased": ((VP(), "eps"),),
    "tcd": ((VP(), "v"), (VP(), "eps")),
    "trig": ((TrigFlow(), "trig"), (TrigFlow(sigma_data=0.5), "trig")),
    "edm": ((EDM(), "x0"),),
}


SOLVERS = ("dpmpp-2m",)
"""Samplers for teachers that remember the step before; of second order."""


@dataclass(frozen=True)
class Law:
    """A Gaussian, what a sampler's state is at one moment: `mean + std xi`, xi that of the start noise."""

    mean: float
    std: float

    def gap(self, other: "Law") -> float:
        return max(abs(self.mean - other.mean), abs(self.std - other.std))


def sampler_checks(sampler: str) -> Iterator[Check]:
    """Everything known of one of the runtime's samplers."""
    for path, prediction in CASES[sampler]:
        label = f"{path.kind} {prediction}"
        spec = plain_spec(sampler, path, prediction)
        for gamma in (0.0, 0.3, 1.0) if sampler == "tcd" else (None,):
            case = spec if gamma is None else replace(spec, gamma=gamma, stochastic=gamma > 0)
            if sampler in SOLVERS:  # it joins the estimates of several times, so no student's jump is exact for it
                yield from _noise_checks(f"{label} gamma={gamma}", case)
                continue
            yield below(f"{label} gamma={gamma}: law of the exact student", law_gap(case, 1.0, takes_w=False), 1e-9)
            yield from _noise_checks(f"{label} gamma={gamma}", case)
        yield holds(f"{label}: a second time is told where the step lands", tells_landings(spec))
        if sampler in ("ddim", "euler", "phased", *SOLVERS):
            yield from _order_checks(label, spec)
        wanted = {"edm": path.start, "trig": getattr(path, "sigma_data", 1.0)}.get(path.kind, 1.0)
        yield below(f"{label}: scale of the start noise", path_start(path) - wanted, 1e-12)
    if sampler == "tcd":
        still = replace(plain_spec("tcd", VP(), "v"), gamma=0.0, stochastic=False)
        ddim = replace(still, sampler="ddim", gamma=None)
        yield holds("gamma=0 is DDIM", all(updates(still, n) == updates(ddim, n) for n in COUNTS))


def sampling_checks(recipe: Recipe) -> Iterator[Check]:
    """The recipe's own sampling contract on the student it aims at, at both ends of its guidance range (TB3)."""
    spec = recipe_spec(recipe, VP(), "v")
    embedded = spec.guidance.mode == "embedded"
    for w in sorted(set(spec.guidance.range)):
        # LCM's c_skip is 1e-7 where it should be none
        yield below(f"sampler: law of the exact student, w={w}", law_gap(spec, w, takes_w=embedded), 1e-5)
    yield from _noise_checks("sampler", spec)
    yield holds("sampler: a second time is told where the step lands", tells_landings(spec))


def law_gap(spec: SamplerSpec, w: float, *, takes_w: bool) -> float:
    """How far the law of the perfect student's samples is from the data's, over all step counts of the spec."""
    stage = _stage(spec)
    mean = MEAN + (w if takes_w else 1.0) * SHIFT
    cond = {"ctx": torch.full((2, 1, 1), SHIFT, dtype=torch.float64), "w": torch.full((2,), w, dtype=torch.float64)}
    gaps = []
    for steps in spec.steps:
        to = landings(spec, steps)
        nets = [stage.jumper(_at(s), takes_w=takes_w) for s in to]
        if spec.sampler == "edm":  # its x0 is the sample at the path's end
            nets = [stage.consistency(takes_w=takes_w)] * steps
        rows = updates(spec, steps)
        law = follow(rows, nets, cond, noised_law(spec.path, mean, rows[0][0]))
        gaps.append(law.gap(noised_law(spec.path, mean, to[-1])))
    return max(gaps)


def follow(rows: Sequence[tuple[float, Any]], nets: Sequence[Denoiser], cond: Condition, law: Law) -> Law:
    """The law after all rows, one network per row; `cond` leads with 2."""
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    kept = Law(0.0, 0.0)
    for (t, update), net in zip(rows, nets, strict=True):
        low, high = net.raw(ends, torch.full((2,), t, dtype=torch.float64), cond)[:, 0].tolist()
        slope = high - low
        gain = update.a + update.b * slope
        mean, std = gain * law.mean + update.b * low + update.d * kept.mean, gain * law.std + update.d * kept.std
        if update.keep is not None:
            of_x, of_f = update.keep
            kept = Law((of_x + of_f * slope) * law.mean + of_f * low, (of_x + of_f * slope) * law.std)
        law = Law(mean, (std**2 + update.c**2) ** 0.5)
    return law


def noised_law(path: Path, mean: float, t: float | None) -> Law:
    """The data at time t; None is clean."""
    alpha, sigma = (1.0, 0.0) if t is None else (path.alpha(t), path.sigma(t))
    return Law(alpha * mean, (alpha**2 * STD**2 + sigma**2) ** 0.5)


def landings(spec: SamplerSpec, steps: int) -> list[float | None]:
    """Where the deterministic part of each step lands: what a student of this sampler must be able to jump to."""
    ends = [to for _, to in time_pairs(spec, steps)]
    if spec.sampler in ("lcm", "trig"):
        return [None] * steps
    if spec.sampler == "edm":
        return [spec.path.end] * steps
    if spec.sampler == "euler-ancestral":
        return [None if to is None else _down(spec.path, t, to) for t, to in time_pairs(spec, steps)]
    if spec.sampler == "tcd":
        return [None if to is None else float(int((1.0 - (spec.gamma or 0.0)) * to)) for to in ends]
    return ends


def tells_landings(spec: SamplerSpec) -> bool:
    """Whether the coefficients of each step go with the time to which a perfect student has to jump."""
    pairs = [pair for n in spec.steps for pair in zip(updates(spec, n), landings(spec, n), strict=True)]
    return all(
        to is update.lands is None or (to is not None and update.lands is not None and abs(to - update.lands) < 1e-9)
        for (_, update), to in pairs
    )


def _down(path: Path, t: float, to: float) -> float:
    """The time of ancestral Euler's `sigma_down`: level(to)^2 / level(t)."""
    return float(path.time(path.level(to) ** 2 * path.alpha(t) / path.sigma(t)))


def plain_spec(sampler: str, path: Path, prediction: str, counts: tuple[int, ...] = COUNTS) -> SamplerSpec:
    """Even grids from the noisiest time."""
    width = path.start - path.end
    grids = {n: tuple(path.start - width * k / n for k in range(n)) for n in counts}
    if path.kind == "vp":
        grids = {n: tuple(float(round(t)) for t in times) for n, times in grids.items()}
    return SamplerSpec(
        prediction=prediction,
        path=path,
        sampler=sampler,
        grids=grids,
        stochastic=sampler in (*STOCHASTIC, "tcd"),
        gamma=0.3 if sampler == "tcd" else None,
        phases=4 if sampler == "phased" else None,
        final_alpha_one=sampler != "tcd",
        guidance=Guidance(mode="none"),
        latent=Latent(channels=1, factor=8, scale=1.0),
        sizes=((8, 8),),
        recipe="none",
    )


def _noise_checks(label: str, spec: SamplerSpec) -> Iterator[Check]:
    """Fresh noise at every step but the last where the sampler is stochastic, and nowhere else."""
    right = True
    for steps in spec.steps:
        *first, last = (update.c for _, update in updates(spec, steps))
        right &= last == 0.0 and all((c > 0.0) == spec.stochastic for c in first)
    yield holds(f"{label}: noise is drawn between steps only, and as declared", right)


def _order_checks(label: str, spec: SamplerSpec) -> Iterator[Check]:
    """On the exact denoiser the error falls in half when the number of steps doubles, to a quarter for a solver.

    A solver's last step is of first order, and the steps before it are long in log(alpha / sigma): it is compared half
    way.
    """
    solver = spec.sampler in SOLVERS
    low, high = (3.2, 4.8) if solver else (1.7, 2.4)
    counts = (64, 128, 256) if spec.path.kind == "vp" else (32, 64, 128)
    fine = plain_spec(spec.sampler, spec.path, spec.prediction, counts)
    stage = _stage(spec)
    cond = {"ctx": torch.full((2, 1, 1), SHIFT, dtype=torch.float64)}
    mean, errors = MEAN + SHIFT, []
    for n in counts:
        rows = updates(fine, n)
        start, end = rows[0][0], rows[n // 2][0] if solver else None
        rows = rows[: n // 2] if solver else rows
        law = follow(rows, [stage.teacher()] * len(rows), cond, noised_law(spec.path, mean, start))
        errors.append(law.gap(noised_law(spec.path, mean, end)))
    for coarse, finer in pairwise(errors):
        yield between(f"{label}: error ratio when steps double", coarse / finer, low, high)


def _at(s: float | None) -> Landing | None:
    """A landing that is the same from everywhere."""
    if s is None:
        return None

    def to(t: Tensor, cond: Condition) -> Tensor:
        return torch.full_like(t, s, dtype=torch.float64)

    return to


def _stage(spec: SamplerSpec) -> World:
    """One element, so that a law is one mean and one deviation."""
    return World(spec.path, spec.prediction, gaussian(torch.tensor([MEAN], dtype=torch.float64), STD))


def all_sampler_checks() -> dict[str, list[Check]]:
    """Errors: `KeyError` for a sampler that the spec knows and the suite does not."""
    return {name: list(sampler_checks(name)) for name in SAMPLERS}
